"""How do ranks share a sequence? Each holds two pieces of it, one early and one late, and sees all keys and values.

A causal model does more work for later positions. With 2 n pieces for n ranks, rank r takes piece r from the front and
piece r from the back, so all ranks work equally. Two ways to attend, both exact: gather K and V of the whole sequence,
with the transposed collective for their gradients (any device and dtype); or pass them round in a ring (ring.py), which
never holds more than one other rank's.

Shape suffixes: B batch, S this rank's positions, T all positions, H query heads, K key/value heads, E head_dim.
"""

# ruff: noqa: N815  shape suffixes
from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from reshard.model.llama import Attend, Block, Llama
from reshard.parallel.ring import RingAttention


def positions_of(rank: int, ranks: int, seq_len: int) -> Tensor:
    """Global positions of this rank's tokens: (seq_len / ranks,) int64, head piece first. seq_len divides by 2 ranks."""
    if ranks == 1:
        return torch.arange(seq_len)
    piece = seq_len // (2 * ranks)
    head, tail = rank * piece, (2 * ranks - 1 - rank) * piece
    return torch.cat((torch.arange(head, head + piece), torch.arange(tail, tail + piece)))


@dataclass(frozen=True)
class GatheringAttention:
    """Attention of this rank's queries to the whole sequence's keys and values.

    group: the ranks that share the sequence. mask_ST: True where a query may look.
    """

    group: dist.ProcessGroup
    mask_ST: Tensor

    def __call__(self, q_BHSE: Tensor, k_BKSE: Tensor, v_BKSE: Tensor) -> Tensor:
        """(B, H, S, E)."""
        k_BKTE, v_BKTE = _gather(k_BKSE, self.group), _gather(v_BKSE, self.group)
        return F.scaled_dot_product_attention(
            q_BHSE, k_BKTE, v_BKTE, attn_mask=self.mask_ST, enable_gqa=q_BHSE.shape[1] != k_BKTE.shape[1]
        )


def apply_context_parallel(
    model: Llama, group: dist.ProcessGroup, seq_len: int, method: str, compute: torch.dtype
) -> None:
    """Replace the attention of all blocks. Call init_rope with positions_of this rank, and give it its tokens only.

    method: gather, ring or auto. compute: dtype of the forward.
    """
    ranks = group.size()
    everyone = torch.cat([positions_of(r, ranks, seq_len) for r in range(ranks)])
    mine = positions_of(group.rank(), ranks, seq_len)
    device = next(model.parameters()).device
    fused_on_cuda = device.type == "cuda" and compute in (torch.bfloat16, torch.float16)
    attend: Attend = GatheringAttention(group, (mine[:, None] >= everyone[None, :]).to(device))
    if method == "ring" or (method == "auto" and fused_on_cuda):
        attend = RingAttention(group)
    for block in model.layers.values():
        cast(Block, block).attention.attend = attend


def _gather(x_BKSE: Tensor, group: dist.ProcessGroup) -> Tensor:
    """All ranks' positions, in rank order: (B, K, T, E)."""
    gathered: Tensor = _AllGather.apply(x_BKSE, group)  # type: ignore[no-untyped-call]
    return gathered


class _AllGather(torch.autograd.Function):
    """Concatenate along the sequence over the group; backward sums every rank's gradient of this rank's part."""

    @staticmethod
    def forward(ctx: Any, x_BKSE: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        out = x_BKSE.new_empty(group.size() * x_BKSE.shape[0], *x_BKSE.shape[1:])
        dist.all_gather_single(out, x_BKSE.contiguous(), group=group)
        # (ranks * B, K, S, E) -> (B, K, ranks * S, E)
        by_rank: Tensor = out.unflatten(0, (group.size(), -1))  # type: ignore[no-untyped-call]
        return by_rank.permute(1, 2, 0, 3, 4).flatten(2, 3)

    @staticmethod
    def backward(ctx: Any, grad_BKTE: Tensor) -> tuple[Tensor, None]:
        # (B, K, ranks * S, E) -> (ranks * B, K, S, E)
        parts = grad_BKTE.unflatten(2, (ctx.group.size(), -1)).permute(2, 0, 1, 3, 4)  # type: ignore[no-untyped-call]
        mine = torch.empty_like(parts[0], memory_format=torch.contiguous_format)
        dist.reduce_scatter_single(mine, parts.flatten(0, 1).contiguous(), group=ctx.group)
        return mine, None
