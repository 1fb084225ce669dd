"""What shape is a Llama? Sizes, named flavors and the shape of every parameter. Imports no torch.

Field names are those of Meta's params.json; `ffn_dim` stands for what ffn_dim_multiplier and multiple_of compute.
Sources: llama-models sku_list.py (sizes), transformers' configs of the released models (RoPE factors, ties).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from reshard.errors import ConfigError, LayoutError, nearest


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's stretching of the slow rotary frequencies, see model/rope.py.

    params.json only says *that* a model is scaled; the factor is 32 for Llama 3.2's 1B and 3B, 8 for all others.
    """

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192  # positions of the pre-training before the stretch


@dataclass(frozen=True)
class LlamaSpec:
    """Everything that decides the arithmetic of one Llama."""

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    ffn_dim: int
    vocab_size: int
    head_dim: int = 0  # 0: dim / n_heads
    rope_theta: float = 500000.0
    norm_eps: float = 1e-5
    rope_scaling: RopeScaling | None = None
    tied: bool = False  # output.weight is tok_embeddings.weight

    def __post_init__(self) -> None:
        if self.head_dim == 0:
            if self.dim % self.n_heads:
                raise LayoutError(f"model dim {self.dim} does not divide into {self.n_heads} heads")
            object.__setattr__(self, "head_dim", self.dim // self.n_heads)
        if self.n_heads % self.n_kv_heads:
            raise LayoutError(f"{self.n_heads} query heads do not divide among {self.n_kv_heads} KV heads")
        if self.head_dim % 2:
            raise LayoutError(f"head_dim {self.head_dim} is odd, but RoPE rotates pairs")

    def to_dict(self) -> dict[str, Any]:
        """The spec as plain JSON values."""
        return asdict(self)

    @staticmethod
    def from_dict(data: dict[str, Any]) -> LlamaSpec:
        """The inverse of to_dict. Raises ConfigError on a key that no spec has."""
        data = dict(data)
        unknown = sorted(set(data) - {f.name for f in fields(LlamaSpec)})
        if unknown:
            raise ConfigError(f"model spec has unknown keys: {', '.join(unknown)}")
        scaling = data.pop("rope_scaling", None)
        return LlamaSpec(**data, rope_scaling=RopeScaling(**scaling) if scaling else None)


def ffn_dim_from_params(dim: int, multiplier: float | None, multiple_of: int) -> int:
    """Hidden size of the feed-forward, as Meta's reference computes it: 2/3 of 4 dim, scaled, rounded up."""
    hidden = int(2 * (4 * dim) / 3)
    if multiplier is not None:
        hidden = int(multiplier * hidden)
    return multiple_of * ((hidden + multiple_of - 1) // multiple_of)


def scaling_of_release(dim: int) -> RopeScaling:
    """Which RoPE scaling does a scaled release of this width have? 32 for 3.2's 1B and 3B, else 8."""
    return RopeScaling(factor=32.0 if dim in (2048, 3072) else 8.0)


_VOCAB = 128256  # Llama 3's tiktoken: 128,000 ranks and 256 special tokens

FLAVORS: dict[str, LlamaSpec] = {
    "debugmodel": LlamaSpec(dim=256, n_layers=8, n_heads=16, n_kv_heads=8, ffn_dim=768, vocab_size=512),
    "1B": LlamaSpec(
        dim=2048, n_layers=16, n_heads=32, n_kv_heads=8, ffn_dim=8192, vocab_size=_VOCAB, tied=True,
        rope_scaling=RopeScaling(factor=32.0),
    ),
    "3B": LlamaSpec(
        dim=3072, n_layers=28, n_heads=24, n_kv_heads=8, ffn_dim=8192, vocab_size=_VOCAB, tied=True,
        rope_scaling=RopeScaling(factor=32.0),
    ),
    "8B": LlamaSpec(dim=4096, n_layers=32, n_heads=32, n_kv_heads=8, ffn_dim=14336, vocab_size=_VOCAB),
    "70B": LlamaSpec(dim=8192, n_layers=80, n_heads=64, n_kv_heads=8, ffn_dim=28672, vocab_size=_VOCAB),
    "405B": LlamaSpec(
        dim=16384, n_layers=126, n_heads=128, n_kv_heads=8, ffn_dim=53248, vocab_size=_VOCAB,
        rope_scaling=RopeScaling(factor=8.0),
    ),
}  # fmt: skip

# `llama3` takes each flavor as it was first released; the others say which release is meant.
RELEASES: dict[str, tuple[str, ...]] = {
    "llama3": tuple(FLAVORS),
    "llama3_1": ("debugmodel", "8B", "70B", "405B"),
    "llama3_2": ("debugmodel", "1B", "3B"),
    "llama3_3": ("70B",),
}


def flavor(name: str, flavor_name: str) -> LlamaSpec:
    """Which spec do `model.name` and `model.flavor` mean? Raises ConfigError with the nearest valid name."""
    if name not in RELEASES:
        raise ConfigError(
            f"model.name `{name}` is not known, expected one of {', '.join(RELEASES)}",
            key="model.name",
            hint=_did_you_mean(name, RELEASES),
        )
    if flavor_name not in RELEASES[name]:
        raise ConfigError(
            f"model.flavor `{flavor_name}` is not known for {name}, expected one of {', '.join(RELEASES[name])}",
            key="model.flavor",
            hint=_did_you_mean(flavor_name, RELEASES[name]),
        )
    spec = FLAVORS[flavor_name]
    if name != "llama3" and spec.rope_scaling is None:
        spec = replace(spec, rope_scaling=scaling_of_release(spec.dim))
    return spec


def release_is_tied(spec: LlamaSpec) -> bool:
    """Is this, but for the tie, the model of a release whose embeddings are tied (Llama 3.2's 1B and 3B)?"""
    return replace(spec, tied=True) in FLAVORS.values()


def release_context(spec: LlamaSpec) -> int | None:
    """Positions that the release of exactly this model is meant for. None for a model that is no release."""
    released = [flavor(name, size) for name, sizes in RELEASES.items() for size in sizes if size != "debugmodel"]
    if not any(replace(spec, tied=other.tied) == other for other in released):
        return None
    return 8192 if spec.rope_scaling is None else 131072


def _did_you_mean(word: str, valid: Any) -> str | None:
    close = nearest(word, valid)
    return f"did you mean `{close}`?" if close else None


def parameter_shapes(spec: LlamaSpec) -> dict[str, tuple[int, ...]]:
    """Canonical name -> shape of every parameter, in the order of the forward pass.

    A tied model has no `output.weight` of its own.
    """
    q, kv = spec.n_heads * spec.head_dim, spec.n_kv_heads * spec.head_dim
    shapes: dict[str, tuple[int, ...]] = {"tok_embeddings.weight": (spec.vocab_size, spec.dim)}
    for i in range(spec.n_layers):
        shapes |= {
            f"layers.{i}.attention_norm.weight": (spec.dim,),
            f"layers.{i}.attention.wq.weight": (q, spec.dim),
            f"layers.{i}.attention.wk.weight": (kv, spec.dim),
            f"layers.{i}.attention.wv.weight": (kv, spec.dim),
            f"layers.{i}.attention.wo.weight": (spec.dim, q),
            f"layers.{i}.ffn_norm.weight": (spec.dim,),
            f"layers.{i}.feed_forward.w1.weight": (spec.ffn_dim, spec.dim),
            f"layers.{i}.feed_forward.w2.weight": (spec.dim, spec.ffn_dim),
            f"layers.{i}.feed_forward.w3.weight": (spec.ffn_dim, spec.dim),
        }
    shapes["norm.weight"] = (spec.dim,)
    if not spec.tied:
        shapes["output.weight"] = (spec.vocab_size, spec.dim)
    return shapes


def parameter_count(spec: LlamaSpec) -> int:
    """How many parameters are stored and trained? A tied embedding counts once."""
    total = 0
    for shape in parameter_shapes(spec).values():
        size = 1
        for extent in shape:
            size *= extent
        total += size
    return total


def block_flops_per_token(spec: LlamaSpec, seq_len: int) -> float:
    """Floating point operations of one layer's forward and backward for one token.

    6 per weight, plus 12 n_heads head_dim seq_len of attention, not halved for causality. Source: PaLM, appendix B.
    """
    q, kv = spec.n_heads * spec.head_dim, spec.n_kv_heads * spec.head_dim
    weights = spec.dim * (2 * q + 2 * kv + 3 * spec.ffn_dim) + 2 * spec.dim
    return 6.0 * weights + 12.0 * q * seq_len


def output_flops_per_token(spec: LlamaSpec) -> float:
    """The same of the last norm and the output projection."""
    return 6.0 * (spec.vocab_size * spec.dim + spec.dim)


def flops_per_token(spec: LlamaSpec, seq_len: int) -> float:
    """Floating point operations of forward and backward for one token, the usual MFU count; looking up costs none."""
    return spec.n_layers * block_flops_per_token(spec, seq_len) + output_flops_per_token(spec)
