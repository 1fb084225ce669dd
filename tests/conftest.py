"""What do the tests share? A shell to type commands into, a model that trains in a second, and real text for it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

# Before anything imports torch: ranks that fight for cores are slow.
os.environ.setdefault("OMP_NUM_THREADS", "1")

PROJECT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Done:
    """How a command ended: exit code, stdout, stderr."""

    code: int
    out: str
    err: str

    @property
    def sentence(self) -> str:
        """The one line of stderr that begins with `error: `. Fails where there is none, or a traceback."""
        assert "Traceback" not in self.err, self.err
        sentences = [line for line in self.err.splitlines() if line.startswith("error: ")]
        assert len(sentences) == 1, self.err
        return sentences[0].removeprefix("error: ")

    @property
    def hint(self) -> str:
        """What stderr says after `hint: `."""
        assert self.err.count("hint: ") == 1, self.err
        return self.err.partition("hint: ")[2].strip()


Shell = Callable[..., Done]


@pytest.fixture(scope="session")
def project() -> Path:
    return PROJECT


@pytest.fixture(scope="session")
def shell() -> Shell:
    """shell("reshard config x.toml", cwd=..., NGPU="2"): run a line of bash as a user would, from the project's root."""

    def run(command: str, *, cwd: Path = PROJECT, timeout_s: float = 300, **environment: str) -> Done:
        inherited = {k: v for k, v in os.environ.items() if k not in {"NGPU", "CONFIG", "CONFIG_FILE", "LOG_RANK"}}
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        done = subprocess.run(
            ["bash", "-c", command],
            cwd=cwd, capture_output=True, text=True, check=False, timeout=timeout_s, stdin=subprocess.DEVNULL,
            env={**inherited, "PATH": path, "OMP_NUM_THREADS": "1", **environment},
        )  # fmt: skip
        return Done(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of real text, some 300 kB: this project's own source."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    sources = sorted((PROJECT / "src").rglob("*.py"))
    path.write_text("\n".join(source.read_text(encoding="utf-8") for source in sources), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tiny(text: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Options that make any config a model of 0.1 million parameters, on `text`, with one cache for all."""
    return (
        "--model.dim 64 --model.n_layers 1 --model.n_heads 4 --model.n_kv_heads 2 --model.ffn_dim 128 "
        "--training.seq_len 32 --training.batch_size 2 --training.steps 4 --training.warmup_steps 1 "
        f"--training.dataset {text} --training.cache_folder {tmp_path_factory.mktemp('tokens')}"
    )
