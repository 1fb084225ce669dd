"""How do the ranks agree? One rank decides, or all work and any failure becomes everybody's.

All of it is small objects on a CPU group (gloo): no control traffic ever goes through an accelerator.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar, cast

from reshard.errors import ReshardError

if TYPE_CHECKING:
    import torch.distributed as dist

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
    raise value
