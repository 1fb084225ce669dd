"""How well can text be predicted without looking at what came before? The bar that any model has to clear."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from reshard.errors import DataError

_CHUNK_TOKENS = 1 << 22  # bincount makes int64 of what it counts: 32 MB at a time


def unigram_entropy(tokens: NDArray[np.integer[Any]]) -> float:
    """Entropy of the frequencies of single tokens, in nats per token.

    The loss of the best model that ignores all context. tokens: (n,), usually a memory map; read in chunks.
    Raises DataError where there are no tokens.
    """
    if len(tokens) == 0:
        raise DataError("the entropy of no tokens is not defined")
    counts = np.zeros(0, dtype=np.int64)
    for start in range(0, len(tokens), _CHUNK_TOKENS):
        chunk = np.bincount(tokens[start : start + _CHUNK_TOKENS], minlength=len(counts))
        chunk[: len(counts)] += counts
        counts = chunk
    p = counts[counts > 0] / len(tokens)
    return max(0.0, -float((p * np.log(p)).sum()))
