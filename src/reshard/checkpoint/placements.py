"""Is the box that torch names for a DTensor the one that its ranks hold? By arithmetic on indices, alike on all ranks.

torch works a DTensor's box out from left to right, placement by placement. FSDP2 over tensor parallelism on one dim cuts
from right to left, which torch writes as `_StridedShard`, and where rows do not divide the two ways part: torch then
names rows that a rank does not hold. Read in torch 2.13.0: tensor/_utils.py, `_StridedShard` in tensor/placement_types.py,
fsdp/_fully_shard/_fsdp_param.py; the tests compare with torch itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import prod

from torch.distributed.tensor import Partial, Placement, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard  # private: what FSDP2 leaves; torch 2.13.0

Axis = tuple[int, int]  # of a mesh: ranks along it, and the split factor of its placement; 1: a plain Shard
Runs = tuple[tuple[int, int], ...]  # indices along a dim, as runs: first and end of each

HINT = (
    "with FSDP over tensor parallelism, let its rows divide by the ranks of tensor parallelism (pad the vocabulary, say); "
    "any other tensor: place it by Shard and Replicate alone"
)


def problem_of(placements: Sequence[Placement], mesh_shape: tuple[int, ...], shape: tuple[int, ...]) -> str | None:
    """Why torch's box cannot be believed, in words that follow the tensor's name; None where it can."""
    for placement in placements:
        if isinstance(placement, Partial):
            return f"it is {placement!r}: each rank holds a summand of it, not a part"
        if type(placement) not in (Shard, Replicate, _StridedShard):
            return f"its placement {placement!r} is a {type(placement).__name__}, expected Shard or Replicate"
    axes: dict[int, list[Axis]] = {}
    for count, placement in zip(mesh_shape, placements, strict=True):
        if isinstance(placement, Shard | _StridedShard):
            factor = int(placement.split_factor) if isinstance(placement, _StridedShard) else 1
            axes.setdefault(placement.dim, []).append((count, factor))
    for dim, along in axes.items():
        if any(factor > 1 for _, factor in along) and not named_as_held(tuple(along), shape[dim]):
            return (
                f"torch does not say right which of its {shape[dim]} rows (dim {dim}) each rank holds, as they are placed "
                f"by {tuple(placements)!r} on a mesh of {tuple(mesh_shape)}"
            )
    return None


@lru_cache(maxsize=4096)
def named_as_held(axes: tuple[Axis, ...], extent: int) -> bool:
    """Does torch's box hold what each rank does, on every rank? axes: those that cut one dim, of `extent` indices.

    The placements do not tell who made the tensor: it has to be right for FSDP2's and for distribute_tensor's.
    """
    whole: Runs = ((0, extent),)
    named, held = _left_to_right(whole, axes), _as_fsdp(whole, axes)
    return all(len(a) <= 1 and a == b for a, b in zip(map(_joined, named), map(_joined, held), strict=True))


def _left_to_right(runs: Runs, axes: tuple[Axis, ...]) -> list[Runs]:
    """The indices of each rank as torch's answer and distribute_tensor have them, by coordinate."""
    if not axes:
        return [runs]
    (count, factor), *rest = axes
    return [leaf for part in _interleaved(runs, count, factor) for leaf in _left_to_right(part, tuple(rest))]


def _as_fsdp(runs: Runs, axes: tuple[Axis, ...]) -> list[Runs]:
    """The same as FSDP2 has them: an axis whose factor counts the parts made by those after it cuts each of those parts."""
    if not axes:
        return [runs]
    (count, factor), *rest = axes
    if factor > 1 and factor == prod(ranks for ranks, _ in rest):
        cut = [_chunks(leaf, count) for leaf in _as_fsdp(runs, tuple(rest))]
        return [pieces[i] for i in range(count) for pieces in cut]
    return [leaf for part in _interleaved(runs, count, factor) for leaf in _as_fsdp(part, tuple(rest))]


def _interleaved(runs: Runs, count: int, factor: int) -> list[Runs]:
    """_StridedShard: cut into `factor`, each of those into `count`; part i has the i-th of each."""
    cut = [_chunks(part, count) for part in _chunks(runs, factor)]
    return [tuple(run for pieces in cut for run in pieces[i]) for i in range(count)]


def _chunks(runs: Runs, count: int) -> list[Runs]:
    """torch.chunk: the first ones are of one size, the last ones smaller or empty."""
    size = -(-sum(end - first for first, end in runs) // count)
    return [_between(runs, i * size, (i + 1) * size) for i in range(count)]


def _between(runs: Runs, start: int, stop: int) -> Runs:
    found, at = [], 0
    for first, end in runs:
        a, b = max(start - at, 0), min(stop - at, end - first)
        if a < b:
            found.append((first + a, first + b))
        at += end - first
    return tuple(found)


def _joined(runs: Runs) -> Runs:
    found: list[tuple[int, int]] = []
    for first, end in runs:
        if found and found[-1][1] == first:
            found[-1] = (found[-1][0], end)
        elif first < end:
            found.append((first, end))
    return tuple(found)
