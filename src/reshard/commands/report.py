"""How did the run go? `reshard report`: one HTML file, and its curves as PNG. Imports no torch.

The page needs nothing but itself: no network, no fonts, no library. Every text that comes from a file is escaped by the
template engine; what the page's script reads are numbers and escaped JSON.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path, PurePath
from statistics import median
from typing import Any

from reshard.checkpoint.layout import Entry, entries, leads_out
from reshard.commands.amounts import counted, date, seconds, size
from reshard.commands.report_charts import TONES, Curve, Line, Scale, drawn, finite, short, step_scale
from reshard.commands.report_checkpoints import Advance, Verified, checkpoint_rows, verify_entry
from reshard.commands.run_lines import moment, step_of_line
from reshard.commands.run_record import RunRecord, Stretch, read_run
from reshard.errors import StorageError
from reshard.text.once import write_whole

logger = logging.getLogger(__name__)

EXPORTS = "exports"  # where `checkpoint.export` puts them
_LAST = 12  # steps at the end of a run over which the last loss is averaged


def run(folder: Path, output: Path | None = None, *, png: bool = False, verify: bool = False,
        advance: Advance = lambda n: None) -> list[Path]:  # fmt: skip
    """Write the report of a dump folder's run; returns the files written, the page first.

    output: default `<folder>/report.html`. png: also each curve, as `<output>-<curve>.png`. verify: read every byte of
    every checkpoint; advance is called with bytes done. Raises DataError where there is no run, StorageError where the
    report cannot be written, ConfigError where matplotlib is wanted and not installed.
    """
    record = read_run(folder)
    output = folder / "report.html" if output is None else output
    if png:
        from reshard.commands.report_png import check_matplotlib

        check_matplotlib()  # before anything is written
    found, linked = checkpoints_of(record)
    if linked is not None:
        logger.warning(
            "%s: its checkpoints lie elsewhere, by a link: not followed; `reshard inspect %s` lists them",
            folder,
            linked,
        )
    verified = {e.path: verify_entry(e, advance) for e in found if not e.linked} if verify else {}
    content = render(context(record, found, verified, linked))
    _write(output, content.encode())
    written = [output]
    if png:
        from reshard.commands.report_png import draw

        for key, image in draw(record, curves(record)):
            target = output.with_name(f"{output.stem}-{key}.png")
            _write(target, image)
            written.append(target)
    return written


def bytes_to_verify(folder: Path) -> int:
    """For a progress bar."""
    found, _ = checkpoints_of(read_run(folder))
    return sum(e.manifest.bytes for e in found if e.manifest is not None)


def render(values: Mapping[str, Any]) -> str:
    """The page, from the template beside this module."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("reshard.commands", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: "\N{EN DASH}" if value is None else value,
    )
    return environment.get_template("report.html.j2").render(values)


def curves(record: RunRecord) -> list[Curve]:
    """What the run wrote down at every step."""

    def lines(key: str, name: str, factor: float = 1) -> tuple[Line, ...]:
        lost = [
            Line("left behind", "lost", _times(s.values(key, kept=False), factor), "lost") for s in record.stretches
        ]
        return (*(line for line in lost if line.points), Line(name, "main", _times(record.series(key), factor)))

    validation = Line("validation", "second", record.validations, "dots")
    found = (
        Curve("loss", "Loss", "nats per token", (*lines("loss", "training"), validation), noisy=True),
        Curve(
            "grad-norm",
            "Gradient norm",
            "before clipping",
            lines("grad_norm", "gradient norm"),
            may_log=True,
            noisy=True,
        ),
        Curve("lr", "Learning rate", "", lines("lr", "learning rate"), floor=True),
        Curve(
            "throughput", "Throughput", "tokens/s, all ranks", lines("tokens_per_s", "tokens/s"), floor=True, noisy=True
        ),
        Curve("memory", "Peak memory", "GiB, rank 0", lines("memory_gib", "GiB"), floor=True),
        Curve("mfu", "Model FLOPs utilisation", "% of peak", lines("mfu", "MFU", 100), floor=True, noisy=True),
    )
    return [curve for curve in found if curve.has_points]


def _times(points: list[tuple[int, float]], factor: float) -> list[tuple[int, float]]:
    return [(step, factor * value) for step, value in points]


def checkpoints_of(record: RunRecord) -> tuple[list[Entry], str | None]:
    """The run's checkpoints; or none, and where their folder leads, if that is a link out of the run's folder."""
    place = checkpoint_folder(record)
    if place is None:
        return [], None
    target = leads_out(place, record.folder)
    return ([], target) if target is not None else (entries(place, root=record.folder), None)


def checkpoint_folder(record: RunRecord) -> Path | None:
    """Where the run's checkpoints lie today, also if the dump folder was moved since. None: nowhere. May be a link."""
    for _, save in reversed(record.saves):
        parts = save.path.parent.parts
        for depth in range(1, min(4, len(parts) + 1)):
            place = record.folder.joinpath(*parts[-depth:])
            if ".." in parts[-depth:] or parts[-depth] == "/" or not place.is_dir():
                continue
            if leads_out(place, record.folder) is not None or entries(place, root=record.folder):
                return place
    usual = record.folder / "checkpoint"
    return usual if usual.is_dir() else None


def context(
    record: RunRecord, found: list[Entry], verified: Mapping[Path, Verified], linked: str | None = None
) -> dict[str, Any]:
    """All that the template shows, as plain values. linked: as checkpoints_of says."""
    tones = {layout: i % TONES for i, layout in enumerate(dict.fromkeys(s.layout for s in record.stretches))}
    first = min((min(s.records) for s in record.stretches if s.records), default=0)
    last = max(s.last_step for s in record.stretches)
    x = step_scale(min(first, 0 if first == 1 else first), last)
    checkpoints = checkpoint_rows(record, found, verified, linked)
    newest = found[-1].manifest if found else None
    config = newest.config if newest is not None and newest.config else {}
    bands = _bands(record, x, tones)
    charts = [drawn(curve, x) for curve in curves(record)]
    timing_curve = _timing(checkpoints)
    timing = drawn(timing_curve, x) if timing_curve.has_points else None
    return {
        "title": _title(config, record.folder),
        "folder": str(record.folder.resolve()),
        "made_at": date(datetime.now(UTC)),
        "status": _status(record, config),
        "model": newest.model if newest is not None else None,
        "flavor": _section(config, "model").get("flavor"),
        "facts": _facts(record, checkpoints),
        "x_ticks": [(x.percent(tick), f"{int(tick):,}") for tick in x.ticks],
        "bands": bands,
        "names": _names(bands),
        "lost": _lost(record, x),
        "marks": [
            {"kind": m.kind, "step": m.step, "text": m.text, "at": date(m.at), "x": x.percent(min(max(m.step, x.low), x.high))}
            for m in record.marks
        ],
        "stretches": [_stretch(s, tones) for s in record.stretches],
        "charts": charts,
        "timing": timing,
        "checkpoints": checkpoints,
        "slowest_s": max((row["total_s"] or 0 for row in checkpoints), default=0),
        "verified": bool(verified),
        "exports": _exports(record.folder),
        "config": {k: {key: _worded(x) for key, x in v.items()} for k, v in config.items() if isinstance(v, dict)},
        "events": [
            {"at": date(moment(e.get("at"))), "event": e["event"], "step": step_of_line(e),
             "rest": {k: _worded(v) for k, v in e.items() if k not in ("at", "event", "step")}}
            for s in record.stretches for e in s.events
        ],
        "data": {
            "low": x.low, "high": x.high, "charts": [c["data"] for c in (*charts, timing) if c is not None],
            "stretches": [{"from": s.start_step, "to": s.kept_last_step, "layout": s.layout} for s in record.stretches],
        },
    }  # fmt: skip


def _worded(value: Any) -> str | None:
    """A value of JSON for people."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return short(value)
    if isinstance(value, list):
        return ", ".join(str(_worded(item)) for item in value) or None
    if isinstance(value, dict):
        return ", ".join(f"{key} {_worded(item)}" for key, item in value.items()) or None
    return None if value is None else str(value)


def _title(config: Mapping[str, Any], folder: Path) -> str:
    description = _section(config, "job").get("description")
    return description if isinstance(description, str) and description.strip() else folder.resolve().name


def _section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = config.get(name)
    return section if isinstance(section, dict) else {}


def _status(record: RunRecord, config: Mapping[str, Any]) -> dict[str, str]:
    """What people ask first: is it done?"""
    steps = _section(config, "training").get("steps")
    last = record.stretches[-1]
    if isinstance(steps, int) and record.last_step >= steps:
        return {"word": "finished", "detail": f"step {record.last_step:,} of {steps:,}"}
    of = f" of {steps:,}" if isinstance(steps, int) else ""
    word = "running or cut off" if last.ending == "cut off" else "stopped"
    return {"word": word, "detail": f"step {record.last_step:,}{of}"}


def _facts(record: RunRecord, checkpoints: list[dict[str, Any]]) -> list[tuple[str, str, str]]:
    """(name, number, a word on it) of what sums up the run."""
    losses, speeds = finite(record.series("loss")), finite(record.series("tokens_per_s"))
    tokens, memory = finite(record.series("tokens_seen")), finite(record.series("memory_gib"))
    facts = []
    if losses:
        near = [value for _, value in losses[-_LAST:]]
        facts.append(("training loss", short(sum(near) / len(near)), f"mean of the last {len(near)} steps"))
    if record.validations:
        step, best = min(record.validations, key=lambda point: point[1])
        facts.append(("validation loss", short(best), f"the best, at step {step:,}"))
    facts.append(("steps", f"{record.last_step:,}", f"in {len(record.stretches)} starts"))
    if tokens:
        facts.append(("tokens", counted(tokens[-1][1]), "seen"))
    if speeds:
        facts.append(("throughput", counted(median(v for _, v in speeds)), "tokens/s, median"))
    if memory:
        facts.append(("peak memory", f"{max(v for _, v in memory):.2f} GiB", "of rank 0"))
    stalls = [row["stall_s"] for row in checkpoints if row["stall_s"] is not None]
    if stalls:
        spent = sum(value for _, value in finite(record.series("step_time_s")))
        share = f", {sum(stalls) / (sum(stalls) + spent):.1%} of the time" if spent else ""
        facts.append(("waiting for saves", seconds(sum(stalls)), f"{len(stalls)} saves{share}"))
    return facts


def _bands(record: RunRecord, x: Scale, tones: Mapping[str, int]) -> list[dict[str, Any]]:
    """The stretches along the steps, as far as they count."""
    bands: list[dict[str, Any]] = []
    for s in record.stretches:
        if s.records and s.kept_last_step > s.start_step:
            low, high = x.percent(max(s.start_step, x.low)), x.percent(s.kept_last_step)
            bands.append({"x": low, "width": round(high - low, 3), "layout": s.layout, "tone": tones[s.layout],
                          "number": s.number, "joins": bool(bands) and bands[-1]["layout"] == s.layout})  # fmt: skip
    return bands


def _names(bands: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Where each layout's name goes: once over neighbours on the same one."""
    names: list[dict[str, Any]] = []
    for band in bands:
        if names and names[-1]["layout"] == band["layout"]:
            names[-1]["width"] = round(band["x"] + band["width"] - names[-1]["x"], 3)
        else:
            names.append(dict(band))
    # What a name needs of the plot, in per cent: of a phone's, and of any. Elsewhere the table has it.
    return [
        name
        | {"slim": name["width"] < 5 + 2.9 * len(name["layout"]), "thin": name["width"] < 2 + 0.8 * len(name["layout"])}
        for name in names
    ]


def _lost(record: RunRecord, x: Scale) -> list[dict[str, Any]]:
    """The steps that count no more."""
    pieces = []
    for s in record.stretches:
        if s.records and s.kept_last_step < s.last_step:
            low, high = (x.percent(max(step, x.low)) for step in (max(s.kept_last_step, s.start_step), s.last_step))
            text = f"start {s.number}: steps {s.kept_last_step + 1} to {s.last_step} were left behind"
            pieces.append({"x": low, "width": round(high - low, 3), "text": text})
    return pieces


def _stretch(s: Stretch, tones: Mapping[str, int]) -> dict[str, Any]:
    speeds = [value for _, value in finite(s.values("tokens_per_s")) or finite(s.values("tokens_per_s", kept=False))]
    lasted = max((s.ended - s.began).total_seconds(), 0.0) if s.ended is not None and s.began is not None else None
    return {
        "number": s.number,
        "layout": s.layout,
        "tone": tones[s.layout],
        "ranks": s.world_size,
        "degrees": ", ".join(f"{axis} {n}" for axis, n in s.degrees.items()),
        "first": s.start_step + 1 if s.records else None,
        "last": s.last_step,
        "lost": max(s.last_step - s.kept_last_step, 0),
        "from": PurePath(s.loaded).name if s.loaded else "first weights",
        "began": date(s.began),
        "lasted": seconds(lasted) if lasted is not None else None,
        "speed": counted(median(speeds)) if speeds else None,
        "ending": s.ending,
        "notes": s.notes,
    }


def _timing(checkpoints: list[dict[str, Any]]) -> Curve:
    """Seconds of each save over the steps."""

    def line(name: str, tone: str, key: str, look: Any) -> Line:
        return Line(name, tone, [(r["step"], r[key]) for r in checkpoints if r[key] is not None], look)

    return Curve(
        "saves", "Seconds of each save", "s",
        (line("until committed", "quiet", "write_s", "stems"), line("training waited", "warm", "stall_s", "stems"),
         line("verification", "fine", "verify_s", "dots")),
        floor=True,
    )  # fmt: skip


def _exports(folder: Path) -> list[dict[str, Any]]:
    """What lies in `exports/<step-N>/<format>`. No link is followed, and what cannot be read says so."""
    found = []
    for path, word in _folders_below(folder / EXPORTS, 2):
        if ".old-" in path.name or ".tmp-" in path.name:
            continue
        name, problem = str(path.relative_to(folder)), word
        row: dict[str, Any] = {"from": path.parent.name, "format": path.name, "files": None, "bytes": None, "at": None}
        try:
            stats = list(_files_below(path)) if not problem else []
            if not problem:
                made = max((s.st_mtime for s in stats), default=path.stat().st_mtime)
                total = sum(s.st_size for s in stats)
                row |= {"files": len(stats), "bytes": size(total), "at": date(datetime.fromtimestamp(made, UTC))}
        except OSError as error:
            problem = f"cannot be read: {error.strerror or error}"
        found.append({**row, "path": f"{name} {problem}".rstrip()})
    return found


def _folders_below(path: Path, levels: int) -> Iterator[tuple[Path, str]]:
    """The folders so many levels below; and with a word on why, each of them and on the way that is not looked into."""
    if path.is_symlink():
        yield path, "is a link, not followed"
    elif levels == 0:
        yield path, ""
    else:
        try:
            inner = [e for e in os.scandir(path) if e.is_symlink() or e.is_dir(follow_symlinks=False)]
        except (FileNotFoundError, NotADirectoryError):
            return
        except OSError as error:
            yield path, f"cannot be read: {error.strerror or error}"
            return
        for entry in sorted(inner, key=lambda e: e.name):
            yield from _folders_below(Path(entry.path), levels - 1)


def _files_below(folder: Path) -> Iterator[os.stat_result]:
    """Of every file in a folder and below. Raises OSError where one cannot be looked at."""
    for entry in os.scandir(folder):
        if entry.is_dir(follow_symlinks=False):
            yield from _files_below(Path(entry.path))
        elif entry.is_file(follow_symlinks=False):
            yield entry.stat(follow_symlinks=False)


def _write(path: Path, content: bytes) -> None:
    """All of it or nothing. Raises StorageError."""
    try:
        write_whole(path, content)
    except OSError as error:
        raise StorageError(
            f"`{path}` cannot be written: {error.strerror or error}",
            path=path,
            hint="name another place: --output FILE",
        ) from None
