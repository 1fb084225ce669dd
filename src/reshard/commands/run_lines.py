"""What does a line of a run's journals say? Torn lines are left out; a value of the wrong type is as good as absent."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Container, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from reshard.errors import DataError

_WHOLE_LINE = re.compile(rb'\{"step": (\d{1,15}), .*\}\Z')  # as the trainer writes one
_MOST_BRACKETS = 200  # no line of ours has as many, and what is nested deeply is hard to print


def read_lines(path: Path, only: Container[int] | None = None) -> list[dict[str, Any]]:
    """The whole lines of a journal, in the order of writing. only: of other steps, just the number. Raises DataError."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"`{path}` cannot be read: {error.strerror or error}", path=path) from None
    records = []
    for line in content.splitlines():
        if only is not None and (whole := _WHOLE_LINE.match(line)) and (step := int(whole[1])) not in only:
            records.append({"step": step})
            continue
        if line.count(b"[") + line.count(b"{") > _MOST_BRACKETS:
            continue
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            records.append(record)
    return records


def step_of_line(record: Mapping[str, Any]) -> int | None:
    """Of which step is it? None where it does not say."""
    step = record.get("step")
    return step if type(step) is int and 0 <= step < 2**53 else None


def numeric(record: Mapping[str, Any], key: str) -> float | None:
    """A line's number, None where there is none. May be NaN or infinite."""
    value = record.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:
        return None


def seconds_of_line(event: Mapping[str, Any], key: str) -> float | None:
    """A duration, None where there is none that makes sense."""
    value = numeric(event, key)
    return value if value is not None and math.isfinite(value) and value >= 0 else None


def time_of_line(event: Mapping[str, Any]) -> datetime | None:
    """When was it written?"""
    return moment(event.get("at"))


def moment(text: Any) -> datetime | None:
    """An ISO 8601 time in UTC; None where it is none."""
    if not isinstance(text, str):
        return None
    try:
        at = datetime.fromisoformat(text)
    except ValueError:
        return None
    return at.astimezone(UTC) if at.tzinfo else at.replace(tzinfo=UTC)
