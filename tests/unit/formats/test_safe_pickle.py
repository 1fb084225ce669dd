"""Does the small pickle machine read what torch writes, and nothing else?"""

import collections
import contextlib
import pickle
import pickletools
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import PurePosixPath

import pytest

from reshard.errors import FormatError
from reshard.safe_pickle import loads


@dataclass(frozen=True)
class Point:
    x: int
    y: tuple


class Stateful:
    def __setstate__(self, state):
        self.got = state

    def __getstate__(self):
        return ("state", 3)


MODULE = Point.__module__
ALLOWED = {
    (MODULE, "Point"): Point,
    (MODULE, "Stateful"): Stateful,
    ("collections", "OrderedDict"): OrderedDict,
    ("pathlib", "PurePosixPath"): PurePosixPath,
}


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("optimized", [False, True])
def test_reads_what_pickle_writes(protocol, optimized):
    content = {
        "ints": [0, 255, 256, 65535, 65536, -1, 2**31, -(2**63), 2**80],
        "text": ["", "short", "é" * 300, "x" * 70000],
        "bytes": [b"", b"abc", b"x" * 300] if protocol > 2 else [],
        "plain": (None, True, False, 1.5, (), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)),
        ("a", 1): OrderedDict(b=1, a=[]),
        "many": {str(i): i for i in range(3000)},
    }
    data = pickle.dumps(content, protocol)
    assert loads(pickletools.optimize(data) if optimized else data, ALLOWED) == content


@pytest.mark.parametrize("protocol", [2, 4])
def test_makes_instances_of_allowed_classes(protocol):
    ordered = OrderedDict(a=1)
    ordered._metadata = OrderedDict(version=1)  # as nn.Module.state_dict() leaves it
    point, path = Point(1, (2, 3)), PurePosixPath("a/b")
    data = pickle.dumps([point, {point: path}, ordered, Stateful()], protocol)
    got_point, by_point, got_ordered, stateful = loads(data, ALLOWED)
    assert got_point == point
    assert by_point == {point: path}
    assert got_ordered == ordered
    assert got_ordered._metadata == {"version": 1}
    assert stateful.got == ("state", 3)


def test_shared_objects_stay_shared():
    shared = [1]
    first, second = loads(pickle.dumps([shared, shared], 2), {})
    assert first is second


def test_a_name_that_is_not_allowed_is_named():
    with pytest.raises(FormatError, match=r"file\.pth.*`collections\.Counter`.*nothing of it was run"):
        loads(pickle.dumps(collections.Counter("a"), 2), ALLOWED, path="file.pth")


def test_persistent_ids_go_to_the_caller():
    data = b"\x80\x02X\x03\x00\x00\x00keyQ."
    assert loads(data, {}, lambda pid: ("storage", pid)) == ("storage", "key")
    with pytest.raises(FormatError, match="outside"):
        loads(data, {})


def test_a_damaged_pickle_is_an_error_wherever_it_is_cut():
    data = pickle.dumps([Point(1, (2,)), {"a": [1, 2, 3]}], 4)
    for end in range(len(data)):
        with pytest.raises(FormatError, match="damaged"):
            loads(data[:end], ALLOWED)


def test_flipped_bytes_never_escape_as_another_error():
    data = pickle.dumps([Point(1, (2,)), {"a": [1, 2, 3]}, OrderedDict(x=Stateful())], 2)
    for at in range(len(data)):
        for value in (0, 0x80, 0xFF, data[at] ^ 1, ord("b"), ord("R"), ord("r")):
            with contextlib.suppress(FormatError):
                loads(data[:at] + bytes([value]) + data[at + 1 :], ALLOWED, lambda pid: pid)


def test_too_long_a_pickle_is_not_begun():
    with pytest.raises(FormatError, match="more than 10 bytes"):
        loads(b"\x80\x02" + b"N" * 20, {}, most_bytes=10)


def test_only_what_is_allowed_is_called():
    """Not even what an allowed function or the caller's own persistent_load has handed out."""
    called = []

    def innocent():
        return lambda: called.append("result")

    for data in (b"\x80\x02cx\ny\n)R)R.", b"\x80\x02NQ)R."):
        with pytest.raises(FormatError, match="not a function"):
            loads(data, {("x", "y"): innocent}, lambda pid: lambda: called.append("persistent"))
    assert called == []


def test_no_state_is_set_on_what_is_not_an_instance():
    def function():
        pass

    for target in (function, Point):
        with pytest.raises(FormatError, match="not an instance"):
            loads(b"\x80\x02cx\ny\n}X\x01\x00\x00\x00aK\x01sb.", {("x", "y"): target})
        assert not hasattr(target, "a")
