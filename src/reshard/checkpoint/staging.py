"""How do numbers leave their device while training goes on? Copied into memory that is used again each time.

What lies on CPU is copied at once. From an accelerator it is copied on a queue beside the training's: behind all that the
training has queued so far, and in front of what it queues from `hold_callers` on. Each device has a queue of its own: a
copy is only ordered with what is queued on the device that it reads from. (The CUDA part is not yet run on a GPU.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from reshard.checkpoint.state import Piece, dtype_from_name


class Mark(Protocol):
    """A place in a queue of copies."""

    def hold_caller(self) -> None:
        """What this thread queues on the device from now on waits for the copies before the mark."""

    def wait(self) -> None:
        """Until the copies before the mark are done."""


class Queue(Protocol):
    """Copies from one device, one after the other."""

    def copy(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> Mark:
        """Queue copies (into, source) behind all that this thread has queued on the device; a mark behind them."""


@dataclass
class Staged:
    """Pieces that read from the arena, and the copies that are on their way there."""

    pieces: list[Piece]
    marks: list[Mark]
    sources: list[Tensor]  # kept until their copies are done: memory that is let go is used again at once

    def hold_callers(self) -> None:
        """Call it before the sources change: on each of their devices, what this thread queues next waits for the copies."""
        for mark in self.marks:
            mark.hold_caller()

    def wait(self) -> None:
        """Until the arena has everything."""
        for mark in self.marks:
            mark.wait()
        self.sources.clear()


class Arena:
    """Memory for what is being saved, kept from save to save.

    queue_of: makes the queue for copies from a device; None where they are made at once.
    """

    def __init__(self, queue_of: Callable[[torch.device], Queue | None] | None = None) -> None:
        self._queue_of = queue_of or cuda_queue
        self._queues: dict[torch.device, Queue | None] = {}
        self._memory: Tensor | None = None

    def stage(self, pieces: Iterable[Piece]) -> Staged:
        """Copy the pieces' numbers, or begin to; nothing that was staged before may still be copied or read."""
        pieces = list(pieces)
        starts, total = [], 0
        for piece in pieces:
            starts.append(total)
            total += -(-piece.nbytes // 64) * 64
        memory = self._room(total, pinned=any(p.part is not None and p.part.is_cuda for p in pieces))
        staged: list[Piece] = []
        pairs: dict[Queue, list[tuple[Tensor, Tensor]]] = {}
        with torch.no_grad():
            for piece, start in zip(pieces, starts, strict=True):
                room = memory[start : start + piece.nbytes].view(dtype_from_name(piece.dtype)).view(piece.sizes)
                source = piece.part if piece.part is not None else piece.read()
                queue = self._queue(source.device)
                if queue is None:
                    room.copy_(source)
                else:
                    pairs.setdefault(queue, []).append((room, source))
                staged.append(replace(piece, read=partial(_itself, room), part=None))
            marks = [queue.copy(of_queue) for queue, of_queue in pairs.items()]
        return Staged(staged, marks, [source for of_queue in pairs.values() for _, source in of_queue])

    def _room(self, nbytes: int, *, pinned: bool) -> Tensor:
        if self._memory is None or self._memory.numel() < nbytes:
            self._memory = None  # free the old one first
            self._memory = torch.empty(nbytes, dtype=torch.uint8, pin_memory=pinned)
        return self._memory

    def _queue(self, device: torch.device) -> Queue | None:
        if device not in self._queues:
            self._queues[device] = self._queue_of(device)
        return self._queues[device]


def _itself(tensor: Tensor) -> Tensor:
    return tensor


# -- CUDA


def cuda_queue(device: torch.device) -> Queue | None:
    """A stream for copies from a CUDA device; None for any other: what lies there is copied at once."""
    return _CudaQueue(device) if device.type == "cuda" else None


class _CudaQueue:
    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def copy(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> Mark:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            for into, source in pairs:
                into.copy_(source, non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(self._stream)
        return _CudaMark(self._device, event)


class _CudaMark:
    def __init__(self, device: torch.device, event: torch.cuda.Event) -> None:
        self._device, self._event = device, event

    def hold_caller(self) -> None:
        torch.cuda.current_stream(self._device).wait_event(self._event)

    def wait(self) -> None:
        self._event.synchronize()
