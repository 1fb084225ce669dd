"""What these tests share: small real checkpoints, made by the save that a run uses."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from reshard.checkpoint.layout import step_directory
from reshard.checkpoint.manifest import Manifest
from reshard.checkpoint.ranks import Ranks
from reshard.checkpoint.save import About, save

torch.set_num_threads(1)

Save = Callable[..., Manifest]
NOBODY = 65534


@pytest.fixture
def unprivileged(tmp_path: Path) -> Callable[[], AbstractContextManager[None]]:
    """A block in which this process may no more than anybody: root becomes nobody for it."""

    @contextmanager
    def block() -> Iterator[None]:
        if os.geteuid() != 0:
            yield
            return
        above = [path for path in tmp_path.parents if path.stat().st_uid == 0 and not path.stat().st_mode & 0o001]
        modes = {path: path.stat().st_mode for path in (tmp_path, *above)}
        for path, mode in modes.items():
            path.chmod(mode | 0o011)  # it may pass through to what the test has made
        os.seteuid(NOBODY)
        try:
            yield
        finally:
            os.seteuid(0)
            for path, mode in modes.items():
                path.chmod(mode)

    return block


def state_of(number: int) -> dict[str, Any]:
    """A state that tells which save it came from."""
    weight = torch.arange(24, dtype=torch.float32).reshape(6, 4) + number
    return {"model": {"a.weight": weight}, "optimizer": {"state.a.weight.exp_avg": weight / 7}}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "checkpoint"


@pytest.fixture
def make(folder: Path) -> Save:
    """make(step): a committed checkpoint, each made after those before it. number: what its tensors hold."""

    def save_step(
        step: int, *, kind: str = "full", number: int | None = None, parent: Manifest | None = None, **source: Any
    ) -> Manifest:
        state = state_of(step if number is None else number)
        about = About(
            step=step,
            kind=kind,  # type: ignore[arg-type]
            source={"kind": "train", **source},
            parent=parent.save_id if parent else None,
            train_state={"step": step} if kind == "full" else {},
        )
        return save(step_directory(folder, step), state if kind == "full" else state["model"], about, Ranks())

    return save_step


@pytest.fixture
def number_in(folder: Path) -> Callable[[int], int]:
    """Which save does step N hold? Read by plain torch, so that a manifest cannot speak for other bytes."""
    import torch.distributed.checkpoint as dcp

    def read(step: int) -> int:
        tensor = torch.empty(6, 4)
        dcp.load({"model": {"a.weight": tensor}}, checkpoint_id=str(step_directory(folder, step)), no_dist=True)
        return int(tensor[0, 0])

    return read
