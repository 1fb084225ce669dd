"""Which signals ask a run to stop, and what becomes of the others?"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from reshard.train.signals import STOPPING, asked_to_stop


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in STOPPING}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2])
def test_the_first_signal_is_noted_and_later_ones_change_nothing(number: signal.Signals) -> None:
    with asked_to_stop() as asked:
        os.kill(os.getpid(), number)
        assert asked.signal == number
        os.kill(os.getpid(), signal.SIGUSR1)
        assert asked.signal == number
    os.kill(os.getpid(), signal.SIGTERM)  # this process is on its way out: nothing cuts that short


def test_who_presses_ctrl_c_again_does_not_wait() -> None:
    with asked_to_stop():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_what_was_ignored_stays_ignored() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    with asked_to_stop() as asked:
        os.kill(os.getpid(), signal.SIGHUP)
    assert asked.signal == 0


def test_without_a_signal_all_is_as_before() -> None:
    before = [signal.getsignal(number) for number in STOPPING]
    with asked_to_stop():
        assert [signal.getsignal(number) for number in STOPPING] != before
    assert [signal.getsignal(number) for number in STOPPING] == before


@pytest.mark.parametrize(("program", "code"), [("exit 7", 7), ("kill -KILL $$", 128 + signal.SIGKILL), ("true", 0)])
def test_launch_ends_as_its_command_does(program: str, code: int, project: object) -> None:
    done = subprocess.run([sys.executable, f"{project}/scripts/launch.py", "bash", "-c", program], check=False)
    assert done.returncode == code
