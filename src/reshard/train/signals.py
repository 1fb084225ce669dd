"""What if the run is asked to stop? The signal is noted, and answered with a save at the end of the step."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

logger = logging.getLogger(__name__)

# SIGQUIT is left as it is: it asks for an end at once.
STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


class Asked:
    """Whether this rank was asked to stop; the others are told by the loop, so that all end at the same step."""

    def __init__(self) -> None:
        self.signal: int = 0

    def note(self, number: int, _frame: FrameType | None) -> None:
        """Signal handler: remember the first signal. A second one changes nothing, the save that it asks for is coming;
        but whoever presses Ctrl-C a second time does not want to wait for it.
        """
        if number == signal.SIGINT and self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = self.signal or number


@contextmanager
def asked_to_stop() -> Iterator[Asked]:
    """Take the signals of STOPPING for the time of the loop. Outside of the main thread Python allows no handlers.

    Signals that are ignored stay ignored: that is how nohup keeps a hangup away from what it starts. A process that was
    asked to stop keeps the handlers to its end, or one more signal would take away its exit code.
    """
    asked = Asked()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    heeded = [number for number in STOPPING if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, asked.note) for number in heeded}
    try:
        yield asked
    finally:
        if not asked.signal:
            for number, handler in before.items():
                signal.signal(number, handler)
