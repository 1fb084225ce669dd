"""Run torchrun, or srun, for a launch script: hand every signal on to it, and say by the exit code if the run was stopped.

    exec python3 scripts/launch.py torchrun --nproc-per-node 8 -m reshard train CONFIG.toml

Exit code: 75 ("try again") where a signal has stopped the training and the ranks have ended by themselves; else the
command's own.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from reshard.parallel.world import end_with_parent

PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
NAMES = ",".join(number.name for number in PASSED_ON)


def launch(command: Sequence[str]) -> int:
    """Run a command to its end; returns the exit code for this process."""
    with tempfile.NamedTemporaryFile(prefix="reshard-stopped-") as told:
        # torchrun dies of signals that it was not told to handle, and its ranks with it. As an environment variable,
        # because a torchrun that does not have the option yet ignores it.
        environment = {"PET_SIGNALS_TO_HANDLE": NAMES, **os.environ, "RESHARD_STOPPED": told.name}
        # Signals that come before there is a child wait until there is one.
        signal.pthread_sigmask(signal.SIG_BLOCK, PASSED_ON)
        # In a process group of its own: what a terminal sends to all of a group would reach the child twice.
        try:
            child = subprocess.Popen(
                command, env=environment, process_group=0,
                preexec_fn=_before_the_command,  # noqa: PLW1509 - safe, this process has one thread
            )  # fmt: skip
        except OSError as error:
            print(f"error: `{command[0]}` cannot be started: {error.strerror}", file=sys.stderr)
            return 127
        for number in PASSED_ON:
            if signal.getsignal(number) != signal.SIG_IGN:  # e.g. a hangup, where nohup has started this script
                signal.signal(number, _PassOn(child))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, PASSED_ON)
        code = child.wait()
        if Path(told.name).stat().st_size:
            return os.EX_TEMPFAIL
    return code if code >= 0 else 128 - code


class _PassOn:
    """Signal handler. The first signal asks the ranks to save and end; more of them would make torchrun kill the ranks in
    the midst of it, so only those of somebody who does not want to wait are passed on: SIGQUIT, and SIGINT once more.
    """

    asked = 0

    def __init__(self, child: subprocess.Popen[bytes]) -> None:
        self._child = child

    def __call__(self, number: int, _frame: object) -> None:
        if not _PassOn.asked or number == signal.SIGQUIT or (number == signal.SIGINT == _PassOn.asked):
            self._child.send_signal(number)
        _PassOn.asked = _PassOn.asked or number


def _before_the_command() -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, PASSED_ON)
    end_with_parent()


if __name__ == "__main__":
    sys.exit(launch(sys.argv[1:]))
