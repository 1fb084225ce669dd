"""Real ranks for the proofs, quickly: what each of them saw and held.

    python launch.py        reads one JSON request a line on stdin, answers with one JSON line on stdout

Importing torch takes seconds, so the process behind `Ranks` has imported it, once for all proofs of a module. Every run
forks new processes from it, which are ranks as torchrun makes them (own process, RANK and WORLD_SIZE in the environment,
gloo between them). Not several runs on the same ranks: DTensor caches what it knows of a mesh, and takes the next run's
mesh of the same extents for it, whose groups are others.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))

from ports import free_port

os.environ.setdefault("OMP_NUM_THREADS", "1")

PROJECT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 240  # of one run
_DEGREES = (
    "data_parallel_replicate_degree", "data_parallel_shard_degree", "context_parallel_degree", "tensor_parallel_degree",
    "pipeline_parallel_degree",
)  # fmt: skip

# Eight heads, for tensor parallel of up to eight; layers for two chunks on each of two ranks.
MODEL = {"dim": 64, "n_layers": 4, "n_heads": 8, "n_kv_heads": 8, "ffn_dim": 128, "vocab_size": 512}

Sections = dict[str, dict[str, Any]]


class RankFailed(Exception):
    """A rank ended with something else than a result, or not in time."""


@dataclass(frozen=True)
class Seen:
    """What one rank came to.

    error: the sentence of a ReshardError. fed: for each forward pass of the part with
    the embedding, a digest of each row of tokens that is not padding. held: name -> digest of every whole tensor
    (parameters, moments) of this rank's stages, as its first optimizer step found them.
    """

    error: str | None
    fed: list[list[str]]
    held: dict[str, str]


class Ranks:
    """Starts ranks. A context: leaving it ends the process behind."""

    def __init__(self, place: Path) -> None:
        self._place, self._count = place, 0
        self._zygote: subprocess.Popen[str] | None = None

    def __call__(self, configs: Sequence[Any], *, watch: bool = False) -> list[list[Seen]]:
        """Run each reshard.config.Config on new ranks, one run after the other. For each: what its ranks saw, in order.

        watch: fill `fed` and `held`. Raises RankFailed.
        """
        return [self._run(config.model_dump(), world_size(config), watch) for config in configs]

    def problems(self, configs: Sequence[Any]) -> list[str | None]:
        """Run, and say of each what went wrong: what `reshard parity` asks of whoever runs its layouts."""
        problems: list[str | None] = []
        for config in configs:
            try:
                (ranks,) = self([config])
                problems.append(next((seen.error for seen in ranks if seen.error), None))
            except RankFailed as error:
                problems.append(str(error))
        return problems

    def _run(self, config: Sections, world: int, watch: bool) -> list[Seen]:
        self._count += 1
        place = self._place / f"run-{self._count}"
        place.mkdir(parents=True)
        request = {"config": config, "port": free_port(), "world": world, "place": str(place), "watch": watch}
        problem = self._ask(request)
        if problem:
            output = "\n".join(f"-- rank {r}\n{_tail(place / f'stderr-{r}')}" for r in range(world))
            raise RankFailed(f"{config['job']['dump_folder']}: {problem}\n{output}")
        return [Seen(**json.loads((place / f"result-{rank}.json").read_text())) for rank in range(world)]

    def _ask(self, request: dict[str, Any]) -> str:
        if self._zygote is None:
            self._zygote = subprocess.Popen(
                [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                env={
                    **{k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")},
                    "TORCHINDUCTOR_CACHE_DIR": str(self._place / "compiled"),
                },
            )  # fmt: skip
        assert self._zygote.stdin is not None
        assert self._zygote.stdout is not None
        self._zygote.stdin.write(json.dumps(request) + "\n")
        self._zygote.stdin.flush()
        line = self._zygote.stdout.readline()
        assert line, "the process that forks the ranks has ended"
        return str(json.loads(line))

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        if self._zygote is not None:
            assert self._zygote.stdin is not None
            self._zygote.stdin.close()
            self._zygote.wait(timeout=60)


def base_config(place: Path, **sections: dict[str, Any]) -> Any:
    """A Config of the tiny model on real text, this project's own source; tokenised once in `place`."""
    from reshard.config import Config

    text = place / "text.txt"
    if not text.exists():
        sources = sorted((PROJECT / "src").rglob("*.py"))
        text.write_text("\n".join(path.read_text(encoding="utf-8") for path in sources), encoding="utf-8")
    base: Sections = {
        "job": {"dump_folder": str(place)},
        "model": dict(MODEL),
        "optimizer": {"lr": 2e-3},
        "training": {
            "dataset": str(text), "cache_folder": str(place / "tokens"), "seq_len": 64, "batch_size": 2,
            "global_batch_size": 8, "steps": 20, "warmup_steps": 2,
        },
        "activation_checkpoint": {"mode": "none"},
        "comm": {"init_timeout_seconds": 60, "train_timeout_seconds": 60},
    }  # fmt: skip
    for section, values in sections.items():
        base[section] = base.get(section, {}) | values
    return Config().with_values(**base)


def on_layout(config: Any, name: str, folder: Path, **sections: dict[str, Any]) -> Any:
    """The config on a layout, written as `reshard parity` reads it, with a folder of its own."""
    from reshard.commands.parity import AXES, parse_layout

    wanted = parse_layout(name)
    degrees: dict[str, Any] = {key: getattr(wanted.layout, field) for field, key in AXES.values()}
    if wanted.schedule:
        degrees["pipeline_parallel_schedule"] = wanted.schedule
    changes: Sections = {"job": {"dump_folder": str(folder)}, "parallelism": degrees}
    for section, values in sections.items():
        changes[section] = changes.get(section, {}) | values
    return config.with_values(**changes)


def world_size(config: Any) -> int:
    """As many ranks as the degrees ask for."""
    return math.prod(getattr(config.parallelism, name) for name in _DEGREES)


def stored_items(directory: Path) -> dict[str, Any]:
    """Every tensor of a DCP directory, put together from its items, each opened by torch.load alone.

    None of our reader is in it, nor DCP's planner: the metadata says which bytes of which file are which box. Fails where
    the boxes leave a number out.
    """
    import torch
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    metadata = dcp.FileSystemReader(str(directory)).read_metadata()
    described = {n: e for n, e in metadata.state_dict_metadata.items() if isinstance(e, TensorStorageMetadata)}
    tensors = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in described.items()}
    filled = dict.fromkeys(tensors, 0)
    for index, info in (metadata.storage_data or {}).items():
        if index.fqn not in described:
            continue
        with open(directory / info.relative_path, "rb") as file:
            file.seek(info.offset)
            item = torch.load(io.BytesIO(file.read(info.length)), weights_only=True)
        offsets = index.offset or (0,) * item.ndim
        box = tuple(slice(start, start + size) for start, size in zip(offsets, item.shape, strict=True))
        tensors[index.fqn][box] = item
        filled[index.fqn] += item.numel()
    assert filled == {name: tensor.numel() for name, tensor in tensors.items()}
    return tensors


def digest(tensor: Any) -> str:
    """Of dtype, shape and every bit."""
    import torch

    tensor = tensor.detach().contiguous()
    head = f"{tensor.dtype} {tuple(tensor.shape)} ".encode()
    return hashlib.blake2b(head + tensor.reshape(-1).view(torch.uint8).numpy().tobytes(), digest_size=16).hexdigest()


def _tail(path: Path, characters: int = 4000) -> str:
    return path.read_text(errors="replace")[-characters:] if path.exists() else "(nothing)"


# -- the other end: what the ranks do


class Watch:
    """Sees what a run feeds to its model, and what it holds before its first optimizer step, by torch's own global hooks.

    Whole tensors are put together by DTensor, not by our code.
    """

    def __init__(self) -> None:
        from torch.nn.modules.module import register_module_forward_pre_hook
        from torch.optim.optimizer import register_optimizer_step_pre_hook

        self.fed: list[list[str]] = []
        self.held: dict[str, str] = {}
        self._parts: list[Any] = []
        self._hooks = [
            register_module_forward_pre_hook(self._see_forward),
            register_optimizer_step_pre_hook(lambda optimizer, _a, _k: self._see_step(optimizer)),
        ]

    def _see_forward(self, module: Any, inputs: Any) -> None:
        from reshard.model.llama import Llama

        if not isinstance(module, Llama):
            return
        if all(module is not part for part in self._parts):
            self._parts.append(module)
        if module.training and not inputs[0].is_floating_point():
            rows = [row.numpy().tobytes() for row in inputs[0] if row.any()]  # padding is all zeros, text never is
            self.fed.append([hashlib.blake2b(row, digest_size=8).hexdigest() for row in rows])

    def _see_step(self, optimizer: Any) -> None:
        from torch.distributed.tensor import DTensor

        if self.held:
            return
        # In the order of layers on every rank, because putting them together is a collective.
        for part in sorted(self._parts, key=lambda part: part.part.layers.start):
            for name, parameter in part.named_parameters():
                tensors = {f"model.{name}": parameter.detach()}
                tensors |= {f"optimizer.state.{name}.{key}": t for key, t in optimizer.state[parameter].items()}
                for key, tensor in tensors.items():
                    assert key not in self.held, key
                    self.held[key] = digest(tensor.full_tensor() if isinstance(tensor, DTensor) else tensor)

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()


def _work(sections: Sections, watching: bool) -> dict[str, Any]:
    import reshard.train.loop
    from reshard.config import Config
    from reshard.errors import ReshardError

    watch = Watch() if watching else None
    error = None
    try:
        reshard.train.loop.train(Config().with_values(**sections))
    except ReshardError as refused:
        error = str(refused)
    finally:
        if watch is not None:
            watch.remove()
    return {"error": error, "fed": watch.fed if watch else [], "held": watch.held if watch else {}}


def _be_rank(request: dict[str, Any], rank: int) -> None:
    """The life of a forked rank. Never returns."""
    place, status = Path(request["place"]), 1
    try:
        sys.stdin.close()
        log = os.open(place / f"stderr-{rank}", os.O_WRONLY | os.O_CREAT, 0o600)
        os.dup2(log, 1)
        os.dup2(log, 2)
        if request["world"] > 1:
            os.environ.update(
                RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(request["world"]), MASTER_ADDR="127.0.0.1",
                MASTER_PORT=str(request["port"]),
            )  # fmt: skip
        result = _work(request["config"], request["watch"])
        (place / f"result-{rank}.json").write_text(json.dumps(result))
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def _launch(request: dict[str, Any]) -> str:
    """Fork the ranks and wait for them. Returns what went wrong, or nothing."""
    living: dict[int, int] = {}
    for rank in range(request["world"]):
        pid = os.fork()
        if pid == 0:
            _be_rank(request, rank)
        living[pid] = rank
    deadline = time.monotonic() + TIMEOUT_S
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
            problem = problem or f"ranks {sorted(living.values())} did not end within {TIMEOUT_S} s"
            for pid in living:
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.005)
    return problem


def main() -> None:
    import torch.distributed.pipelining.schedules
    import torch.distributed.tensor.parallel  # noqa: F401

    import reshard.train.loop  # noqa: F401

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        answers.write(json.dumps(_launch(json.loads(line))) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
