"""Where on the page does a number go? Scales, ticks and paths of the report's curves. Imports no torch.

Plots are stretched to whatever width the reader's screen has: a path lives in a box of 1000 x 1000, everything else
(ticks, marks, names) is text that the page places by percent, so that it stays as large as the reader wants it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal

Points = Sequence[tuple[int, float]]
Look = Literal["line", "dots", "lost", "stems"]

TONES = 6  # colours of layouts in the style sheet
MOST_POINTS = 1200  # of a path: more than a screen has pixels
_MOST_LOST = 80  # of each path that the run has left behind: there may be many
_SMOOTH_FROM = 150  # points from which on a moving average is drawn, too
_LOG_FROM = 100  # largest by smallest value from which on a scale is logarithmic


@dataclass(frozen=True)
class Line:
    """One curve. lost: of steps that the run has left behind."""

    name: str
    tone: str
    points: Points
    look: Look = "line"


@dataclass(frozen=True)
class Curve:
    """What is drawn into one plot.

    floor: zero belongs to the scale. may_log: it may be logarithmic. noisy: many points get a moving average.
    """

    key: str
    title: str
    unit: str
    lines: tuple[Line, ...]
    floor: bool = False
    may_log: bool = False
    noisy: bool = False

    @property
    def has_points(self) -> bool:
        """Is there anything to draw?"""
        return any(finite(line.points) for line in self.lines)


@dataclass(frozen=True)
class Scale:
    """From values to per cent of the plot, and the ticks of it."""

    low: float
    high: float
    ticks: tuple[float, ...]
    log: bool = False

    def percent(self, value: float) -> float:
        """0 at the low end, 100 at the high one."""
        low, high, at = (
            (math.log10(v) for v in (self.low, self.high, value)) if self.log else (self.low, self.high, value)
        )
        return round(100 * (at - low) / (high - low), 3)


def finite(points: Points) -> list[tuple[int, float]]:
    """The points that can be drawn."""
    return [(step, value) for step, value in points if math.isfinite(value)]


def value_scale(values: Sequence[float], *, floor: bool = False, may_log: bool = False, count: int = 5) -> Scale:
    """A scale with round ends that holds all (finite) values. may_log: where they differ by orders of magnitude."""
    low, high = min(values), max(values)
    if may_log and low > 0 and high / low > _LOG_FROM:
        first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
        every = max(1, (last - first) // count)
        return Scale(10.0**first, 10.0**last, tuple(10.0**e for e in range(first, last + 1, every)), log=True)
    if floor:
        low, high = min(low, 0.0), max(high, 0.0)
    if not math.isfinite(high - low):  # the ends of float64
        low, high = max(low, -1e300), min(high, 1e300)
    if high - low <= 1e-9 * max(abs(high), abs(low)):
        room = abs(high) / 2 or 1.0
        low, high = (low, high + room) if floor and low == 0 else (low - room, high + room)
    step = _round_step((high - low) / count)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = tuple(i * step for i in range(first, last + 1))
    return Scale(ticks[0], ticks[-1], ticks)


def step_scale(low: int, high: int, count: int = 6) -> Scale:
    """From the first to the last step, with ticks at round ones."""
    high = max(high, low + 1)
    step = max(1, int(_round_step((high - low) / count)))
    first = -(-low // step) * step
    return Scale(low, high, tuple(float(tick) for tick in range(first, high + 1, step)))


def _round_step(least: float) -> float:
    """The smallest of 1, 2, 2.5, 5 times a power of ten that is not below `least`."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= least * (1 - 1e-9))


def thinned(points: Points, most: int = MOST_POINTS) -> list[tuple[int, float]]:
    """As many points as a screen can show. The lowest and the highest of what is left out stay: no spike is lost."""
    if len(points) <= most:
        return list(points)
    every = -(-2 * len(points) // most)
    kept: list[tuple[int, float]] = []
    for start in range(0, len(points), every):
        part = points[start : start + every]
        broken = next((p for p in part if not math.isfinite(p[1])), None)
        ends = {broken} if broken else {min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])}
        kept += sorted(ends)
    return [points[0], *kept, points[-1]] if kept[0] != points[0] else [*kept, points[-1]]


def smoothed(points: Points) -> list[tuple[int, float]]:
    """A moving average over a hundredth of the points, centred, so that it does not lag; nothing of few points.

    Towards the ends it is over fewer, equally many on both sides.
    """
    points = finite(points)
    if len(points) < _SMOOTH_FROM:
        return []
    sums = list(accumulate((value for _, value in points), initial=0.0))
    half, last = max(2, len(points) // 200), len(points) - 1
    result = []
    for i, (step, _) in enumerate(points):
        reach = min(half, i, last - i)
        result.append((step, (sums[i + reach + 1] - sums[i - reach]) / (2 * reach + 1)))
    return result


def path(points: Points, x: Scale, y: Scale) -> str:
    """The `d` of an SVG path in a box of 1000 x 1000; it is broken where a value is not finite."""
    parts, pen = [], "M"
    for step, value in points:
        if not math.isfinite(value) or (y.log and value <= 0):
            pen = "M"
            continue
        parts.append(f"{pen}{_at(x.percent(step))} {_at(100 - y.percent(value))}")
        pen = "L"
    return "".join(parts)


def stems(points: Points, x: Scale, y: Scale) -> str:
    """The same for upright lines from zero."""
    return "".join(
        f"M{_at(x.percent(step))} 1000V{_at(100 - y.percent(value))}" for step, value in points if math.isfinite(value)
    )


def _at(percent: float) -> str:
    return f"{10 * percent:.1f}".removesuffix(".0")


def drawn(curve: Curve, x: Scale) -> dict[str, Any]:
    """All that the page needs to draw one curve: paths, dots, ticks, and the numbers that it shows under the pointer."""
    values = [value for line in curve.lines for _, value in finite(line.points)]
    y = value_scale(values, floor=curve.floor, may_log=curve.may_log)
    lines = []
    for line in curve.lines:
        if not finite(line.points):
            continue
        points = thinned(line.points, _MOST_LOST if line.look == "lost" else MOST_POINTS)
        soft = smoothed(line.points) if curve.noisy and line.look == "line" else []
        lines.append(
            {
                "name": line.name,
                "tone": line.tone,
                "look": line.look,
                "path": (stems if line.look == "stems" else path)(points, x, y),
                "smooth": path(thinned(soft), x, y),
                "dots": [(x.percent(s), y.percent(v)) for s, v in finite(points)] if line.look == "dots" else [],
                "single": [(x.percent(s), y.percent(v)) for s, v in finite(points)] if len(points) == 1 else [],
            }
        )
    return {
        "key": curve.key,
        "title": curve.title,
        "unit": curve.unit + (" (logarithmic)" if y.log else ""),
        "lines": lines,
        "ticks": [(y.percent(tick), tick_text(tick, y)) for tick in y.ticks],
        "range": (short(min(values)), short(max(values))),
        "last": short(next(v for line in curve.lines for _, v in reversed(finite(line.points)))),
        "data": {
            "key": curve.key,
            "lines": [
                {"name": line.name, "points": [(s, short(v) if math.isfinite(v) else str(v)) for s, v in thinned(line.points)]}
                for line in curve.lines
                if line.look != "lost" and line.points
            ],
        },
    }  # fmt: skip


def tick_text(value: float, scale: Scale) -> str:
    """A tick as it is written: as many digits as tell it from its neighbours."""
    if value == 0:
        return "0"
    if scale.log:
        return f"{value:g}"
    size = max(abs(scale.low), abs(scale.high))
    if size < 1e-3 or size >= 1e15:
        return _powered(value, 1)
    for limit, divisor, unit in ((1e12, 1e12, "T"), (1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if size >= limit:
            return f"{value / divisor:.10g}{unit}"
    return f"{value:.10g}"


def short(value: float) -> str:
    """A number for people: four digits of it."""
    if not math.isfinite(value):
        return str(value)
    if value == 0 or 1e-3 <= abs(value) < 1e4:
        return f"{value:.4g}"
    if abs(value) < 1e15 and abs(value) >= 1e4:
        return f"{value:,.0f}"
    return _powered(value, 2)


def _powered(value: float, digits: int) -> str:
    mantissa, _, power = f"{value:.{digits}e}".partition("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(power)}"
