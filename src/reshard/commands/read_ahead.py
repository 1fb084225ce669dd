"""How is one thing read while the last one is still in use? In a thread of its own, one step ahead and no further."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, TypeVar

T = TypeVar("T")


class ReadAhead(Generic[T]):
    """The results of some reads, in their order. Use it as a context: leaving it waits for the read under way.

    It holds at most two results: the one taken last, which may be taken again, and the next.
    """

    def __init__(self, reads: Sequence[Callable[[], T]]) -> None:
        self._reads = reads
        self._pool = ThreadPoolExecutor(1, "reshard read ahead")
        self._found: dict[int, Future[T]] = {}

    def take(self, number: int) -> T:
        """The result of this read; what it raises is raised here. The next one begins."""
        self._found = {n: found for n, found in self._found.items() if n >= number}
        found = self._begun(number)
        result = found.result()
        if number + 1 < len(self._reads):
            self._begun(number + 1)
        return result

    def _begun(self, number: int) -> Future[T]:
        if number not in self._found:
            self._found[number] = self._pool.submit(self._reads[number])
        return self._found[number]

    def __enter__(self) -> ReadAhead[T]:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._pool.shutdown(cancel_futures=True)
