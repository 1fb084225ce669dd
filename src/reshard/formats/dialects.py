"""Whose names are these? A bag of named tensors becomes a Llama's, under our names and in our order of rows.

Files that say nothing of the model itself (a bare .pt, a lone .safetensors, a foreign DCP directory) are told which one
they hold; without that they are refused: heads, RoPE and epsilon cannot be seen in shapes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from reshard.errors import FormatError, TensorMismatch
from reshard.formats.protocol import WEIGHT_DTYPES, LazyTensor, StoredTensor, same_bytes
from reshard.formats.rotary import rotated
from reshard.model.names import HUGGING_FACE, META, TORCHTITAN, TORCHTUNE, Dialect, canonical_names, foreign_name
from reshard.model.spec import LlamaSpec, parameter_shapes, release_is_tied

EMBEDDING, OUTPUT = "tok_embeddings.weight", "output.weight"
_MARKS = {  # a name that only this dialect has
    "norm.scale": TORCHTUNE,
    "model.embed_tokens.weight": HUGGING_FACE,
    "rope.freqs": META,
}


def dialect_of(names: Iterable[str]) -> Dialect:
    """Which table do the names come from? Meta's own and torchtitan's are one."""
    names = set(names)
    return next((dialect for mark, dialect in _MARKS.items() if mark in names), TORCHTITAN)


@dataclass(frozen=True)
class Told:
    """The model that a user says a source holds.

    says_tie: False for a params.json, which has no field for it. scaling_from: what says whether RoPE is scaled. A file
    does; the name of a scaled release (llama3_1/8B) does of its weights; a flavor alone (8B, llama3/8B) does not.
    """

    spec: LlamaSpec
    says_tie: bool = True
    scaling_from: Literal["file", "release", "flavor"] = "file"


def told(path: Path, model: Told | None) -> Told:
    """The model that somebody has to tell. Raises FormatError where nobody did."""
    if model is None:
        raise FormatError(
            f"{path} does not say which model it is: heads, RoPE and epsilon cannot be seen in its tensors",
            path=path,
            hint="--model FLAVOR (e.g. 8B or llama3_1/8B), or --model with its params.json or config.json",
        )
    return model


def check_scaling_is_said(path: Path, model: Told, *, trained: bool) -> None:
    """Raises FormatError where nothing says whether RoPE is scaled. trained: by torchtitan, which may not be as released."""
    if model.scaling_from == "flavor" or (trained and model.scaling_from == "release"):
        raise FormatError(
            f"{path} does not say whether its RoPE is scaled, and neither does a flavor's name: torchtitan 0.2 trains "
            "every llama3 flavor scaled, torchtitan of early 2025 none",
            path=path,
            hint="--rope-scaling llama3 or --rope-scaling none; or --model with its params.json or config.json",
        )


def no_output(path: Path, name: str = OUTPUT, *, why: str = "", hint: str | None = None) -> TensorMismatch:
    """The error for a model without an output projection that nobody says is tied to the embedding."""
    return TensorMismatch(
        f"{path} has no {name}, and nothing says that it is tied to the embedding{why}",
        path=path,
        missing=[name],
        hint=hint
        or "it is incomplete: copy or download it again. If the model is tied, `reshard convert --model CONFIG.json`, with a "
        '"tie_word_embeddings": true in it',
    )


def check_dtypes(path: Path, dtypes: Mapping[str, str]) -> None:
    """Are these numbers that can be kept? Raises FormatError for fp8 and whole numbers: they need scales."""
    strange = {name: dtype for name, dtype in dtypes.items() if dtype not in WEIGHT_DTYPES}
    if strange:
        name, dtype = next(iter(strange.items()))
        raise FormatError(
            f"{path}: {name} is {dtype}, expected one of {', '.join(WEIGHT_DTYPES)}: quantised weights cannot be kept",
            path=path,
            hint="use the bf16 release of the same model",
        )


def canonical_tensors(
    found: Mapping[str, StoredTensor], path: Path, model: Told, dialect: Dialect | None = None
) -> tuple[dict[str, LazyTensor], LlamaSpec]:
    """The tensors under our names, in the order of the forward pass, wq and wk in our order; and the spec, tied or not.

    dialect: None to tell by the names. A model without an output of its own must be said to be tied, or be of a release
    that is; one with an output that equals its embedding stays what the spec says. Raises TensorMismatch, FormatError.
    """
    spec = model.spec
    dialect = dialect or dialect_of(found)
    names = canonical_names(found, dialect, path=path)
    check_dtypes(path, {name: found[name].dtype for name in names})
    canonical = {ours: replace(found[theirs], name=ours) for theirs, ours in names.items()}
    if OUTPUT not in canonical and not spec.tied:
        if model.says_tie or not release_is_tied(spec):
            raise no_output(path, foreign_name(OUTPUT, dialect))
        spec = replace(spec, tied=True)
    check_shapes(path, {name: tensor.shape for name, tensor in canonical.items()}, spec)
    if spec.tied and OUTPUT in canonical and not _same(canonical[EMBEDDING], canonical[OUTPUT]):
        raise TensorMismatch(
            f"{path} has an output.weight that differs from its embedding, but the model's are tied",
            path=path,
            hint='if a tied model was trained untied, "tie_word_embeddings": false in its config.json keeps both matrices',
        )
    order = [name for name in (*parameter_shapes(spec), OUTPUT) if name in canonical]
    tensors: dict[str, LazyTensor] = {}
    for name in order:
        tensor = canonical[name]
        tensors[name] = rotated(tensor, name, spec, "pairs") if dialect is HUGGING_FACE else tensor
    return tensors, spec


def _same(left: StoredTensor, right: StoredTensor) -> bool:
    """Equal by the checksums that lie with them, where there are some, else by their bytes."""
    sums = [
        [(b.row, b.rows, b.column, b.width, b.region.crc32) for b in t.blocks if b.region.nbytes == b.rows * b.width]
        for t in (left, right)
    ]
    summed = all(crc is not None for *_, crc in sums[0]) and len(sums[0]) == len(left.blocks) == len(right.blocks)
    return (summed and left.dtype == right.dtype and sums[0] == sums[1]) or same_bytes(left, right)


def check_shapes(path: Path, found: Mapping[str, tuple[int, ...]], spec: LlamaSpec) -> None:
    """Are these the tensors of the model? Raises TensorMismatch. A tied model may have an output of its own."""
    expected = parameter_shapes(spec)
    missing = [name for name in expected if name not in found]
    unexpected = [name for name in found if name not in expected and not (name == OUTPUT and spec.tied)]
    shapes = {**expected, OUTPUT: (spec.vocab_size, spec.dim)}
    wrong = {
        name: (str(list(shapes[name])), str(list(shape)))
        for name, shape in found.items()
        if name in shapes and shape != shapes[name]
    }
    if missing or unexpected or wrong:
        raise TensorMismatch(
            f"{path} has not the tensors of the model that it is said to be",
            path=path,
            missing=missing,
            unexpected=unexpected,
            wrong=wrong,
        )
