"""What became of every checkpoint of a run? Its saves, joined with what lies in the folder today. Imports no torch."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from reshard.checkpoint.layout import Entry
from reshard.checkpoint.verify import verify_checkpoint
from reshard.commands.amounts import date, seconds, size
from reshard.commands.inspect_folder import rows
from reshard.commands.report_charts import short
from reshard.commands.run_lines import moment, numeric
from reshard.commands.run_record import RunRecord

Advance = Callable[[int], object]


@dataclass(frozen=True)
class Verified:
    """What reading every byte of a checkpoint came to, and how long it took."""

    whole: bool | None
    problem: str
    seconds: float


def verify_entry(entry: Entry, advance: Advance) -> Verified:
    """Read every byte of a checkpoint that is no link. Raises nothing of ours."""
    began = time.perf_counter()
    verdict = verify_checkpoint(entry.path, "bytes", advance)
    problem = verdict.problem or "; ".join(f"{f.file} {f.problem}".strip() for f in verdict.findings[:3])
    return Verified(verdict.whole, problem, time.perf_counter() - began)


def checkpoint_rows(
    record: RunRecord, found: list[Entry], verified: Mapping[Path, Verified], linked: str | None = None
) -> list[dict[str, Any]]:
    """A row for each save of the run, in their order, and before them what it began with; see the template.

    linked: where the folder of checkpoints leads, if it is a link out of the run's: then none of them was looked at.
    """
    on_disk = {Path(row["path"]).name: row for row in rows(found, record)}
    aside = _set_aside(record)
    newest = {save.path.name: i for i, (_, save) in enumerate(record.saves)}
    table = []
    for i, (stretch, save) in enumerate(record.saves):
        name = save.path.name
        there = on_disk.pop(name, None) if newest[name] == i and i not in aside else None
        loss = numeric(stretch.records.get(save.step, {}), "loss")
        row: dict[str, Any] = {
            "step": save.step, "name": name, "kind": save.kind, "at": date(save.at), "layout": stretch.layout,
            "bytes": size(save.bytes) if save.bytes is not None else None, "stall_s": save.stall_s, "write_s": save.write_s,
            "loss": short(loss) if loss is not None else None, "line": None, "verify_s": None,
        }  # fmt: skip
        if there is None:
            gone = f"set aside as {aside[i]}" if i in aside else "replaced" if newest[name] != i else "deleted since"
            if linked is not None:
                gone = f"not looked at: the folder is a link to {linked}"
            row |= {"state": gone, "sort": "bad" if i in aside else "gone"}
        else:
            row |= _state(there, verified.get(Path(there["path"])))
        table.append(row)
    first = []
    for row in on_disk.values():  # what no event tells of: the seed or the import that it began with
        path = Path(row["path"])
        saved = date(moment(row.get("created_at")))
        first.append({
            "step": row["step"], "name": path.name, "kind": row["holds"], "at": saved, "layout": row.get("layout"),
            "bytes": size(row["bytes"]) if "bytes" in row else None, "stall_s": None, "write_s": None, "loss": None,
            "line": None, "verify_s": None, **_state(row, verified.get(path)),
        })  # fmt: skip
    for row in first + table:
        waits = [row["stall_s"], row["write_s"], row["verify_s"]]
        row["total_s"] = max((s for s in waits if s is not None), default=None)
        row["times"] = {key: seconds(row[key]) for key in ("stall_s", "write_s", "verify_s") if row[key] is not None}
    return first + table


def _state(row: Mapping[str, Any], verified: Verified | None) -> dict[str, Any]:
    """What is known of a checkpoint that is there."""
    if row["holds"] is None and row["verified"]["whole"] is None:
        return {"state": f"not looked at: {row['problem']}", "sort": "gone", "line": None}
    if row["holds"] is None or (verified is not None and verified.whole is False):
        problem = verified.problem if verified is not None and verified.problem else row.get("problem")
        return {"state": f"DAMAGED: {problem}", "sort": "bad", "line": row.get("line")}
    if verified is not None:
        state = "verified, every byte" if verified.whole else f"not verified: {verified.problem}"
        return {"state": state, "sort": "good" if verified.whole else "gone", "line": row["line"],
                "verify_s": verified.seconds}  # fmt: skip
    return {"state": "names and sizes agree", "sort": "good", "line": row["line"]}


def _set_aside(record: RunRecord) -> dict[int, str]:
    """Number of a save -> the name under which it was set aside."""
    found: dict[int, str] = {}
    latest: dict[str, int] = {}
    i = 0
    for stretch in record.stretches:
        for event in stretch.events:
            if event["event"] == "save" and i < len(record.saves) and event.get("step") == record.saves[i][1].step:
                latest[record.saves[i][1].path.name] = i
                i += 1
            was = PurePath(str(event.get("set_aside") or "")).name
            if event["event"] == "rollback" and was in latest:
                found[latest[was]] = PurePath(str(event.get("now") or "")).name
    return found
