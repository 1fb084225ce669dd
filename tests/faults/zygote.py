"""The other end of `runs.py`: a warm process that forks runs of real ranks, and ends them.

    python zygote.py        reads one JSON request a line on stdin, answers with one JSON line on stdout

Importing torch takes seconds, so it is imported once, here. A run is a process group of its own: a leader, and its
ranks as torchrun makes them (own process, RANK and WORLD_SIZE in the environment, gloo between them). This process
never starts a thread or joins a group, and takes the orphans of a killed leader, so that it knows when all are gone.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import signal
import sys
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
sys.path.append(str(Path(__file__).resolve().parents[1]))


import torch.distributed.checkpoint
import torch.distributed.fsdp  # noqa: F401

import reshard.train.loop  # noqa: F401
from reshard.cli import main as command_line

PR_SET_CHILD_SUBREAPER = 36


def be_rank(request: dict[str, Any], rank: int) -> None:
    """The life of a forked rank: type a command, or call a function of these tests. Never returns."""
    place, status = Path(request["place"]), 1
    try:
        for number, name in ((1, f"out-{rank}"), (2, f"err-{rank}")):
            os.dup2(os.open(place / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), number)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        os.chdir(request["cwd"])
        os.environ.update(request["environment"])
        if request["world"] > 1:
            os.environ.update(
                RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(request["world"]), MASTER_ADDR="127.0.0.1",
                MASTER_PORT=str(request["port"]),
            )  # fmt: skip
        if request["words"] is not None:
            command_line(request["words"])
        else:
            module, _, function = request["call"].partition(":")
            getattr(importlib.import_module(module), function)(**request["arguments"])
        status = 0
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def lead(request: dict[str, Any]) -> None:
    """The life of a leader: fork the ranks, wait; when one fails, end the others. Never returns."""
    os.setpgid(0, 0)
    place = Path(request["place"])
    living: dict[int, int] = {}
    for rank in range(request["world"]):
        pid = os.fork()
        if pid == 0:
            be_rank(request, rank)
        living[pid] = rank
    pids = {rank: pid for pid, rank in living.items()}
    tell(place, "pids", pids)
    codes: dict[int, int] = {}
    deadline = float("inf")
    while living:
        for pid, rank in list(living.items()):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                del living[pid]
                codes[rank] = os.waitstatus_to_exitcode(status)
                if codes[rank] != 0:
                    deadline = min(deadline, time.monotonic() + 5)  # torchrun does not wait for the others either
        if time.monotonic() > deadline:
            for pid in living:
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.002)
    tell(place, "codes", [codes[rank] for rank in range(request["world"])])
    os._exit(0)


def tell(place: Path, name: str, value: object) -> None:
    """Write a file that is there whole or not at all; not by a rename, which a test may have made to fail."""
    (place / f"{name}.tmp").write_text(json.dumps(value))
    os.link(place / f"{name}.tmp", place / f"{name}.json")


def answer(request: dict[str, Any]) -> Any:
    match request["do"]:
        case "nothing":
            return None
        case "start":
            pid = os.fork()
            if pid == 0:
                lead(request)
            with suppress(PermissionError, ProcessLookupError):
                os.setpgid(pid, pid)  # here as well: a kill may come before the child has got that far
            return pid
        case "wait":
            return reap(request["run"], time.monotonic() + request["timeout_s"])
    raise ValueError(request)


def reap(run: int, deadline: float | None) -> bool:
    """Wait until no process of a run is left. After the deadline the run is killed; returns whether it had to be."""
    late = False
    while True:
        try:
            ended, _ = os.waitpid(-run, os.WNOHANG)
        except ChildProcessError:
            return late
        if not ended:
            if deadline is not None and time.monotonic() > deadline:
                late, deadline = True, None
                os.killpg(run, signal.SIGKILL)
            time.sleep(0.002)


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    for line in sys.stdin:
        answers.write(json.dumps(answer(json.loads(line))) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
