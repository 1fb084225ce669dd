"""How do the fault tests run the command line on real ranks, quickly, and kill it? See zygote.py for the other end."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from ports import free_port

PROJECT = Path(__file__).resolve().parents[2]
_HIDDEN = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "NGPU", "CONFIG", "CONFIG_FILE"}


@dataclass(frozen=True)
class Ended:
    """How a run ended. codes: of each rank, None where the run was killed. out, err: of each rank."""

    codes: list[int] | None
    out: list[str]
    err: list[str]

    @property
    def code(self) -> int:
        """Of the rank that failed, or 0. Fails where the run was killed."""
        assert self.codes is not None, "\n".join(self.err)
        return max(self.codes, key=lambda code: (code != 0, code == 2))

    @property
    def sentences(self) -> list[str]:
        """The error of each rank that has one, without the hint."""
        lines = [line for text in self.err for line in text.splitlines() if line.startswith("error")]
        return [line.partition(": ")[2] for line in lines]


class Run:
    """Ranks that are running."""

    def __init__(self, runs: Runs, group: int, place: Path, world: int) -> None:
        self._runs, self.group, self.place, self._world = runs, group, place, world

    def kill(self) -> Ended:
        """SIGKILL for all ranks at once, and wait until they are gone."""
        with suppress(ProcessLookupError):  # it may just have ended
            os.killpg(self.group, signal.SIGKILL)
        self._runs.ask({"do": "wait", "run": self.group, "timeout_s": 60})
        return self._ended()

    def kill_rank(self, rank: int, *, timeout_s: float = 60) -> Ended:
        """SIGKILL for one rank; the others are left to notice."""
        pids = json.loads((self.place / "pids.json").read_text())
        with suppress(ProcessLookupError):
            os.kill(pids[str(rank)], signal.SIGKILL)
        return self.wait(timeout_s)

    def wait(self, timeout_s: float = 240) -> Ended:
        """Until all have ended. Fails where they do not in time."""
        late = self._runs.ask({"do": "wait", "run": self.group, "timeout_s": timeout_s})
        ended = self._ended()
        assert not late, f"not done after {timeout_s} s\n" + "\n".join(ended.err)
        return ended

    def _ended(self) -> Ended:
        codes = self.place / "codes.json"
        read = lambda name: [  # noqa: E731
            path.read_text(errors="replace") if (path := self.place / f"{name}-{rank}").exists() else ""
            for rank in range(self._world)
        ]
        return Ended(json.loads(codes.read_text()) if codes.exists() else None, read("out"), read("err"))


class Runs:
    """Starts runs, by way of one process that has torch imported. A context: leaving it ends that process."""

    def __init__(self, place: Path) -> None:
        self._place, self._count = place, 0
        self._zygote: subprocess.Popen[str] | None = None

    def start(
        self,
        words: Sequence[str] | None = None,
        *,
        world: int = 1,
        call: str = "",
        cwd: Path = PROJECT,
        environment: dict[str, str] | None = None,
        **arguments: Any,
    ) -> Run:
        """Start `reshard <words>` on so many ranks; or a function, call="faults.module:function", with arguments."""
        assert (words is None) == bool(call), "either a command or a function"
        self._count += 1
        place = self._place / f"run-{self._count}"
        place.mkdir(parents=True)
        request = {
            "do": "start", "words": None if words is None else [str(word) for word in words], "call": call,
            "arguments": arguments, "world": world, "place": str(place), "port": free_port(), "cwd": str(cwd),
            "environment": environment or {},
        }  # fmt: skip
        return Run(self, self.ask(request), place, world)

    def run(self, words: Sequence[str] | None = None, *, timeout_s: float = 240, **options: Any) -> Ended:
        """Start, and wait for the end."""
        return self.start(words, **options).wait(timeout_s)

    @property
    def process(self) -> int:
        """The process that all of them come from: who traces it, traces them."""
        self.ask({"do": "nothing"})
        assert self._zygote is not None
        return self._zygote.pid

    def ask(self, request: dict[str, Any]) -> Any:
        if self._zygote is None:
            self._place.mkdir(parents=True, exist_ok=True)
            self._zygote = subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name("zygote.py"))],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                stderr=open(self._place / "stderr", "w"),  # noqa: SIM115  the child has it open, too
                env={key: value for key, value in os.environ.items() if key not in _HIDDEN},
            )  # fmt: skip
        assert self._zygote.stdin is not None
        assert self._zygote.stdout is not None
        self._zygote.stdin.write(json.dumps(request) + "\n")
        self._zygote.stdin.flush()
        line = self._zygote.stdout.readline()
        assert line, f"the process that forks the ranks has ended\n{(self._place / 'stderr').read_text()[-4000:]}"
        return json.loads(line)

    def __enter__(self) -> Runs:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._zygote is not None:
            assert self._zygote.stdin is not None
            self._zygote.stdin.close()
            self._zygote.wait(timeout=60)
            self._zygote = None


def wait_for(condition: Any, *, timeout_s: float = 60, every_s: float = 0.001) -> None:
    """Until it is true. Fails where that takes too long."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(every_s)


# -- what they run


TINY = (
    "--model.dim", "32", "--model.n_layers", "2", "--model.n_heads", "4", "--model.n_kv_heads", "2", "--model.ffn_dim",
    "64", "--model.vocab_size", "512", "--training.seq_len", "16", "--training.batch_size", "2",
    "--training.warmup_steps", "1", "--lr_scheduler.decay_type", "constant", "--comm.train_timeout_seconds", "60",
    "--comm.init_timeout_seconds", "60", "--checkpoint.enable_checkpoint",
)  # fmt: skip
# Of few bytes, for the states of a crash: they are made by the thousand.
TINIER = (
    *TINY, "--model.dim", "8", "--model.n_layers", "1", "--model.n_heads", "2", "--model.n_kv_heads", "1",
    "--model.ffn_dim", "8", "--model.vocab_size", "264",
)  # fmt: skip


def train_words(place: Path, text: Path, *more: str, model: Sequence[str] = TINY, **options: Any) -> list[str]:
    """`reshard train` of a model of 50,000 parameters on a text: train_words(where, text, steps=3, interval=1).

    options: keys of [checkpoint] and [training], and lr.
    """
    of_checkpoint = ("interval", "keep_latest_k", "load_step", "initial_load_path", "async_mode", "folder")
    sections = {"lr": "optimizer"} | dict.fromkeys(of_checkpoint, "checkpoint")
    words = ["train", str(PROJECT / "train_configs" / "debug_model.toml"), *model]
    words += ["--job.dump_folder", str(place), "--training.dataset", str(text)]
    words += ["--training.cache_folder", str(text.parent / "tokens")]
    for name, value in options.items():
        words += [f"--{sections.get(name, 'training')}.{name}", str(value)]
    return [*words, *more]


def text_for_training(place: Path) -> Path:
    """A file of real text: this project's own source. Tokenised once, in `tokens` beside it."""
    path = place / "text.txt"
    sources = sorted((PROJECT / "src").rglob("*.py"))
    path.write_text("\n".join(source.read_text(encoding="utf-8") for source in sources), encoding="utf-8")
    return path


@dataclass(frozen=True)
class Workshop:
    """What the fault tests work with: a place in memory where there is one, a warm process, and a text."""

    place: Path
    runs: Runs
    text: Path

    def folder(self, name: str) -> Path:
        """A new directory."""
        (self.place / name).mkdir()
        return self.place / name


@contextmanager
def workshop() -> Iterator[Workshop]:
    """Make it, and take it away again. Thousands of folders are made and deleted: in memory that is quick."""
    memory = Path("/dev/shm")
    roomy = memory.is_dir() and os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > 1 << 30
    with tempfile.TemporaryDirectory(prefix="reshard-faults-", dir=memory if roomy else None) as name:
        place = Path(name)
        with Runs(place / "runs") as runs:
            yield Workshop(place, runs, text_for_training(place))
