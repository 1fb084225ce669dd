"""What happened in a run? Its stretches, one for each start, with their steps, saves and rollbacks. Imports no torch.

Read from metrics.jsonl and events.jsonl as the trainer appends to them. Where a run went back to an older step, what it had
done since counts no more.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from pathlib import Path, PurePath
from typing import Any, Literal

from reshard.checkpoint.layout import leads_out
from reshard.commands.run_lines import numeric, read_lines, seconds_of_line, step_of_line, time_of_line
from reshard.errors import DataError

METRICS, EVENTS = "metrics.jsonl", "events.jsonl"
_AXES = {"dp_replicate": "rep", "dp_shard": "fsdp", "cp": "cp", "tp": "tp", "pp": "pp"}  # as the log names them

MarkKind = Literal["start", "resume", "reshard", "rollback", "save", "stop"]


@dataclass(frozen=True)
class Mark:
    """Something that happened after `step` steps. at: when, where it was recorded."""

    kind: MarkKind
    step: int
    text: str
    at: datetime | None = None


@dataclass(frozen=True)
class Save:
    """A checkpoint that was committed. Seconds and bytes are None where the line did not have them."""

    step: int
    kind: str
    path: PurePath
    at: datetime | None
    bytes: int | None
    stall_s: float | None
    write_s: float | None


@dataclass
class Stretch:
    """From one start of the trainer to its end, on one layout.

    start_step: completed steps when it began. records: step -> line of metrics.jsonl. kept_to: the last step of it that
    still counts, because the next stretch went on from there; None: all of them do.
    """

    number: int
    start_step: int
    degrees: Mapping[str, int]
    world_size: int | None
    began: datetime | None
    resumed: bool
    loaded: str | None
    notes: tuple[str, ...]
    events: list[dict[str, Any]] = field(default_factory=list)
    records: dict[int, dict[str, Any]] = field(default_factory=dict)
    kept_to: int | None = None

    @property
    def layout(self) -> str:
        """E.g. `fsdp2.tp2`."""
        return layout_name(self.degrees)

    @property
    def last_step(self) -> int:
        """The last step that it took."""
        return max(self.records, default=self.start_step)

    @property
    def kept_last_step(self) -> int:
        """The last step of it that still counts."""
        return self.last_step if self.kept_to is None else min(self.last_step, self.kept_to)

    @property
    def ended(self) -> datetime | None:
        """When the last thing of it was recorded."""
        return max((at for at in map(time_of_line, self.events) if at is not None), default=self.began)

    @property
    def ending(self) -> str:
        """How did it end, in a word or two?"""
        for event in reversed(self.events):
            if event["event"] == "end":
                stop = next((e for e in self.events if e["event"] == "stop"), None)
                return f"stopped by {stop.get('signal')}" if stop else "ended"
        return "cut off"

    def keeps(self, step: int) -> bool:
        """Does step N of it still count?"""
        return self.kept_to is None or step <= self.kept_to

    def values(self, key: str, *, kept: bool = True) -> list[tuple[int, float]]:
        """(step, value) of every line that has the key; kept: those that count, else those that do not."""
        found = [(step, numeric(record, key)) for step, record in self.records.items() if self.keeps(step) == kept]
        return [(step, value) for step, value in found if value is not None]


@dataclass(frozen=True)
class RunRecord:
    """One dump folder's run, from its first start to the newest."""

    folder: Path
    stretches: tuple[Stretch, ...]

    def series(self, key: str) -> list[tuple[int, float]]:
        """(step, value) of the steps that count, in order."""
        return [point for stretch in self.stretches for point in stretch.values(key)]

    @cached_property
    def last_step(self) -> int:
        """The step that the run has reached."""
        return max((s.kept_last_step for s in self.stretches if s.records), default=0)

    @cached_property
    def saves(self) -> list[tuple[Stretch, Save]]:
        """Every save, in the order of commits."""
        return [
            (s, _save(e))
            for s in self.stretches
            for e in s.events
            if e["event"] == "save" and step_of_line(e) is not None
        ]

    @cached_property
    def validations(self) -> list[tuple[int, float]]:
        """(step, loss) on held-out text, of the steps that count."""
        found: dict[int, float] = {}
        for stretch in self.stretches:
            for event in stretch.events:
                step, loss = step_of_line(event), numeric(event, "loss")
                if event["event"] == "validation" and step is not None and loss is not None and stretch.keeps(step):
                    found[step] = loss
        return sorted(found.items())

    @cached_property
    def marks(self) -> list[Mark]:
        """What people look for in the curves, in the order of happening."""
        found: list[Mark] = []
        before: Stretch | None = None
        for stretch in self.stretches:
            during = [mark for event in stretch.events if (mark := _mark(event)) is not None]
            found += [mark for mark in during if mark.kind == "rollback"]  # it went back before it could go on
            found += [*_beginning(stretch, before), *(mark for mark in during if mark.kind != "rollback")]
            before = stretch
        return found

    def loss_at(self, step: int, saved_at: datetime | None, *, current: bool) -> float | None:
        """The training loss of a step, in the stretch that saved it then.

        saved_at: when the checkpoint was made, by its manifest; its line in the events is the next one of that step.
        current: the checkpoint is on the line that the run is on; then the loss of the steps that count will do.
        """
        later = [
            (save.at, stretch)
            for stretch, save in self.saves
            if save.step == step and saved_at and save.at and save.at >= saved_at and step in stretch.records
        ]
        if later:
            return numeric(min(later, key=lambda found: found[0])[1].records[step], "loss")
        return dict(self.series("loss")).get(step) if current else None


def read_run(folder: Path, only: Container[int] | None = None) -> RunRecord:
    """Read a dump folder. only: the steps that are asked for; of the others just their numbers are read, which is fast.

    Raises DataError where it holds no run.
    """
    metrics, events = folder / METRICS, folder / EVENTS
    for journal in (metrics, events):
        if (target := leads_out(journal, folder)) is not None:
            raise DataError(
                f"`{journal}` is a link to `{target}`, out of the run's folder: it is not followed",
                path=journal,
                hint="name the folder that it lies in, or put a copy in the link's place",
            )
    if not folder.is_dir():
        problem = "is a file, expected the dump folder of a run" if folder.exists() else "does not exist"
        raise DataError(f"`{folder}` {problem}", path=folder, hint=_other_run(folder))
    if not metrics.is_file():
        raise DataError(f"`{folder}` holds no run: it has no {METRICS}", path=folder, hint=_other_run(folder))
    lines = [record for record in read_lines(metrics, only) if step_of_line(record) is not None]
    if not lines:
        raise DataError(
            f"`{metrics}` has no line of a step yet",
            path=metrics,
            hint="the run writes one when its first step is done",
        )
    recorded = read_lines(events) if events.is_file() else []
    return RunRecord(folder, tuple(_stretches(lines, [e for e in recorded if isinstance(e.get("event"), str)])))


def run_of_checkpoints(folder: Path, config: Mapping[str, Any] | None, steps: Container[int]) -> RunRecord | None:
    """The run that a checkpoint folder belongs to; None where it left no journal.

    config: the resolved config of a checkpoint in it; it says how deep under the dump folder it lies. steps: as `only`
    of read_run.
    """
    section = (config or {}).get("checkpoint")
    name = section.get("folder") if isinstance(section, dict) else None
    depth = len(PurePath(name).parts) if isinstance(name, str) and not PurePath(name).is_absolute() else 1
    above = folder.absolute().parents
    try:
        return read_run(above[depth - 1], steps) if 0 < depth <= len(above) else None
    except DataError:
        return None


def layout_name(degrees: Mapping[str, Any]) -> str:
    """A layout as the log and `reshard parity` write it, e.g. `fsdp2.tp2`; `1 rank` for one process."""
    if not degrees:
        return "not recorded"
    parts = [f"{_AXES[axis]}{n}" for axis in _AXES if isinstance(n := degrees.get(axis), int) and n > 1]
    return ".".join(parts) or "1 rank"


def _other_run(folder: Path) -> str:
    near = [p for p in (folder.parent, folder.parent.parent) if (p / METRICS).is_file()]
    if near:
        return f"the run that it belongs to: reshard report {near[0]}"
    try:
        below = sorted(p.parent for p in folder.glob(f"*/{METRICS}"))
    except OSError:
        below = []
    if below:
        return f"there is one in `{below[0]}`: reshard report {below[0]}"
    return "name the run's job.dump_folder, `./outputs` unless its config says otherwise"


def _stretches(lines: list[dict[str, Any]], events: list[dict[str, Any]]) -> list[Stretch]:
    stretches: list[Stretch] = []
    for event in events:
        if event["event"] == "start" and step_of_line(event) is not None:
            stretches.append(_start(event, len(stretches)))
        if stretches:
            stretches[-1].events.append(event)
    places: dict[int, list[int]] = {}
    for i, line in enumerate(lines):
        places.setdefault(line["step"], []).append(i)
    # From the end: the newest start has the lines from the last one of its first step on, and so on backwards. Within a
    # stretch steps go up by one, so a step's line is found again only where a later stretch took it again.
    end = len(lines)
    for stretch in reversed(stretches):
        firsts = places.get(stretch.start_step + 1, [])
        before_end = bisect_left(firsts, end)
        began = firsts[before_end - 1] if before_end and not _took_no_step(stretch) else end
        stretch.records = _in_order(lines[began:end])
        end = began
    if end > 0:  # lines of starts that were not recorded
        stretches.insert(0, _unrecorded(lines[:end]))
    for i, stretch in enumerate(stretches):
        stretch.number = i + 1
        later = [s.start_step for s in stretches[i + 1 :] if s.records]
        if later and min(later) < stretch.last_step:
            stretch.kept_to = min(later)
    return stretches


def _took_no_step(stretch: Stretch) -> bool:
    return any(e["event"] in ("end", "stop") and step_of_line(e) == stretch.start_step for e in stretch.events)


def _in_order(lines: Iterable[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    return dict(sorted({line["step"]: line for line in lines}.items()))


def _start(event: Mapping[str, Any], number_before: int) -> Stretch:
    degrees, notes = event.get("layout"), event.get("notes")
    loaded, ranks = event.get("loaded"), event.get("world_size")
    return Stretch(
        number=number_before + 1,
        start_step=step_of_line(event) or 0,
        degrees={k: v for k, v in degrees.items() if type(v) is int} if isinstance(degrees, dict) else {},
        world_size=ranks if type(ranks) is int else None,
        began=time_of_line(event),
        resumed=event.get("resumed") is True,
        loaded=loaded if isinstance(loaded, str) else None,
        notes=tuple(str(note) for note in notes) if isinstance(notes, list) else (),
    )


def _unrecorded(lines: list[dict[str, Any]]) -> Stretch:
    records = _in_order(lines)
    first = min(records)
    return Stretch(1, max(first - 1, 0), {}, None, None, False, None, (), records=records)


def _save(event: Mapping[str, Any]) -> Save:
    size = event.get("bytes")
    return Save(
        step=step_of_line(event) or 0,
        kind=str(event.get("kind") or "full"),
        path=PurePath(str(event.get("path") or f"step-{event['step']}")),
        at=time_of_line(event),
        bytes=size if type(size) is int and 0 <= size < 2**63 else None,
        stall_s=seconds_of_line(event, "stall_s"),
        write_s=seconds_of_line(event, "write_s"),
    )


def _beginning(stretch: Stretch, before: Stretch | None) -> list[Mark]:
    """The marks of a stretch's start: begun, resumed, resharded, gone back."""
    step, at = stretch.start_step, stretch.began
    source = f" from {PurePath(stretch.loaded).name}" if stretch.loaded else ""
    if before is None:
        text = f"began on {stretch.layout}{source}"
        return [Mark("start" if not stretch.resumed else "resume", step, text, at)]
    if not stretch.resumed and step == 0:
        return [Mark("start", 0, f"began anew on {stretch.layout}{source}", at)]
    found = []
    went_back = any(e["event"] == "rollback" for e in stretch.events)
    lost = max(before.last_step - step, 0)
    saved_since = [e["step"] for e in before.events if e["event"] == "save" and (step_of_line(e) or 0) > step]
    if saved_since and not went_back:  # whole steps were there, and were left behind: somebody asked for an older one
        found.append(Mark("rollback", step, f"went back to step {step}: {lost} steps left behind", at))
    again = f", {lost} steps taken again" if lost and not saved_since else ""
    if stretch.layout != before.layout:
        found.append(Mark("reshard", step, f"resharded {before.layout} → {stretch.layout}{source}{again}", at))
    else:
        found.append(Mark("resume", step, f"resumed on {stretch.layout}{source}{again}", at))
    return found


def _mark(event: Mapping[str, Any]) -> Mark | None:
    step, at = step_of_line(event), time_of_line(event)
    if step is None:
        return None
    if event["event"] == "save":
        return Mark("save", step, f"saved step-{step}, {event.get('kind')}", at)
    if event["event"] == "rollback":
        was = PurePath(str(event.get("set_aside") or "a checkpoint")).name
        return Mark("rollback", step, f"rolled back to step {step}: {was} was damaged ({event.get('reason')})", at)
    if event["event"] == "stop":
        return Mark("stop", step, f"stopped by {event.get('signal')}", at)
    return None
