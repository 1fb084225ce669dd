"""Does a config say what was typed, and is everything else refused before anything starts?"""

from __future__ import annotations

import textwrap
import tomllib
from pathlib import Path
from typing import Literal, get_args, get_origin

import pytest

from reshard import compat
from reshard.commands.check import check
from reshard.config import Config, Section, config_to_toml, load_config, sections
from reshard.errors import ConfigError

PROJECT = Path(__file__).resolve().parents[2]


def toml(tmp_path: Path, content: str) -> Path:
    path = tmp_path / "config.toml"
    path.write_text(textwrap.dedent(content))
    return path


def typed(*words: str) -> Config:
    return load_config(None, words)[0]


def refusal(*words: str, path: Path | None = None) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        load_config(path, words)
    return caught.value


# -- precedence ----------------------------------------------------------------------------------------------------


def test_the_line_wins_over_the_file_and_the_file_over_the_default(tmp_path: Path) -> None:
    path = toml(tmp_path, "[training]\nsteps = 7\nseq_len = 64\n")
    config, warnings = load_config(path, ["--training.steps", "9"])
    assert (config.training.steps, config.training.seq_len, config.training.batch_size) == (9, 64, 8)
    assert warnings == []


def test_of_the_same_option_twice_the_later_counts() -> None:
    assert typed("--training.steps", "3", "--training.steps=4").training.steps == 4


def test_the_line_wins_over_the_file_also_under_another_spelling(tmp_path: Path) -> None:
    path = toml(tmp_path, "[parallelism]\ntensor_parallel_degree = 2\n")
    assert load_config(path, ["--training.tensor_parallel_degree", "4"])[0].parallelism.tensor_parallel_degree == 4


@pytest.mark.parametrize("option", [["--job.config_file", "{}"], ["--job.config_file={}"], ["--job.config-file", "{}"]])
def test_config_file_is_an_option_too(tmp_path: Path, option: list[str]) -> None:
    path = toml(tmp_path, "[training]\nsteps = 7\n")
    words = [word.format(path) for word in option]
    assert load_config(None, [*words, "--training.seq_len", "16"])[0].training.steps == 7
    assert load_config(path, words)[0].training.steps == 7  # the same file twice is no contradiction


def test_two_config_files_are_refused(tmp_path: Path) -> None:
    error = refusal("--job.config_file", "other.toml", path=toml(tmp_path, ""))
    assert "two config files" in error.message
    assert "other.toml" in error.message


# -- types ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "value"),
    [
        (["--training.compile"], True),
        (["--training.compile=true"], True),
        (["--training.compile", "true"], True),
        (["--training.compile", "True"], True),
        (["--training.compile=false"], False),
        (["--training.compile", "false"], False),
        (["--training.compile", "--training.steps", "3"], True),
        (["--training.compile", "--training.compile=false"], False),
    ],
)
def test_booleans(tmp_path: Path, words: list[str], value: bool) -> None:
    path = toml(tmp_path, f"[training]\ncompile = {str(not value).lower()}\n")
    assert load_config(path, words)[0].training.compile is value


def test_dashes_in_names_are_underscores() -> None:
    assert typed("--training.seq-len", "64").training.seq_len == 64


def test_negative_numbers_are_values() -> None:
    config = typed("--parallelism.data_parallel_shard_degree", "-1", "--checkpoint.load_step=-1")
    assert (config.parallelism.data_parallel_shard_degree, config.checkpoint.load_step) == (-1, -1)


@pytest.mark.parametrize("text", ["optimizer,data", '["optimizer", "data"]'])
def test_lists(text: str) -> None:
    assert typed("--checkpoint.exclude_from_loading", text).checkpoint.exclude_from_loading == ["optimizer", "data"]


def test_an_option_can_be_unset(tmp_path: Path) -> None:
    path = toml(tmp_path, "[lr_scheduler]\ndecay_ratio = 0.2\n")
    assert load_config(path, ["--lr_scheduler.decay_ratio", "none"])[0].lr_scheduler.decay_ratio is None


def test_whole_numbers_are_fine_for_fractions(tmp_path: Path) -> None:
    assert load_config(toml(tmp_path, "[training]\nmax_norm = 1\n"))[0].training.max_norm == 1.0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--training.steps", "many"], "config key `training.steps`: expected an integer, got 'many'"),
        (["--training.steps", "1.5"], "config key `training.steps`: expected an integer, got '1.5'"),
        (["--training.compile=perhaps"], "config key `training.compile`: expected a boolean, got 'perhaps'"),
        (["--optimizer.lr", "fast"], "config key `optimizer.lr`: expected a number, got 'fast'"),
        (["--training.seq_len", "0"], "config key `training.seq_len`: expected greater than 0, got 0"),
        (["--optimizer.beta1", "1"], "config key `optimizer.beta1`: expected less than 1, got 1.0"),
        (["--training.seed", "x"], "config key `training.seed`: expected an integer, got 'x'"),
        (["--training.steps"], "`--training.steps` needs a value"),
        (["--training.steps", "--training.compile"], "`--training.steps` needs a value"),
    ],
)
def test_wrong_types_on_the_line(words: list[str], message: str) -> None:
    assert refusal(*words).message == message


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('steps = "7"', "config key `training.steps`: expected an integer, got '7'"),
        ("steps = true", "config key `training.steps`: expected an integer, got True"),
        ("compile = 1", "config key `training.compile`: expected a boolean, got 1"),
        ("dataset = 3", "config key `training.dataset`: expected a string, got 3"),
    ],
)
def test_wrong_types_in_the_file(tmp_path: Path, line: str, message: str) -> None:
    assert refusal(path=toml(tmp_path, f"[training]\n{line}\n")).message == message


# -- names and choices ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message", "hint"),
    [
        (["--training.step", "3"], "config key `training.step` in the command line is not known", "`training.steps`"),
        (["--training.lr", "3"], "config key `training.lr` in the command line is not known", "`optimizer.lr`"),
        (["--training.tensor_paralel_degree", "2"], "not known", "`parallelism.tensor_parallel_degree`"),
        (["--checkpoint.foldr", "x"], "config key `checkpoint.foldr` in the command line is not known", "`checkpoint.folder`"),
        (["--trainning.steps", "3"], "config section `trainning` in the command line is not known", "`training`"),
        (["--checkpoint.interval_type", "step"], "`checkpoint.interval_type`: expected 'steps' or 'seconds'", "`steps`"),
        (["--checkpoint.export_dtype", "bf16"], "`checkpoint.export_dtype`: expected 'float16', 'bfloat16'", "`bfloat16`"),
        (["--training.dtype", "float16"], "expected 'float32', 'bfloat16' or 'float64', got 'float16'", "`bfloat16`"),
        (["--optimizer.name", "adamw"], "config key `optimizer.name`: expected 'AdamW' or 'Adam', got 'adamw'", "`AdamW`"),
    ],
)  # fmt: skip
def test_the_nearest_name_is_offered(words: list[str], message: str, hint: str) -> None:
    error = refusal(*words)
    assert message in error.message
    assert error.hint == f"did you mean {hint}?"


def test_a_name_that_nothing_is_near_to() -> None:
    error = refusal("--zzz.q", "3")
    assert error.hint is not None
    assert all(name in error.hint for name in sections())
    error = refusal("--metrics.qqqqqq", "3")
    assert error.hint is not None
    assert "reshard config --keys" in error.hint
    assert "log_freq" in error.hint


def test_unknown_names_in_the_file_are_refused(tmp_path: Path) -> None:
    path = toml(tmp_path, "[training]\nstepz = 3\n")
    error = refusal(path=path)
    assert error.message == f"config key `training.stepz` in {path} is not known"
    assert error.hint == "did you mean `training.steps`?"


def test_a_key_outside_of_a_section_is_refused(tmp_path: Path) -> None:
    assert "stands outside of a section" in refusal(path=toml(tmp_path, "steps = 3\n")).message


@pytest.mark.parametrize("word", ["steps", "-x", "--steps", "3"])
def test_what_is_no_option_is_refused(word: str) -> None:
    assert refusal(word, "3").message == f"`{word}` is not an option"


def test_a_config_file_after_the_keys() -> None:
    error = refusal("--training.steps", "3", "x.toml")
    assert error.hint is not None
    assert "before the keys" in error.hint


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    assert "does not exist" in refusal(path=tmp_path / "none.toml").message
    assert "cannot be read" in refusal(path=tmp_path).message
    assert "is not TOML" in refusal(path=toml(tmp_path, "[training\n")).message
    (tmp_path / "latin.toml").write_bytes(b'[job]\ndescription = "caf\xe9"\n')
    assert "cannot be read" in refusal(path=tmp_path / "latin.toml").message


# -- other spellings --------------------------------------------------------------------------------------------------


def other_value(section: str, key: str) -> str:
    """A valid value of a key that is not its default, as typed."""
    field = sections()[section].model_fields[key]
    if get_origin(field.annotation) is Literal:
        return next(str(choice) for choice in get_args(field.annotation) if choice != field.default)
    if field.annotation is bool:
        return str(not field.default).lower()
    return {"lr_min": "0.25", "decay_ratio": "0.5", "pipeline_parallel_split_points": "layers.1"}.get(key, "3")


def as_toml(section: str, key: str, value: str) -> str:
    """The same value as a TOML file has it."""
    annotation = str(sections()[section].model_fields[key].annotation)
    if "list" in annotation:
        return f'["{value}"]'
    return f'"{value}"' if "Literal" in annotation or "str" in annotation else value


@pytest.mark.parametrize("old", compat.ALIASES)
def test_every_alias_works_on_the_line_and_in_the_file(tmp_path: Path, old: str) -> None:
    section, _, key = compat.ALIASES[old].partition(".")
    value = other_value(section, key)
    on_the_line, warnings = load_config(None, [f"--{old}", value])
    old_section, _, old_key = old.partition(".")
    in_the_file, _ = load_config(toml(tmp_path, f"[{old_section}]\n{old_key} = {as_toml(section, key, value)}\n"))
    assert on_the_line == in_the_file != Config()
    assert value.lower() in str(getattr(getattr(on_the_line, section), key)).lower()
    assert warnings == []


@pytest.mark.parametrize(
    ("key", "old", "new"), [(key, old, new) for key, table in compat.VALUES.items() for old, new in table.items()]
)
def test_other_spellings_of_values(tmp_path: Path, key: str, old: str, new: str) -> None:
    section, _, name = key.partition(".")
    for config, _ in (
        load_config(None, [f"--{key}", old]),
        load_config(toml(tmp_path, f'[{section}]\n{name} = "{old}"\n')),
    ):
        assert getattr(getattr(config, section), name) == new


@pytest.mark.parametrize("old", compat.ALIASES)
def test_an_alias_means_a_key_that_exists_and_is_none_itself(old: str) -> None:
    section, _, key = compat.ALIASES[old].partition(".")
    assert key in sections()[section].model_fields
    old_section, _, old_key = old.partition(".")
    assert old_section not in sections() or old_key not in sections()[old_section].model_fields


def test_alias_and_name_with_different_values_are_refused(tmp_path: Path) -> None:
    error = refusal("--training.tensor_parallel_degree", "2", "--parallelism.tensor_parallel_degree", "4")
    assert error.message == (
        "`training.tensor_parallel_degree` and `parallelism.tensor_parallel_degree` are the same key, "
        "but the command line gives 2 and 4"
    )
    assert error.hint == "keep one of the two spellings"
    path = toml(tmp_path, "[training]\nseed = 1\nrng_seed = 2\n")
    assert "`training.seed` and `training.rng_seed`" in refusal(path=path).message


def test_alias_and_name_with_the_same_value_are_fine(tmp_path: Path) -> None:
    assert typed("--training.seed", "5", "--training.rng_seed", "5").training.rng_seed == 5
    assert load_config(toml(tmp_path, "[training]\nseed = 1\nrng_seed = 1\n"))[0].training.rng_seed == 1


def test_the_options_of_the_specification() -> None:
    """The seed command of the guide, word for word after the script's name."""
    words = (
        "--checkpoint.enable_checkpoint --checkpoint.create_seed_checkpoint --training.data_parallel_replicate_degree 1 "
        "--training.data_parallel_shard_degree 1 --training.tensor_parallel_degree 1 "
        "--experimental.pipeline_parallel_degree 1 --experimental.context_parallel_degree 1"
    )
    config = typed(*words.split())
    assert config.checkpoint.enable_checkpoint
    assert config.checkpoint.create_seed_checkpoint
    assert set(
        config.parallelism.model_dump(include={k for k in Config().parallelism.model_dump() if "degree" in k}).values()
    ) == {1}


@pytest.mark.parametrize(
    "block",
    [
        'enable_checkpoint = true\nfolder = "checkpoint"\ninterval_type = "steps"\ninterval = 500',
        "enable_checkpoint = true\nmodel_weights_only = true",
        'enable_checkpoint = true\nmodel_weights_only = true\nexport_dtype = "bfloat16"',
        'enable_checkpoint = true\nfolder = "checkpoint"\ninterval_type = "steps"\ninterval = 10\nload_step = 5\n'
        'model_weights_only = true\nexport_dtype = "bfloat16"',
    ],
)
def test_the_toml_blocks_of_the_specification(tmp_path: Path, block: str) -> None:
    config, warnings = load_config(toml(tmp_path, f"[checkpoint]\n{block}\n"))
    assert tomllib.loads(block).items() <= config.checkpoint.model_dump().items()
    assert warnings == []


# -- torchtitan's other keys ------------------------------------------------------------------------------------------


EARLY_2025 = {
    "autumn 2024, parallel degrees under [training]": """
        [job]
        dump_folder = "./runs"
        description = "Llama 3 8B on 64 devices"
        use_for_integration_test = false
        [profiling]
        enable_profiling = true
        save_traces_folder = "traces"
        profile_freq = 50
        enable_memory_snapshot = false
        save_memory_snapshot_folder = "snapshots"
        [metrics]
        log_freq = 5
        enable_color_printing = true
        enable_tensorboard = true
        save_tb_folder = "tensorboard"
        rank_0_only = true
        [model]
        name = "llama3"
        flavor = "8B"
        norm_type = "fused_rmsnorm"
        tokenizer_path = "./tokenizer.model"
        [optimizer]
        name = "AdamW"
        lr = 1e-4
        fused = true
        [training]
        seed = 42
        batch_size = 2
        seq_len = 4096
        warmup_steps = 50
        max_norm = 1
        steps = 250
        data_parallel_replicate_degree = 2
        data_parallel_shard_degree = -1
        tensor_parallel_degree = 4
        enable_loss_parallel = true
        mixed_precision_param = "bfloat16"
        mixed_precision_reduce = "float32"
        compile = true
        gc_freq = 20
        dataset = "c4"
        dataset_path = "/data/c4"
        [experimental]
        pipeline_parallel_degree = 1
        pipeline_parallel_split_points = ["layers.16"]
        pipeline_parallel_schedule = "1f1b"
        enable_async_tensor_parallel = false
        [checkpoint]
        enable_checkpoint = true
        folder = "ckpt"
        interval_type = "seconds"
        interval = 600
        model_weights_only = true
        export_dtype = "bfloat16"
        create_seed_checkpoint = false
        async_mode = "disabled"
        keep_latest_k = 4
        [activation_checkpoint]
        mode = "selective"
        selective_ac_option = "op"
        [float8]
        enable_float8_linear = false
        enable_fsdp_float8_all_gather = false
        scaling_type_input = "dynamic"
        [comm]
        init_timeout_seconds = 400
        train_timeout_seconds = 120
        trace_buf_size = 20000
        [memory_estimation]
        enabled = false
        disable_fake_mode = false
    """,
    "March 2025, [scheduler]": """
        [job]
        print_args = true
        [metrics]
        disable_color_printing = true
        enable_wandb = false
        save_for_all_ranks = false
        [model]
        flavor = "debugmodel"
        converters = []
        print_after_conversion = false
        [optimizer]
        eps = 1e-8
        early_step_in_backward = false
        [scheduler]
        warmup_steps = 3
        decay_ratio = 0.8
        decay_type = "linear"
        lr_min = 0.1
        [training]
        fsdp_reshard_after_forward = "never"
        deterministic = false
        enable_cpu_offload = false
        [experimental]
        context_parallel_degree = 1
        context_parallel_rotate_method = "allgather"
        [checkpoint]
        load_step = -1
        exclude_from_loading = []
    """,
    "spring 2025, [lr_scheduler] and [parallelism]": """
        [optimizer]
        implementation = "fused"
        [lr_scheduler]
        warmup_steps = 3
        decay_type = "cosine"
        [parallelism]
        data_parallel_shard_degree = 4
        enable_compiled_autograd = false
        pipeline_parallel_schedule = "Interleaved1F1B"
        pipeline_parallel_schedule_csv = ""
        pipeline_parallel_microbatch_size = 1
        [float8]
        filter_fqns = ["output"]
        force_recompute_fp8_weight_in_bwd = false
        [fault_tolerance]
        enable = false
        group_size = 0
        [experimental]
        custom_import = ""
    """,
}


@pytest.mark.parametrize("content", EARLY_2025.values(), ids=EARLY_2025)
def test_files_of_early_2025_run(tmp_path: Path, content: str) -> None:
    """Whatever has a meaning here arrives; whatever has none is said, once for each key."""
    path = toml(tmp_path, content)
    config, warnings = load_config(path)
    arrived = config.model_dump()
    silent = set()
    for section, values in tomllib.loads(path.read_text()).items():
        for key, value in values.items():
            name = compat.ALIASES.get(f"{section}.{key}", f"{section}.{key}")
            ours, _, our_key = name.partition(".")
            if ours in arrived and our_key in arrived[ours]:
                assert arrived[ours][our_key] == compat.VALUES.get(name, {}).get(str(value), value), name
            else:
                silent.add(f"torchtitan's `{section}.{key}` has no effect here")
    assert set(warnings) == silent
    assert len(warnings) == len(silent)
    assert warnings


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("[float8]\nenable_float8_linear = true", "float8 training is not supported"),
        ("[training]\nenable_float8_linear = true", "float8 training is not supported"),
        ('[model]\nconverters = ["float8"]', "float8 training is not supported"),
        ('[model]\nconverters = "float8"', "float8 training is not supported"),
        ('[model]\nnorm_type = "layernorm"', "Llama 3 is defined with RMSNorm"),
        ("[optimizer]\nearly_step_in_backward = true", "cannot clip by the global norm"),
        ("[training]\nenable_loss_parallel = false", "parallelism.disable_loss_parallel"),
        ("[training]\nenable_cpu_offload = true", "CPU offload"),
        ("[metrics]\nenable_wandb = true", "W&B is not a dependency"),
        ("[memory_estimation]\nenabled = true", "memory estimation"),
        ("[profiling]\nenable_memory_snapshot = true", "memory snapshots"),
        ('[experimental]\ncustom_import = "my_code"', "a config runs no code of its own"),
        ("[fault_tolerance]\nenable = true", "torchft is not supported"),
    ],
)
def test_what_we_do_not_do_is_refused_with_the_reason(tmp_path: Path, line: str, reason: str) -> None:
    error = refusal(path=toml(tmp_path, line))
    assert error.message.startswith("torchtitan's `")
    assert reason in error.message


def test_a_flag_of_torchtitans_alone_on_the_line() -> None:
    assert "float8 training" in refusal("--float8.enable_float8_linear").message
    assert load_config(None, ["--optimizer.fused", "--float8.enable_float8_linear=false"])[1] == [
        "torchtitan's `optimizer.fused` has no effect here",
        "torchtitan's `float8.enable_float8_linear` has no effect here",
    ]


def test_no_key_of_ours_is_also_one_without_effect() -> None:
    ours = {f"{section}.{key}" for section, cls in sections().items() for key in cls.model_fields}
    foreign = {name for name, meaning, _ in compat.rows() if "without effect" in meaning}
    assert not ours & foreign
    assert not foreign & set(compat.ALIASES)


def option_table() -> str:
    """compat.rows() as docs/coming-from-torchtitan.md has it. To renew it: python tests/unit/test_config.py"""
    lines = ["| torchtitan | here |", "|---|---|"]
    for name, meaning, reason in compat.rows():
        here = f"`{meaning.removeprefix('means ')}`" if meaning.startswith("means ") else meaning
        lines.append(f"| `{name}` | {here}{'; otherwise refused: ' + reason if reason else ''} |")
    return "\n".join(lines)


def test_the_guide_for_torchtitans_users_is_in_step() -> None:
    assert option_table() in (PROJECT / "docs" / "coming-from-torchtitan.md").read_text(encoding="utf-8")


# -- the resolved config ----------------------------------------------------------------------------------------------


def test_the_resolved_toml_reads_back_as_the_same_config(tmp_path: Path) -> None:
    config = typed(
        "--training.steps", "7", "--optimizer.lr", "3e-05", "--model.dim", "64", "--lr_scheduler.decay_ratio", "0.25",
        "--checkpoint.exclude_from_loading", "data", "--job.description", 'quotes " and \\ and umlauts äöü',
    )  # fmt: skip
    path = toml(tmp_path, "")
    path.write_text(config_to_toml(config), encoding="utf-8")
    again, warnings = load_config(path)
    assert again == config
    assert warnings == []


def test_the_defaults_are_valid_and_named_once() -> None:
    assert Config() == load_config(None)[0]
    for section, cls in sections().items():
        assert issubclass(cls, Section)
        assert cls.__doc__, section
        for key, field in cls.model_fields.items():
            assert field.description, f"{section}.{key} has no docstring, so `reshard config --keys` cannot explain it"
            assert "\n" not in field.description, f"{section}.{key}"


def test_with_values_validates_again() -> None:
    assert Config().with_values(training={"steps": 3}).training.steps == 3
    with pytest.raises(ConfigError, match="expected an integer"):
        Config().with_values(training={"steps": "3"})


# -- the configs that come with reshard -------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted((PROJECT / "train_configs").glob("*.toml")), ids=lambda path: path.stem)
def test_our_own_configs_have_no_foreign_key_and_explain_each(path: Path) -> None:
    _, warnings = load_config(path)
    assert warnings == []
    used = {section: set(values) for section, values in tomllib.loads(path.read_text()).items()}
    assert not {f"{s}.{k}" for s, keys in used.items() for k in keys} & set(compat.ALIASES)
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        if "=" in line and line.partition(" =")[0] not in WITHOUT_COMMENT:
            assert "  # " in line or line.startswith("#"), f"{path.name}:{number} does not explain its key"


# Names say it, or the key above does.
WITHOUT_COMMENT = {
    "description", "name", "flavor", "export_dtype", "async_mode", "data_parallel_replicate_degree",
    "tensor_parallel_degree", "pipeline_parallel_degree", "context_parallel_degree", "enable_checkpoint",
}  # fmt: skip


if __name__ == "__main__":
    guide = PROJECT / "docs" / "coming-from-torchtitan.md"
    before, begin, rest = guide.read_text(encoding="utf-8").partition("| torchtitan | here |\n")
    guide.write_text(before + option_table() + rest[rest.index("\n\n") :], encoding="utf-8")


# -- what asks for something while checkpoints are off


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (["--checkpoint.initial_load_path", "somewhere"], "checkpoint.initial_load_path is"),
        (["--checkpoint.load_step", "0"], "checkpoint.load_step is"),
        (["--checkpoint.export", "hf"], "checkpoint.export is"),
        (["--checkpoint.model_weights_only"], "checkpoint.model_weights_only is"),
        (["--checkpoint.exclude_from_loading", "data"], "checkpoint.exclude_from_loading is"),
        (["--checkpoint.load_step", "3", "--checkpoint.export", "hf"], "checkpoint.load_step, checkpoint.export are"),
    ],
)
def test_what_asks_for_checkpoints_while_they_are_off_is_refused(words: list[str], key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check(typed(*words), 1)
    assert caught.value.message.startswith(f"{key} set, but checkpoint.enable_checkpoint is false")
    check(typed(*words, "--checkpoint.enable_checkpoint"), 1)  # as the hint says


def test_settings_of_checkpoints_that_are_off_are_accepted() -> None:
    settings = ["folder=ckpt", "interval=7", "interval_type=seconds", "export_dtype=bfloat16", "keep_latest_k=2"]
    settings += ["async_mode=async", "load_step=-1", "model_weights_only=false"]
    check(typed(*(f"--checkpoint.{setting}" for setting in settings)), 1)
