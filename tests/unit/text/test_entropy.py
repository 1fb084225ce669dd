"""The unigram entropy, against the definition."""

from __future__ import annotations

import math
import tracemalloc

import numpy as np
import pytest

from reshard.errors import DataError
from reshard.text.entropy import unigram_entropy


def test_known_entropies() -> None:
    assert unigram_entropy(np.full(1000, 7, dtype=np.uint16)) == 0.0
    assert unigram_entropy(np.arange(256, dtype=np.uint16)) == pytest.approx(math.log(256))
    quarters = np.array([0, 0, 1, 2], dtype=np.uint32)
    assert unigram_entropy(quarters) == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(4))


def test_chunks_add_up_and_stay_small() -> None:
    rng = np.random.default_rng(0)
    tokens = np.concatenate([rng.integers(0, 50, 9_000_000), rng.integers(0, 3000, 3_000_000)]).astype(np.uint16)
    p = np.bincount(tokens) / len(tokens)
    p = p[p > 0]
    tracemalloc.start()
    got = unigram_entropy(tokens)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert got == pytest.approx(float(-(p * np.log(p)).sum()), rel=1e-12)
    assert peak < 48 << 20  # a plain bincount of all of it would make 96 MB of int64


def test_no_tokens_have_no_entropy() -> None:
    with pytest.raises(DataError):
        unigram_entropy(np.empty(0, dtype=np.uint16))
