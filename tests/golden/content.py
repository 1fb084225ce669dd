"""What do the golden checkpoints hold? Numbers that follow from a tensor's name alone, so that nothing of ours makes them."""

from __future__ import annotations

import struct
from math import prod

# name -> (shape, dtype): every dtype that can be stored, scalars, an empty shard, dims that do not divide, and one tensor
# that reaches over several blocks.
TENSORS: dict[str, tuple[tuple[int, ...], str]] = {
    "model.rows": ((6, 5), "float32"),
    "model.columns": ((3, 8), "bfloat16"),
    "model.uneven": ((5, 3), "float64"),
    "model.one_row": ((1, 7), "float32"),
    "model.whole": ((24_000,), "float32"),
    "model.half": ((4, 4), "float16"),
    "optimizer.state.rows.exp_avg": ((6, 5), "float32"),
    "optimizer.state.rows.step": ((), "float32"),
    "optimizer.groups.decay.lr": ((), "float64"),
    "train_state.step": ((), "int64"),
    "more.int64": ((2, 2, 2), "int64"),
    "more.int32": ((3,), "int32"),
    "more.int16": ((3,), "int16"),
    "more.int8": ((5,), "int8"),
    "more.uint8": ((5,), "uint8"),
    "more.bool": ((9,), "bool"),
}
ROW_SHARDED = ("model.rows", "model.uneven", "model.one_row", "optimizer.state.rows.exp_avg")
COLUMN_SHARDED = ("model.columns",)

_FORMS = {"float64": "d", "float32": "f", "float16": "e", "int64": "q", "int32": "i", "int16": "h", "int8": "b",
          "uint8": "B", "bool": "B"}  # fmt: skip


def numbers(name: str) -> list[float] | list[int]:
    """The numbers of a tensor, row-major. Few bits each: exact in every dtype."""
    shape, dtype = TENSORS[name]
    whole = [(7 * i + sum(name.encode())) % 97 for i in range(prod(shape))]
    if dtype == "bool":
        return [n % 2 for n in whole]
    return [(n - 48) / 8 for n in whole] if "float" in dtype else whole


def raw(name: str) -> bytes:
    """The same as they lie on disk, little-endian."""
    dtype, values = TENSORS[name][1], numbers(name)
    if dtype == "bfloat16":  # the upper half of a float32
        return b"".join(struct.pack("<f", value)[2:] for value in values)
    return struct.pack(f"<{len(values)}{_FORMS[dtype]}", *values)
