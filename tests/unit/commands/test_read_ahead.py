"""Reads happen one step ahead, in order, in another thread; no further, and their errors come out where they belong."""

from __future__ import annotations

import threading

import pytest

from reshard.commands.read_ahead import ReadAhead


def test_one_ahead_and_no_further() -> None:
    begun: list[int] = []
    second = threading.Event()

    def read(number: int) -> str:
        begun.append(number)
        if number == 1:
            second.set()
        return f"rows {number}, {threading.current_thread() is threading.main_thread()}"

    with ReadAhead([lambda n=n: read(n) for n in range(4)]) as ahead:
        assert begun == []  # nothing before it is asked for
        assert ahead.take(0) == "rows 0, False"
        assert second.wait(10)
        assert ahead.take(0) == "rows 0, False"  # the same rows under another name
        assert begun == [0, 1]
        assert [ahead.take(n) for n in (1, 2, 3)] == [f"rows {n}, False" for n in (1, 2, 3)]
    assert begun == [0, 1, 2, 3]


def test_an_error_is_raised_by_the_take_it_belongs_to() -> None:
    def fail() -> int:
        raise OSError("the disk says no")

    with ReadAhead([lambda: 1, fail, lambda: 3]) as ahead:
        assert ahead.take(0) == 1
        with pytest.raises(OSError, match="the disk says no"):
            ahead.take(1)


def test_leaving_waits_for_the_read_under_way() -> None:
    started, release, done = threading.Event(), threading.Event(), threading.Event()

    def slow() -> None:
        started.set()
        release.wait(10)
        done.set()

    with ReadAhead([lambda: None, slow]) as ahead:
        ahead.take(0)
        assert started.wait(10)
        release.set()
    assert done.is_set()
