"""What is in one of our checkpoints, who wrote it, and where does it come from? Reads manifests only, imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path, PurePath
from typing import Any

from reshard.checkpoint.layout import entries
from reshard.checkpoint.manifest import Manifest, read_manifest
from reshard.commands.inspect_folder import when
from reshard.commands.run_record import layout_name
from reshard.errors import CheckpointError
from reshard.torch_zip import ITEM_BYTES


@dataclass(frozen=True)
class Link:
    """One checkpoint of a chain. missing: it is known that there were others between it and the one before, now gone."""

    name: str
    step: int | None
    how: str  # seed, import, or trained
    text: str
    save_id: str | None = None
    missing: bool = False


def report(path: Path) -> dict[str, Any]:
    """The report as plain JSON values.

    Raises NotACheckpoint, TornCheckpoint, IntegrityError or StorageError as reading a manifest does.
    """
    manifest = read_manifest(path)
    groups: dict[str, dict[str, int]] = {}
    tensors = {}
    for name, entry in manifest.tensors.items():
        nbytes = prod(entry.shape) * ITEM_BYTES[entry.dtype]
        tensors[name] = {"shape": list(entry.shape), "dtype": entry.dtype, "bytes": nbytes}
        group = groups.setdefault(_group_of(name), {"tensors": 0, "numbers": 0, "bytes": 0})
        group["tensors"] += 1
        group["numbers"] += prod(entry.shape)
        group["bytes"] += nbytes
    return {
        "kind": "checkpoint",
        "path": str(path),
        "step": manifest.step,
        "holds": manifest.kind,
        "created_at": manifest.created_at,
        "save_id": manifest.save_id,
        "parent": manifest.parent,
        "source": manifest.source,
        "chain": [asdict(link) for link in chain(path, manifest)],
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
    """model, train_state, or which part of the optimizer; a weights-only checkpoint's names have no such prefix."""
    first, _, rest = name.partition(".")
    if first == "optimizer":
        kind = rest.rpartition(".")[2] if rest.startswith("state.") else "group values"
        return f"optimizer: {kind}"
    return first if first in ("model", "train_state") else "model"


def chain(path: Path, manifest: Manifest) -> list[Link]:
    """From this checkpoint back to where its weights came from, as far as it can still be told.

    A manifest names its parent's save id, which is looked for in the folder, and the directory that its run started
    from. Where retention has deleted the parent, the chain goes on from there.
    """
    by_id = {
        e.manifest.save_id: (e.path, e.manifest)
        for e in entries(path.parent, root=path.parent)
        if e.manifest is not None
    }
    links = [_link(path.name, manifest)]
    seen = {manifest.save_id}
    while True:
        if manifest.source.get("kind") != "train":
            return [*links, *_before(manifest)]
        found, missing = by_id.get(manifest.parent or ""), False
        if found is None:
            found = _started_from(path, manifest)
            missing = found is not None and found[1].save_id != manifest.parent
        if found is None and manifest.source.get("from") is None:
            rng_seed = _rng_seed(manifest)
            gone = manifest.parent is not None
            return [*links, Link("its own first weights", 0, "seed", f"rng_seed {rng_seed}", missing=gone)]
        if found is None or found[1].save_id in seen:
            name = PurePath(str(manifest.source.get("from"))).name
            return [*links, Link(name, None, "unknown", "no longer there", save_id=manifest.parent)]
        path, manifest = found
        seen.add(manifest.save_id)
        links.append(_link(path.name, manifest, missing=missing))


def _started_from(path: Path, manifest: Manifest) -> tuple[Path, Manifest] | None:
    """The checkpoint that the run of this one started from: where it lay then, or beside this one."""
    source = manifest.source.get("from")
    if not isinstance(source, str):
        return None
    for place in (path.parent / PurePath(source).name, Path(source)):
        try:
            found = read_manifest(place)
        except (CheckpointError, OSError, ValueError):
            continue
        if found.save_id == manifest.parent or found.sequence < manifest.sequence or place.parent != path.parent:
            return place, found
    return None


def _link(name: str, manifest: Manifest, *, missing: bool = False) -> Link:
    source = manifest.source
    kind = source.get("kind")
    if kind == "seed":
        return Link(name, manifest.step, "seed", f"seed, rng_seed {source.get('rng_seed')}", manifest.save_id, missing)
    if kind == "import":
        told = f"import of {source.get('format')} {source.get('path')}"
        return Link(name, manifest.step, "import", told, manifest.save_id, missing)
    told = f"{manifest.kind}, trained on {layout_name(manifest.layout)}"
    return Link(name, manifest.step, "trained", told, manifest.save_id, missing)


def _before(manifest: Manifest) -> list[Link]:
    """What an import was made from, where that was a checkpoint of ours."""
    source = manifest.source
    if source.get("kind") != "import" or "save_id" not in source:
        return []
    step, name = source.get("step"), str(source.get("path"))
    told = f"{source.get('holds')}, step {step}; see there for what was before"
    return [Link(name, step if isinstance(step, int) else None, "trained", told, str(source["save_id"]))]


def _rng_seed(manifest: Manifest) -> Any:
    section = (manifest.config or {}).get("training")
    return section.get("rng_seed") if isinstance(section, dict) else None


def text(report: Mapping[str, Any]) -> list[str]:
    """The report for people."""
    model, state = report["model"] or {}, report["train_state"]
    degrees = ", ".join(f"{axis} {n}" for axis, n in report["layout"].items())
    lines = [
        f"{report['path']}: step {report['step']}, {report['holds']}, "
        f"{report['bytes'] / 1e6:,.1f} MB in {len(report['files'])} files",
        f"saved      {when(report['created_at'])} UTC by "
        + ", ".join(f"{program} {number}" for program, number in sorted(report["versions"].items())),
        f"layout     {layout_name(report['layout'])}" + (f" ({degrees})" if degrees else ""),
    ]
    if model:
        sizes = "  ".join(
            f"{k} {model[k]}"
            for k in ("dim", "n_layers", "n_heads", "n_kv_heads", "ffn_dim", "vocab_size")
            if k in model
        )
        scaling = f", RoPE scaled {model['rope_scaling']['factor']:g} times" if model.get("rope_scaling") else ""
        lines.append(f"model      {sizes}{scaling}{', tied embeddings' if model.get('tied') else ''}")
    if state:
        lines.append("state      " + "  ".join(f"{k} {v:,}" for k, v in state.items()))
    if report["data"]:
        lines.append(f"data       {report['data'].get('dataset')}, tokenizer {report['data'].get('tokenizer')}")
    lines += [f"{'from' if i == 0 else '':10} {line}" for i, line in enumerate(_chain_text(report["chain"]))]
    lines.append("")
    for name, group in report["groups"].items():
        lines.append(
            f"{name:24} {group['tensors']:>7,} tensors {group['numbers']:>18,} numbers {group['bytes'] / 1e6:>12,.1f} MB"
        )
    total = {key: sum(group[key] for group in report["groups"].values()) for key in ("tensors", "numbers", "bytes")}
    lines.append(
        f"{'in all':24} {total['tensors']:>7,} tensors {total['numbers']:>18,} numbers {total['bytes'] / 1e6:>12,.1f} MB"
    )
    return lines


def _chain_text(links: Sequence[Mapping[str, Any]]) -> list[str]:
    """Oldest first, saves of the same layout that follow each other in one line."""
    lines: list[str] = []
    run_of: list[Mapping[str, Any]] = []

    def close() -> None:
        if run_of:
            first, last = run_of[0]["name"], run_of[-1]["name"]
            names = first if len(run_of) == 1 else f"{first} .. {last} ({len(run_of)} saves)"
            lines.append(f"{'-> ' if lines else ''}{names}: {run_of[0]['text']}")
            run_of.clear()

    # `missing` says that saves between a link and the next newer one are gone.
    for link in reversed(links):
        if run_of and (link["text"] != run_of[0]["text"] or link["how"] != "trained"):
            close()
        run_of.append(link)
        if link["missing"]:
            close()
            lines.append("-> (saves that are gone by now)")
    close()
    return lines
