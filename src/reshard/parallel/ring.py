"""How do ranks share a sequence without any of them holding all keys and values? They pass them around in a ring.

Rank r of n holds piece r (the head) and piece 2n-1-r (the tail) of 2n, see context.py. When the keys of rank s come by:
    s = r: causal attention, as the pieces are in order
    s < r: every query sees s's head, none its tail
    s > r: the tail's queries see all of s, the head's none
so each step is plain attention, and all ranks work equally. Partial results are merged by their log-sum-exp. Backward
goes round once more, with the merged result; the gradients of keys and values travel with them and end at their owner.
Source: Liu et al., Ring Attention with Blockwise Transformers, 2023; the numerics of the merge are FlashAttention's.

Shape suffixes: B batch, S this rank's positions, H query heads, K key/value heads, E head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class RingAttention:
    """Attention of this rank's queries to the whole sequence, with one other rank's keys and values at a time."""

    group: dist.ProcessGroup

    def __call__(self, q_BHSE: Tensor, k_BKSE: Tensor, v_BKSE: Tensor) -> Tensor:
        """(B, H, S, E)."""
        repeats = q_BHSE.shape[1] // k_BKSE.shape[1]
        if repeats > 1:  # autograd sums the copies' gradients
            k_BKSE, v_BKSE = (x.repeat_interleave(repeats, dim=1) for x in (k_BKSE, v_BKSE))
        out: Tensor = _Ring.apply(q_BHSE, k_BKSE, v_BKSE, self.group)  # type: ignore[no-untyped-call]
        return out


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, group: dist.ProcessGroup) -> Tensor:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        rank, ranks, half = group.rank(), group.size(), q.shape[2] // 2
        exact = torch.promote_types(q.dtype, torch.float32)
        out = lse = torch.empty(0)
        kv = torch.stack((k, v))
        for step in range(ranks):
            owner = (rank - step) % ranks
            passing = _Passing(kv, group) if step + 1 < ranks else None
            queries, keys = _visible(owner, rank, half)
            part, part_lse = _attend(q[:, :, queries], kv[0][:, :, keys], kv[1][:, :, keys], causal=owner == rank)
            if (
                step == 0
            ):  # copies: they are written to below, and recompute may have kept the kernel's own for backward
                out, lse = part.to(exact, copy=True), part_lse.to(exact, copy=True)
            else:
                out[:, :, queries], lse[:, :, queries] = _merge(
                    out[:, :, queries], lse[:, :, queries], part.to(exact), part_lse.to(exact)
                )
            if passing is not None:
                kv = passing.wait()
        result = out.to(q.dtype)
        ctx.group = group
        ctx.save_for_backward(q, k, v, result, lse)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, out, lse = ctx.saved_tensors
        group, grad = ctx.group, grad.contiguous()
        rank, ranks, half = group.rank(), group.size(), q.shape[2] // 2
        exact = lse.dtype
        dq = torch.zeros_like(q, dtype=exact)
        kv = torch.stack((k, v))
        dkv = torch.zeros_like(kv, dtype=exact)
        for step in range(ranks):
            owner = (rank - step) % ranks
            passing = _Passing(kv, group) if step + 1 < ranks else None
            queries, keys = _visible(owner, rank, half)
            part_q, part_k, part_v = _attend_backward(
                grad[:, :, queries], q[:, :, queries], kv[0][:, :, keys], kv[1][:, :, keys], out[:, :, queries],
                lse[:, :, queries], causal=owner == rank,
            )  # fmt: skip
            dq[:, :, queries] += part_q
            dkv[0][:, :, keys] += part_k
            dkv[1][:, :, keys] += part_v
            if passing is not None:
                kv = passing.wait()
            # One pass more than the keys themselves: after n of them the gradients are home.
            dkv = _Passing(dkv, group).wait()
        return dq.to(q.dtype), dkv[0].to(k.dtype), dkv[1].to(v.dtype), None


def _visible(owner: int, rank: int, half: int) -> tuple[slice, slice]:
    """Which of this rank's queries meet which of the owner's keys?"""
    everything = slice(None)
    if owner == rank:
        return everything, everything
    return (everything, slice(0, half)) if owner < rank else (slice(half, None), everything)


class _Passing:
    """Hand a tensor to the next rank of the ring and take the one of the rank before, while other work goes on."""

    def __init__(self, tensor: Tensor, group: dist.ProcessGroup) -> None:
        rank, ranks = group.rank(), group.size()
        self._mine, self._theirs = tensor, torch.empty_like(tensor)
        self._works = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, self._mine, group=group, group_peer=(rank + 1) % ranks),
                dist.P2POp(dist.irecv, self._theirs, group=group, group_peer=(rank - 1) % ranks),
            ]
        )

    def wait(self) -> Tensor:
        """What came from the rank before."""
        for work in self._works:
            work.wait()
        return self._theirs


def _merge(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Two softmaxes over different keys as one over both."""
    both = torch.logaddexp(lse, part_lse)
    return out * (lse - both).exp()[..., None] + part * (part_lse - both).exp()[..., None], both


def _attend(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> tuple[Tensor, Tensor]:
    """Attention and its log-sum-exp (B, H, S), by the device's fused kernel."""
    aten = torch.ops.aten
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    if q.is_cuda:  # not yet run on a GPU
        found = aten._scaled_dot_product_flash_attention.default(q, k, v, 0.0, causal, False)
        return found[0], found[1]
    out, lse = aten._scaled_dot_product_flash_attention_for_cpu.default(q, k, v, 0.0, causal)
    return out, lse


def _attend_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values from the merged output and log-sum-exp: exact for these keys' share."""
    aten = torch.ops.aten
    grad, q, k, v, out, lse = (x.contiguous() for x in (grad, q, k, v, out, lse))
    if q.is_cuda:  # not yet run on a GPU
        seed = torch.empty(2, dtype=torch.uint64, device=q.device)  # of dropout, which there is none of
        dq, dk, dv = aten._scaled_dot_product_flash_attention_backward.default(
            grad, q, k, v, out, lse.float(), None, None, q.shape[2], k.shape[2], 0.0, causal, seed, seed[:0]
        )
        return dq, dk, dv
    dq, dk, dv = aten._scaled_dot_product_flash_attention_for_cpu_backward.default(grad, q, k, v, out, lse, 0.0, causal)
    return dq, dk, dv
