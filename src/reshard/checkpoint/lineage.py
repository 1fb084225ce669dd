"""Which save follows from which? A run that goes back to an older step leaves a branch behind: it is told apart here.

Every manifest names its parent's save id and counts the folder's saves upwards, so neither step numbers nor clocks
matter; step-0 is the oldest, whenever it was made. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Sequence

from reshard.checkpoint.layout import Entry


def line_of(committed: Sequence[Entry]) -> list[Entry]:
    """From the newest save back to the oldest that it follows from, as far as the folder still has them."""
    by_id = {e.manifest.save_id: e for e in committed if e.manifest is not None}
    line: list[Entry] = []
    newest = max(committed, key=lambda e: e.age, default=None)
    while newest is not None and newest.manifest is not None and newest not in line:
        line.append(newest)
        newest = by_id.get(newest.manifest.parent or "")
    return line


def abandoned(committed: Sequence[Entry]) -> list[Entry]:
    """The saves of a branch that was left: not on the newest one's line, but later than where that line begins.

    What lies before the oldest save of the line that is still there may be its past, with a link deleted between: it is
    only told apart by a step number that the line had not reached.
    """
    line = line_of(committed)
    if not line:
        return []
    oldest, on_line = line[-1], {e.path for e in line}
    return [
        e
        for e in committed
        if e.manifest is not None and e.path not in on_line and (e.age > oldest.age or e.step > oldest.step)
    ]


def by_worth(committed: Sequence[Entry]) -> list[Entry]:
    """Abandoned saves first, then by age: what may go comes first, the newest last."""
    left = {e.path for e in abandoned(committed)}
    return sorted(committed, key=lambda e: (e.path not in left, e.age))
