"""The report's curves as PNG files, for slides and chats: drawn by matplotlib, which is an extra."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from tempfile import TemporaryDirectory

from reshard.commands.report_charts import Curve, finite, smoothed
from reshard.commands.run_record import RunRecord
from reshard.errors import ConfigError

_COLOURS = {"main": "#2158d8", "second": "#b4480a", "lost": "#7d8594"}
_TONES = ("#2158d8", "#0d7d74", "#8a3fc2", "#a35a00", "#b3246b", "#4c6a13")
_RULES = {"resume": ("#2158d8", ":"), "reshard": ("#8a3fc2", "-"), "rollback": ("#b91c1c", "--")}


def check_matplotlib() -> None:
    """Raises ConfigError with the way to install it."""
    if find_spec("matplotlib") is None:
        raise ConfigError("PNG files need matplotlib, which is not installed", hint="pip install 'reshard[plot]'")


@contextmanager
def _no_traces() -> Iterator[None]:
    """Matplotlib, as it is imported, makes folders in the user's home and a list of fonts in them: nobody asked for it."""
    if "MPLCONFIGDIR" in os.environ:
        yield
        return
    with TemporaryDirectory(prefix="reshard-") as folder:
        os.environ["MPLCONFIGDIR"] = folder
        try:
            yield
        finally:
            del os.environ["MPLCONFIGDIR"]


def draw(record: RunRecord, curves: Sequence[Curve]) -> Iterator[tuple[str, bytes]]:
    """(key, PNG file) of each curve."""
    with _no_traces():
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

    tones = {layout: i % len(_TONES) for i, layout in enumerate(dict.fromkeys(s.layout for s in record.stretches))}
    for curve in curves:
        figure = Figure(figsize=(9, 4.5 if curve.key == "loss" else 3.2), dpi=150, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        values = [value for line in curve.lines for _, value in finite(line.points)]
        if curve.may_log and min(values) > 0 and max(values) / min(values) > 100:
            axes.set_yscale("log")
        for line in curve.lines:
            steps, numbers = zip(*finite(line.points), strict=True) if finite(line.points) else ((), ())
            colour, soft = (
                _COLOURS.get(line.tone, "#000000"),
                smoothed(line.points) if curve.noisy and line.look == "line" else [],
            )
            style = {"line": "-", "lost": "--", "dots": "o-", "stems": "-"}[line.look]
            axes.plot(steps, numbers, style, color=colour, markersize=4, linewidth=1.6, alpha=0.4 if soft else 1,
                      label=line.name if steps and line.look != "lost" else None)  # fmt: skip
            if soft:
                axes.plot(*zip(*soft, strict=True), color=colour, linewidth=1.8)
        for s in record.stretches:
            if s.records and s.kept_last_step > s.start_step:
                axes.axvspan(s.start_step, s.kept_last_step, color=_TONES[tones[s.layout]], alpha=0.07, linewidth=0)
                axes.annotate(
                    s.layout, ((s.start_step + s.kept_last_step) / 2, 1), xycoords=("data", "axes fraction"), ha="center",
                    xytext=(0, 4), textcoords="offset points", fontsize=8, color=_TONES[tones[s.layout]], annotation_clip=False,
                )  # fmt: skip
        for mark in record.marks:
            if mark.kind in _RULES:
                colour, style = _RULES[mark.kind]
                axes.axvline(mark.step, color=colour, linestyle=style, linewidth=1)
            elif mark.kind == "save":
                axes.axvline(mark.step, ymax=0.03, color="#565e6c", linewidth=1.2)
        axes.set_title(curve.title, loc="left", pad=18, fontsize=11, fontweight="bold")
        axes.set(xlabel="step", ylabel=curve.unit or curve.title)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        axes.margins(x=0)
        if curve.floor:
            axes.set_ylim(bottom=min(0.0, *values))
        if sum(bool(line.points) and line.look != "lost" for line in curve.lines) > 1:
            axes.legend(frameon=False)
        image = io.BytesIO()
        figure.savefig(image, format="png")
        yield curve.key, image.getvalue()
