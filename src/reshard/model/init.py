"""What are a parameter's first values? A pure function of (rng_seed, name, row), whatever rank asks.

Rows are drawn in blocks, each from a generator of its own, so that a rank draws only the blocks that its shard
touches and every layout, the seed command included, starts from the same bits.
"""

from __future__ import annotations

import hashlib
from math import prod

import torch
from torch import Tensor

from reshard.model.spec import LlamaSpec, parameter_shapes

BLOCK_NUMBERS = 1 << 20  # numbers per generator; part of the definition: changing it changes every initial weight


def initial_std(spec: LlamaSpec, name: str) -> float | None:
    """Standard deviation of a parameter's first values; None for norms, which start at one.

    Deeper layers write smaller residuals (0.02 / sqrt(2 (layer + 1)) on wo, w2 and w3), the embedding starts at
    unit variance and the output at dim^-0.5. A tied embedding is an output too, so it starts at 0.02.
    Source: torchtitan's Llama 3, init_weights with depth_init; transformers' initializer_range for tied models.
    """
    if name == "tok_embeddings.weight":
        return 0.02 if spec.tied else 1.0
    if name == "output.weight":
        return float(spec.dim**-0.5)
    if name.endswith("norm.weight"):
        return None
    layer, kind = int(name.split(".")[1]), name.split(".")[-2]
    return float(0.02 / (2 * (layer + 1)) ** 0.5) if kind in ("wo", "w2", "w3") else 0.02


def initial_rows(spec: LlamaSpec, rng_seed: int, name: str, start: int, stop: int) -> Tensor:
    """First values of rows [start, stop) of a parameter: float32 on CPU, normal, clamped at three deviations.

    Drawn in float32 for every training dtype, so that bfloat16 and float64 runs start from the same numbers.
    """
    shape = parameter_shapes(spec)[name]
    std = initial_std(spec, name)
    if std is None:
        return torch.ones(stop - start, *shape[1:])
    row_numbers = prod(shape[1:])
    block_rows = max(1, BLOCK_NUMBERS // row_numbers)
    pieces = []
    for block in range(start // block_rows, -(-stop // block_rows)):
        first, last = block * block_rows, min((block + 1) * block_rows, shape[0])
        generator = torch.Generator(device="cpu").manual_seed(_block_seed(rng_seed, name, block))
        # At least 16 numbers: below that torch draws them by another algorithm, one by one.
        values = torch.randn(max(16, (last - first) * row_numbers), generator=generator, dtype=torch.float32)
        rows = values[: (last - first) * row_numbers].reshape(last - first, *shape[1:])
        pieces.append(rows[max(start, first) - first : min(stop, last) - first])
    result = torch.cat(pieces) if pieces else torch.empty(0, *shape[1:])
    return result.mul_(std).clamp_(-3 * std, 3 * std)


def _block_seed(rng_seed: int, name: str, block: int) -> int:
    digest = hashlib.blake2b(f"{rng_seed}/{name}/{block}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1  # manual_seed takes a signed 64-bit number
