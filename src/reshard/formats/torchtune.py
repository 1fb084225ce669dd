"""What does torchtune need to go on with a model? checkpoint.pt, the tokenizer, and the sections of its YAML, ready to run.

FullModelMetaCheckpointer takes one file under Meta's names, FullModelTorchTuneCheckpointer one under torchtune's own;
neither renames. For Llama 3.2 the first pops output.weight and fails without it, the second fails with it.
Source: torchtune 0.6.1, training/checkpointing/_checkpointer.py and models/.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

from reshard.errors import FormatError, listed
from reshard.formats.hf_config import context_length
from reshard.formats.output import Output
from reshard.formats.protocol import Source
from reshard.formats.torch_model import plan_torch
from reshard.model.names import META, TORCHTUNE
from reshard.model.spec import LlamaSpec, RopeScaling, flavor

CHECKPOINT, RECIPE = "checkpoint.pt", "checkpointer.yaml"

_BUILDERS = {  # (model.name, flavor) -> torchtune's own builder
    ("llama3", "8B"): "llama3.llama3_8b",
    ("llama3", "70B"): "llama3.llama3_70b",
    ("llama3_1", "8B"): "llama3_1.llama3_1_8b",
    ("llama3_1", "70B"): "llama3_1.llama3_1_70b",
    ("llama3_1", "405B"): "llama3_1.llama3_1_405b",
    ("llama3_2", "1B"): "llama3_2.llama3_2_1b",
    ("llama3_2", "3B"): "llama3_2.llama3_2_3b",
}


def builder_of(spec: LlamaSpec, max_seq_len: int = 8192) -> tuple[str, dict[str, Any]]:
    """torchtune's function that builds this model, and its arguments; a named size needs none.

    Raises FormatError for a model that no builder makes: all of them divide dim into heads, and take of RoPE a whole theta
    and a whole factor.
    """
    for (name, size), builder in _BUILDERS.items():
        if flavor(name, size) == spec:
            return f"torchtune.models.{builder}", {}
    _check_can_say(spec)
    arguments: dict[str, Any] = {
        "vocab_size": spec.vocab_size,
        "num_layers": spec.n_layers,
        "num_heads": spec.n_heads,
        "num_kv_heads": spec.n_kv_heads,
        "embed_dim": spec.dim,
        "max_seq_len": max_seq_len,
        "rope_base": int(spec.rope_theta),
        "intermediate_dim": spec.ffn_dim,
        "norm_eps": spec.norm_eps,
    }
    if spec.tied:  # only this builder can share the embedding
        factor = spec.rope_scaling.factor if spec.rope_scaling else 1
        return "torchtune.models.llama3_2.llama3_2", {**arguments, "scale_factor": int(factor)}
    if spec.rope_scaling is not None:
        return "torchtune.models.llama3_1.llama3_1", {**arguments, "scale_factor": int(spec.rope_scaling.factor)}
    return "torchtune.models.llama3.llama3", arguments


def _check_can_say(spec: LlamaSpec) -> None:
    said = {"head_dim": (spec.head_dim, spec.dim / spec.n_heads), "rope_theta": (spec.rope_theta, int(spec.rope_theta))}
    if (scaling := spec.rope_scaling) is not None:
        fixed = RopeScaling(factor=int(scaling.factor))
        said |= {f"rope_scaling.{key}": (value, getattr(fixed, key)) for key, value in asdict(scaling).items()}
    wrong = [f"{key} {ours:g} (it would be {theirs:g})" for key, (ours, theirs) in said.items() if ours != theirs]
    if wrong:
        raise FormatError(
            f"torchtune's builders cannot say {listed(wrong)}: its recipe would build another model",
            hint="another target that says it: --to hf, or --to torch for the weights alone",
        )


def recipe(
    spec: LlamaSpec, directory: Path, names: Literal["torchtune", "meta"], *, tokenizer: bool, max_seq_len: int = 8192
) -> str:
    """The model, tokenizer and checkpointer sections of a torchtune config. max_seq_len: only sizes its tables."""
    builder, arguments = builder_of(spec, max_seq_len)
    kind = "FullModelTorchTuneCheckpointer" if names == "torchtune" else "FullModelMetaCheckpointer"
    lines = [
        "# The sections of a torchtune config that load this checkpoint; put them in place of the recipe's own.",
        "model:",
        f"  _component_: {builder}",
        *(f"  {key}: {_scalar(value)}" for key, value in arguments.items()),
        "",
    ]
    if tokenizer:
        lines += [
            "tokenizer:",
            "  _component_: torchtune.models.llama3.llama3_tokenizer",
            f"  path: {_scalar(str(directory / 'tokenizer.model'))}",
            "",
        ]
    lines += [
        "checkpointer:",
        f"  _component_: torchtune.training.{kind}",
        f"  checkpoint_dir: {_scalar(str(directory))}",
        f"  checkpoint_files: [{CHECKPOINT}]",
        "  recipe_checkpoint: null",
        f"  output_dir: {_scalar(str(directory.with_name(directory.name + '-tuned')))}  # not inside of checkpoint_dir",
        f"  model_type: {'LLAMA3_2' if spec.tied else 'LLAMA3'}",
        "resume_from_checkpoint: false",
    ]
    return "\n".join(lines) + "\n"


def _scalar(value: Any) -> str:
    """A YAML scalar. Its floats need a dot: 1e-05 would be text."""
    if isinstance(value, float):
        text = repr(value)
        return text if "." in text or "e" not in text else text.replace("e", ".0e")
    if isinstance(value, str):
        return "'" + value.replace("'", "''") + "'"
    return str(value)


def plan_torchtune(
    source: Source,
    spec: LlamaSpec,
    directory: Path,
    *,
    names: Literal["torchtune", "meta"] = "torchtune",
    dtype: str | None = None,
    assets: Mapping[str, Path | bytes] | None = None,
) -> Output:
    """A directory for torchtune. directory: where it will lie, for the YAML."""
    assets = source.assets if assets is None else assets
    dialect = TORCHTUNE if names == "torchtune" else META
    output = plan_torch(source, spec, CHECKPOINT, dialect=dialect, dtype=dtype, tied_output=names == "meta")
    tokenizer = {name: content for name, content in assets.items() if name == "tokenizer.model"}
    positions = context_length(spec, source.about) or 8192
    text = recipe(spec, directory.absolute(), names, tokenizer=bool(tokenizer), max_seq_len=positions)
    return replace(output, format="torchtune", alone=False, beside={RECIPE: text.encode(), **tokenizer})
