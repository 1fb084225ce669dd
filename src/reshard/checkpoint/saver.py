"""Who saves during a run? At once, or in the background while training goes on: one save in flight, errors never lost.

In the background the training waits for staging only: this rank's pieces are copied into an arena that is used again
each time. A thread writes and commits from there, with the other ranks' threads, on a process group of its own.
"""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType

import torch

from reshard.checkpoint.blocks import Throttle
from reshard.checkpoint.manifest import Manifest
from reshard.checkpoint.ours import refuse_others
from reshard.checkpoint.plan import Planner, SavePlan
from reshard.checkpoint.ranks import Ranks
from reshard.checkpoint.replicas import Differ
from reshard.checkpoint.save import About, begin_plan, mine, plan_save, write_and_commit
from reshard.checkpoint.staging import Arena, Staged
from reshard.checkpoint.state import Piece, State

logger = logging.getLogger(__name__)

RUNNING, FINISHED = 0, 1  # what `status` says; the larger one wins among ranks


@dataclass(frozen=True)
class Saved:
    """A save that is over. stall_s: how long training waited. write_s: until it was committed."""

    directory: Path
    manifest: Manifest
    stall_s: float
    write_s: float


class Saver:
    """The saves of one run, on one rank. Use it as a context: leaving it waits for what is in flight.

    ranks: for planning, in the training's own thread. background: the ranks over another group, for the writing
    thread; None saves at once. write_limit: bytes per second of this rank's background writing; 0: no limit.
    differ: what becomes of a save for which ranks hold other numbers under one name; see replicas.py.
    arena: where numbers are copied to; None makes one.
    """

    def __init__(
        self,
        ranks: Ranks,
        background: Ranks | None = None,
        write_limit: float = 0,
        differ: Differ = "refuse",
        arena: Arena | None = None,
    ) -> None:
        self._ranks, self._background, self._write_limit = ranks, background, write_limit
        self._planner = Planner(ranks, differ)
        self._arena = arena or Arena()
        self._staged: Staged | None = None  # what the caller must not change before `fence`
        self._thread: threading.Thread | None = None
        self._outcome: Saved | BaseException | None = None
        self.last_save_id: str | None = None

    def start(self, directory: Path, state: State, about: About, dtype: torch.dtype | None = None) -> list[Saved]:
        """Save, or begin to. Collective. Returns the saves that are over by now, this one included if it was at once.

        about.parent is taken from the save before, where there was one. What the state holds may change after `fence`.
        Raises what an earlier save has failed with, and CheckpointError where ranks hold other numbers under one name or
        the directory holds what is not ours.
        """
        over = self.collect()
        began = time.perf_counter()
        self._ranks.on_first(lambda: refuse_others(directory))
        about = replace(about, parent=self.last_save_id or about.parent)
        if self._background is None:
            pieces, plan = plan_save(directory, state, dtype, self._planner)
            manifest = write_and_commit(directory, pieces, plan, about, self._ranks)
            self.last_save_id = manifest.save_id
            seconds = time.perf_counter() - began
            return [*over, Saved(directory, manifest, seconds, seconds)]
        staged, failure, plan = self._stage(directory, state, dtype)
        self._staged = staged
        stall = time.perf_counter() - began
        ranks, throttle = self._background, _throttle(self._write_limit)

        def copy_is_there() -> None:
            if failure is not None:
                raise failure
            if staged is not None:
                staged.wait()

        def work() -> None:
            try:
                ranks.everywhere(copy_is_there)  # nobody writes while another still copies, and its training waits
                manifest = write_and_commit(directory, staged.pieces if staged else [], plan, about, ranks, throttle)
                self._outcome = Saved(directory, manifest, stall, time.perf_counter() - began)
            except BaseException as error:  # the thread's own end: it is raised again by `collect`, on every rank
                self._outcome = error

        self._thread = threading.Thread(target=work, name="reshard save", daemon=True)
        self._thread.start()
        if failure is not None and not isinstance(failure, Exception):
            raise failure  # an interrupt: the others are told by the thread, this rank goes on with it now
        return over

    def status(self) -> int:
        """FINISHED if a background save is over and waits for `collect`, else RUNNING. Not collective: ranks differ."""
        return FINISHED if self._thread is not None and not self._thread.is_alive() else RUNNING

    def collect(self) -> list[Saved]:
        """Wait for the save in flight, if any; returns it or raises its error. Call it on all ranks, at the same step."""
        if self._thread is None:
            return []
        self._thread.join()
        outcome, self._thread, self._outcome = self._outcome, None, None
        if isinstance(outcome, BaseException):
            raise outcome
        assert outcome is not None
        self.last_save_id = outcome.manifest.save_id
        return [outcome]

    def fence(self) -> None:
        """Call it before weights change: on CUDA their copy may still be under way."""
        if self._staged is not None:
            self._staged.hold_callers()
            self._staged = None

    def _stage(
        self, directory: Path, state: State, dtype: torch.dtype | None
    ) -> tuple[Staged | None, BaseException | None, SavePlan]:
        """Agree on a plan, and copy, or begin to copy, what this rank writes. With what copying has raised."""
        # That nobody's part has changed is agreed on while we copy: ranks that come late are not waited for twice.
        offered, planning = begin_plan(directory, state, dtype, self._planner)
        staged, failure = self._try_to_stage(offered, planning.guess)
        plan = None
        try:
            plan = planning.plan()
        finally:
            if staged is not None and plan is not planning.guess:
                staged.wait()  # the next copies go to the same memory
        if plan is not planning.guess:
            staged, failure = self._try_to_stage(offered, plan)
        return staged, failure, plan

    def _try_to_stage(self, offered: list[Piece], plan: SavePlan | None) -> tuple[Staged | None, BaseException | None]:
        """What this rank writes by a plan, copied; or what copying has raised, for the others wait for this rank."""
        try:
            return (None if plan is None else self._arena.stage(mine(offered, plan))), None
        except BaseException as error:
            return None, error

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        """Wait for what is in flight. While another error is on its way, a failed save is only logged."""
        try:
            self.collect()
        except BaseException as failed:
            if error is None:
                raise
            logger.error("the save in flight failed, too: %s", failed)


def _throttle(bytes_per_s: float) -> Throttle | None:
    return Throttle(bytes_per_s) if bytes_per_s else None
