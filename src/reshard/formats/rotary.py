"""In which order do the rows of wq and wk lie? THE permutation: Meta pairs neighbours, Hugging Face pairs halves.

RoPE turns pairs of a head's numbers. In Meta's files, and in ours, torchtune's and GGUF's, a pair are the rows 2i and
2i + 1 of a head; in Hugging Face's they are i and i + head_dim / 2. Rows only move inside of their head, so any run of
whole heads can be turned on its own. Keys have fewer heads than queries: their count is n_kv_heads.
The first position is not rotated: logits of a single token cannot tell whether this was done right.
Source: transformers' convert_llama_weights_to_hf.py, `permute`.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from reshard.formats.protocol import ITEM_BYTES, LazyTensor, Ledger
from reshard.model.names import row_of
from reshard.model.spec import LlamaSpec

Order = Literal["pairs", "halves"]


def rotary_heads(canonical: str, spec: LlamaSpec) -> int | None:
    """How many heads' rows does the permutation concern in this tensor? None: not its business."""
    heads = {"attention.wq.weight": spec.n_heads, "attention.wk.weight": spec.n_kv_heads}
    return heads.get(row_of(canonical).removeprefix("layers.LAYER."))


def permuted(rows: NDArray[np.uint8], head_dim: int, order: Order) -> NDArray[np.uint8]:
    """Whole heads' rows, brought into `order` from the other one.

    rows: (heads * head_dim, row bytes). Returns a view of the shape (heads, _, _, row bytes) that lists them anew.
    """
    heads, width = len(rows) // head_dim, rows.shape[1]
    pair_first = (heads, head_dim // 2, 2, width)
    half_first = (heads, 2, head_dim // 2, width)
    return rows.reshape(pair_first if order == "halves" else half_first).swapaxes(1, 2)


@dataclass(frozen=True)
class Rotated:
    """A LazyTensor with its rows in the other order."""

    inner: LazyTensor
    head_dim: int
    order: Order

    @property
    def name(self) -> str:
        """See LazyTensor."""
        return self.inner.name

    @property
    def shape(self) -> tuple[int, ...]:
        """See LazyTensor."""
        return self.inner.shape

    @property
    def dtype(self) -> str:
        """See LazyTensor."""
        return self.inner.dtype

    @property
    def nbytes(self) -> int:
        """See LazyTensor."""
        return self.inner.nbytes

    @property
    def grain(self) -> int:
        """A head."""
        return self.head_dim

    def fill(self, buffer: NDArray[np.uint8], start: int, stop: int, ledger: Ledger | None = None) -> None:
        """See LazyTensor. Rows that begin or end inside of a head need all of it."""
        width = prod(self.shape[1:]) * ITEM_BYTES[self.dtype]
        first, last = start // self.head_dim * self.head_dim, -(-stop // self.head_dim) * self.head_dim
        rows = np.empty((last - first, width), np.uint8)
        self.inner.fill(rows.reshape(-1), first, last, ledger)
        turned = permuted(rows, self.head_dim, self.order)
        if (first, last) == (start, stop):
            np.copyto(buffer.reshape(turned.shape), turned)
        else:
            buffer[:] = turned.reshape(rows.shape)[start - first : stop - first].reshape(-1)


def rotated(tensor: LazyTensor, canonical: str, spec: LlamaSpec, order: Order) -> LazyTensor:
    """The tensor in `order`, given that it is in the other one; those that RoPE does not touch as they are."""
    if rotary_heads(canonical, spec) is None:
        return tensor
    if isinstance(tensor, Rotated) and tensor.order != order:
        return tensor.inner  # there and back again
    return Rotated(tensor, spec.head_dim, order)
