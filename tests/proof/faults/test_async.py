"""Do background saves and signals keep what they promise? Real ranks, real signals, real write errors.

Writing is slowed down by the run's own rate limit, so that several steps pass while a save is under way.
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import tomli_w

PROJECT = Path(__file__).resolve().parents[3]
MODEL = {
    "dim": 128,
    "n_layers": 3,
    "n_heads": 4,
    "n_kv_heads": 4,
    "ffn_dim": 320,
    "vocab_size": 512,
}  # 9 MB with moments
PATIENCE_S = 120


class Run:
    """A run of `reshard train` on some ranks, each a process with torchrun's environment."""

    def __init__(self, place: Path, text: Path, ranks: int, sections: dict[str, dict[str, Any]]) -> None:
        place.mkdir(parents=True, exist_ok=True)
        self.place, self.folder = place, place / "checkpoint"
        config: dict[str, dict[str, Any]] = {
            "job": {"dump_folder": str(place)},
            "model": dict(MODEL),
            "optimizer": {"lr": 2e-3},
            "training": {
                "dataset": str(text), "cache_folder": str(text.parent / "tokens"), "seq_len": 32, "batch_size": 2,
                "global_batch_size": 4 * ranks, "steps": 12, "warmup_steps": 2,
            },
            "lr_scheduler": {"decay_type": "constant"},
            "parallelism": {"data_parallel_shard_degree": ranks},
            "checkpoint": {
                "enable_checkpoint": True, "interval": 100_000, "keep_latest_k": 0, "async_mode": "async",
                "async_write_limit_mb_s": 5.0,
            },
            "activation_checkpoint": {"mode": "none"},
            "comm": {"init_timeout_seconds": 60, "train_timeout_seconds": 60},
        }  # fmt: skip
        for section, values in sections.items():
            config.setdefault(section, {}).update(values)
        (place / "config.toml").write_text(tomli_w.dumps(config))
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        common = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        self.ranks = [
            subprocess.Popen(
                [sys.executable, "-m", "reshard", "train", str(place / "config.toml")],
                env={**common, "RANK": str(r), "LOCAL_RANK": str(r), "WORLD_SIZE": str(ranks)},
                stdout=subprocess.DEVNULL, stderr=(place / f"stderr-{r}").open("w"),
            )
            for r in range(ranks)
        ]  # fmt: skip

    def codes(self) -> list[int]:
        """Wait for all ranks; their exit codes."""
        return [process.wait(timeout=PATIENCE_S) for process in self.ranks]

    def end(self) -> None:
        """All went well."""
        assert self.codes() == [0] * len(self.ranks), self.said()

    def said(self) -> str:
        return "\n".join(f"-- {path.name}\n{path.read_text()[-3000:]}" for path in sorted(self.place.glob("stderr-*")))

    def lines(self, name: str) -> list[dict[str, Any]]:
        path = self.place / name
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def steps(self) -> list[int]:
        return [line["step"] for line in self.lines("metrics.jsonl")]

    def saves(self) -> list[dict[str, Any]]:
        return [line for line in self.lines("events.jsonl") if line["event"] == "save"]

    def wait_for(self, what: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not what():
            assert time.monotonic() < deadline, self.said()
            assert all(process.poll() is None for process in self.ranks), self.said()
            time.sleep(0.005)

    def committed(self) -> dict[int, Path]:
        return {int(path.name[5:]): path for path in self.folder.glob("step-*") if path.name[5:].isdigit()}

    def under_way(self) -> list[Path]:
        return list(self.folder.glob("step-*.tmp-*")) if self.folder.exists() else []

    def kill(self) -> None:
        for process in self.ranks:
            process.kill()
            process.wait()


Start = Callable[..., Run]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    sources = sorted((PROJECT / "src").rglob("*.py"))
    path.write_text("\n".join(source.read_text(encoding="utf-8") for source in sources), encoding="utf-8")
    return path


@pytest.fixture
def start(text: Path, tmp_path: Path) -> Iterator[Start]:
    """start(ranks, name, section={...}): a run that has begun; what still runs at the end is killed."""
    runs = []

    def begin(ranks: int = 2, name: str = "run", **sections: dict[str, Any]) -> Run:
        runs.append(Run(tmp_path / name, text, ranks, sections))
        return runs[-1]

    yield begin
    for run in runs:
        run.kill()


def digests(directory: Path) -> dict[str, str]:
    """Of every tensor in a checkpoint, by plain torch."""
    import torch
    import torch.distributed.checkpoint as dcp

    described = dcp.FileSystemReader(directory).read_metadata().state_dict_metadata
    tensors: dict[str, Any] = {n: torch.empty(e.size, dtype=e.properties.dtype) for n, e in described.items()}
    dcp.load(tensors, storage_reader=dcp.FileSystemReader(directory), no_dist=True)
    return {
        name: hashlib.blake2b(tensor.reshape(-1).view(torch.uint8).numpy().tobytes(), digest_size=8).hexdigest()
        for name, tensor in tensors.items()
    }


def whole(directory: Path) -> bool:
    from reshard.checkpoint.verify import verify_checkpoint

    verdict = verify_checkpoint(directory)
    return verdict.whole is True


# -- saves in the background


@pytest.mark.parametrize("ranks", [1, 2])
def test_what_is_saved_is_bit_for_bit_what_was_staged_though_weights_change_meanwhile(ranks: int, start: Start) -> None:
    background = start(ranks, "background", checkpoint={"interval": 4})
    background.end()
    at_once = start(ranks, "at-once", checkpoint={"interval": 4, "async_mode": "disabled"})
    at_once.end()
    assert background.lines("metrics.jsonl")[-1]["loss"] == at_once.lines("metrics.jsonl")[-1]["loss"]
    assert background.committed().keys() == at_once.committed().keys() == {4, 8, 12}
    for step, directory in background.committed().items():
        assert digests(directory) == digests(at_once.committed()[step])
    # And it was not the case that nothing changed meanwhile.
    for save in background.saves():
        assert save["write_s"] > 4 * save["stall_s"]
    assert digests(background.committed()[4]) != digests(background.committed()[8])


def test_one_save_is_in_flight_and_the_end_of_the_run_waits_for_it(start: Start) -> None:
    run = start(2, checkpoint={"interval": 1}, training={"steps": 5})
    most = 0
    while any(process.poll() is None for process in run.ranks):
        most = max(most, len(run.under_way()))
        time.sleep(0.002)
    run.end()
    assert most == 1
    assert sorted(run.committed()) == [1, 2, 3, 4, 5]
    assert all(whole(path) for path in run.committed().values())
    assert run.under_way() == []
    assert [save["step"] for save in run.saves()] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("failing", [0, 1])
def test_an_error_of_one_ranks_writing_ends_all_ranks_at_a_next_step(failing: int, start: Start) -> None:
    first = start(2, "run", training={"steps": 1}, checkpoint={"interval": 1})
    first.end()
    run = start(2, "run", training={"steps": 100_000}, checkpoint={"interval": 20})
    resource.prlimit(run.ranks[failing].pid, resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY))
    codes = run.codes()
    assert all(code not in (0, -signal.SIGKILL) for code in codes), run.said()
    assert 20 <= run.steps()[-1] <= 40  # no later than where the next save would have begun
    for rank in range(2):
        said = (run.place / f"stderr-{rank}").read_text()
        assert "Traceback" not in said
    assert f"__{failing}_0.distcp" in run.said()
    assert "step-20" in run.said()
    assert sorted(run.committed()) == [1]
    assert whole(run.committed()[1])
    assert run.under_way() == []


def test_an_exception_in_training_waits_for_the_save_in_flight_and_keeps_it(start: Start) -> None:
    run = start(2, optimizer={"lr": 1e30}, training={"warmup_steps": 0, "steps": 50}, checkpoint={"interval": 1})
    codes = run.codes()
    assert all(code not in (0, -signal.SIGKILL) for code in codes), run.said()
    assert "expected finite numbers" in run.said()
    last = max(run.committed())
    assert last == run.steps()[-1]  # the step before the one that failed had just begun to be saved
    assert all(whole(path) for path in run.committed().values())
    assert run.under_way() == []


# -- signals


def newest_is_where_it_stopped(run: Run) -> None:
    last = run.steps()[-1]
    assert max(run.committed()) == last
    assert whole(run.committed()[last])
    assert run.under_way() == []
    stops = [event for event in run.lines("events.jsonl") if event["event"] == "stop"]
    assert [stop["step"] for stop in stops] == [last]


@pytest.mark.parametrize("mode", ["async", "disabled"])
@pytest.mark.parametrize(("number", "rank"), [(signal.SIGTERM, 1), (signal.SIGUSR1, 0), (signal.SIGUSR1, 1)])
def test_a_signal_to_one_rank_ends_all_after_the_step_with_a_save(
    number: signal.Signals, rank: int, mode: str, start: Start
) -> None:
    run = start(2, training={"steps": 100_000}, checkpoint={"async_mode": mode})
    run.wait_for(lambda: len(run.steps()) >= 3)
    run.ranks[rank].send_signal(number)
    run.end()
    newest_is_where_it_stopped(run)
    assert f"{number.name}: stopping after step {run.steps()[-1]}" in run.said()


def test_a_signal_while_a_save_is_in_flight_keeps_both(start: Start) -> None:
    run = start(2, training={"steps": 100_000}, checkpoint={"interval": 5, "async_write_limit_mb_s": 2.0})
    run.wait_for(lambda: bool(run.under_way()))
    run.ranks[1].send_signal(signal.SIGTERM)
    run.end()
    newest_is_where_it_stopped(run)
    assert 5 in run.committed()
    assert all(whole(path) for path in run.committed().values())


@pytest.mark.parametrize("mode", ["async", "disabled"])
def test_more_signals_corrupt_nothing(mode: str, start: Start) -> None:
    """Two hundred a second to every rank, until they are gone. One may hit a process that is leaving already."""
    run = start(2, training={"steps": 100_000}, checkpoint={"interval": 7, "async_mode": mode})
    run.wait_for(lambda: len(run.steps()) >= 3)
    while any(process.poll() is None for process in run.ranks):
        for process in run.ranks:
            process.send_signal(signal.SIGTERM)
        time.sleep(0.005)
    assert all(code in (0, -signal.SIGTERM) for code in run.codes()), run.said()
    newest_is_where_it_stopped(run)
    assert all(whole(path) for path in run.committed().values())


def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(start: Start) -> None:
    run = start(2, "stopped", training={"steps": 100_000})
    run.wait_for(lambda: len(run.steps()) >= 3)
    run.ranks[0].send_signal(signal.SIGTERM)
    run.end()
    at = run.steps()[-1]
    start(2, "stopped", training={"steps": at + 4}).end()
    start(2, "straight", training={"steps": at + 4}).end()
    folder = run.place.parent
    last = f"checkpoint/step-{at + 4}"
    assert digests(folder / "stopped" / last) == digests(folder / "straight" / last)


# -- by the clock


@pytest.mark.parametrize("mode", ["async", "disabled"])
def test_an_interval_in_seconds_is_agreed_by_all_ranks_and_exact_to_a_step(mode: str, start: Start) -> None:
    run = start(
        3, training={"steps": 100_000},
        checkpoint={"interval_type": "seconds", "interval": 1, "async_mode": mode, "async_write_limit_mb_s": 100.0},
    )  # fmt: skip
    run.wait_for(lambda: len(run.saves()) >= 4)
    run.ranks[2].send_signal(signal.SIGTERM)
    run.end()
    saves = run.saves()[:4]
    took = {line["step"]: line["step_time_s"] for line in run.lines("metrics.jsonl")}
    began = [datetime.fromisoformat(save["at"]).timestamp() - save["write_s"] for save in saves]
    # A background save is reported at the step after its end, so its beginning is only known to a step.
    slack = max(took.values()) if mode == "async" else 0
    for (before, after), (earlier, later) in zip(pairwise(saves), pairwise(began), strict=True):
        assert later - earlier >= 0.95 - slack
        # Not a step too late: when the last but one ended, the second was not yet over.
        between = range(before["step"] + 1, after["step"])
        assert before["stall_s"] + sum(took[step] for step in between) < 1
    for step, directory in run.committed().items():
        names = {path.name for path in directory.iterdir()}
        assert {"__0_0.distcp", "__1_0.distcp", "__2_0.distcp"} <= names, step
        assert whole(directory)
