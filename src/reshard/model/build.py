"""Which Llama does a config describe, and how does it come to be without being held twice?"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from reshard.config import Config
from reshard.model.spec import LlamaSpec, RopeScaling, flavor, scaling_of_release


def spec_of(config: Config) -> LlamaSpec:
    """The spec of `[model]`: a flavor, with the numbers replaced that the section sets. Imports no torch."""
    m = config.model
    base = flavor(m.name, m.flavor)
    changes: dict[str, Any] = {
        name: value
        for name in ("dim", "n_layers", "n_heads", "n_kv_heads", "ffn_dim", "vocab_size", "rope_theta", "norm_eps")
        if (value := getattr(m, name)) is not None
    }
    if m.dim is not None or m.n_heads is not None:
        changes["head_dim"] = 0  # follows from the two
    if m.n_heads is not None and m.n_kv_heads is None:
        changes["n_kv_heads"] = min(base.n_kv_heads, m.n_heads)
    if m.tied_embeddings is not None:
        changes["tied"] = m.tied_embeddings
    if m.rope_scaling_factor is not None:
        scaling = base.rope_scaling or scaling_of_release(base.dim)
        changes["rope_scaling"] = (
            RopeScaling(**{**scaling.__dict__, "factor": m.rope_scaling_factor}) if m.rope_scaling_factor else None
        )
    return replace(base, **changes)
