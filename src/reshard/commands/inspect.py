"""What is in it? `reshard inspect`: a checkpoint, a folder of them, or a model in any format. Imports no torch for ours."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reshard.checkpoint.layout import entries, is_foreign, step_of
from reshard.checkpoint.manifest import MANIFEST
from reshard.commands import inspect_checkpoint, inspect_folder, inspect_tree
from reshard.errors import ConfigError

if TYPE_CHECKING:
    from reshard.commands.sources import RopeSaid


def run(path: Path, model: str | None = None, rope_scaling: RopeSaid | None = None) -> dict[str, Any]:
    """The report as plain JSON values; `kind` is checkpoint, folder or weights (somebody else's).

    model, rope_scaling: what a foreign file is, where it does not say. Raises CheckpointErrors and FormatErrors.
    """
    if path.exists() and not is_ours(path):
        from reshard.commands.sources import open_source
        from reshard.formats.describe import describe

        return describe(open_source(path, model=model, rope_scaling=rope_scaling))
    return inspect_folder.report(path) if _is_folder(path) else inspect_checkpoint.report(path)


def answer(
    path: Path,
    *,
    model: str | None = None,
    rope_scaling: RopeSaid | None = None,
    tensor: str | None = None,
    tree: bool = False,
    tensors: bool = False,
) -> tuple[dict[str, Any], list[str]]:
    """What the command line shows: the report, and its lines for people.

    tensor: of one tensor alone, by its name or the end of it. tree: of the names alone. tensors: with a line for each
    tensor. Raises ConfigError where a folder is asked for one of these, FormatError for a name that is not there.
    """
    if (tensor is not None or tree) and path.exists() and _is_folder(path) and is_ours(path):
        steps = [entry.path for entry in entries(path, root=path) if entry.committed]
        raise ConfigError(
            f"`{path}` is a folder of checkpoints, expected one of them",
            hint=f"name one: reshard inspect {steps[-1]}" if steps else None,
        )
    if tensor is not None:
        from reshard.commands import inspect_tensor
        from reshard.commands.sources import open_source

        found = inspect_tensor.run(path, tensor, lambda: open_source(path, model=model, rope_matters=False))
        return found, inspect_tensor.text(found)
    report = run(path, model, rope_scaling)
    if tree:
        nested = inspect_tree.tree(report["tensors"])
        return {"kind": "tree", "path": str(path), **nested}, inspect_tree.text(nested)
    lines = _text(report)
    if tensors and report["kind"] == "checkpoint":
        lines += [
            f"{name:60} {t['dtype']:9} {t['shape']!s:18} {t['bytes']:>14,}" for name, t in report["tensors"].items()
        ]
    return report, lines


def is_ours(path: Path) -> bool:
    """Is this one of our checkpoints, or a folder with steps in it?"""
    return (path / MANIFEST).exists() or (path.is_dir() and not is_foreign(path) and bool(entries(path, root=path)))


def _is_folder(path: Path) -> bool:
    """A folder of steps, rather than one of them?"""
    return not (path / MANIFEST).exists() and step_of(path) is None and path.is_dir()


def _text(report: Mapping[str, Any]) -> list[str]:
    if report["kind"] == "folder":
        return inspect_folder.text(report)
    if report["kind"] == "checkpoint":
        return inspect_checkpoint.text(report)
    from reshard.formats.describe import text

    return text(dict(report))
