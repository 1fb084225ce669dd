"""How do the ranks agree? One rank decides, or all work and any failure becomes everybody's.

All of it is small objects on a CPU group (gloo): no control traffic ever goes through an accelerator.

Whatever a rank's work raises is told to the others, KeyboardInterrupt and SystemExit too: who waits in a collective for
a rank that has left it waits for half an hour, and cannot be interrupted. The rank itself then goes on raising those two.
"""

from __future__ import annotations

import logging
import pickle
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from copy import copy
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, TypeVar, cast

from reshard.errors import RankFailed, ReshardError, listed

if TYPE_CHECKING:
    import torch.distributed as dist
    from torch import Tensor

T = TypeVar("T")

logger = logging.getLogger(__name__)


class Ranks:
    """The ranks of one run, as seen by one of them. Without a group: a single process, and nothing is sent."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self._group = group
        self.rank, self.size = (0, 1) if group is None else (group.rank(), group.size())

    @property
    def is_first(self) -> bool:
        """Is this the rank that decides?"""
        return self.rank == 0

    def are(self, others: Ranks) -> bool:
        """Are these the ranks of the very same group?"""
        return self._group is others._group

    def on_first(self, work: Callable[[], T]) -> T:
        """Rank 0 does it; every rank gets its result, or raises its error. Collective."""
        if self._group is None:
            return work()
        import torch.distributed as dist

        own = _attempt(work, self.rank) if self.is_first else None
        box = [own and own.told]
        dist.broadcast_object_list(box, group=self._group, group_src=0)
        value, error = cast(_Told, box[0])
        if error is not None:
            _raise(error, own)
        return cast(T, value)

    def everywhere(self, work: Callable[[], T]) -> list[T]:
        """Every rank does its part; all get all results, in rank order, or all raise the first error. Collective.

        Errors that not all ranks have are said with their ranks.
        """
        if self._group is None:
            return [work()]
        import torch.distributed as dist

        own = _attempt(work, self.rank)
        told: list[Any] = [None] * self.size
        dist.all_gather_object(told, own.told, group=self._group)
        failed = [rank for rank, (_, error) in enumerate(told) if error is not None]
        if failed:
            first: Any = own.told[1] if failed[0] == self.rank else told[failed[0]][1]
            _raise(first, own, failed if len(failed) < self.size else [])
        return [value for value, _ in told]

    def maximum(self, *values: int) -> list[int]:
        """The largest of each value over all ranks: one small round. Collective."""
        return self.begin_maximum(*values)()

    def begin_maximum(self, *values: int) -> Callable[[], list[int]]:
        """The same, while this rank does something else; call what is returned for the answer. Collective."""
        if self._group is None:
            return lambda: list(values)
        import torch
        import torch.distributed as dist

        tensor = torch.tensor(values, dtype=torch.int64)
        work = dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self._group, async_op=True)

        def answer() -> list[int]:
            work.wait()
            return [int(value) for value in tensor.tolist()]

        return answer

    @contextmanager
    def messages(self) -> Iterator[Messages]:
        """Tensors from rank to rank; all have arrived when the block ends. Between two ranks, in the order of calls."""
        messages = Messages(self._group)
        yield messages
        messages.wait()


class Messages:
    """Sends and receives under way. Every send needs its receive on the other side."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self._group = group
        self._waiting: list[tuple[Any, Tensor]] = []  # with their tensors, which must live until then

    def send(self, tensor: Tensor, to: int) -> None:
        """Send a contiguous CPU tensor to a rank of the group."""
        import torch.distributed as dist

        data = _raw(tensor)
        self._waiting.append((dist.isend(data, group=self._group, group_dst=to), data))

    def receive(self, tensor: Tensor, sender: int) -> None:
        """Receive into a contiguous CPU tensor; its values are there after `wait`."""
        import torch.distributed as dist

        data = _raw(tensor)
        self._waiting.append((dist.irecv(data, group=self._group, group_src=sender), data))

    def wait(self) -> None:
        """Until all of it has arrived."""
        for work, _data in self._waiting:
            work.wait()
        self._waiting.clear()


def _raw(tensor: Tensor) -> Tensor:
    """The same memory as bytes: gloo does not know every dtype."""
    import torch

    return tensor.reshape(-1).view(torch.uint8)


_Told = tuple[Any, ReshardError | OSError | None]  # what the others get to know: a value, or an error


class _Outcome(NamedTuple):
    """What one rank's work came to. error: as it was raised."""

    told: _Told
    error: BaseException | None = None


def _attempt(work: Callable[[], Any], rank: int) -> _Outcome:
    try:
        return _Outcome((work(), None))
    except BaseException as error:
        return _Outcome((None, _fit_to_travel(error, rank)), error)


def _fit_to_travel(error: BaseException, rank: int) -> ReshardError | OSError:
    """The error as it is, where it says on purpose what is wrong and arrives as it was; else what can be said of it."""
    if isinstance(error, ReshardError | OSError):
        with suppress(Exception):
            pickle.dumps(error)
            copy(error)  # is made again as pickle would make it
            return error
    said = "".join(traceback.format_exception_only(error)).strip()
    failed = RankFailed(
        f"rank {rank} failed: {said}",
        rank=rank,
        traceback="".join(traceback.format_exception(error)),
        hint=f"what led to it is in the log of rank {rank}",
    )
    if isinstance(error, Exception):
        logger.error("%s", failed.message, exc_info=error)
    return failed


def _raise(error: BaseException, own: _Outcome | None, ranks: list[int] | None = None) -> NoReturn:
    """Raise what all ranks raise, but on a rank that was told to stop go on with that. ranks: to say with the error."""
    cause = own.error if own else None
    if cause is not None and not isinstance(cause, Exception):
        raise cause
    where = f"on rank{'s' if ranks and len(ranks) > 1 else ''} {listed(map(str, ranks or ()))}"
    if isinstance(error, ReshardError):
        error.rank_local = False  # all ranks have it now: the first one says it for all
        if ranks and not isinstance(error, RankFailed):
            error.message += f" ({where})"
            error.args = (error.message,)
    elif ranks and isinstance(error, OSError):
        error.strerror = f"{error.strerror or error} ({where})"
    if cause is not None and own is not None and own.told[1] is error and error is not cause:
        raise error from cause
    raise error
