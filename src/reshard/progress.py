"""How far is it? A bar on stderr for anything over a second or two; silent where nobody watches."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal


@contextmanager
def progress_bar(
    title: str, total: int | None, *, unit: Literal["bytes", "items"] = "bytes", shown: bool = True
) -> Iterator[Callable[[int], object]]:
    """Yields what to call with the number of bytes or items that were just done. Only on a terminal, and if `shown`.

    total None: it is not known; then only count and rate are shown.
    """
    if not (shown and sys.stderr.isatty()):
        yield lambda done: None
        return
    from rich import progress as bar
    from rich.console import Console

    counting = (bar.DownloadColumn(), bar.TransferSpeedColumn()) if unit == "bytes" else (bar.MofNCompleteColumn(),)
    columns = (bar.TextColumn("{task.description}"), bar.BarColumn(), *counting, bar.TimeRemainingColumn())
    with bar.Progress(*columns, console=Console(stderr=True)) as running:
        task = running.add_task(title, total=total)
        yield lambda done: running.advance(task, done)
