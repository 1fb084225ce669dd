"""How does a position turn a query or a key? Rotary embeddings in Meta's interleaved order.

Shape suffixes: B batch, S sequence, H heads, E head_dim.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from reshard.model.spec import LlamaSpec, RopeScaling


def rope_frequencies(spec: LlamaSpec) -> Tensor:
    """Radians per position of each pair: (head_dim / 2,), float32.

    Always float32 arithmetic, on CPU: released models were trained on these very roundings, and at position 8,192
    an error of one unit in the last place of a frequency is already 5e-4 radians.
    Source: llama-models llama3/reference_impl/model.py, precompute_freqs_cis.
    """
    exponent = torch.arange(0, spec.head_dim, 2, device="cpu")[: spec.head_dim // 2].float() / spec.head_dim
    frequencies = 1.0 / (spec.rope_theta**exponent)
    return frequencies if spec.rope_scaling is None else _scaled(frequencies, spec.rope_scaling)


def _scaled(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Llama 3.1: waves longer than the original context are slowed, short ones kept, a ramp between.

    Source: llama-models llama3/reference_impl/model.py, apply_scaling.
    """
    wavelength = 2 * math.pi / frequencies
    slowed = frequencies / scaling.factor
    ramp = (scaling.original_context / wavelength - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    mixed = (1 - ramp) * slowed + ramp * frequencies
    longest_kept = scaling.original_context / scaling.high_freq_factor
    shortest_slowed = scaling.original_context / scaling.low_freq_factor
    result = torch.where(wavelength > shortest_slowed, slowed, mixed)
    return torch.where(wavelength < longest_kept, frequencies, result)


def rope_table(spec: LlamaSpec, positions_S: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Cosine and sine for each position and pair: two tensors (S, head_dim / 2) of `dtype`, on CPU."""
    angles = torch.outer(positions_S.float(), rope_frequencies(spec))
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x_BSHE: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (2i, 2i + 1) of each head by its position's angle. Same shape and dtype.

    cos, sin: (S, head_dim / 2). Arithmetic in the dtype of the table, which is at least float32.
    """
    pairs = x_BSHE.to(cos.dtype).unflatten(-1, (-1, 2))  # type: ignore[no-untyped-call]
    cos, sin = cos[:, None, :], sin[:, None, :]
    if torch.compiler.is_compiling() or cos.dtype == torch.bfloat16:
        # The compiler fuses this, but knows nothing of complex numbers; and there are none of bfloat16.
        even, odd = pairs.unbind(-1)
        turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    else:  # the same bits in one operation each way instead of a dozen
        turned = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * torch.complex(cos, sin))
    return turned.flatten(-2).to(x_BSHE.dtype)
