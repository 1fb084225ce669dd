"""How do ranks share a sequence? Every position once, equal work, and the attention of the whole sequence."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from reshard.config import Config
from reshard.errors import LayoutError
from reshard.model.llama import Llama, causal_attention
from reshard.model.spec import FLAVORS, LlamaSpec
from reshard.parallel.context import GatheringAttention, apply_context_parallel, positions_of
from reshard.parallel.dims import Layout, check_fit
from reshard.parallel.ring import RingAttention

SEQ_LEN = 48


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 6, 8])
def test_every_position_is_one_ranks(ranks: int) -> None:
    shared = [positions_of(r, ranks, SEQ_LEN) for r in range(ranks)]
    assert sorted(torch.cat(shared).tolist()) == list(range(SEQ_LEN))
    assert all(len(mine) == SEQ_LEN // ranks for mine in shared)


@pytest.mark.parametrize("ranks", [2, 3, 4, 6, 8])
def test_all_ranks_work_equally(ranks: int) -> None:
    looked_at = {int((positions_of(r, ranks, SEQ_LEN) + 1).sum()) for r in range(ranks)}  # keys that its queries see
    assert len(looked_at) == 1


def test_head_and_tail() -> None:
    assert positions_of(0, 2, 8).tolist() == [0, 1, 6, 7]
    assert positions_of(1, 2, 8).tolist() == [2, 3, 4, 5]


@pytest.mark.parametrize(("cp", "seq_len"), [(2, 50), (3, 16), (4, 12)])
def test_a_sequence_that_does_not_divide_is_refused_with_the_numbers(cp: int, seq_len: int) -> None:
    asked = Config().with_values(training={"seq_len": seq_len}, parallelism={"context_parallel_degree": cp})
    with pytest.raises(LayoutError) as caught:
        check_fit(Layout(cp=cp), FLAVORS["debugmodel"], asked)
    assert f"{seq_len} tokens" in caught.value.message
    assert f"{2 * cp} pieces" in caught.value.message
    hint = int((caught.value.hint or "").removeprefix("--training.seq_len "))
    check_fit(Layout(cp=cp), FLAVORS["debugmodel"], asked.with_values(training={"seq_len": hint}))


@pytest.fixture
def alone() -> Iterator[dist.ProcessGroup]:
    """A group of this process only; tests/proof/layouts/test_matrix.py has real ones."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize(("rank", "ranks"), [(0, 2), (1, 2), (2, 3)])
def test_a_ranks_queries_see_what_they_see_in_the_whole_sequence(
    kv_heads: int, rank: int, ranks: int, alone: dist.ProcessGroup
) -> None:
    # One process stands for all: its keys are the whole sequence already, in the order in which ranks would gather them.
    torch.manual_seed(0)
    q = torch.randn(2, 4, SEQ_LEN, 8, dtype=torch.float64)
    k, v = (torch.randn(2, kv_heads, SEQ_LEN, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    mine, everyone = (
        positions_of(rank, ranks, SEQ_LEN),
        torch.cat([positions_of(r, ranks, SEQ_LEN) for r in range(ranks)]),
    )
    attend = GatheringAttention(alone, mine[:, None] >= everyone[None, :])
    got = attend(q[:, :, mine], k[:, :, everyone], v[:, :, everyone])
    expected = causal_attention(q, k, v)[:, :, mine]
    torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-13)
    for ours, theirs in zip(
        torch.autograd.grad(got.sum(), (k, v)), torch.autograd.grad(expected.sum(), (k, v)), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(
    ("method", "kind"), [("auto", GatheringAttention), ("gather", GatheringAttention), ("ring", RingAttention)]
)
def test_every_block_shares_its_attention(method: str, kind: type, alone: dist.ProcessGroup) -> None:
    model = Llama(LlamaSpec(dim=32, n_layers=3, n_heads=4, n_kv_heads=2, ffn_dim=64, vocab_size=64))
    apply_context_parallel(model, alone, 16, method, torch.float32)
    assert all(isinstance(block.attention.attend, kind) for block in model.layers.values())
