"""What is in it? `reshard inspect`: one of our checkpoints, or a folder of them. Reads manifests only, imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

from reshard.checkpoint.layout import Entry, entries, is_foreign, step_of
from reshard.checkpoint.lineage import abandoned, line_of
from reshard.checkpoint.manifest import MANIFEST, Manifest, read_manifest
from reshard.errors import NotACheckpoint

_ITEM_BYTES = {"float64": 8, "int64": 8, "float32": 4, "int32": 4, "bfloat16": 2, "float16": 2, "uint8": 1, "bool": 1}


def is_ours(path: Path) -> bool:
    """Is this one of our checkpoints, or a folder with steps in it?"""
    return (path / MANIFEST).exists() or (path.is_dir() and not is_foreign(path) and bool(entries(path)))


def run(path: Path) -> dict[str, Any]:
    """The report as plain JSON values: of one checkpoint (`kind` checkpoint) or of a folder (`kind` folder).

    Raises NotACheckpoint, TornCheckpoint, IntegrityError or StorageError as reading a manifest does.
    """
    if not (path / MANIFEST).exists() and step_of(path) is None and path.is_dir():
        found = entries(path)
        if not found:
            raise NotACheckpoint(f"`{path}` holds no step-N directory and no {MANIFEST}", path=path)
        return {"kind": "folder", "path": str(path), "steps": _steps(found)}
    manifest = read_manifest(path)
    return {"kind": "checkpoint", "path": str(path), **_checkpoint(path, manifest)}


def _checkpoint(path: Path, manifest: Manifest) -> dict[str, Any]:
    groups: dict[str, dict[str, int]] = {}
    tensors = {}
    for name, entry in manifest.tensors.items():
        nbytes = prod(entry.shape) * _ITEM_BYTES.get(entry.dtype, 0)
        tensors[name] = {"shape": list(entry.shape), "dtype": entry.dtype, "bytes": nbytes}
        group = groups.setdefault(_group_of(name), {"tensors": 0, "numbers": 0, "bytes": 0})
        group["tensors"] += 1
        group["numbers"] += prod(entry.shape)
        group["bytes"] += nbytes
    return {
        "step": manifest.step,
        "holds": manifest.kind,
        "created_at": manifest.created_at,
        "save_id": manifest.save_id,
        "parent": manifest.parent,
        "source": manifest.source,
        "history": _history(path, manifest),
        "layout": manifest.layout,
        "model": manifest.model,
        "data": manifest.data,
        "train_state": manifest.train_state,
        "versions": manifest.versions,
        "bytes": manifest.bytes,
        "files": {name: entry.bytes for name, entry in manifest.files.items()},
        "groups": groups,
        "tensors": tensors,
        "config": manifest.config,
    }


def _group_of(name: str) -> str:
    """model, optimizer or train_state; a weights-only checkpoint's names have no such prefix."""
    first = name.partition(".")[0]
    return first if first in ("model", "optimizer", "train_state") else "model"


def _history(path: Path, manifest: Manifest) -> list[str]:
    """From this checkpoint back to where its weights came from, as far as the folder still tells."""
    by_id = {e.manifest.save_id: e for e in entries(path.parent) if e.manifest is not None}
    line = [_origin(path.name, manifest)]
    before = by_id.get(manifest.parent or "")
    while before is not None and before.manifest is not None and len(line) <= len(by_id):
        line.append(_origin(before.path.name, before.manifest))
        before = by_id.get(before.manifest.parent or "")
    return line


def _origin(name: str, manifest: Manifest) -> str:
    kind = manifest.source.get("kind")
    if kind == "seed":
        return f"{name}: seed, rng_seed {manifest.source.get('rng_seed')}"
    if kind == "import":
        return f"{name}: import of {manifest.source.get('format')} {manifest.source.get('path')}"
    layout = ".".join(f"{axis}{n}" for axis, n in manifest.layout.items() if n > 1) or "1 rank"
    return f"{name}: {manifest.kind}, trained on {layout}"


def _steps(found: list[Entry]) -> list[dict[str, Any]]:
    committed = [e for e in found if e.manifest is not None]
    left, line = {e.path for e in abandoned(committed)}, {e.path for e in line_of(committed)}
    rows = []
    for entry in sorted(found, key=lambda e: e.step):
        row: dict[str, Any] = {"step": entry.step, "path": str(entry.path)}
        if entry.manifest is None:
            row |= {"holds": None, "problem": entry.problem.message if entry.problem else ""}
        else:
            m = entry.manifest
            where = "abandoned" if entry.path in left else "current" if entry.path in line else "earlier"
            row |= {
                "holds": m.kind,
                "bytes": m.bytes,
                "created_at": m.created_at,
                "sequence": m.sequence,
                "line": where,
            }
        rows.append(row)
    return rows


def text(report: Mapping[str, Any]) -> list[str]:
    """The report for people."""
    return _folder_text(report) if report["kind"] == "folder" else _checkpoint_text(report)


def _folder_text(report: Mapping[str, Any]) -> list[str]:
    lines = [f"{'step':>8}  {'holds':6} {'MB':>10}  {'saved at (UTC)':20} line"]
    for row in report["steps"]:
        if row["holds"] is None:
            lines.append(f"{row['step']:>8}  {'-':6} {'-':>10}  {row['problem']}")
        else:
            when = row["created_at"].removesuffix("+00:00").replace("T", " ")
            lines.append(f"{row['step']:>8}  {row['holds']:6} {row['bytes'] / 1e6:>10,.1f}  {when:20} {row['line']}")
    return lines


def _checkpoint_text(report: Mapping[str, Any]) -> list[str]:
    model, state = report["model"] or {}, report["train_state"]
    layout = ".".join(f"{axis}{n}" for axis, n in report["layout"].items() if n > 1) or "1 rank"
    lines = [
        f"{report['path']}: step {report['step']}, {report['holds']}, "
        f"{report['bytes'] / 1e6:,.1f} MB in {len(report['files'])} files",
        f"saved      {report['created_at']} by "
        + ", ".join(f"{program} {number}" for program, number in sorted(report["versions"].items())),
        f"layout     {layout}",
    ]
    if model:
        sizes = "  ".join(
            f"{k} {model[k]}" for k in ("dim", "n_layers", "n_heads", "n_kv_heads", "ffn_dim", "vocab_size")
        )
        scaling = f", RoPE scaled {model['rope_scaling']['factor']:g} times" if model.get("rope_scaling") else ""
        lines.append(f"model      {sizes}{scaling}{', tied embeddings' if model.get('tied') else ''}")
    if state:
        lines.append("state      " + "  ".join(f"{k} {v:,}" for k, v in state.items()))
    if report["data"]:
        lines.append(f"data       {report['data'].get('dataset')}, tokenizer {report['data'].get('tokenizer')}")
    lines += [f"{'history' if i == 0 else '':10} {line}" for i, line in enumerate(report["history"])]
    lines.append("")
    for name, group in report["groups"].items():
        lines.append(
            f"{name:12} {group['tensors']:>7,} tensors {group['numbers']:>18,} numbers {group['bytes'] / 1e6:>12,.1f} MB"
        )
    return lines
