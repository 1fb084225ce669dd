"""Is what a background save stores what was there when `save` returned, where copies from a device take their time?

The device of these tests has two queues, as CUDA has streams: one of the caller's work, one of copies. Nothing in them is
done before it must be, and then the caller's work goes first wherever nothing holds it.
"""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import reshard
from reshard.checkpoint.load import load
from reshard.checkpoint.ranks import Ranks
from reshard.checkpoint.save import About
from reshard.checkpoint.saver import Saver
from reshard.checkpoint.staging import Arena, cuda_queue


@dataclass
class Late:
    """A device that does what it is asked to do late."""

    caller: list[Callable[[], object]] = field(default_factory=list)
    copies: list[Callable[[], object]] = field(default_factory=list)
    asked: threading.Event = field(default_factory=threading.Event)  # set: the device begins

    def queue_of(self, device: torch.device) -> Late:
        return self

    def __hash__(self) -> int:
        return id(self)

    def copy(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> Late:
        self.copies += [lambda into=into, source=source: into.copy_(source) for into, source in pairs]  # type: ignore[misc]
        return self

    def hold_caller(self) -> None:
        self.caller.append(self._copy_all)

    def wait(self) -> None:
        assert self.asked.wait(30)
        while self.caller:
            self.caller.pop(0)()
        self._copy_all()

    def _copy_all(self) -> None:
        while self.copies:
            self.copies.pop(0)()


@pytest.fixture
def device() -> Late:
    return Late()


def saved(directory: Path) -> Tensor:
    found = {"a": torch.zeros(1000)}
    load(directory, found, Ranks())
    return found["a"]


def test_what_the_caller_queues_after_an_async_save_comes_after_the_copy(tmp_path: Path, device: Late) -> None:
    a = torch.arange(1000.0)
    with reshard.AsyncSaver() as saver:
        saver._saver._arena = Arena(device.queue_of)
        saver.save(tmp_path / "step-1", {"a": a})
        device.caller.append(lambda: a.fill_(-1))  # the next optimizer step
        device.asked.set()
    assert torch.equal(saved(tmp_path / "step-1"), torch.arange(1000.0))
    assert float(a[0]) == -1


@pytest.mark.parametrize("fenced", [True, False])
def test_a_training_loop_says_itself_when_its_weights_change(tmp_path: Path, device: Late, fenced: bool) -> None:
    """And where it does not, the device of these tests does what it is here for."""
    a, forward = torch.arange(1000.0), []
    with Saver(Ranks(), Ranks(), arena=Arena(device.queue_of)) as saver:
        saver.start(tmp_path / "step-1", {"a": a}, About(step=1, kind="full", source={}))
        device.caller.append(lambda: forward.append(len(device.copies)))
        if fenced:
            saver.fence()
        device.caller.append(lambda: a.fill_(-1))
        device.asked.set()
    assert forward == [1]  # what only reads need not wait
    assert torch.equal(saved(tmp_path / "step-1"), torch.arange(1000.0) if fenced else torch.full((1000,), -1.0))


def test_what_the_caller_lets_go_is_kept_until_it_is_copied(tmp_path: Path, device: Late) -> None:
    numbers = np.arange(1000, dtype=np.float32)
    alive = weakref.ref(numbers)
    with reshard.AsyncSaver() as saver:
        saver._saver._arena = Arena(device.queue_of)
        saver.save(tmp_path / "step-1", {"a": torch.from_numpy(numbers)})
        del numbers
        gc.collect()
        assert alive() is not None
        device.asked.set()
        saver.wait()
        gc.collect()
        assert alive() is None
    assert torch.equal(saved(tmp_path / "step-1"), torch.arange(1000.0))


def test_what_lies_on_cpu_is_copied_at_once() -> None:
    assert cuda_queue(torch.device("cpu")) is None
