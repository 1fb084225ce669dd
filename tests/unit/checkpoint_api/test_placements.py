"""Is a placement refused exactly where torch's box is wrong? Against torch's own answer, over many meshes and sizes."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from math import prod

import pytest
import torch
from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset as torchs_answer
from torch.distributed.tensor.placement_types import _StridedShard

from reshard.checkpoint.placements import problem_of

Indices = list[int]


def chunk(indices: Indices, count: int, number: int) -> Indices:
    parts = torch.tensor(indices, dtype=torch.int64).chunk(count) if indices else ()
    return parts[number].tolist() if number < len(parts) else []


def by_fsdp(extent: int, mesh: tuple[int, ...], at: tuple[int, ...]) -> Indices:
    """What fully_shard over tensor parallel leaves to a rank: the later axes cut first, then the first one."""
    indices = list(range(extent))
    for count, number in (*zip(mesh[1:], at[1:], strict=True), (mesh[0], at[0])):
        indices = chunk(indices, count, number)
    return indices


def by_distribute_tensor(extent: int, mesh: tuple[int, ...], placements: list[object], at: tuple[int, ...]) -> Indices:
    """What distribute_tensor gives to a rank, by the placements' own splitting."""
    indices = torch.arange(extent)
    for count, placement, number in zip(mesh, placements, at, strict=True):
        if isinstance(placement, Shard | _StridedShard):
            indices = placement._split_tensor(indices, count, with_padding=False)[0][number]
    return [int(i) for i in indices]


def is_right(extent: int, mesh: tuple[int, ...], placements: list[object], held: Indices, at: tuple[int, ...]) -> bool:
    sizes, offsets = torchs_answer((extent,), mesh, list(at), placements)
    return held == list(range(offsets[0], offsets[0] + sizes[0])) if held else sizes[0] == 0


def fsdp_over_tp() -> Iterator[tuple[tuple[int, ...], list[object]]]:
    for mesh in product(range(1, 6), range(2, 5)):
        yield mesh, [_StridedShard(0, split_factor=mesh[1]), Shard(0)]
    for mesh in ((2, 2, 2), (3, 2, 2), (2, 1, 3)):
        yield mesh, [_StridedShard(0, split_factor=prod(mesh[1:])), Shard(0), Shard(0)]


@pytest.mark.parametrize("divides", [False, True], ids=["uneven", "even"])
def test_fsdp_over_tensor_parallel_is_refused_where_torch_is_wrong_on_any_rank_and_nowhere_else(divides: bool) -> None:
    refused = 0
    for mesh, placements in fsdp_over_tp():
        extents = range(0, 50, prod(mesh[1:])) if divides else [*range(17), 37]
        for extent in extents:
            right = all(
                is_right(extent, mesh, placements, by_fsdp(extent, mesh, at), at) for at in product(*map(range, mesh))
            )
            problem = problem_of(placements, mesh, (extent, 5))
            assert (problem is None) == right, (mesh, extent)
            refused += not right
    assert (refused == 0) == divides


def test_the_vocabularies_of_real_models() -> None:
    """Where they do not divide, most are refused; where they do, or FSDP has two ranks, none."""
    made = [_StridedShard(0, split_factor=2), Shard(0)]
    for rows, dp in product((32001, 50257), (3, 4)):
        ranks = product(range(dp), range(2))
        right = all(is_right(rows, (dp, 2), made, by_fsdp(rows, (dp, 2), at), at) for at in ranks)
        assert (problem_of(made, (dp, 2), (rows, 8)) is None) == right
    assert problem_of(made, (4, 2), (50257, 8)) is not None
    for rows in (32000, 128256, 151936):
        assert problem_of([_StridedShard(0, split_factor=8), Shard(0)], (64, 8), (rows, 8)) is None
    assert problem_of(made, (2, 2), (50257, 8)) is None


def test_rows_that_lie_interleaved_are_refused() -> None:
    for count, factor, extent in product(range(1, 5), range(2, 5), range(20)):
        for placements in (
            [_StridedShard(0, split_factor=factor), Replicate()],
            [Shard(0), _StridedShard(0, split_factor=factor)],
        ):
            mesh = (count, 2) if isinstance(placements[1], Replicate) else (2, count)
            right = all(
                is_right(extent, mesh, placements, by_distribute_tensor(extent, mesh, placements, at), at)
                for at in product(*map(range, mesh))
            )
            assert (problem_of(placements, mesh, (extent,)) is None) == right, (mesh, factor, extent)


def test_other_dims_and_plain_shards_are_never_refused() -> None:
    assert problem_of([Shard(0), Shard(0)], (3, 2), (7, 7)) is None
    assert problem_of([Replicate(), Shard(1)], (3, 2), (7, 7)) is None
    assert problem_of([_StridedShard(1, split_factor=2), Shard(1)], (3, 2), (7, 12)) is None
    assert "7 rows (dim 1)" in str(problem_of([_StridedShard(1, split_factor=2), Shard(1)], (3, 2), (12, 7)))


def test_what_is_no_part_is_refused() -> None:
    assert "Partial" in str(problem_of([Partial()], (2,), (4,)))

    class Ragged(Shard):
        pass

    assert "Ragged" in str(problem_of([Ragged(0)], (2,), (4,)))
