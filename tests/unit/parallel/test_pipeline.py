"""How do ranks share the layers? Stages cut by cost or by hand, dealt to the ranks, and a tie that is one tensor."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

from reshard.config import Config, Parallelism
from reshard.errors import LayoutError
from reshard.model.spec import FLAVORS, LlamaSpec, block_flops_per_token, output_flops_per_token
from reshard.parallel.dims import Layout, check_fit
from reshard.parallel.pipeline import Tie, parts_of_rank, split_layers, stage_count, stages_of_rank, tie_of

SEQ_LEN = 64


def spec_of(layers: int, **changes: Any) -> LlamaSpec:
    plain = {"dim": 64, "n_layers": layers, "n_heads": 4, "n_kv_heads": 2, "ffn_dim": 128, "vocab_size": 512}
    return LlamaSpec(**{**plain, **changes})


def parallelism(pp: int, schedule: str = "1F1B", points: str = "", **more: Any) -> Parallelism:
    return Parallelism(
        pipeline_parallel_degree=pp, pipeline_parallel_schedule=schedule,
        pipeline_parallel_split_points=points.split(",") if points else [], **more,
    )  # fmt: skip


def most_costly(cuts: list[range], spec: LlamaSpec) -> float:
    costs = [len(layers) * block_flops_per_token(spec, SEQ_LEN) for layers in cuts]
    costs[-1] += output_flops_per_token(spec)
    return max(costs)


@pytest.mark.parametrize("vocab_size", [16, 512, 8192, 65536])
@pytest.mark.parametrize("layers", range(1, 9))
def test_layers_are_cut_so_that_the_costliest_stage_is_cheapest(layers: int, vocab_size: int) -> None:
    spec = spec_of(layers, vocab_size=vocab_size)
    for stages in range(1, layers + 1):
        cuts = split_layers(spec, stages, [], SEQ_LEN)
        assert [i for layers_ in cuts for i in layers_] == list(range(layers))
        assert len(cuts) == stages
        assert all(len(layers_) > 0 for layers_ in cuts)
        # Against all the ways there are.
        possible = [
            [range(a, b) for a, b in itertools.pairwise((0, *inner, layers))]
            for inner in itertools.combinations(range(1, layers), stages - 1)
        ]
        assert most_costly(cuts, spec) == min(most_costly(one, spec) for one in possible)


def test_a_large_vocabulary_leaves_the_last_stage_fewer_layers() -> None:
    assert [len(cut) for cut in split_layers(spec_of(8, vocab_size=16), 2, [], SEQ_LEN)] == [4, 4]
    first, last = split_layers(spec_of(8, vocab_size=4096), 2, [], SEQ_LEN)
    assert len(first) > len(last)
    assert [len(cut) for cut in split_layers(FLAVORS["405B"], 16, [], 8192)].count(8) >= 13


def test_split_points_are_taken_as_they_are() -> None:
    assert split_layers(spec_of(6), 3, ["layers.1", "layers.5"], SEQ_LEN) == [range(1), range(1, 5), range(5, 6)]


@pytest.mark.parametrize(
    ("layers", "asked", "words"),
    [
        (2, parallelism(4), "2 layers do not make 4 pipeline stages"),
        (7, parallelism(4, "ZBVZeroBubble"), "7 layers do not make 8 pipeline stages"),
        (6, parallelism(4, "Interleaved1F1B"), "6 layers do not make 8 pipeline stages"),
        (6, parallelism(2, points="layers.6"), "`layers.6` is not layers.1 to layers.5"),
        (6, parallelism(2, points="layers.0"), "`layers.0` is not layers.1 to layers.5"),
        (6, parallelism(2, points="norm"), "`norm` is not layers.1"),
        (6, parallelism(2, points="layer.2"), "`layer.2` is not layers.1"),
        (6, parallelism(3, points="layers.4,layers.2"), "leave a stage without layers"),
        (6, parallelism(3, points="layers.2,layers.2"), "leave a stage without layers"),
        (6, parallelism(3, points="layers.2"), "1 split points make 2 stages, but 1F1B on 3 ranks needs 3"),
        (6, parallelism(2, "ZBVZeroBubble", "layers.2"), "make 2 stages, but ZBVZeroBubble on 2 ranks needs 4"),
        (6, parallelism(2, "Interleaved1F1B", "layers.2,layers.3"), "3 stages, but Interleaved1F1B on 2 ranks needs"),
    ],
)  # fmt: skip
def test_stages_that_cannot_be_are_refused_with_the_numbers(layers: int, asked: Parallelism, words: str) -> None:
    config = Config(parallelism=asked)
    with pytest.raises(LayoutError) as caught:
        check_fit(Layout(pp=asked.pipeline_parallel_degree), spec_of(layers), config)
    assert words in caught.value.message


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"training": {"compile": True}}, "training.compile is true"),
        ({"activation_checkpoint": {"mode": "selective", "selective_ac_option": "op"}}, "selective_ac_option is `op`"),
        ({"parallelism": {"fsdp_reshard_after_forward": "always"}}, "fsdp_reshard_after_forward is `always`"),
    ],
)
def test_what_zero_bubble_cannot_do_is_refused(changes: dict[str, Any], words: str) -> None:
    config = Config(parallelism=parallelism(2, "ZBVZeroBubble")).with_values(**changes)
    with pytest.raises(LayoutError) as caught:
        check_fit(Layout(pp=2), spec_of(8), config)
    assert words in caught.value.message
    check_fit(
        Layout(pp=2), spec_of(8), config.with_values(parallelism={"pipeline_parallel_schedule": "Interleaved1F1B"})
    )


@pytest.mark.parametrize(("mode", "option", "fits"), [("none", "2", True), ("selective", "op", True),
                                                      ("selective", "2", False), ("full", "2", False)])  # fmt: skip
def test_compiled_blocks_that_are_split_are_not_recomputed_whole(mode: str, option: str, fits: bool) -> None:
    config = Config().with_values(
        training={"compile": True}, activation_checkpoint={"mode": mode, "selective_ac_option": option}
    )
    check_fit(Layout(pp=2), spec_of(4), config)
    if fits:
        check_fit(Layout(tp=2), spec_of(4), config)
    else:
        with pytest.raises(LayoutError, match="cannot be compiled and recomputed whole"):
            check_fit(Layout(tp=2), spec_of(4), config)


@pytest.mark.parametrize(
    ("asked", "stages"),
    [
        (parallelism(1), 1),
        (parallelism(4), 4),
        (parallelism(4, "GPipe"), 4),
        (parallelism(4, "ZBVZeroBubble"), 8),
        (parallelism(4, "Interleaved1F1B"), 8),
        (parallelism(4, "Interleaved1F1B", pipeline_parallel_stages_per_rank=3), 12),
        (parallelism(2, "Interleaved1F1B", "layers.1,layers.2,layers.3,layers.4,layers.5"), 6),
    ],
)
def test_how_many_stages(asked: Parallelism, stages: int) -> None:
    assert stage_count(asked) == stages


def test_stages_are_dealt_out_in_turn_or_folded_into_a_v() -> None:
    assert [stages_of_rank(r, 4, 4, "1F1B") for r in range(4)] == [[0], [1], [2], [3]]
    assert [stages_of_rank(r, 2, 6, "Interleaved1F1B") for r in range(2)] == [[0, 2, 4], [1, 3, 5]]
    assert [stages_of_rank(r, 4, 8, "ZBVZeroBubble") for r in range(4)] == [[0, 7], [1, 6], [2, 5], [3, 4]]


@pytest.mark.parametrize("schedule", ["GPipe", "1F1B", "Interleaved1F1B", "ZBVZeroBubble"])
@pytest.mark.parametrize(("pp", "layers"), [(2, 5), (2, 9), (4, 8), (4, 11)])
def test_every_layer_is_one_ranks_and_both_ends_are_there(schedule: str, pp: int, layers: int) -> None:
    parts = [p for r in range(pp) for p in parts_of_rank(r, spec_of(layers), parallelism(pp, schedule), SEQ_LEN)]
    in_order = [part for _, part in sorted(parts, key=lambda numbered: numbered[0])]
    assert [number for number, _ in sorted(parts, key=lambda numbered: numbered[0])] == list(range(len(parts)))
    assert [i for part in in_order for i in part.layers] == list(range(layers))
    assert [part.embed for part in in_order] == [True] + [False] * (len(parts) - 1)
    assert [part.head for part in in_order] == [False] * (len(parts) - 1) + [True]


# -- tied embeddings; between ranks: tests/proof/layouts/test_matrix.py


@pytest.fixture
def alone() -> Iterator[dist.ProcessGroup]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_both_ends_on_one_rank_get_the_sum_of_both_gradients(alone: dist.ProcessGroup) -> None:
    embedding, copy = (torch.nn.Parameter(torch.ones(3, 2)) for _ in range(2))
    embedding.grad, copy.grad = torch.full((3, 2), 2.0), torch.full((3, 2), 5.0)
    Tie(embedding, copy, alone, other=0).sum_gradients()
    assert torch.equal(embedding.grad, torch.full((3, 2), 7.0))
    assert torch.equal(copy.grad, embedding.grad)
    assert copy.grad.data_ptr() != embedding.grad.data_ptr()  # clipping scales each once


@pytest.mark.parametrize(
    ("tied", "names", "part"),
    [
        (True, ["tok_embeddings.weight"], True),
        (True, ["output.weight", "norm.weight"], True),
        (True, ["layers.3.ffn_norm.weight"], False),
        (False, ["tok_embeddings.weight"], False),
        (False, ["output.weight"], False),
    ],
)
def test_who_takes_part_in_a_tie(tied: bool, names: list[str], part: bool, alone: dist.ProcessGroup) -> None:
    parameters = {name: torch.ones(1) for name in names}
    assert (tie_of(spec_of(4, tied=tied), parallelism(4), 4, parameters, alone) is not None) == part
