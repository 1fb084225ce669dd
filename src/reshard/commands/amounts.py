"""How are bytes, seconds and large numbers written for people? Imports no torch."""

from __future__ import annotations

from datetime import datetime


def size(nbytes: int) -> str:
    """Bytes for people, in powers of ten as disks are sold."""
    for limit, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if nbytes >= limit:
            return f"{nbytes / limit:.1f} {unit}"
    return f"{nbytes} B"


def seconds(value: float) -> str:
    """A time for people."""
    if value < 1:
        return f"{value * 1e3:.0f} ms" if value >= 1e-3 or value == 0 else f"{value * 1e3:.1g} ms"
    if value < 60:
        return f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60:,} h {minutes % 60} min"


def counted(value: float) -> str:
    """A number for people: three digits and a letter."""
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if value >= limit:
            return f"{value / (1e3 if unit == 'k' else limit):.3g} {unit}"
    return f"{value:,.0f}"


def date(at: datetime | None) -> str | None:
    """A time in UTC, to the second; None where it is not known."""
    return at.strftime("%Y-%m-%d %H:%M:%S") if at is not None else None
