"""What is saved? Named tensors, and the box that each rank holds of them.

Nothing here knows what a model is: a state is dicts of names over tensors, {"model": {fqn: tensor}}, one level deep for
weights-only checkpoints. A plain tensor has to be the same on every rank that has it; replicas.py compares them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed._functional_collectives import (
    AsyncCollectiveTensor,
)  # private: an unfinished result; torch 2.13.0
from torch.distributed.tensor import DTensor

from reshard.checkpoint import archive
from reshard.checkpoint.kinds import problem_of
from reshard.checkpoint.placements import HINT as PLACEMENT_HINT
from reshard.checkpoint.placements import problem_of as placements_problem
from reshard.errors import CheckpointError

State = Mapping[str, Any]  # of tensors, or of such mappings

PIECE_BYTES = 64 << 20  # a stored chunk is at most about this large, so that no reader ever needs a whole matrix


class Box(NamedTuple):
    """A rectangle of a tensor: where it begins and how far it reaches, per tensor dim.

    A tuple, because at a thousand ranks there are millions: they are made, hashed and compared in C.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    def __str__(self) -> str:
        return f"{list(self.sizes)} at {list(self.offsets)}"

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


Known = dict[tuple[Any, ...], Box]  # boxes, by what decides them; see `local_part`
NOWHERE = Box((0,), (0,))  # of a rank that is not in a tensor's mesh: no numbers, also of a scalar


def local_part(tensor: Tensor, name: str = "a tensor", known: Known | None = None) -> tuple[Tensor, Box]:
    """This rank's numbers and the box that they fill; an empty shard has an empty box.

    known: of one save or load, so that torch is asked once for all tensors that lie alike: it takes 50 us to answer.
    Never kept for another: the ranks may have met again in another order by then.
    Raises CheckpointError, naming the tensor, where the box that it claims is not that of the numbers that it holds.
    """
    if not isinstance(tensor, DTensor):
        if isinstance(tensor, AsyncCollectiveTensor):
            tensor = tensor.wait()
        return tensor.detach(), Box((0,) * tensor.ndim, tuple(tensor.shape))
    with torch.no_grad():  # as data: autograd would make a node of it
        local = tensor.to_local().detach()
    problem = None
    if type(local) is not Tensor:
        if isinstance(local, AsyncCollectiveTensor):
            local = local.wait()
        problem = problem_of(local)
    box = _box_of(tensor, name, {} if known is None else known)
    if problem is not None:
        problem = f"its part on this rank is {problem}"
    elif local.shape != box.sizes and box is not NOWHERE:
        problem = f"this rank holds {list(local.shape)} of it, but its placements {tensor.placements!r} say {box}"
    elif local.dtype != tensor.dtype:
        problem = f"this rank holds {dtype_name(local.dtype)}, but it says {dtype_name(tensor.dtype)}"
    if problem is not None:
        raise _refused(name, problem)
    return local, box


def _box_of(tensor: DTensor, name: str, known: Known) -> Box:
    """Which box of a tensor is this rank's? Raises CheckpointError where torch's answer is wrong on any rank."""
    mesh, placements, shape = tensor.device_mesh, tensor.placements, tuple(tensor.shape)
    coordinate = mesh.get_coordinate()
    # Equal meshes may be of two meetings of the ranks, in which this one had other coordinates.
    key = mesh, coordinate, placements, shape
    box = known.get(key)
    if box is None:
        problem = placements_problem(placements, tuple(mesh.shape), shape)
        if problem is not None:
            raise _refused(name, problem, PLACEMENT_HINT)
        box = NOWHERE
        if coordinate is not None:
            # DCP's own protocol method of DTensor, not a public name; tested on torch 2.13.0.
            (chunk,) = tensor.__create_chunk_list__()  # type: ignore[no-untyped-call]
            box = Box(tuple(chunk.offsets), tuple(chunk.sizes))
            if not box.within(shape):
                raise _refused(name, f"torch says that this rank holds {box}, which is outside of its shape {shape}")
        known[key] = box
    return box


def _refused(name: str, problem: str, hint: str | None = None) -> CheckpointError:
    return CheckpointError(f"`{name}` cannot be saved or loaded: {problem}", hint=hint)


def mesh_names(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """A name for the mesh of each DTensor, the same on all of the mesh's ranks and another for other ranks."""
    known: dict[int, str] = {}
    result = {}
    for fqn, tensor in tensors.items():
        if isinstance(tensor, DTensor):
            mesh = tensor.device_mesh
            if id(mesh) not in known:
                ranks = mesh.mesh
                known[id(mesh)] = sha256(f"{tuple(ranks.shape)} {ranks.flatten().tolist()}".encode()).hexdigest()[:16]
            result[fqn] = known[id(mesh)]
    return result


def pieces_of(
    fqn: str, tensor: Tensor, dtype: torch.dtype | None = None, known: Known | None = None
) -> Iterator[Piece]:
    """This rank's part of a tensor, cut along its first dim into chunks of at most PIECE_BYTES.

    dtype: cast to it on the way out; None keeps the tensor's own. known, errors: as `local_part`.
    """
    local, box = local_part(tensor, fqn, known)
    yield from cut_pieces(fqn, tuple(tensor.shape), local, box, dtype or tensor.dtype)


def cut_pieces(fqn: str, shape: tuple[int, ...], local: Tensor, box: Box, stored: torch.dtype) -> Iterator[Piece]:
    """The same for numbers that are known to be this box of a tensor of this shape.

    A tensor without elements is one empty piece, as plain torch stores it, and on every rank the same one.
    Raises CheckpointError for a row that is larger than one chunk can be.
    """
    name = dtype_name(stored)
    if 0 in shape and box is not NOWHERE:
        empty = local.new_empty(shape)
        yield Piece(fqn, shape, (0,) * len(shape), shape, name, _reader_of(empty, stored), empty)
        return
    volume = box.volume
    if volume == 0:
        return
    if volume * stored.itemsize > archive.MOST_BYTES:
        _check_rows(fqn, box, stored)
    for cut in row_cuts(box, stored.itemsize):
        part = local if cut == box else local[cut.slices_in(box)]
        yield Piece(fqn, shape, cut.offsets, cut.sizes, name, _reader_of(part, stored), part)


def _check_rows(fqn: str, box: Box, stored: torch.dtype) -> None:
    row_bytes = prod(box.sizes[1:]) * stored.itemsize
    if row_bytes > archive.MOST_BYTES:
        raise CheckpointError(
            f"`{fqn}` cannot be saved: one row of it has {row_bytes:,} bytes, expected at most {archive.MOST_BYTES:,}",
            hint="reshape it, so that its first dim is longer",
        )


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, whatever its dtype. Keeps the tensor alive; no copy."""
    array: Any = tensor.detach().reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)


def has_own_bytes(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Are the numbers of a tensor, in this dtype, the bytes of its memory, one after the other?"""
    return (
        tensor.dtype == dtype
        and tensor.device.type == "cpu"
        and tensor.is_contiguous()
        and not tensor.is_conj()
        and not tensor.is_neg()
    )


def _reader_of(part: Tensor, dtype: torch.dtype) -> Callable[[], Tensor]:
    def read() -> Tensor:
        numbers = part.to(device="cpu", dtype=dtype)
        return numbers.resolve_conj().resolve_neg() if numbers.is_conj() or numbers.is_neg() else numbers

    return read


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
