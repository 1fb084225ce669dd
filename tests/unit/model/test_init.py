"""Are the first weights a pure function of (rng_seed, name, row)?"""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from reshard.model.init import BLOCK_NUMBERS, initial_rows, initial_std
from reshard.model.spec import FLAVORS, LlamaSpec, parameter_shapes

torch.set_num_threads(1)

DEBUG = FLAVORS["debugmodel"]
# Rows of 3,000 numbers: blocks of 349 rows, so that cuts fall inside of blocks, on their edges and across several.
WIDE = LlamaSpec(dim=3000, n_layers=1, n_heads=30, n_kv_heads=10, ffn_dim=64, vocab_size=1500)
BLOCK_ROWS = BLOCK_NUMBERS // WIDE.dim
EMBEDDING = "tok_embeddings.weight"


@pytest.fixture(scope="module")
def whole() -> torch.Tensor:
    return initial_rows(WIDE, 7, EMBEDDING, 0, WIDE.vocab_size)


def test_any_split_of_the_rows_gives_the_same_bits(whole: torch.Tensor) -> None:
    rng = random.Random(0)
    splits = [[*sorted(rng.sample(range(1, WIDE.vocab_size), rng.randint(0, 6)))] for _ in range(6)]
    splits += [[BLOCK_ROWS], [BLOCK_ROWS - 1, BLOCK_ROWS + 1], [1], [WIDE.vocab_size - 1], [750], [375, 750, 1125]]
    for cuts in splits:
        edges = [0, *cuts, WIDE.vocab_size]
        parts = [initial_rows(WIDE, 7, EMBEDDING, a, b) for a, b in pairwise(edges)]
        assert torch.equal(torch.cat(parts), whole), cuts


def test_asking_twice_or_in_another_order_changes_nothing(whole: torch.Tensor) -> None:
    torch.manual_seed(123)  # nor does the global generator, in either direction
    before = torch.get_rng_state()
    later = initial_rows(WIDE, 7, EMBEDDING, 1000, 1200)
    earlier = initial_rows(WIDE, 7, EMBEDDING, 10, 400)
    assert torch.equal(later, whole[1000:1200])
    assert torch.equal(earlier, whole[10:400])
    assert torch.equal(torch.get_rng_state(), before)


def test_blocks_differ_from_each_other(whole: torch.Tensor) -> None:
    assert not torch.equal(whole[:BLOCK_ROWS], whole[BLOCK_ROWS : 2 * BLOCK_ROWS])
    assert torch.unique(whole[:, 0]).numel() > 0.99 * WIDE.vocab_size


def test_no_rows_are_no_rows() -> None:
    assert initial_rows(WIDE, 0, EMBEDDING, 5, 5).shape == (0, WIDE.dim)
    assert initial_rows(WIDE, 0, "norm.weight", 5, 5).shape == (0,)


def test_every_name_and_every_seed_has_values_of_its_own() -> None:
    matrices = [name for name in parameter_shapes(DEBUG) if initial_std(DEBUG, name) is not None]
    # Divided by its deviation, so that two names with one generator would show under different deviations too.
    firsts = {}
    for seed in (0, 1, 2**31):
        for name in matrices:
            row = initial_rows(DEBUG, seed, name, 0, 1)[0, :4] / (initial_std(DEBUG, name) or 1)
            firsts[seed, name] = tuple(row.tolist())
    assert len(set(firsts.values())) == 3 * len(matrices)


@pytest.mark.parametrize("name", parameter_shapes(DEBUG))
def test_shapes_and_statistics(name: str) -> None:
    shape = parameter_shapes(DEBUG)[name]
    values = initial_rows(DEBUG, 0, name, 0, shape[0])
    assert values.shape == shape
    assert values.dtype == torch.float32
    std = initial_std(DEBUG, name)
    if std is None:
        assert torch.equal(values, torch.ones(shape))
        return
    # Clamping at three deviations takes 0.7 % off the deviation; 1 % covers 32,768 draws.
    assert values.std().item() == pytest.approx(0.9933 * std, rel=0.015)
    assert abs(values.mean().item()) < 5 * std / values.numel() ** 0.5
    assert values.abs().max().item() == pytest.approx(3 * std)  # clamped: some of so many always reach it


def test_deviations_are_torchtitans() -> None:
    assert initial_std(DEBUG, EMBEDDING) == 1.0
    assert initial_std(DEBUG, "output.weight") == DEBUG.dim**-0.5
    assert initial_std(DEBUG, "layers.0.attention.wq.weight") == 0.02
    assert initial_std(DEBUG, "layers.5.feed_forward.w1.weight") == 0.02
    for layer in (0, 1, 7):
        for kind in ("attention.wo", "feed_forward.w2", "feed_forward.w3"):
            assert initial_std(DEBUG, f"layers.{layer}.{kind}.weight") == pytest.approx(0.02 / (2 * (layer + 1)) ** 0.5)
    assert initial_std(DEBUG, "layers.3.ffn_norm.weight") is None


def test_a_tied_embedding_is_small_because_it_is_the_output_too() -> None:
    tied = replace(DEBUG, tied=True)
    assert initial_std(tied, EMBEDDING) == 0.02
    untied_rows, tied_rows = initial_rows(DEBUG, 0, EMBEDDING, 0, 9), initial_rows(tied, 0, EMBEDDING, 0, 9)
    torch.testing.assert_close(tied_rows, untied_rows * 0.02)


def test_the_values_themselves_stay_what_they_are() -> None:
    # Another generator, block size or hash would silently change every seed that was ever published.
    rows = initial_rows(DEBUG, 0, "layers.0.attention.wq.weight", 0, 1)[0, :3]
    later = initial_rows(WIDE, 7, EMBEDDING, 2 * BLOCK_ROWS, 2 * BLOCK_ROWS + 1)[0, :3]
    assert BLOCK_NUMBERS == 1 << 20
    torch.testing.assert_close(rows, torch.tensor(WQ_ROW), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(later, torch.tensor(EMBEDDING_ROW), rtol=1e-5, atol=1e-7)


WQ_ROW = [0.01084521, 0.02577169, 0.01861269]
EMBEDDING_ROW = [1.101653, 1.815635, 1.498852]
