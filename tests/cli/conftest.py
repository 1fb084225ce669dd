"""What do the tests of commands share? A way to type many of them that imports torch once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True)
class Typed:
    """How a command ended: exit code, stdout, stderr."""

    code: int
    out: str
    err: str


@pytest.fixture(scope="session")
def typed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[list[str], Path], Typed]]:
    """typed(["reshard", "inspect", "x"], cwd): run it, or `python FILE ...`, in a fork of warm.py."""
    place = tmp_path_factory.mktemp("typed")
    alone = {k: v for k, v in os.environ.items() if k not in {"RANK", "WORLD_SIZE", "LOCAL_RANK", "NGPU"}}
    warm = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("warm.py"))],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**alone, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert warm.stdin is not None
    assert warm.stdout is not None
    stdin, stdout = warm.stdin, warm.stdout

    def run(words: list[str], cwd: Path) -> Typed:
        files = {"out": str(place / "out"), "err": str(place / "err")}
        stdin.write(json.dumps({"words": words, "cwd": str(cwd), **files}) + "\n")
        stdin.flush()
        code = int(stdout.readline())
        return Typed(code, Path(files["out"]).read_text(), Path(files["err"]).read_text())

    yield run
    stdin.close()
    warm.wait(timeout=30)
