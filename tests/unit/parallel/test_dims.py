"""Do degrees, ranks, model and batch fit together? What does not is refused with the numbers, before anything starts."""

from __future__ import annotations

from typing import Any

import pytest

from reshard.config import Config
from reshard.errors import LayoutError
from reshard.model.spec import FLAVORS
from reshard.parallel.dims import Layout, check_fit, plan_batches, resolve_layout

DEBUG = FLAVORS["debugmodel"]


def config(rep: int = 1, shard: int = -1, tp: int = 1, **training: Any) -> Config:
    degrees = {
        "data_parallel_replicate_degree": rep,
        "data_parallel_shard_degree": shard,
        "tensor_parallel_degree": tp,
    }
    return Config().with_values(parallelism=degrees, training=training)


@pytest.mark.parametrize(
    ("world", "rep", "shard", "tp", "expected"),
    [
        (1, 1, -1, 1, Layout()),
        (2, 1, -1, 1, Layout(dp_shard=2)),
        (4, 1, 4, 1, Layout(dp_shard=4)),
        (4, 2, -1, 1, Layout(dp_replicate=2, dp_shard=2)),
        (4, 1, -1, 2, Layout(dp_shard=2, tp=2)),
        (8, 2, -1, 2, Layout(dp_replicate=2, dp_shard=2, tp=2)),
        (6, 1, -1, 2, Layout(dp_shard=3, tp=2)),
        (2, 2, 1, 1, Layout(dp_replicate=2)),
        (4, 1, 1, 4, Layout(tp=4)),
    ],
)
def test_degrees_become_a_layout(world: int, rep: int, shard: int, tp: int, expected: Layout) -> None:
    layout = resolve_layout(config(rep, shard, tp), world)
    assert layout == expected
    assert layout.world_size == world
    assert layout.dp * layout.tp == world
    assert set(layout.to_dict()) == {"dp_replicate", "dp_shard", "cp", "tp", "pp"}


@pytest.mark.parametrize(
    ("world", "rep", "shard", "tp", "numbers", "hint"),
    [
        (3, 1, -1, 2, ("3 ranks", "tp 2"), "start 2 ranks"),
        (2, 1, 4, 1, ("4", "2 rank"), "start 4 ranks"),
        (8, 2, 2, 1, ("4", "8 rank"), "start 4 ranks"),
        (1, 2, -1, 1, ("1 ranks", "dp_replicate 2"), "start 2 ranks"),
        (4, 1, 0, 1, ("0", "-1"), None),
    ],
)
def test_degrees_that_do_not_fit_the_ranks(
    world: int, rep: int, shard: int, tp: int, numbers: tuple[str, ...], hint: str | None
) -> None:
    with pytest.raises(LayoutError) as caught:
        resolve_layout(config(rep, shard, tp), world)
    assert all(number in caught.value.message for number in numbers)
    assert hint is None or hint in (caught.value.hint or "")


def test_async_tensor_parallel_without_the_compiler_is_refused() -> None:
    with pytest.raises(LayoutError, match=r"needs training\.compile"):
        resolve_layout(Config().with_values(parallelism={"enable_async_tensor_parallel": True}), 1)


@pytest.mark.parametrize(
    ("tp", "changes", "words"),
    [
        (16, {}, ("8 KV heads", "16")),
        (32, {}, ("16 query heads", "32")),
        (8, {"seq_len": 100}, ("100 tokens", "8")),
        (3, {}, ("16 query heads", "3")),
    ],
)
def test_a_model_that_does_not_divide_is_refused(tp: int, changes: dict[str, int], words: tuple[str, ...]) -> None:
    asked = config(tp=tp, **changes)
    with pytest.raises(LayoutError) as caught:
        check_fit(resolve_layout(asked, tp), DEBUG, asked)
    assert all(word in caught.value.message for word in words)


def test_a_model_that_divides_is_not() -> None:
    asked = config(tp=8, seq_len=64)
    check_fit(resolve_layout(asked, 8), DEBUG, asked)


@pytest.mark.parametrize(
    ("layout", "batch_size", "global_batch", "share", "count", "size"),
    [
        (Layout(), 2, 8, 8, 4, 2),
        (Layout(dp_shard=2), 2, 8, 4, 2, 2),
        (Layout(dp_shard=4), 2, 8, 2, 1, 2),
        (Layout(dp_replicate=2, dp_shard=2), 1, 8, 2, 2, 1),
        (Layout(tp=2), 8, 8, 8, 1, 8),
        (Layout(tp=2, cp=2), 4, 8, 8, 2, 4),
        (Layout(dp_shard=3), 1, 8, 3, 3, 1),  # one rank has a row of padding
        (Layout(dp_shard=2), 3, 8, 4, 2, 3),  # and here every rank has two
        (Layout(), 16, 8, 8, 1, 8),
        (Layout(dp_shard=4), 8, 6, 2, 1, 2),
    ],
)
def test_every_rank_runs_equally_many_equal_micro_batches(
    layout: Layout, batch_size: int, global_batch: int, share: int, count: int, size: int
) -> None:
    batches = plan_batches(layout, config(batch_size=batch_size), global_batch)
    assert (batches.share, batches.count, batches.size) == (share, count, size)
    assert batches.rows >= batches.share
    assert batches.share * layout.dp >= global_batch
    assert batches.size <= batch_size


def test_a_global_batch_of_nothing_is_refused() -> None:
    with pytest.raises(LayoutError, match="0 sequences"):
        plan_batches(Layout(), config(batch_size=1), 0)


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        (Layout(), "1 rank"),
        (Layout(dp_shard=2), "fsdp2"),
        (Layout(dp_replicate=2, dp_shard=2), "rep2.fsdp2"),
        (Layout(dp_shard=2, tp=2), "fsdp2.tp2"),
    ],
)
def test_a_layout_says_its_name(layout: Layout, expected: str) -> None:
    assert str(layout) == expected
