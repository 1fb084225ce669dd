"""What is in a foreign file? Its model, its tensors and their sizes, as plain JSON values; nothing but headers is read."""

from __future__ import annotations

from math import prod
from typing import Any

from reshard.formats.protocol import Source


def describe(source: Source) -> dict[str, Any]:
    """The report of `reshard inspect` for a source of any format."""
    tensors = {
        name: {"shape": list(tensor.shape), "dtype": tensor.dtype, "bytes": tensor.nbytes}
        for name, tensor in source.tensors.items()
    }
    dtypes: dict[str, int] = {}
    for tensor in source.tensors.values():
        dtypes[tensor.dtype] = dtypes.get(tensor.dtype, 0) + tensor.nbytes
    return {
        "kind": "weights",
        "path": str(source.path),
        "format": source.provenance.get("format"),
        "files": {file["name"]: file["bytes"] for file in source.provenance.get("files", ())},
        "model": source.spec.to_dict() if source.spec is not None else None,
        "about": dict(source.about),
        "assets": sorted(source.assets),
        "tokenizer_problem": source.tokenizer_problem,
        "dtypes": dtypes,
        "parameters": sum(prod(tensor.shape) for tensor in source.tensors.values()),
        "bytes": sum(tensor.nbytes for tensor in source.tensors.values()),
        "tensors": tensors,
    }


def text(report: dict[str, Any]) -> list[str]:
    """The report for people."""
    model = report["model"] or {}
    lines = [f"{report['path']}: {report['format']}, {report['parameters']:,} numbers, {report['bytes'] / 1e6:,.1f} MB"]
    if model:
        sizes = "  ".join(
            f"{k} {model[k]}" for k in ("dim", "n_layers", "n_heads", "n_kv_heads", "ffn_dim", "vocab_size")
        )
        scaling = f", RoPE scaled {model['rope_scaling']['factor']:g} times" if model.get("rope_scaling") else ""
        lines.append(f"model      {sizes}{scaling}{', tied embeddings' if model.get('tied') else ''}")
        lines.append(f"           rope_theta {model['rope_theta']:g}  norm_eps {model['norm_eps']:g}")
    if report["assets"]:
        lines.append(f"beside     {', '.join(report['assets'])}")
    if report["tokenizer_problem"]:
        lines.append(f"tokenizer  cannot be handed on: {report['tokenizer_problem']}")
    width = max((len(name) for name in report["tensors"]), default=0)
    for name, t in report["tensors"].items():
        shape = " x ".join(map(str, t["shape"]))
        lines.append(f"{name:{width}}  {shape:>16}  {t['dtype']:9} {t['bytes'] / 1e6:>10,.2f} MB")
    return lines
