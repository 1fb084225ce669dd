"""What do the ranks of the fault tests do beside training? Called by name in processes of zygote.py."""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import traceback
import warnings
from pathlib import Path

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from faults.loading import Destination, load_plain
from reshard.checkpoint.commit import recover
from reshard.cli import main as command_line


def save_plainly(sources: list[str], folder: str, steps: list[int]) -> None:
    """torch.distributed.checkpoint.save of what checkpoints of ours hold, sharded over these ranks as FSDP2 does.

    One after the other as the given steps, as a run would: rank 0 says so in events.jsonl.
    """
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for source, step in zip(sources, steps, strict=True):
        whole = Destination.of(Path(source))
        load_plain(Path(source), whole)
        state: dict[str, dict[str, object]] = {}
        for name, tensor in whole.tensors.items():
            part, _, rest = name.partition(".")
            sharded: DTensor | object = distribute_tensor(tensor, mesh, [Shard(0)]) if tensor.ndim else tensor
            state.setdefault(part, {})[rest] = sharded
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.save(state, checkpoint_id=f"{folder}/checkpoint/step-{step}")
        if dist.get_rank() == 0:
            with open(f"{folder}/events.jsonl", "a") as events:
                events.write(json.dumps({"event": "save", "step": step}) + "\n")
    dist.destroy_process_group()


def recover_all(folders: list[str]) -> None:
    """What a start does first, in each of these checkpoint folders."""
    for folder in folders:
        recover(Path(folder))


def with_little_memory(megabytes: float, command: list[str]) -> None:
    """`reshard <command>` in a process that may take so much memory more than it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + int(megabytes * 1e6)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    command_line(command)


def each_command(commands: list[list[str]], place: str, megabytes: int, seconds: int) -> None:
    """Every `reshard <command>` in a process of its own, with a limit on memory and time; code and output to files."""
    for number, command in enumerate(commands):
        pid = os.fork()
        if pid == 0:
            for descriptor, name in ((1, "out"), (2, "err")):
                file = os.open(f"{place}/{name}-{number}", os.O_WRONLY | os.O_CREAT, 0o600)
                os.dup2(file, descriptor)
            signal.alarm(seconds)
            try:
                with_little_memory(megabytes, command)
                os._exit(0)
            except SystemExit as stop:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(int(stop.code or 0))
            except BaseException:
                traceback.print_exc()
                os._exit(99)
        _, status = os.waitpid(pid, 0)
        Path(f"{place}/code-{number}").write_text(str(os.waitstatus_to_exitcode(status)))
