"""Which rank am I, on which device? Joining and leaving the process group. Imports no torch at the top."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from reshard.config import Comm
from reshard.errors import LayoutError, RankLost

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist


PR_SET_PDEATHSIG = 1  # of linux/prctl.h
_PEER_IS_GONE = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")  # as gloo says it


@dataclass(frozen=True)
class Place:
    """This process among the others, as torchrun's environment says; alone without it."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1


@dataclass(frozen=True)
class World:
    """A process that has met the others.

    control: a CPU group for small objects. background: another one, for what happens while training goes on. Both None
    where there is one rank. sequence: the ranks that share this one's sequences; None where there is none to share with.
    """

    place: Place
    device: torch.device
    control: dist.ProcessGroup | None
    background: dist.ProcessGroup | None
    sequence: dist.ProcessGroup | None


def place_from_environment() -> Place:
    """Read RANK, LOCAL_RANK and WORLD_SIZE. Raises LayoutError where only some of them are sensible."""
    values = {name: os.environ.get(name) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    if values["RANK"] is None or values["WORLD_SIZE"] is None:
        return Place()
    try:
        place = Place(int(values["RANK"]), int(values["LOCAL_RANK"] or 0), int(values["WORLD_SIZE"]))
    except ValueError:
        raise LayoutError(f"RANK, LOCAL_RANK and WORLD_SIZE are {values}, expected whole numbers") from None
    if not 0 <= place.rank < place.world_size:
        raise LayoutError(f"RANK is {place.rank}, expected 0 to {place.world_size - 1}")
    return place


def end_with_agent() -> None:
    """Under torchrun: this rank ends when its agent does, also where the agent was killed. To be called first of all.

    torchrun starts its workers in sessions of their own, and ends them itself. Killed by SIGKILL it cannot: the ranks
    would train on with nobody to watch them, holding the devices and the lock of the checkpoint folder against the
    restarted job.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent()


def end_with_parent() -> None:
    """From now on, SIGKILL for this process when its parent ends. Linux only; elsewhere nothing happens.

    SIGKILL, because SIGTERM asks for a checkpoint at the end of the step, which ranks that wait for a dead one never
    reach. Nothing is lost by it: a killed save leaves the last checkpoint whole. Lasts over exec, not over fork.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)


def device_type() -> str:
    """`cuda` where there is one, else `cpu`."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


@contextmanager
def join(place: Place, comm: Comm, *, need_group: bool, sequences: list[list[int]]) -> Iterator[World]:
    """Meet the other ranks, and leave them at the end. NCCL on CUDA (not yet run on a GPU), gloo on CPU.

    sequences: the ranks that share each sequence, all of them. need_group: make a process group even for a single rank
    (FSDP's mixed precision wants one). Where another rank ends in the midst of it, what waited for it is a RankLost.
    """
    import torch
    import torch.distributed as dist

    kind = device_type()
    device = torch.device(kind, place.local_rank) if kind == "cuda" else torch.device("cpu")
    if kind == "cuda":
        torch.cuda.set_device(device)
    if place.world_size == 1 and not need_group:
        yield World(place, device, None, None, None)
        return
    backend = "cuda:nccl,cpu:gloo" if kind == "cuda" else "gloo"
    timeout = timedelta(seconds=comm.init_timeout_seconds)
    if "MASTER_ADDR" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    else:  # a single rank that nobody launched: no port, nothing to meet
        dist.init_process_group(backend, store=_lone_store(), rank=0, world_size=1, timeout=timeout)
    try:
        if place.world_size == 1:
            yield World(place, device, None, None, None)
            return
        patience = timedelta(seconds=comm.train_timeout_seconds)
        control, background = (dist.new_group(backend="gloo", timeout=patience) for _ in range(2))
        yield World(place, device, control, background, _sequence_group(place, sequences))
    except RuntimeError as error:
        if (said := _peer_is_gone(error)) is not None:  # its own traceback says what was wrong, not ours
            raise RankLost(
                f"another rank has ended: {said.partition('] ')[2].partition('. ')[0] or said}",
                hint="the first failure in the launcher's summary is the reason; started again, the run resumes from "
                "its newest checkpoint",
                rank_local=True,
            ) from error
        raise
    finally:
        dist.destroy_process_group()


def _peer_is_gone(error: BaseException | None) -> str | None:
    """What gloo said of a peer that has ended, if that is what the error is about. A pipeline's stage wraps it once more."""
    while error is not None and not any(words in str(error) for words in _PEER_IS_GONE):
        error = error.__cause__
    return None if error is None else str(error)


def set_timeouts(comm: Comm, groups: list[dist.ProcessGroup]) -> None:
    """From now on, give a collective up after comm.train_timeout_seconds."""
    from torch.distributed.distributed_c10d import _set_pg_timeout  # private, no public way in torch 2.13.0

    for group in groups:
        _set_pg_timeout(timedelta(seconds=comm.train_timeout_seconds), group)


def _lone_store() -> Any:
    """A store in this process's memory: a single rank has nobody to exchange addresses with."""
    import torch.distributed as dist

    return dist.HashStore()  # type: ignore[attr-defined]  # it is public, but not listed in __all__


def _sequence_group(place: Place, sequences: list[list[int]]) -> dist.ProcessGroup | None:
    """The group of this rank's sequence. Every rank makes every group, as torch asks for."""
    import torch.distributed as dist

    mine = None
    for members in sequences:
        group = dist.new_group(members) if len(members) > 1 else None
        if place.rank in members:
            mine = group
    return mine
