"""What if the run is asked to stop? SIGTERM and SIGUSR1 are noted, and answered at the end of the step."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

logger = logging.getLogger(__name__)

STOPPING = (signal.SIGTERM, signal.SIGUSR1)


class Asked:
    """Whether this rank was asked to stop; the others are told by the loop, so that all end at the same step."""

    def __init__(self) -> None:
        self.signal: int = 0

    def note(self, number: int, _frame: FrameType | None) -> None:
        """Signal handler: remember the first one. A second one changes nothing: the save that it asks for is coming."""
        self.signal = self.signal or number


@contextmanager
def asked_to_stop() -> Iterator[Asked]:
    """Take SIGTERM and SIGUSR1 for the time of the loop. Outside of the main thread Python allows no handlers."""
    asked = Asked()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before = {number: signal.signal(number, asked.note) for number in STOPPING}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
