"""What do others call a tensor? Our names are Meta's; each dialect is a table of somebody else's. Imports no torch.

A row stands for all layers: LAYER is the place of the number.
Sources: meta-llama's llama3/llama/model.py; torchtitan's git history (prefix `model.` until July 2025, `freqs_cis`
saved until August 2025, `qkv_linear` and `lm_head` since April 2026); torchtune 0.6.1 models/convert_weights.py;
transformers' modeling_llama.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from reshard.errors import TensorMismatch, nearest

LAYER = "LAYER"

# Meta (canonical), torchtune, Hugging Face
_PER_LAYER = (
    ("attention_norm.weight", "sa_norm.scale", "input_layernorm.weight"),
    ("attention.wq.weight", "attn.q_proj.weight", "self_attn.q_proj.weight"),
    ("attention.wk.weight", "attn.k_proj.weight", "self_attn.k_proj.weight"),
    ("attention.wv.weight", "attn.v_proj.weight", "self_attn.v_proj.weight"),
    ("attention.wo.weight", "attn.output_proj.weight", "self_attn.o_proj.weight"),
    ("ffn_norm.weight", "mlp_norm.scale", "post_attention_layernorm.weight"),
    ("feed_forward.w1.weight", "mlp.w1.weight", "mlp.gate_proj.weight"),
    ("feed_forward.w2.weight", "mlp.w2.weight", "mlp.down_proj.weight"),
    ("feed_forward.w3.weight", "mlp.w3.weight", "mlp.up_proj.weight"),
)
_TABLE = (
    ("tok_embeddings.weight", "tok_embeddings.weight", "model.embed_tokens.weight"),
    *((f"layers.LAYER.{a}", f"layers.LAYER.{b}", f"model.layers.LAYER.{c}") for a, b, c in _PER_LAYER),
    ("norm.weight", "norm.scale", "model.norm.weight"),
    ("output.weight", "output.weight", "lm_head.weight"),
)


@dataclass(frozen=True)
class Dialect:
    """One way to name the tensors of a Llama.

    names: their row -> canonical row, the preferred one first where a canonical row has two.
    dropped: rows of buffers that are computed, not weights; they are left out when reading.
    prefix: may stand before every name, and is left out when reading.
    """

    title: str
    names: Mapping[str, str]
    dropped: frozenset[str] = frozenset()
    prefix: str = ""


META = Dialect("Meta", {meta: meta for meta, _, _ in _TABLE}, frozenset({"rope.freqs"}))

TORCHTITAN = Dialect(
    "torchtitan",
    {meta: meta for meta, _, _ in _TABLE}
    | {
        f"layers.LAYER.attention.qkv_linear.{w}.weight": f"layers.LAYER.attention.{w}.weight"
        for w in ("wq", "wk", "wv")
    }
    | {"lm_head.weight": "output.weight"},
    frozenset({"freqs_cis"}),
    prefix="model.",
)

TORCHTUNE = Dialect("torchtune", {torchtune: meta for meta, torchtune, _ in _TABLE})

HUGGING_FACE = Dialect(
    "Hugging Face",
    {hugging_face: meta for meta, _, hugging_face in _TABLE},
    frozenset({"model.layers.LAYER.self_attn.rotary_emb.inv_freq"}),
)

_NUMBER = re.compile(r"(?<=\blayers\.)(0|[1-9][0-9]*)(?=\.)", re.ASCII)


def canonical_name(name: str, dialect: Dialect = META) -> str | None:
    """What do we call the tensor that the dialect calls `name`? None for a buffer that is left out.

    Raises TensorMismatch for a name that is not in the dialect's table.
    """
    bare = name.removeprefix(dialect.prefix)
    row, number = _split(bare)
    if row in dialect.dropped:
        return None
    if row not in dialect.names or LAYER in name:
        raise _unknown([name], dialect)
    return _join(dialect.names[row], number)


def canonical_names(names: Iterable[str], dialect: Dialect = META, *, path: Path | str = "") -> dict[str, str]:
    """Foreign name -> canonical name of every tensor that is kept, in the order given.

    path: the file that has the names, for the error. Raises TensorMismatch, listing every name that is unknown, or two
    names that mean the same tensor.
    """
    kept: dict[str, str] = {}
    owner: dict[str, str] = {}
    unknown = []
    for name in names:
        try:
            canonical = canonical_name(name, dialect)
        except TensorMismatch:
            unknown.append(name)
            continue
        if canonical is None:
            continue
        if canonical in owner:
            raise TensorMismatch(
                f"{_in(path)}`{owner[canonical]}` and `{name}` both mean {canonical}, expected one of them", path=path
            )
        owner[canonical] = name
        kept[name] = canonical
    if unknown:
        raise _unknown(unknown, dialect, path)
    return kept


def foreign_name(canonical: str, dialect: Dialect) -> str:
    """What does the dialect call our tensor `canonical`? (Without the optional prefix.)

    Raises TensorMismatch where `canonical` is not a canonical name.
    """
    row, number = _split(canonical)
    for theirs, ours in dialect.names.items():
        if ours == row and LAYER not in canonical:
            return _join(theirs, number)
    raise _unknown([canonical], META)


def row_of(name: str) -> str:
    """The name with its layer number replaced by LAYER: what tables are keyed by."""
    return _split(name)[0]


def _split(name: str) -> tuple[str, str]:
    found = _NUMBER.search(name)
    if found is None:
        return name, ""
    return f"{name[: found.start()]}{LAYER}{name[found.end() :]}", found.group()


def _join(row: str, number: str) -> str:
    return row.replace(LAYER, number)


def _in(path: Path | str) -> str:
    return f"{path}: " if str(path) else ""


def _unknown(names: list[str], dialect: Dialect, path: Path | str = "") -> TensorMismatch:
    row, number = _split(names[0].removeprefix(dialect.prefix))
    close = nearest(row, dialect.names)
    return TensorMismatch(
        f"{_in(path)}not the name of a Llama's tensor as {dialect.title} writes it",
        path=path,
        unexpected=names,
        hint=f"the nearest known name is `{_join(close, number)}`" if close else None,
    )
