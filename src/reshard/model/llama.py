"""What does a Llama compute? Llama 3 in plain PyTorch, with Meta's parameter names.

Shape suffixes: B batch, S sequence, D dim, H query heads, K key/value heads, E head_dim, F ffn_dim, V vocab_size.

Nothing here knows of ranks. Under tensor parallel the projections hand out local tensors, so heads are counted
from the tensor at hand (`-1`), never from the spec. There are no persistent buffers: a checkpoint holds parameters only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from reshard.model.rope import rope_table, rotate
from reshard.model.spec import LlamaSpec

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def upcast(dtype: torch.dtype) -> torch.dtype:
    """The dtype for norms, RoPE and loss: float32, or float64 where the model is float64. Never down."""
    return torch.promote_types(dtype, torch.float32)


class RMSNorm(nn.Module):
    """x / rms(x) * weight, the quotient in at least float32."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim))

    def forward(self, x_BSD: Tensor) -> Tensor:
        """(B, S, D) -> (B, S, D), in x's dtype."""
        normed = F.rms_norm(x_BSD.to(upcast(x_BSD.dtype)), (x_BSD.shape[-1],), None, self.eps)
        return normed.to(x_BSD.dtype) * self.weight


def causal_attention(q_BHSE: Tensor, k_BKSE: Tensor, v_BKSE: Tensor) -> Tensor:
    """Softmax attention to the past: (B, H, S, E). Several query heads share one key/value head."""
    return F.scaled_dot_product_attention(
        q_BHSE, k_BKSE, v_BKSE, is_causal=True, enable_gqa=q_BHSE.shape[1] != k_BKSE.shape[1]
    )


class Attention(nn.Module):
    """Grouped-query attention. `attend` is replaced where ranks share a sequence."""

    def __init__(self, spec: LlamaSpec) -> None:
        super().__init__()
        self.head_dim = spec.head_dim
        self.wq = nn.Linear(spec.dim, spec.n_heads * spec.head_dim, bias=False)
        self.wk = nn.Linear(spec.dim, spec.n_kv_heads * spec.head_dim, bias=False)
        self.wv = nn.Linear(spec.dim, spec.n_kv_heads * spec.head_dim, bias=False)
        self.wo = nn.Linear(spec.n_heads * spec.head_dim, spec.dim, bias=False)
        self.attend: Attend = causal_attention

    def forward(self, x_BSD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """(B, S, D) -> (B, S, D). cos, sin: (S, E / 2), the rotary table of these positions."""
        q_BSHE = self.wq(x_BSD).unflatten(-1, (-1, self.head_dim))
        k_BSKE = self.wk(x_BSD).unflatten(-1, (-1, self.head_dim))
        v_BSKE = self.wv(x_BSD).unflatten(-1, (-1, self.head_dim))
        q_BSHE, k_BSKE = rotate(q_BSHE, cos, sin), rotate(k_BSKE, cos, sin)
        out_BHSE = self.attend(q_BSHE.transpose(1, 2), k_BSKE.transpose(1, 2), v_BSKE.transpose(1, 2))
        return cast(Tensor, self.wo(out_BHSE.transpose(1, 2).flatten(2)))


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x)."""

    def __init__(self, spec: LlamaSpec) -> None:
        super().__init__()
        self.w1 = nn.Linear(spec.dim, spec.ffn_dim, bias=False)
        self.w2 = nn.Linear(spec.ffn_dim, spec.dim, bias=False)
        self.w3 = nn.Linear(spec.dim, spec.ffn_dim, bias=False)

    def forward(self, x_BSD: Tensor) -> Tensor:
        """(B, S, D) -> (B, S, D)."""
        return cast(Tensor, self.w2(F.silu(self.w1(x_BSD)) * self.w3(x_BSD)))


class Block(nn.Module):
    """One transformer layer. With `recompute` set, backward runs its forward again instead of keeping it."""

    def __init__(self, spec: LlamaSpec) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(spec.dim, spec.norm_eps)
        self.attention = Attention(spec)
        self.ffn_norm = RMSNorm(spec.dim, spec.norm_eps)
        self.feed_forward = FeedForward(spec)
        # None: keep all activations. Otherwise the keyword arguments of torch.utils.checkpoint.checkpoint.
        # Inside the block rather than around it, so that parameter names stay Meta's.
        self.recompute: dict[str, Any] | None = None

    def forward(self, x_BSD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """`compute`, now or again in backward."""
        if self.recompute is None or not torch.is_grad_enabled():
            return self.compute(x_BSD, cos, sin)
        return cast(Tensor, checkpoint(self.compute, x_BSD, cos, sin, use_reentrant=False, **self.recompute))

    def compute(self, x_BSD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """The layer itself: both residual branches."""
        x_BSD = x_BSD + self.attention(self.attention_norm(x_BSD), cos, sin)
        return cast(Tensor, x_BSD + self.feed_forward(self.ffn_norm(x_BSD)))


class TiedOutput(nn.Module):
    """The output projection of a tied model: a module without parameters, so that the embedding exists once."""

    def forward(self, x_BSD: Tensor, weight_VD: Tensor) -> Tensor:
        """(B, S, D) and the embedding (V, D) -> logits (B, S, V)."""
        return F.linear(x_BSD, weight_VD)


@dataclass(frozen=True)
class Part:
    """A run of consecutive layers, with the embedding before or the output after it, or both: a pipeline's stage."""

    layers: range
    embed: bool = True
    head: bool = True

    @staticmethod
    def whole(spec: LlamaSpec) -> Part:
        """All of a model."""
        return Part(range(spec.n_layers))


class Llama(nn.Module):
    """Tokens to logits, or one part of the way: hidden states come in where the embedding is not in the part.

    Build it under `torch.device("meta")`, shard it, `to_empty`, then `init_rope` and fill the parameters
    (model/init.py or a checkpoint): no rank ever holds more than its part.
    """

    def __init__(self, spec: LlamaSpec, part: Part | None = None) -> None:
        super().__init__()
        self.spec, self.part = spec, part or Part.whole(spec)
        if self.part.embed:
            self.tok_embeddings = nn.Embedding(spec.vocab_size, spec.dim)
        self.layers = nn.ModuleDict({str(i): Block(spec) for i in self.part.layers})
        if self.part.head:
            self.norm = RMSNorm(spec.dim, spec.norm_eps)
            # A tied model whose embedding lies in another part has a copy of it here, under the name output.weight.
            self.output = TiedOutput() if self.shares_embedding else nn.Linear(spec.dim, spec.vocab_size, bias=False)
        self.register_buffer("cos", None, persistent=False)
        self.register_buffer("sin", None, persistent=False)

    @property
    def shares_embedding(self) -> bool:
        """Does the output use the embedding of this very part?"""
        return self.spec.tied and self.part.embed and self.part.head

    def init_rope(self, positions_S: Tensor) -> None:
        """Compute the rotary table for these positions (those of the sequence, or of this rank's part of it)."""
        parameter = next(self.parameters())
        cos, sin = rope_table(self.spec, positions_S.cpu(), upcast(parameter.dtype))
        self.cos, self.sin = cos.to(parameter.device), sin.to(parameter.device)

    def forward(self, x: Tensor) -> Tensor:
        """tokens (B, S) int64, or hidden states (B, S, D) -> logits (B, S, V), or hidden states.

        S may be shorter than the rotary table. Under sequence parallel S of the hidden states is a rank's share, but
        attention always sees all of it.
        """
        cos, sin = self.cos, self.sin
        if self.part.embed:
            cos, sin = cos[: x.shape[1]], sin[: x.shape[1]]
            x = self.tok_embeddings(x)
        for block in self.layers.values():
            x = block(x, cos, sin)
        if not self.part.head:
            return x
        x = self.norm(x)
        if self.shares_embedding:
            return cast(Tensor, self.output(x, self.tok_embeddings.weight))
        return cast(Tensor, self.output(x))


def cross_entropy_sum(logits_BSV: Tensor, labels_BS: Tensor) -> Tensor:
    """Sum (not mean) over tokens of -log p(label), in nats; labels of -100 do not count. At least float32.

    The sum, because the mean belongs to the global batch, which no single rank or micro-step can see.
    """
    return F.cross_entropy(
        logits_BSV.flatten(0, 1).to(upcast(logits_BSV.dtype)), labels_BS.flatten(), reduction="sum", ignore_index=-100
    )
