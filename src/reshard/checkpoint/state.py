"""What is saved? Named tensors, and the box that each rank holds of them.

Nothing here knows what a model is: a state is dicts of names over tensors, {"model": {fqn: tensor}}, one level deep for
weights-only checkpoints. A plain tensor is taken to be the same on every rank that has it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement

State = Mapping[str, Any]  # of tensors, or of such mappings

PIECE_BYTES = 64 << 20  # a stored chunk is at most about this large, so that no reader ever needs a whole matrix


class Box(NamedTuple):
    """A rectangle of a tensor: where it begins and how far it reaches, per tensor dim.

    A tuple, because at a thousand ranks there are millions: they are made, hashed and compared in C.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def volume(self) -> int:
        """Numbers in the box; 1 for a scalar."""
        return prod(self.sizes)

    def within(self, shape: tuple[int, ...]) -> bool:
        """Does it lie inside of a tensor of this shape?"""
        return len(shape) == len(self.offsets) == len(self.sizes) and all(
            o >= 0 and s >= 0 and o + s <= n for o, s, n in zip(self.offsets, self.sizes, shape, strict=True)
        )

    def overlap(self, other: Box) -> Box | None:
        """The common part of two boxes of one tensor; None where they do not meet."""
        if self == other:
            return self if self.volume else None
        starts, sizes = [], []
        for a, s, b, t in zip(self.offsets, self.sizes, other.offsets, other.sizes, strict=True):
            start, end = max(a, b), min(a + s, b + t)
            if end <= start:
                return None
            starts.append(start)
            sizes.append(end - start)
        return Box(tuple(starts), tuple(sizes))

    def slices_in(self, outer: Box) -> tuple[slice, ...]:
        """Index of this box within a tensor that holds `outer`."""
        return tuple(
            slice(o - base, o - base + s) for o, s, base in zip(self.offsets, self.sizes, outer.offsets, strict=True)
        )


@dataclass(frozen=True)
class Piece:
    """One chunk of one tensor, on its way to a file.

    read: called once, when its turn to be written has come; gives a CPU tensor of `sizes` and `dtype`.
    part: the live numbers that `read` would give, where they are in memory already, on any device.
    """

    fqn: str
    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    dtype: str
    read: Callable[[], Tensor]
    part: Tensor | None = None

    @property
    def box(self) -> Box:
        """Where the chunk lies in its tensor."""
        return Box(self.offsets, self.sizes)

    @property
    def nbytes(self) -> int:
        """Bytes of its numbers."""
        return self.box.volume * dtype_from_name(self.dtype).itemsize


@cache
def dtype_name(dtype: torch.dtype) -> str:
    """torch.bfloat16 -> "bfloat16"."""
    return str(dtype).removeprefix("torch.")


@cache
def dtype_from_name(name: str) -> torch.dtype:
    """ "bfloat16" -> torch.bfloat16."""
    dtype = getattr(torch, name, None)
    assert isinstance(dtype, torch.dtype), name
    return dtype


def flatten(state: State) -> dict[str, tuple[tuple[str, ...], Tensor]]:
    """Name -> (path, tensor): {"model": {"a.b": t}} gives {"model.a.b": (("model", "a.b"), t)}."""
    flat: dict[str, tuple[tuple[str, ...], Tensor]] = {}

    def walk(node: State, above: tuple[str, ...], prefix: str) -> None:
        for key, value in node.items():
            if isinstance(value, Tensor):
                flat[prefix + key] = ((*above, key), value)
            else:
                walk(value, (*above, key), f"{prefix}{key}.")

    walk(state, (), "")
    return flat


def local_part(tensor: Tensor) -> tuple[Tensor, Box]:
    """This rank's numbers and the box that they fill; an empty shard has an empty box."""
    if isinstance(tensor, DTensor):
        with torch.no_grad():  # as data: autograd would make a node of it
            return tensor.to_local().detach(), _box_of(tensor)
    return tensor.detach(), Box((0,) * tensor.ndim, tuple(tensor.shape))


_BOXES: dict[tuple[DeviceMesh, tuple[Placement, ...], tuple[int, ...]], Box] = {}


def _box_of(tensor: DTensor) -> Box:
    """Which box of a tensor is this rank's? Asked of torch once for all that lie alike: it takes 50 us to answer."""
    key = tensor.device_mesh, tensor.placements, tuple(tensor.shape)
    box = _BOXES.get(key)
    if box is None:
        # DCP's own protocol method of DTensor, not a public name; tested on torch 2.13.0.
        chunks = tensor.__create_chunk_list__()  # type: ignore[no-untyped-call]
        empty = (0,) * tensor.ndim
        box = Box(tuple(chunks[0].offsets), tuple(chunks[0].sizes)) if chunks else Box(empty, empty)
        _BOXES[key] = box
    return box


def pieces_of(fqn: str, tensor: Tensor, dtype: torch.dtype | None = None) -> Iterator[Piece]:
    """This rank's part of a tensor, cut along its first dim into chunks of at most PIECE_BYTES.

    dtype: cast to it on the way out; None keeps the tensor's own.
    """
    local, box = local_part(tensor)
    yield from cut_pieces(fqn, tuple(tensor.shape), local, box, dtype or tensor.dtype)


def cut_pieces(fqn: str, shape: tuple[int, ...], local: Tensor, box: Box, stored: torch.dtype) -> Iterator[Piece]:
    """The same for numbers that are known to be this box of a tensor of this shape."""
    if box.volume == 0:
        return
    name = dtype_name(stored)
    for cut in row_cuts(box, stored.itemsize):
        part = local if cut == box else local[cut.slices_in(box)]
        yield Piece(fqn, shape, cut.offsets, cut.sizes, name, _reader_of(part, stored), part)


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, whatever its dtype. Keeps the tensor alive; no copy."""
    array: Any = tensor.detach().reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)


def _reader_of(part: Tensor, dtype: torch.dtype) -> Callable[[], Tensor]:
    return lambda: part.to(device="cpu", dtype=dtype)


def row_cuts(box: Box, itemsize: int) -> Iterator[Box]:
    """Cut a box along its first dim into boxes of at most PIECE_BYTES (a single row may be larger)."""
    if not box.sizes:
        yield box
        return
    row_bytes = max(1, prod(box.sizes[1:]) * itemsize)
    rows = max(1, PIECE_BYTES // row_bytes)
    if rows >= box.sizes[0]:
        yield box
        return
    first, end = box.offsets[0], box.offsets[0] + box.sizes[0]
    for start in range(first, end, rows):
        yield Box((start, *box.offsets[1:]), (min(rows, end - start), *box.sizes[1:]))
