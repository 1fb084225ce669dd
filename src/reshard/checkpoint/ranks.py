"""How do the ranks agree? One rank decides, or all work and any failure becomes everybody's.

All of it is small objects on a CPU group (gloo): no control traffic ever goes through an accelerator.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar, cast

from reshard.errors import ReshardError

if TYPE_CHECKING:
    import torch.distributed as dist
    from torch import Tensor

T = TypeVar("T")


class Ranks:
    """The ranks of one run, as seen by one of them. Without a group: a single process, and nothing is sent."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self._group = group
        self.rank, self.size = (0, 1) if group is None else (group.rank(), group.size())

    @property
    def is_first(self) -> bool:
        """Is this the rank that decides?"""
        return self.rank == 0

    def on_first(self, work: Callable[[], T]) -> T:
        """Rank 0 does it; every rank gets its result, or raises its error. Collective."""
        outcome: Any = None
        if self.is_first:
            outcome = _attempt(work)
        if self._group is not None:
            import torch.distributed as dist

            box = [outcome]
            dist.broadcast_object_list(box, group=self._group, group_src=0)
            outcome = box[0]
        return cast(T, _result(outcome))

    def everywhere(self, work: Callable[[], T]) -> list[T]:
        """Every rank does its part; all get all results, in rank order, or all raise the first error. Collective."""
        outcome = _attempt(work)
        outcomes = [outcome]
        if self._group is not None:
            import torch.distributed as dist

            outcomes = [None] * self.size  # type: ignore[list-item]
            dist.all_gather_object(outcomes, outcome, group=self._group)
        for o in outcomes:
            _result(o)
        return [_result(o) for o in outcomes]

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


def _attempt(work: Callable[[], Any]) -> tuple[bool, Any]:
    try:
        return True, work()
    except ReshardError as error:
        return False, error
    except OSError as error:  # other errors are bugs: they stay on their rank, with a traceback
        return False, error


def _result(outcome: tuple[bool, Any]) -> Any:
    worked, value = outcome
    if worked:
        return value
    if isinstance(value, ReshardError):
        value.rank_local = False  # all ranks have it now: the first one says it for all
    raise value
