"""The other end of the `launch` fixture: a warm process that forks fresh ranks, and what a rank then does.

    python ranks.py        reads one JSON request a line on stdin, answers with one JSON line on stdout

Importing torch takes seconds, so it is imported once, here; every launch forks N new processes from this one. They are
ranks as torchrun makes them: own process, RANK and WORLD_SIZE in the environment, gloo between them, nothing shared,
nothing left over from the launch before. This process itself never starts a thread or joins a group.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import resource
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import reshard.train.loop
from reshard.commands.seed import seed
from reshard.config import Config
from reshard.errors import ReshardError
from reshard.model.llama import Attention, Llama


def digest(tensor: Tensor) -> str:
    """Of dtype, shape and every bit."""
    tensor = tensor.detach().contiguous()
    head = f"{tensor.dtype} {tuple(tensor.shape)} ".encode()
    return hashlib.blake2b(head + tensor.reshape(-1).view(torch.uint8).numpy().tobytes(), digest_size=16).hexdigest()


class Watch:
    """Sees what a run feeds to its model, and what it holds before its first and after each optimizer step.

    By torch's own global hooks, so that the training under test is the one that users run. Whole tensors are put
    together by DTensor, not by our code.
    """

    def __init__(self, sequences: bool, tensors: bool) -> None:
        self.fed: list[list[str]] = []  # per forward pass of the model: a digest of each sequence
        self.attentions = 0  # how often an attention ran in training: twice a layer where it is recomputed
        self.before: dict[str, str] = {}  # name -> digest, as the first optimizer step found it
        self.after: dict[str, str] = {}  # and as the last one left it
        self._model: Llama | None = None
        self._removable = [register_module_forward_pre_hook(lambda m, i: self._see_forward(m, i, sequences))]
        if tensors:
            self._removable += [
                register_optimizer_step_pre_hook(lambda o, _a, _k: self._see_step(o, first=True)),
                register_optimizer_step_post_hook(lambda o, _a, _k: self._see_step(o, first=False)),
            ]

    def _see_forward(self, module: Any, inputs: Any, sequences: bool) -> None:
        if isinstance(module, Attention) and module.training:
            self.attentions += 1
        if isinstance(module, Llama):
            self._model = module
            if sequences and module.training and not inputs[0].is_floating_point():
                self.fed.append(
                    [hashlib.blake2b(row.numpy().tobytes(), digest_size=8).hexdigest() for row in inputs[0]]
                )

    def _see_step(self, optimizer: Any, *, first: bool) -> None:
        if first and self.before:
            return
        assert self._model is not None
        seen: dict[str, str] = {}
        for name, parameter in self._model.named_parameters():
            tensors = {f"model.{name}": parameter.detach()}
            tensors |= {f"optimizer.state.{name}.{key}": t for key, t in optimizer.state[parameter].items()}
            for key, tensor in tensors.items():
                seen[key] = digest(tensor.full_tensor() if isinstance(tensor, DTensor) else tensor)
        if first:
            self.before = seen
        else:
            self.after = seen

    def remove(self) -> None:
        for hook in self._removable:
            hook.remove()


class Lines(logging.Handler):
    """The log of one rank."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def work(request: dict[str, Any], sections: dict[str, Any], rank: int) -> dict[str, Any]:
    """Do one run; a ReshardError is a result, anything else is not."""
    lines = Lines()
    logging.getLogger("reshard").addHandler(lines)
    logging.getLogger("reshard").setLevel(logging.INFO)
    for section, values in request["own"].get(str(rank), {}).items():
        sections.setdefault(section, {}).update(values)
    config = Config().with_values(**sections)
    watch = Watch(request["sequences"], request["tensors"])
    limit = request["file_size_limit"].get(str(rank))
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    result: dict[str, Any] = {"error": None, "step": None, "loss": None, "checkpoint": None}
    try:
        if request["verb"] == "seed":
            result["checkpoint"] = str(seed(config))
        else:
            outcome = reshard.train.loop.train(config)
            result |= {"step": outcome.step, "loss": outcome.loss}
            result["checkpoint"] = str(outcome.checkpoint) if outcome.checkpoint else None
    except ReshardError as error:
        result["error"] = {"type": type(error).__name__, "message": error.message, "hint": error.hint}
        result["error"]["files"] = list(getattr(error, "files", ()))
    finally:
        watch.remove()
        logging.getLogger("reshard").removeHandler(lines)
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return {
        **result, "log": lines.lines, "fed": watch.fed, "attentions": watch.attentions,
        "before": watch.before, "after": watch.after,
    }  # fmt: skip


def be_rank(request: dict[str, Any], rank: int) -> None:
    """The life of a forked rank. Never returns."""
    place = Path(request["place"])
    status = 1
    try:
        sys.stdin.close()
        log = os.open(place / f"stderr-{rank}", os.O_WRONLY | os.O_CREAT, 0o600)
        os.dup2(log, 1)
        os.dup2(log, 2)
        results = []
        for sections, port in zip(request["configs"], request["ports"], strict=True):
            if request["world"] > 1:
                os.environ.update(
                    RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(request["world"]),
                    MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
                )  # fmt: skip
            results.append(work(request, sections, rank))
        (place / f"result-{rank}.json").write_text(json.dumps(results))
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def launch(request: dict[str, Any]) -> str:
    """Fork the ranks and wait for them. Returns what went wrong, or nothing."""
    living: dict[int, int] = {}
    for rank in range(request["world"]):
        pid = os.fork()
        if pid == 0:
            be_rank(request, rank)
        living[pid] = rank
    deadline = time.monotonic() + request["timeout_s"]
    problem = ""
    while living:
        for pid, rank in list(living.items()):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                del living[pid]
                if status != 0 and not problem:
                    problem = f"rank {rank} ended with status {status}"
                    deadline = min(deadline, time.monotonic() + 5)  # the others wait for it in vain
        if time.monotonic() > deadline and living:
            problem = problem or f"ranks {sorted(living.values())} did not end within {request['timeout_s']} s"
            for pid in living:
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.005)
    return problem


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        answers.write(json.dumps(launch(json.loads(line))) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
