"""Is every sequence of a global batch computed once, however it is dealt out? Shares, micro-batches and padding."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch

from reshard.config import Config
from reshard.errors import LayoutError
from reshard.model.spec import FLAVORS
from reshard.parallel.dims import Layout, check_fit, plan_batches
from reshard.text.order import TrainingText
from reshard.train.passes import IGNORED, Passes

SEQ_LEN = 8


def config(batch_size: int, **parallelism: Any) -> Config:
    return Config().with_values(training={"batch_size": batch_size, "seq_len": SEQ_LEN}, parallelism=parallelism)


@pytest.mark.parametrize("dp", range(1, 9))
def test_shares_cover_the_batch_in_order_and_rows_cover_the_shares(dp: int) -> None:
    for global_batch, batch_size in itertools.product(range(1, 20), range(1, 6)):
        batches = plan_batches(Layout(dp_shard=dp), config(batch_size), global_batch)
        taken = [
            i for rank in range(dp) for i in range(rank * batches.share, min((rank + 1) * batches.share, global_batch))
        ]
        assert taken == list(range(global_batch))
        assert batches.rows == batches.count * batches.size >= batches.share
        assert batches.size <= batch_size
        assert batches.rows - batches.share < batches.size  # no micro-batch is all padding on every rank


@pytest.mark.parametrize("pp", [2, 3, 4])
@pytest.mark.parametrize("schedule", ["GPipe", "1F1B", "Interleaved1F1B", "ZBVZeroBubble"])
def test_a_pipeline_gets_the_micro_batches_that_it_needs(schedule: str, pp: int) -> None:
    for global_batch, batch_size, dp in itertools.product(range(1, 20), range(1, 6), range(1, 4)):
        asked = config(batch_size, pipeline_parallel_degree=pp, pipeline_parallel_schedule=schedule)
        batches = plan_batches(Layout(pp=pp, dp_shard=dp), asked, global_batch)
        stages = pp * (2 if schedule in ("Interleaved1F1B", "ZBVZeroBubble") else 1)
        assert batches.count >= stages
        assert batches.size <= batch_size
        assert batches.rows >= batches.share == -(-global_batch // dp)
        if schedule == "Interleaved1F1B":
            assert batches.count % pp == 0


@pytest.mark.parametrize(("schedule", "asked", "count", "size"), [("1F1B", 5, 5, 2), ("Interleaved1F1B", 5, 6, 2),
                                                                  ("ZBVZeroBubble", 1, 1, 8), ("GPipe", 3, 3, 3)])  # fmt: skip
def test_micro_batches_that_were_asked_for(schedule: str, asked: int, count: int, size: int) -> None:
    parallelism = {
        "pipeline_parallel_degree": 2, "pipeline_parallel_schedule": schedule, "pipeline_parallel_microbatches": asked,
    }  # fmt: skip
    batches = plan_batches(Layout(pp=2), config(4, **parallelism), 8)
    assert (batches.count, batches.size) == (count, size)


def test_too_few_micro_batches_are_refused_before_there_are_ranks() -> None:
    asked = config(4, pipeline_parallel_degree=4, pipeline_parallel_microbatches=3)
    with pytest.raises(LayoutError, match="microbatches is 3, but 1F1B needs at least one for each of the 4 stages"):
        check_fit(Layout(pp=4), FLAVORS["debugmodel"], asked)


@pytest.mark.parametrize("global_batch", [1, 5, 6, 7, 8])
@pytest.mark.parametrize("dp", [1, 2, 3, 4, 6])
def test_the_ranks_rows_are_the_batch_and_padding_does_not_count(dp: int, global_batch: int) -> None:
    text = TrainingText(np.arange(1, 1000), SEQ_LEN, rng_seed=3)
    batches = plan_batches(Layout(dp_shard=dp), config(2), global_batch)
    inputs, labels = [], []
    for rank in range(dp):
        fed = Fed(batches=batches, dp_rank=rank, dp=dp)
        fed.train(text, 40, global_batch)
        assert fed.inputs.shape == fed.labels.shape == (batches.rows, SEQ_LEN)
        own = fed.labels[:, 0] != IGNORED
        assert torch.equal(fed.labels == IGNORED, ~own[:, None].expand(-1, SEQ_LEN))  # a row counts whole or not at all
        assert not fed.inputs[~own].any()  # a token that every vocabulary has
        inputs.append(fed.inputs[own])
        labels.append(fed.labels[own])
    expected = torch.from_numpy(np.stack([text[i] for i in range(40, 40 + global_batch)]))
    assert torch.equal(torch.cat(inputs), expected[:, :-1])
    assert torch.equal(torch.cat(labels), expected[:, 1:])


class Fed(Passes):
    """Passes that keep what the model would be fed, instead of having one."""

    inputs: torch.Tensor
    labels: torch.Tensor

    def __init__(self, **given: Any) -> None:
        super().__init__(
            parts=[], positions_S=torch.arange(SEQ_LEN), groups=[], device=torch.device("cpu"),
            loss_context=torch.enable_grad, tokens_per_step=1, hidden=torch.empty, **given,
        )  # fmt: skip

    def _forward_backward(self, inputs_BS: torch.Tensor, labels_BS: torch.Tensor) -> list[torch.Tensor]:
        self.inputs, self.labels = inputs_BS, labels_BS
        return []
