"""Which checkpoints does a folder hold, and how are they related? One row each. Reads manifests only, imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from reshard.checkpoint.layout import Entry, entries, set_aside_before
from reshard.checkpoint.lineage import abandoned, line_of
from reshard.commands.run_lines import moment
from reshard.commands.run_record import RunRecord, layout_name, run_of_checkpoints
from reshard.errors import NotACheckpoint


def report(folder: Path) -> dict[str, Any]:
    """A folder's report as plain JSON values. Raises NotACheckpoint where no step lies in it, StorageError."""
    found = entries(folder, root=folder)
    if not found:
        raise NotACheckpoint(
            f"`{folder}` holds no step-N directory, expected a checkpoint or a folder of them",
            path=folder,
            hint="a run writes them to its checkpoint.folder, `./outputs/checkpoint` unless its config says otherwise",
        )
    newest = found[-1].manifest
    run = run_of_checkpoints(folder, newest.config if newest is not None else None, {e.step for e in found})
    return {
        "kind": "folder",
        "path": str(folder),
        "steps": rows(found, run),
        "set_aside": [path.name for path in set_aside_before(folder)],
    }


def rows(found: Sequence[Entry], run: RunRecord | None) -> list[dict[str, Any]]:
    """A row for each step, by step. run: whose checkpoints they are, where that is known.

    verified: at which level, and with what answer; reading a manifest compares it with itself and with the files' names
    and sizes, as `verify --level files` does. line: `current` is the newest save and all that it follows from;
    `abandoned` is a branch that the run has left; `earlier` may be the past of either. loss: the training's at that step.
    """
    committed = [e for e in found if e.manifest is not None]
    left, line = {e.path for e in abandoned(committed)}, {e.path for e in line_of(committed)}
    table = []
    for entry in sorted(found, key=lambda e: e.step):
        row: dict[str, Any] = {"step": entry.step, "path": str(entry.path)}
        m = entry.manifest
        if m is None:
            problem = entry.problem.message if entry.problem else ""
            whole = None if entry.linked else False
            row |= {"holds": None, "problem": problem, "verified": {"level": "files", "whole": whole}}
        else:
            where = "abandoned" if entry.path in left else "current" if entry.path in line else "earlier"
            trained = m.source.get("kind") == "train"
            loss = run.loss_at(m.step, moment(m.created_at), current=where == "current") if run and trained else None
            row |= {
                "holds": m.kind,
                "bytes": m.bytes,
                "created_at": m.created_at,
                "verified": {"level": "files", "whole": True},
                "loss": loss,
                "layout": layout_name(m.layout) if trained else m.source.get("kind"),
                "sequence": m.sequence,
                "line": where,
            }
        table.append(row)
    return table


def text(found: Mapping[str, Any]) -> list[str]:
    """The table for people."""
    head = ("step", "kind", "MB", "saved at (UTC)", "files", "loss", "written by", "line")
    cells = [head]
    for row in found["steps"]:
        if row["holds"] is None:
            word = "DAMAGED" if row["verified"]["whole"] is False else "a link"
            cells.append((str(row["step"]), "-", "-", "-", word, "-", "-", row["problem"]))
            continue
        loss = "-" if row["loss"] is None else f"{row['loss']:.4f}"
        cells.append(
            (str(row["step"]), row["holds"], f"{row['bytes'] / 1e6:,.1f}", when(row["created_at"]), "whole", loss,
             str(row["layout"]), row["line"])
        )  # fmt: skip
    widths = [max(len(line[i]) for line in cells) for i in range(len(head) - 1)]
    right = {0, 2, 5}
    lines = []
    for line in cells:
        shown = [
            cell.rjust(w) if i in right else cell.ljust(w)
            for i, (cell, w) in enumerate(zip(line, widths, strict=False))
        ]
        lines.append("  ".join([*shown, line[-1]]).rstrip())
    lines += [f"set aside: {name}" for name in found["set_aside"]]
    lines.append(f"`reshard verify {found['path']}` reads every byte")
    return lines


def when(created_at: str) -> str:
    """A manifest's time, to the second."""
    at = moment(created_at)
    return at.strftime("%Y-%m-%d %H:%M:%S") if at is not None else created_at
