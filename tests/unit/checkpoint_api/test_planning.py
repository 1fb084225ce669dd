"""Does everybody come to one plan? Who writes what, who reads what for whom; for many ranks, worked out in one process."""

from __future__ import annotations

import pickle
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from reshard.checkpoint.collector import collector_at_rest
from reshard.checkpoint.exchange import SLAB_BYTES, Slab, plan, want
from reshard.checkpoint.index import Index
from reshard.checkpoint.load import open_index
from reshard.checkpoint.manifest import TensorEntry
from reshard.checkpoint.offers import Offer, spreads
from reshard.checkpoint.plan import make_plan
from reshard.checkpoint.ranks import Ranks
from reshard.checkpoint.reader import Job
from reshard.checkpoint.save import About, save
from reshard.checkpoint.state import Box
from reshard.errors import CheckpointError

Layout = Callable[[tuple[int, ...], int, int], Box]
ABOUT = About(step=1, kind="full", source={"kind": "test"})
SHAPES = {
    "wide": (96, 512), "tall": (1000, 8), "odd": (37, 11), "row": (1, 64), "vector": (130,), "scalar": (), "deep": (12, 6, 10),
    "large": (3000, 1024),
}  # fmt: skip


def cut(extent: int, ranks: int, rank: int) -> tuple[int, int]:
    size = -(-extent // ranks)
    start = min(rank * size, extent)
    return start, min(size, extent - start)


def whole(shape: tuple[int, ...]) -> Box:
    return Box((0,) * len(shape), shape)


def along(dim: int) -> Layout:
    def box(shape: tuple[int, ...], rank: int, ranks: int) -> Box:
        if not shape:
            return whole(shape)
        at = min(dim, len(shape) - 1)
        start, size = cut(shape[at], ranks, rank)
        offsets, sizes = [0] * len(shape), list(shape)
        offsets[at], sizes[at] = start, size
        return Box(tuple(offsets), tuple(sizes))

    return box


def replica(shape: tuple[int, ...], _rank: int, _ranks: int) -> Box:
    return whole(shape)


def hybrid(shape: tuple[int, ...], rank: int, ranks: int) -> Box:
    """HSDP: two replicas of dim-0 shards."""
    return along(0)(shape, rank % (ranks // 2), ranks // 2)


def both_dims(shape: tuple[int, ...], rank: int, ranks: int) -> Box:
    """FSDP over TP: rows by rank // 2, columns by rank % 2."""
    if len(shape) < 2:
        return along(0)(shape, rank // 2, ranks // 2)
    (row, rows), (column, columns) = cut(shape[0], ranks // 2, rank // 2), cut(shape[1], 2, rank % 2)
    return Box((row, column, *(0,) * (len(shape) - 2)), (rows, columns, *shape[2:]))


LAYOUTS: dict[str, Layout] = {
    "dim0": along(0), "dim1": along(1), "replica": replica, "hybrid": hybrid, "both": both_dims,
}  # fmt: skip


def offers(layout: Layout, ranks: int, shapes: dict[str, tuple[int, ...]] = SHAPES) -> list[Offer]:
    def parts(rank: int) -> Iterator[tuple[str, TensorEntry, Box]]:
        for name, shape in shapes.items():
            box = layout(shape, rank, ranks)
            if box.volume:
                yield name, TensorEntry(shape, "float32"), box

    return [Offer.of(parts(rank), {name: (name,) for name in shapes}) for rank in range(ranks)]


# -- offers


def test_an_offer_travels_and_says_the_same() -> None:
    offer = offers(both_dims, 4)[3]
    received = pickle.loads(pickle.dumps(offer))
    assert list(received) == list(offer)
    assert received.names.paths == {name: (name,) for name in SHAPES}
    assert [name for name, _, _ in offer] == [name for name in SHAPES if both_dims(SHAPES[name], 3, 4).volume]


def test_several_boxes_of_a_tensor_and_tensors_of_the_same_kind() -> None:
    entry = TensorEntry((4, 2), "int64")
    parts = [(n, entry, Box((row, 0), (2, 2))) for n in ("a", "b") for row in (0, 2)]
    offer = Offer.of(parts)
    assert list(offer) == parts
    assert len(offer.boxes) == 1  # told once


def test_one_box_twice_or_two_shapes_for_a_name_are_refused() -> None:
    entry, box = TensorEntry((4,), "int64"), Box((0,), (4,))
    with pytest.raises(CheckpointError, match="`a` is offered twice"):
        Offer.of([("a", entry, box), ("a", entry, box)])
    with pytest.raises(CheckpointError, match="`a` is offered twice"):
        Offer.of([("a", entry, box), ("a", TensorEntry((5,), "int64"), box)])


def test_ranks_with_different_tensors() -> None:
    """As in a pipeline: some names on some ranks, one on all."""
    entry = TensorEntry((6,), "float32")
    per_rank = [["first", "all"], ["all"], ["all", "last"], ["all", "last"]]
    told = [Offer.of((n, entry, Box((0,), (6,))) for n in names) for names in per_rank]
    found = {name: spread.holders[Box((0,), (6,))] for name, spread in spreads(told).items()}
    assert found == {"first": [0], "all": [0, 1, 2, 3], "last": [2, 3]}


# -- the plan of a save


@pytest.mark.parametrize("ranks", [2, 4, 6])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_number_is_written_once_by_one_who_has_it(layout: str, ranks: int) -> None:
    told = offers(LAYOUTS[layout], ranks)
    plans = [make_plan(told, rank) for rank in range(ranks)]
    counted = {name: np.zeros(shape, dtype=int) for name, shape in SHAPES.items()}
    for rank, own in enumerate(plans):
        for name, _, box in own.written_by(rank):
            assert (name, box) in own.mine
            assert box == LAYOUTS[layout](SHAPES[name], rank, ranks)
            counted[name][box.slices_in(whole(SHAPES[name]))] += 1
    assert all((count == 1).all() for count in counted.values())
    for rank in range(ranks):  # and all ranks think so of all
        written = [sorted(p.written_by(rank), key=str) for p in plans]
        assert all(w == written[0] for w in written)


def test_replicas_are_shared_out_evenly_and_level_what_only_one_rank_has() -> None:
    entry = TensorEntry((1000,), "float32")
    parts = [(f"t{i}", entry, Box((0,), (1000,))) for i in range(100)]
    alone = ("alone", TensorEntry((20_000,), "float32"), Box((0,), (20_000,)))
    told = [Offer.of([*parts, alone] if rank == 2 else parts) for rank in range(4)]
    load = Counter({rank: sum(box.volume for _, box in make_plan(told, rank).mine) for rank in range(4)})
    assert sum(load.values()) == 120_000
    assert max(load.values()) - min(load.values()) <= 1000


@pytest.mark.parametrize(
    ("boxes", "words"),
    [
        ([Box((0, 0), (2, 4))], "8 numbers of 16"),
        ([Box((0, 0), (4, 4)), Box((2, 0), (2, 4))], "24 numbers of 16"),
        ([Box((0, 0), (3, 4)), Box((2, 0), (1, 4))], "overlap"),
        ([Box((0, 0), (4, 3)), Box((1, 2), (4, 1))], "outside"),
    ],
    ids=["gap", "twice", "overlap", "outside"],
)
def test_boxes_that_do_not_tile_a_tensor_are_refused_with_the_ranks(boxes: list[Box], words: str) -> None:
    told = [Offer.of([("a", TensorEntry((4, 4), "float32"), box)]) for box in boxes]
    with pytest.raises(CheckpointError, match=words) as caught:
        make_plan(told, 0)
    for rank, box in enumerate(boxes):
        assert f"rank {rank}: {list(box.sizes)} at {list(box.offsets)}" in caught.value.message


def test_ranks_that_disagree_on_a_shape_are_refused() -> None:
    told = [Offer.of([("a", TensorEntry((n,), "float32"), Box((0,), (n,)))]) for n in (4, 5)]
    with pytest.raises(CheckpointError, match=r"`a` .*\[4\] float32 on rank 0, \[5\] float32 on rank 1"):
        make_plan(told, 0)


# -- the plan of a load


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Index]:
    folder = tmp_path_factory.mktemp("stored") / "x"
    save(folder, {name: torch.zeros(shape) for name, shape in SHAPES.items()}, ABOUT, Ranks())
    return folder, open_index(folder)[1]


def planned(stored: tuple[Path, Index], layout: Layout, ranks: int) -> list[tuple[list[Job], list[Slab]]]:
    directory, index = stored
    wants = [want(index, {name: layout(shape, rank, ranks) for name, shape in SHAPES.items()}) for rank in range(ranks)]
    return [plan(directory, index, wants, rank, whole_chunks=False) for rank in range(ranks)]


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_stored_number_is_read_once_and_everybody_gets_their_part(
    layout: str, ranks: int, stored: tuple[Path, Index]
) -> None:
    plans = planned(stored, LAYOUTS[layout], ranks)
    read = {name: np.zeros(shape, dtype=int) for name, shape in SHAPES.items()}
    for rank, (own, slabs) in enumerate(plans):
        got = {name: np.zeros(shape, dtype=int) for name, shape in SHAPES.items()}
        for job in own:
            read[job.name][job.common.slices_in(whole(SHAPES[job.name]))] += 1
            got[job.name][job.common.slices_in(whole(SHAPES[job.name]))] += 1
        for slab in slabs:
            assert rank in slab.takers
            for c in slab.cuts:
                part = dict(c.wants)[rank]
                got[c.chunk.name][part.slices_in(whole(SHAPES[c.chunk.name]))] += 1
                if slab.reader == rank:
                    read[c.chunk.name][c.rows.slices_in(whole(SHAPES[c.chunk.name]))] += 1
        for name, shape in SHAPES.items():
            expected = np.zeros(shape, dtype=int)
            expected[LAYOUTS[layout](shape, rank, ranks).slices_in(whole(shape))] = 1
            assert (got[name] == expected).all(), name
    assert all((count == 1).all() for count in read.values())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_ranks_meet_in_the_same_slabs_in_the_same_order(layout: str, stored: tuple[Path, Index]) -> None:
    """Otherwise one would wait for a message that the other means to send later."""
    plans = planned(stored, LAYOUTS[layout], 6)
    for a in range(6):
        for b in range(a):
            of_a = [slab for slab in plans[a][1] if b in slab.takers]
            of_b = [slab for slab in plans[b][1] if a in slab.takers]
            assert of_a == of_b


def test_reading_for_others_is_shared_out(stored: tuple[Path, Index]) -> None:
    plans = planned(stored, replica, 4)
    load = [sum(slab.nbytes for slab in slabs if slab.reader == rank) for rank, (_, slabs) in enumerate(plans)]
    assert sum(load) == sum(4 * whole(shape).volume for shape in SHAPES.values())
    assert max(load) - min(load) <= SLAB_BYTES


def test_ten_thousand_small_replicas_are_few_messages(tmp_path: Path) -> None:
    shapes = {f"t{i}": (4, 4) for i in range(10_000)}
    save(tmp_path / "x", {name: torch.zeros(shape) for name, shape in shapes.items()}, ABOUT, Ranks())
    index = open_index(tmp_path / "x")[1]
    wants = [want(index, {name: whole(shape) for name, shape in shapes.items()}) for _ in range(2)]
    own, slabs = plan(tmp_path / "x", index, wants, 0, whole_chunks=False)
    assert own == []
    assert len(slabs) == 1
    assert len(slabs[0].cuts) == 10_000


# -- how it grows


@pytest.mark.slow
def test_planning_grows_with_the_ranks_and_not_with_their_square(tmp_path: Path) -> None:
    """The best of three of each, four times as many ranks: four times the work would be 4, the square 16."""
    shapes = {f"layers.{i}.{name}": shape for i in range(20) for name, shape in {"w": (4096, 64), "v": (2048,)}.items()}
    save(tmp_path / "x", {name: torch.zeros(1).expand(shape) for name, shape in shapes.items()}, ABOUT, Ranks())
    index = open_index(tmp_path / "x")[1]

    def seconds(ranks: int) -> float:
        told = offers(both_dims, ranks, shapes)
        wants = [Offer.of(list(offer)) for offer in told]
        took = []
        for _ in range(3):
            with collector_at_rest():  # as the save and the load have it
                begin = time.process_time()
                make_plan(told, 0)
                plan(tmp_path / "x", index, wants, 0, whole_chunks=False)
                took.append(time.process_time() - begin)
        return min(took)

    assert seconds(2048) < 8 * seconds(512)


def test_an_offer_of_a_large_run_is_small() -> None:
    shapes = {f"layers.{i}.{name}.weight": (1024, 512) for i in range(100) for name in ("wq", "wk", "wv", "wo", "w1")}
    offer: Any = offers(both_dims, 8, shapes)[5]
    assert len(pickle.dumps(offer)) < 10_000
