"""Real ranks for the tests: `launch` starts N processes that call reshard.train.loop.train, and brings back what they saw."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1]))

from ports import free_port

os.environ.setdefault("OMP_NUM_THREADS", "1")

PROJECT = Path(__file__).parents[2]

# Degrees of a layout, by its name; those that are not given are 1.
LAYOUTS: dict[str, dict[str, int]] = {
    "1": {},
    "fsdp2": {"data_parallel_shard_degree": 2},
    "fsdp4": {"data_parallel_shard_degree": 4},
    "hsdp2x2": {"data_parallel_replicate_degree": 2, "data_parallel_shard_degree": 2},
    "rep2": {"data_parallel_replicate_degree": 2},
    "tp2": {"tensor_parallel_degree": 2},
    "fsdp2xtp2": {"data_parallel_shard_degree": 2, "tensor_parallel_degree": 2},
}
DEGREES = (
    "data_parallel_replicate_degree", "data_parallel_shard_degree", "tensor_parallel_degree",
    "context_parallel_degree", "pipeline_parallel_degree",
)  # fmt: skip

TINY = {"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "ffn_dim": 128, "vocab_size": 512}
SEQ_LEN, GLOBAL_BATCH = 32, 8

Sections = dict[str, dict[str, Any]]


class RankFailed(Exception):
    """A rank ended with something else than a result or a ReshardError."""


@dataclass(frozen=True)
class Rank:
    """What one rank came to; see ranks.py. error: type, message, hint and files of a ReshardError."""

    error: dict[str, Any] | None
    step: int | None
    loss: float | None
    checkpoint: str | None
    log: list[str]
    fed: list[list[str]]
    attentions: int
    before: dict[str, str]
    after: dict[str, str]


class Launcher:
    """Starts ranks, by way of one process that has torch imported already (ranks.py)."""

    def __init__(self, place: Path) -> None:
        self._place, self._count = place, 0
        self._zygote: subprocess.Popen[str] | None = None

    def shared(self, make: Callable[[Any], dict[Any, Any]]) -> Callable[[Any, Any], Any]:
        """get(group, key): what `make(group)` has under key; made when first asked for, once, also where it fails."""
        made: dict[Any, dict[Any, Any] | Exception] = {}

        def get(group: Any, key: Any) -> Any:
            if group not in made:
                try:
                    made[group] = make(group)
                except Exception as error:
                    made[group] = error
            found = made[group]
            if isinstance(found, Exception):
                raise found
            return found[key]

        return get

    def __call__(self, config: Sections, **options: Any) -> list[Rank]:
        """Run one config on new ranks, as many as its degrees need. Results in rank order; options as in `each`."""
        return self.each([config], **options)[0]

    def each(
        self,
        configs: list[Sections],
        *,
        verb: str = "train",
        sequences: bool = False,
        tensors: bool = False,
        file_size_limit: dict[int, int] | None = None,
        own: dict[int, Sections] | None = None,
        timeout_s: float = 240,
    ) -> list[list[Rank]]:
        """Run configs one after the other on the same new ranks: starting and warming them costs more than a short run.

        All must need equally many. sequences, tensors: also bring back what was fed, and digests of all tensors before
        and after. file_size_limit: of a rank, in bytes, as a full disk. own: sections of one rank alone.
        Raises RankFailed with the ranks' output where one of them died.
        """
        (world,) = {_world_size(config) for config in configs}
        self._count += 1
        place = self._place / f"launch-{self._count}"
        place.mkdir()
        request = {
            "verb": verb, "configs": configs, "ports": [free_port() for _ in configs], "world": world,
            "place": str(place), "sequences": sequences, "tensors": tensors, "timeout_s": timeout_s,
            "file_size_limit": file_size_limit or {}, "own": own or {},
        }  # fmt: skip
        problem = self._ask(request)
        if problem:
            output = "\n".join(f"-- rank {r}\n{_tail(place / f'stderr-{r}')}" for r in range(world))
            raise RankFailed(f"{problem}\n{output}")
        by_rank = [json.loads((place / f"result-{rank}.json").read_text()) for rank in range(world)]
        return [[Rank(**results[i]) for results in by_rank] for i in range(len(configs))]

    def _ask(self, request: dict[str, Any]) -> str:
        if self._zygote is None:
            alone = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
            with open(self._place / "stderr", "w") as stderr:
                self._zygote = subprocess.Popen(
                    [sys.executable, str(Path(__file__).with_name("ranks.py"))],
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True, env=alone,
                )  # fmt: skip
        assert self._zygote.stdin is not None
        assert self._zygote.stdout is not None
        self._zygote.stdin.write(json.dumps(request) + "\n")
        self._zygote.stdin.flush()
        answer = self._zygote.stdout.readline()
        if not answer:
            raise RankFailed(f"the process that forks the ranks has ended\n{_tail(self._place / 'stderr')}")
        return str(json.loads(answer))

    def close(self) -> None:
        if self._zygote is not None:
            assert self._zygote.stdin is not None
            self._zygote.stdin.close()
            self._zygote.wait(timeout=30)


def _world_size(config: Sections) -> int:
    return math.prod(config.get("parallelism", {}).get(name, 1) for name in DEGREES)


def _tail(path: Path, characters: int = 4000) -> str:
    return path.read_text(errors="replace")[-characters:] if path.exists() else "(nothing)"


@pytest.fixture(scope="session")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launcher]:
    launcher = Launcher(tmp_path_factory.mktemp("launches"))
    yield launcher
    launcher.close()


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for all of these tests: `text.txt` (this project's own source), `tokens` (its cache)."""
    folder = tmp_path_factory.mktemp("shared")
    sources = sorted((PROJECT / "src").rglob("*.py"))
    (folder / "text.txt").write_text("\n".join(path.read_text(encoding="utf-8") for path in sources), encoding="utf-8")
    return folder


Tiny = Callable[..., Sections]


@pytest.fixture(scope="session")
def tiny(shared: Path) -> Tiny:
    """A config of the tiny model on real text: tiny(folder, "fsdp2", training={"steps": 4})."""

    def make(folder: Path, layout: str = "1", **sections: dict[str, Any]) -> Sections:
        config: Sections = {
            "job": {"dump_folder": str(folder)},
            "model": dict(TINY),
            "optimizer": {"lr": 2e-3},
            "training": {
                "dataset": str(shared / "text.txt"), "cache_folder": str(shared / "tokens"), "seq_len": SEQ_LEN,
                "batch_size": 2, "global_batch_size": GLOBAL_BATCH, "steps": 4, "warmup_steps": 2, "max_norm": 0.5,
            },
            "parallelism": dict.fromkeys(DEGREES, 1) | LAYOUTS[layout],
            "checkpoint": {"enable_checkpoint": True, "interval": 1000},
            "activation_checkpoint": {"mode": "none"},
            "comm": {"init_timeout_seconds": 120, "train_timeout_seconds": 120},
        }  # fmt: skip
        for section, values in sections.items():
            config.setdefault(section, {}).update(values)
        return config

    return make


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="session")
def metrics() -> Callable[[Path], list[tuple[int, float, float]]]:
    """(step, loss, grad_norm) of every line of a run's metrics.jsonl."""

    def read(folder: Path) -> list[tuple[int, float, float]]:
        return [(r["step"], r["loss"], r["grad_norm"]) for r in read_lines(folder / "metrics.jsonl")]

    return read


@pytest.fixture(scope="session")
def events() -> Callable[[Path], list[dict[str, Any]]]:
    return lambda folder: read_lines(folder / "events.jsonl")


def plain_tensors(directory: Path) -> dict[str, Any]:
    """All tensors of a DCP directory, by torch.distributed.checkpoint alone: none of our reader is in it."""
    import torch
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    described = dcp.FileSystemReader(str(directory)).read_metadata().state_dict_metadata
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in described.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    dcp.load(tensors, storage_reader=dcp.FileSystemReader(str(directory)), no_dist=True)
    return tensors


def digest(tensor: Any) -> str:
    """Of dtype, shape and every bit, as ranks.py computes it."""
    import torch

    tensor = tensor.detach().contiguous()
    head = f"{tensor.dtype} {tuple(tensor.shape)} ".encode()
    return hashlib.blake2b(head + tensor.reshape(-1).view(torch.uint8).numpy().tobytes(), digest_size=16).hexdigest()


@pytest.fixture(scope="session")
def plain() -> Callable[[Path], dict[str, Any]]:
    return plain_tensors


@pytest.fixture(scope="session")
def stored() -> Callable[[Path], dict[str, str]]:
    """Name -> digest of every tensor that a checkpoint stores, read by plain DCP."""
    return lambda directory: {name: digest(tensor) for name, tensor in plain_tensors(directory).items()}


@pytest.fixture(scope="session")
def copied() -> Callable[[Path, Path], Path]:
    """Put a run's checkpoint folder (or one step) to where another run will find it."""

    def copy(source: Path, target: Path) -> Path:
        shutil.copytree(source, target)
        return target

    return copy
