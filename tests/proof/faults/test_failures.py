"""Does a run that cannot go on end, at once and with the reason? Real torchrun, real SIGKILL."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2]))

from proof.launch import base_config, on_layout, world_size
from reshard.config import config_to_toml

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are found in /proc")

PATIENCE_S = 120  # for what should take seconds: a machine may be busy, a hang lasts longer
ENDLESS = {"steps": 1_000_000}


@dataclass
class Started:
    """A program under way, its output in a file."""

    process: subprocess.Popen[bytes]
    log: Path
    metrics: Path
    others: list[int] = field(default_factory=list)  # processes that it started

    def after_steps(self, steps: int) -> None:
        """Wait until it has trained so far. Fails where it ends before."""
        wait_for(
            lambda: (
                self.process.poll() is not None
                or (self.metrics.exists() and self.metrics.read_text().count("\n") >= steps)
            )
        )
        assert self.process.poll() is None, self.output()

    def output(self) -> str:
        return self.log.read_text(errors="replace")


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Started]]:
    """start("pp2.tp2", "torchrun"): an endless training, or `reshard parity` of it. What is left of it is killed."""
    started: list[Started] = []

    def begin(layout: str, program: str = "torchrun", **sections: dict[str, Any]) -> Started:
        config = on_layout(base_config(tmp_path), layout, tmp_path / "run", **sections)
        toml, log = tmp_path / "config.toml", tmp_path / "log"
        toml.write_text(config_to_toml(config))
        words = {
            "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world_size(config)), "-m",
                         "reshard", "train", str(toml)],
            "parity": ["-m", "reshard", "parity", str(toml), "--layouts", layout, "--steps", "200"],
        }[program]  # fmt: skip
        metrics = tmp_path / {"torchrun": "run", "parity": f"run/parity/{layout}"}[program] / "metrics.jsonl"
        with open(log, "wb") as output:
            process = subprocess.Popen(
                [sys.executable, *words], stdout=output, stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )  # fmt: skip
        started.append(Started(process, log, metrics))
        return started[-1]

    yield begin
    for one in started:
        if one.process.poll() is None:
            one.process.terminate()
            one.process.wait(timeout=PATIENCE_S)
        for pid in one.others:
            if lives(pid):
                os.kill(pid, signal.SIGKILL)


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("layout", "victim"), [("fsdp2", 1), ("pp2.fsdp2", 0), ("cp2.tp2", 3)])
def test_a_rank_that_dies_takes_the_run_down_with_its_number_and_the_reason(
    layout: str, victim: int, start: Any
) -> None:
    run = start(layout, training=ENDLESS)
    run.after_steps(2)
    workers = ranks_of(run.process.pid)
    run.others += workers.values()
    os.kill(workers[victim], signal.SIGKILL)
    begun = time.monotonic()
    code = run.process.wait(timeout=PATIENCE_S)
    print(f"{layout}: the run was down {time.monotonic() - begun:.1f} s after rank {victim} was killed")
    assert code != 0
    summary = run.output().partition("Root Cause")[2]
    assert f"rank      : {victim} (local_rank: {victim})" in summary
    assert "SIGKILL" in summary
    wait_for(lambda: not any(lives(pid) for pid in workers.values()))
    # The others say that it was not they, in a sentence: no traceback but the launcher's own.
    assert "another rank has ended" in run.output()
    assert run.output().count("Traceback") == 1


@pytest.mark.timeout(300)
def test_workers_end_with_their_agent(start: Any) -> None:
    run = start("fsdp2", training=ENDLESS)
    run.after_steps(2)
    workers = ranks_of(run.process.pid)
    run.others += workers.values()
    assert sorted(workers) == [0, 1]
    assert all(lives(pid) for pid in workers.values())
    run.process.kill()  # torchrun cannot end them any more
    begun = time.monotonic()
    wait_for(lambda: not any(lives(pid) for pid in workers.values()))
    print(f"the workers were gone {time.monotonic() - begun:.1f} s after their agent was killed")


@pytest.mark.timeout(300)
def test_nothing_that_parity_started_outlives_it(start: Any) -> None:
    run = start("tp2", "parity", training={"steps": 200})
    run.after_steps(2)
    (agent,) = children_of(run.process.pid)
    workers = ranks_of(agent)
    run.others += [agent, *workers.values()]
    assert sorted(workers) == [0, 1]
    run.process.kill()
    wait_for(lambda: not any(lives(pid) for pid in (agent, *workers.values())))


# Three ranks that nobody else joins: a process that tried to meet the others would wait for them.
LONELY = {"RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
WRONG = {
    "2 degrees on 3 ranks": (3, "--parallelism.tensor_parallel_degree 2", "3 ranks do not divide"),
    "a product that is not the ranks": (4, "--training.data_parallel_shard_degree 2", "multiply to 2, but 4 rank(s)"),
    "heads": (3, "--training.tensor_parallel_degree 3", "query heads do not divide among tensor_parallel_degree 3"),
    "positions": (4, "--experimental.context_parallel_degree 4 --training.seq_len 100", "8 pieces"),
    "stages": (
        8, "--experimental.pipeline_parallel_degree 8 --parallelism.pipeline_parallel_schedule ZBVZeroBubble",
        "8 layers do not make 16 pipeline stages",
    ),
    "split points": (
        2, "--experimental.pipeline_parallel_degree 2 --experimental.pipeline_parallel_split_points layers.8",
        "`layers.8` is not layers.1 to layers.7",
    ),
    "micro-batches": (
        4, "--experimental.pipeline_parallel_degree 4 --experimental.pipeline_parallel_microbatches 2",
        "1F1B needs at least one for each of the 4 stages",
    ),
    "compiled zero bubble": (
        2, "--experimental.pipeline_parallel_degree 2 --parallelism.pipeline_parallel_schedule ZBVZeroBubble "
        "--training.compile", "ZBVZeroBubble cannot run compiled blocks",
    ),
    "split, compiled and recomputed": (
        2, "--training.tensor_parallel_degree 2 --training.compile --activation_checkpoint.mode full",
        "cannot be compiled and recomputed whole",
    ),
}  # fmt: skip


@pytest.mark.parametrize("title", WRONG)
def test_a_wrong_layout_is_refused_before_any_rank_waits_for_another(title: str, shell: Any) -> None:
    world, words, message = WRONG[title]
    config = "train_configs/debug_model.toml"
    checked = shell(f"reshard config --check --world-size {world} {config} {words}", timeout_s=60)
    alone = shell(f"reshard train {config} {words}", timeout_s=60, WORLD_SIZE=str(world), **LONELY)
    for done in (checked, alone):
        assert done.code == 2
        assert message in done.sentence
        assert done.out == ""
    assert alone.sentence == checked.sentence


def test_under_torchrun_it_is_one_sentence_too(start: Any) -> None:
    run = start("tp2", parallelism={"tensor_parallel_degree": 1, "pipeline_parallel_degree": 2}, model={"n_layers": 1})
    assert run.process.wait(timeout=PATIENCE_S) != 0
    assert "1 layers do not make 2 pipeline stages" in run.output()
    assert run.output().count("error: ") == 1
    assert not run.metrics.exists()


def wait_for(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.02)


def children_of(parent: int) -> list[int]:
    found = []
    for place in Path("/proc").iterdir():
        if place.name.isdigit():
            try:
                fields = (place / "stat").read_text().rpartition(")")[2].split()
            except OSError:  # it has ended meanwhile
                continue
            if int(fields[1]) == parent:
                found.append(int(place.name))
    return found


def ranks_of(agent: int) -> dict[int, int]:
    """Rank -> process, of a torchrun."""
    found = {}
    for pid in children_of(agent):
        words = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        environment = dict(word.split(b"=", 1) for word in words if b"=" in word)
        if b"LOCAL_RANK" in environment:
            found[int(environment[b"RANK"])] = pid
    return found


def lives(pid: int) -> bool:
    """Is it running? One that has ended and was not yet asked for its exit code is not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False
