"""Where is every knob? TOML sections as validated models, merged from file and command line. Imports no torch.

Sections and names are those of torchtitan in early 2025 where they exist; `compat.py` holds its other spellings.
A value on the command line (`--section.key value`) wins over the file. Unknown sections, keys, types and choices
are refused with the nearest valid name.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from reshard import compat
from reshard.errors import ConfigError, listed, nearest
from reshard.paths import HINT, is_address

Dtype = Literal["float32", "bfloat16", "float64"]
ExportDtype = Literal["float16", "bfloat16", "float32", "float64"]


class Section(BaseModel):
    """One `[section]`: no unknown keys, no silent conversions, a docstring under each key."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, validate_default=True, frozen=True)


class Job(Section):
    """The run as a whole."""

    dump_folder: str = "./outputs"
    """Folder for everything that a run writes."""
    description: str = ""
    """Free text, kept with every checkpoint."""
    print_args: bool = False
    """Log the resolved config at the start."""


class Model(Section):
    """Which Llama. A number that is set here replaces the flavor's."""

    name: str = "llama3"
    """Release: llama3, llama3_1, llama3_2 or llama3_3; it decides RoPE scaling (llama3 takes each flavor as first released)."""
    flavor: str = "debugmodel"
    """Size: debugmodel, 1B, 3B, 8B, 70B or 405B."""
    tokenizer_path: str = "bytes"
    """`bytes` (one token a byte), `bpe` (trained on the data), a Hugging Face tokenizer.json or Meta's tokenizer.model."""
    dim: int | None = Field(None, gt=0)
    """Width of the residual stream."""
    n_layers: int | None = Field(None, gt=0)
    """Transformer blocks."""
    n_heads: int | None = Field(None, gt=0)
    """Query heads."""
    n_kv_heads: int | None = Field(None, gt=0)
    """Key and value heads; must divide n_heads."""
    ffn_dim: int | None = Field(None, gt=0)
    """Hidden size of the feed-forward."""
    vocab_size: int | None = Field(None, gt=0)
    """Rows of the embedding; must hold every token of the tokenizer."""
    rope_theta: float | None = Field(None, gt=0)
    """Base of the rotary frequencies."""
    rope_scaling_factor: float | None = Field(None, ge=0)
    """Llama 3.1's RoPE scaling; 0 switches it off."""
    norm_eps: float | None = Field(None, gt=0)
    """Epsilon of RMSNorm."""
    tied_embeddings: bool | None = None
    """Output projection and embedding are one tensor."""


class Optimizer(Section):
    """AdamW and its constants."""

    name: Literal["AdamW", "Adam"] = "AdamW"
    """Adam applies weight decay to the gradient, AdamW to the weight."""
    lr: float = Field(8e-4, ge=0)
    """Peak learning rate."""
    beta1: float = Field(0.9, ge=0, lt=1)
    """Decay of the first moment."""
    beta2: float = Field(0.95, ge=0, lt=1)
    """Decay of the second moment."""
    eps: float = Field(1e-8, ge=0)
    """Added to the root of the second moment."""
    weight_decay: float = Field(0.1, ge=0)
    """Per step and unit of learning rate."""
    decay_norms_and_embeddings: bool = True
    """false: norms and embeddings get no weight decay."""
    implementation: Literal["auto", "for-loop", "foreach", "fused"] = "auto"
    """Which of torch's kernels; auto takes fused."""


class LRScheduler(Section):
    """Learning rate after the warm-up: a pure function of the step, so nothing of it is saved."""

    decay_type: Literal["linear", "cosine", "sqrt", "constant"] = "linear"
    """Shape of the decay from the peak to lr_min."""
    decay_ratio: float | None = Field(None, gt=0, le=1)
    """Set: stay at the peak and decay over this last part of decay_steps (warm-up-stable-decay)."""
    decay_steps: int | None = Field(None, gt=0)
    """Step at which lr_min is reached; default training.steps. Set it to lengthen a run without bending its curve."""
    lr_min: float = Field(0.0, ge=0, le=1)
    """Lowest learning rate, as a part of optimizer.lr."""


class Training(Section):
    """Steps, batches, data and precision."""

    batch_size: int = Field(8, gt=0)
    """Sequences per data-parallel rank and micro-step."""
    global_batch_size: int = Field(-1, ge=-1)
    """Sequences per optimizer step; -1: batch_size x data-parallel ranks at a fresh start, the checkpoint's at a resume."""
    seq_len: int = Field(2048, gt=0)
    """Tokens per sequence."""
    warmup_steps: int = Field(200, ge=0)
    """Steps of linear warm-up."""
    max_norm: float = Field(1.0, ge=0)
    """Gradients are scaled down to this global norm; 0 does not clip."""
    steps: int = Field(10000, ge=0)
    """The last optimizer step of the run."""
    stop_after: int = Field(0, ge=0)
    """End early after this step, with a full checkpoint; 0 runs to `steps`."""
    dataset: str = "stdlib"
    """`stdlib` (the Python library's source), a text, .jsonl or .parquet file, a folder, or a Hugging Face dataset's name."""
    dataset_path: str | None = None
    """Where the named dataset lies, if not where its name says."""
    dataset_split: str = "train"
    """Split of a Hugging Face dataset."""
    text_column: str = "text"
    """Field of JSONL, Parquet and Hugging Face records that holds the text."""
    cache_folder: str | None = None
    """Where tokenised text is kept; default <dump_folder>/tokens."""
    dtype: Dtype = "float32"
    """Of parameters and optimizer state; float64 is for proofs."""
    mixed_precision_param: Literal["auto", "bfloat16", "float32"] = "auto"
    """Of forward and backward; auto takes bfloat16 on CUDA where dtype is float32, else dtype itself."""
    mixed_precision_reduce: Literal["float32"] = "float32"
    """Of gradient reductions under mixed precision."""
    compile: bool = False
    """torch.compile each block."""
    rng_seed: int = Field(0, ge=0)
    """Decides the initial weights and the order of the data."""
    deterministic: bool = False
    """Refuse torch kernels that are not deterministic."""
    gc_freq: int = Field(50, gt=0)
    """Python's garbage collector runs every this many steps, on all ranks at once."""


class Validation(Section):
    """Loss on text that is never trained on."""

    freq: int = Field(0, ge=0)
    """Every this many steps, and after the last; 0: never."""
    fraction: float = Field(0.02, ge=0, lt=1)
    """Part of the documents that is held out."""
    sequences: int = Field(64, gt=0)
    """Sequences per validation, the same each time."""


class Parallelism(Section):
    """Five degrees; their product is the number of ranks."""

    data_parallel_replicate_degree: int = Field(1, gt=0)
    """Copies of the model (HSDP where the shard degree is above 1)."""
    data_parallel_shard_degree: int = Field(-1, ge=-1)
    """Ranks that share one copy (FSDP2); -1: all that the others leave."""
    fsdp_reshard_after_forward: Literal["default", "always", "never"] = "default"
    """Free the gathered weights after forward; default: always."""
    tensor_parallel_degree: int = Field(1, gt=0)
    """Ranks that share each matrix, with sequence parallel."""
    disable_loss_parallel: bool = False
    """Gather the logits instead of computing the loss on vocabulary shards."""
    enable_async_tensor_parallel: bool = False
    """Overlap tensor-parallel communication (CUDA with compile)."""
    pipeline_parallel_degree: int = Field(1, gt=0)
    """Ranks in a pipeline."""
    pipeline_parallel_schedule: Literal["GPipe", "1F1B", "Interleaved1F1B", "ZBVZeroBubble"] = "1F1B"
    """Order of forwards and backwards; the last two put several stages on each rank."""
    pipeline_parallel_split_points: list[str] = []
    """First module of each stage but the first, e.g. `layers.4,layers.8`; default: split by cost."""
    pipeline_parallel_microbatches: int | None = Field(None, gt=0)
    """Micro-batches per step; default: as many as the schedule needs, of at most batch_size sequences."""
    pipeline_parallel_stages_per_rank: int = Field(2, gt=0)
    """Of Interleaved1F1B."""
    context_parallel_degree: int = Field(1, gt=0)
    """Ranks that share each sequence."""
    context_parallel_method: Literal["auto", "gather", "ring"] = "auto"
    """Gather all keys and values, or pass them round one rank at a time; auto takes ring for half precision on CUDA."""


class Checkpoint(Section):
    """What is saved when, and what is loaded."""

    enable_checkpoint: bool = False
    """Save and load checkpoints."""
    folder: str = "checkpoint"
    """Under dump_folder."""
    interval_type: Literal["steps", "seconds"] = "steps"
    """Unit of `interval`."""
    interval: int = Field(500, gt=0)
    """A full checkpoint every so many steps or seconds."""
    load_step: int = Field(-1, ge=-1)
    """Resume from this step; -1: the newest."""
    model_weights_only: bool = False
    """The last step holds weights only, in export_dtype; the others stay full."""
    export_dtype: ExportDtype = "float32"
    """Precision of the last, weights-only step."""
    export: list[Literal["hf", "torchtune", "meta", "torch", "gguf"]] = []
    """Formats to write the last step in, under <dump_folder>/exports/step-N."""
    create_seed_checkpoint: bool = False
    """Make step-0 on one CPU and exit, as `reshard seed`."""
    keep_latest_k: int = Field(0, ge=0)
    """Committed checkpoints to keep; 0 keeps all."""
    keep_every_n: int = Field(0, ge=0)
    """Steps that this divides are never deleted by keep_latest_k; 0: none."""
    initial_load_path: str | None = None
    """Weights to start from at step 0, where the folder holds no checkpoint."""
    async_mode: Literal["disabled", "async", "async_with_pinned_mem"] = "disabled"
    """Write in the background."""
    async_write_limit_mb_s: float = Field(0, ge=0)
    """Megabytes per second and rank at most that a background save writes; 0: as fast as it can."""
    exclude_from_loading: list[Literal["optimizer", "data"]] = []
    """Parts of a full checkpoint to start afresh."""
    allow_dtype_change: bool = False
    """Resume a checkpoint of another training.dtype, casting it."""


class ActivationCheckpoint(Section):
    """Recompute in backward what forward does not keep."""

    mode: Literal["none", "selective", "full"] = "selective"
    """Which blocks."""
    selective_ac_option: str = "2"
    """`2`: every second block whole; `op`: keep matrix products and attention, recompute the rest."""


class Metrics(Section):
    """What is reported how often."""

    log_freq: int = Field(10, gt=0)
    """Console line every so many steps; metrics.jsonl has them all."""
    enable_tensorboard: bool = False
    """Also write TensorBoard events (needs the `tensorboard` extra)."""
    save_tb_folder: str = "tb"
    """Under dump_folder."""
    disable_color_printing: bool = False
    """Plain console lines."""


class Profiling(Section):
    """torch.profiler traces."""

    enable_profiling: bool = False
    """Write a Chrome trace every profile_freq steps."""
    save_traces_folder: str = "profile_trace"
    """Under dump_folder."""
    profile_freq: int = Field(10, gt=0)
    """Steps between traces."""


class Comm(Section):
    """Process groups."""

    init_timeout_seconds: int = Field(300, gt=0)
    """Until all ranks have met."""
    train_timeout_seconds: int = Field(600, gt=0)
    """Until a collective of the training is given up."""


class Config(Section):
    """One run, completely."""

    job: Job = Job()
    model: Model = Model()
    optimizer: Optimizer = Optimizer()
    lr_scheduler: LRScheduler = LRScheduler()
    training: Training = Training()
    validation: Validation = Validation()
    parallelism: Parallelism = Parallelism()
    checkpoint: Checkpoint = Checkpoint()
    activation_checkpoint: ActivationCheckpoint = ActivationCheckpoint()
    metrics: Metrics = Metrics()
    profiling: Profiling = Profiling()
    comm: Comm = Comm()

    @property
    def checkpoint_folder(self) -> Path:
        """Folder of the step-N directories."""
        return Path(self.job.dump_folder) / self.checkpoint.folder

    @property
    def token_folder(self) -> Path:
        """Folder of the token caches."""
        return Path(self.training.cache_folder or Path(self.job.dump_folder) / "tokens")

    def with_values(self, **sections: dict[str, Any]) -> Config:
        """A copy with some keys replaced, e.g. with_values(training={"steps": 3}). Validated again."""
        data = self.model_dump()
        for section, values in sections.items():
            data[section] |= values
        changed = _validated(data)
        _refuse_addresses(changed, sections)
        return changed


def sections() -> dict[str, type[Section]]:
    """Section name -> its class, in the order of the file."""
    return {name: field.annotation for name, field in Config.model_fields.items()}  # type: ignore[misc]


def load_config(path: str | Path | None, arguments: Sequence[str] = ()) -> tuple[Config, list[str]]:
    """Read a TOML file, put the command line over it, validate. Returns the config and warnings to log.

    arguments: `--section.key value` as typed. Raises ConfigError.
    """
    arguments, path = _config_file_argument(list(arguments), path)
    warnings: list[str] = []
    from_file, from_line = _Values(str(path), warnings), _Values("the command line", warnings)
    if path is not None:
        for section, key, value in _file_values(Path(path)):
            from_file.put(section, key, value)
    for section, key, text in _argument_values(arguments):
        from_line.put(section, key, text, from_text=True)
    data = from_file.data
    for section, values in from_line.data.items():
        data.setdefault(section, {}).update(values)
    config = _validated(data)
    _refuse_addresses(config, data)
    return config, list(dict.fromkeys(warnings))


def check_checkpointing(config: Config) -> None:
    """Raise ConfigError where something is asked of checkpoints while enable_checkpoint is off: it would not happen.

    Settings that only say how (folder, interval, dtype, retention) ask for nothing, and are for the day it is on.
    """
    asked = config.checkpoint
    if asked.enable_checkpoint:
        return
    requests = {
        "initial_load_path": asked.initial_load_path is not None,
        "load_step": asked.load_step >= 0,
        "exclude_from_loading": bool(asked.exclude_from_loading),
        "model_weights_only": asked.model_weights_only,
        "export": bool(asked.export),
    }
    keys = [f"checkpoint.{key}" for key, is_asked in requests.items() if is_asked]
    if keys:
        raise ConfigError(
            f"{listed(keys)} {'is' if len(keys) == 1 else 'are'} set, but checkpoint.enable_checkpoint is false: "
            "nothing would be loaded or saved",
            key="checkpoint.enable_checkpoint",
            hint=f"--checkpoint.enable_checkpoint, or leave {listed(keys)} out",
        )


def config_to_toml(config: Config) -> str:
    """The resolved config as TOML; keys that are not set are left out."""
    return tomli_w.dumps(config.model_dump(exclude_none=True))


def _config_file_argument(arguments: list[str], path: str | Path | None) -> tuple[list[str], str | Path | None]:
    """Take `--job.config_file X` (the specification's way to name the file) out of the arguments."""
    rest: list[str] = []
    while arguments:
        word = arguments.pop(0)
        name, equals, value = word.partition("=")
        if name.replace("-", "_") != "__job.config_file":
            rest.append(word)
            continue
        if not equals:
            if not arguments:
                raise ConfigError("--job.config_file needs a path", key="job.config_file")
            value = arguments.pop(0)
        if path is not None and Path(path) != Path(value):
            raise ConfigError(f"two config files: `{path}` and --job.config_file `{value}`", key="job.config_file")
        path = value
    return rest, path


def _file_values(path: Path) -> Iterator[tuple[str, str, Any]]:
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            f"config file `{path}` does not exist", hint="`ls train_configs` shows the ones that come with reshard"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"config file `{path}` cannot be read: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"config file `{path}` is not TOML: {error}") from None
    for section, values in data.items():
        if not isinstance(values, dict):
            raise ConfigError(
                f"config key `{section}` in `{path}` stands outside of a section",
                key=section,
                hint="every key belongs under a [section]",
            )
        for key, value in values.items():
            yield section, key, value


def _argument_values(arguments: list[str]) -> Iterator[tuple[str, str, str | None]]:
    """(section, key, value as typed); None where an option stands alone."""
    while arguments:
        word = arguments.pop(0)
        if not word.startswith("--") or "." not in word.partition("=")[0]:
            hint = "config keys are given as --section.key value, e.g. --training.steps 100"
            if word.endswith(".toml"):
                hint = f"one config file, and before the keys: {word} --training.steps 100"
            raise ConfigError(f"`{word}` is not an option", hint=hint)
        name, equals, text = word[2:].partition("=")
        value: str | None = text
        if not equals:
            # `--x false` takes the next word. Negative numbers are values, options are not.
            value = arguments.pop(0) if arguments and not arguments[0].startswith("--") else None
        section, _, key = name.partition(".")
        yield section.replace("-", "_"), key.replace("-", "_"), value


class _Values:
    """The keys that one place (a file, the command line) sets, under our own names."""

    def __init__(self, where: str, warnings: list[str]) -> None:
        self.where, self.warnings = where, warnings
        self.data: dict[str, dict[str, Any]] = {}
        self._spelling: dict[str, str] = {}

    def put(self, section: str, key: str, value: Any, *, from_text: bool = False) -> None:
        """Set one key, by its own name, as an alias, or as one of torchtitan's that we accept or refuse."""
        typed = f"{section}.{key}"
        name = compat.ALIASES.get(typed, typed)
        section, _, key = name.partition(".")
        if not _known(section, key):
            warning = compat.foreign_key(section, key, True if value is None else value)
            if warning is None:
                raise _unknown(section, key, self.where)
            self.warnings.append(warning)
            return
        if isinstance(value, str):
            value = compat.VALUES.get(name, {}).get(value, value)
        if from_text:
            value = _parsed(section, key, value, typed)
        values = self.data.setdefault(section, {})
        other = self._spelling.setdefault(name, typed)
        if other != typed and values[key] != value:
            raise ConfigError(
                f"`{other}` and `{typed}` are the same key, but {self.where} gives {values[key]!r} and {value!r}",
                key=name,
                hint="keep one of the two spellings",
            )
        values[key] = value  # the same spelling again: the later one wins, as on any command line


def _known(section: str, key: str) -> bool:
    cls = sections().get(section)
    return cls is not None and key in cls.model_fields


def _unknown(section: str, key: str, where: str) -> ConfigError:
    known = sections()
    if section not in known:
        close = nearest(section, [*known, *compat.SECTIONS])
        message = f"config section `{section}` in {where} is not known"
        return ConfigError(
            message, key=section, hint=f"did you mean `{close}`?" if close else f"sections: {', '.join(known)}"
        )
    # The same key in another section is likelier meant than another key in this one only where nothing here is close.
    everywhere = [*compat.ALIASES, *(f"{s}.{k}" for s, cls in known.items() for k in cls.model_fields)]
    by_key = {name.partition(".")[2]: name for name in everywhere}  # ours come last and win
    close = nearest(key, known[section].model_fields)
    close = f"{section}.{close}" if close else by_key.get(nearest(key, by_key) or "")
    hint = (
        f"did you mean `{close}`?"
        if close
        else f"`reshard config --keys` lists them all ({section}: {', '.join(known[section].model_fields)})"
    )
    return ConfigError(f"config key `{section}.{key}` in {where} is not known", key=f"{section}.{key}", hint=hint)


def _parsed(section: str, key: str, text: str | None, typed: str) -> Any:
    """A command-line word as the key's own type. `a,b` and `["a", "b"]` are lists; a boolean alone is true."""
    annotation = sections()[section].model_fields[key].annotation
    assert annotation is not None
    if text is None:
        if annotation is bool or bool in getattr(annotation, "__args__", ()):
            return True
        raise ConfigError(f"`--{typed}` needs a value", key=f"{section}.{key}", hint=f"--{typed} VALUE")
    try:
        if "list" in str(annotation):
            if text.strip().startswith("["):
                return tomllib.loads(f"x = {text}")["x"]
            return [word.strip() for word in text.split(",") if word.strip()]
        if text.lower() in ("none", "null") and type(None) in getattr(annotation, "__args__", ()):
            return None
        return TypeAdapter(annotation).validate_strings(text)
    except (ValidationError, tomllib.TOMLDecodeError) as error:
        reason = error.errors()[0] if isinstance(error, ValidationError) else {"msg": str(error), "type": "list"}
        raise _bad_value(section, key, text, reason, typed) from None


def _bad_value(section: str, key: str, value: Any, reason: dict[str, Any] | Any, typed: str = "") -> ConfigError:
    expected = (
        reason["msg"].removeprefix("Input should be ").replace("a valid ", "a ").replace("a integer", "an integer")
    )
    expected = expected.partition(", unable to")[0]
    choices = reason.get("ctx", {}).get("expected")
    close = nearest(str(value), [c.strip(" '") for c in choices.replace(" or ", ", ").split(",")]) if choices else None
    return ConfigError(
        f"config key `{typed or f'{section}.{key}'}`: expected {expected}, got {value!r}",
        key=f"{section}.{key}",
        hint=f"did you mean `{close}`?" if close else "`reshard config --keys` explains every key",
    )


def _validated(data: dict[str, Any]) -> Config:
    try:
        return Config.model_validate(data, strict=True)
    except ValidationError as error:
        reason = error.errors()[0]
        section, key = str(reason["loc"][0]), str(reason["loc"][1]) if len(reason["loc"]) > 1 else ""
        raise _bad_value(section, key, reason["input"], reason) from None


def _refuse_addresses(config: Config, given: Iterable[str]) -> None:
    """Raise ConfigError for a checkpoint's path that is a URL. given: sections; what is stored of another run may be."""
    for section, key in (("job", "dump_folder"), ("checkpoint", "folder"), ("checkpoint", "initial_load_path")):
        value = getattr(getattr(config, section), key)
        if section in given and value is not None and is_address(value):
            raise ConfigError(
                f"config key `{section}.{key}`: expected a path on a file system of this machine, got {value!r}",
                key=f"{section}.{key}",
                hint=HINT,
            )
