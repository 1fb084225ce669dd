"""Does ./run_llama_train.sh do what the specification's command says, and stop before torchrun where it cannot?"""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from reshard.checkpoint.layout import entries

# The guide's command, word for word; what follows --checkpoint.enable_checkpoint is cut nowhere.
GUIDE = (
    "./run_llama_train.sh --checkpoint.enable_checkpoint --checkpoint.create_seed_checkpoint "
    "--training.data_parallel_replicate_degree 1 --training.data_parallel_shard_degree 1 "
    "--training.tensor_parallel_degree 1 --experimental.pipeline_parallel_degree 1 "
    "--experimental.context_parallel_degree 1"
)
DEBUG = "train_configs/debug_model.toml"


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def free_port() -> str:
    """One that no outgoing connection can take before it is bound: the kernel hands out those from 32768 on."""
    while True:
        port = random.SystemRandom().randrange(15000, 32000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return str(port)


@pytest.mark.slow
def test_the_guides_seed_and_two_ranks_that_train_from_it(shell: Any, tiny: str, tmp_path: Path, project: Path) -> None:
    seed = shell(f"NGPU=1 CONFIG={DEBUG} {GUIDE} {tiny} --job.dump_folder {tmp_path}/run")
    assert seed.code == 0, seed.err
    step_0 = tmp_path / "run" / "checkpoint" / "step-0"
    assert seed.out.split() == [str(step_0)]
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"checkpoint"}  # it read no text, it trained nothing
    [entry] = entries(tmp_path / "run" / "checkpoint")
    assert entry.manifest is not None
    assert (entry.step, entry.manifest.kind, entry.manifest.source["kind"]) == (0, "model", "seed")

    # From another directory, with a relative CONFIG, and only rank 1's output shown: it has nothing to say.
    (tmp_path / "mine.toml").write_text((project / DEBUG).read_text())
    words = f"{project}/run_llama_train.sh --checkpoint.enable_checkpoint {tiny} --job.dump_folder run"
    train = shell(f"NGPU=2 CONFIG=mine.toml LOG_RANK=1 {words}", cwd=tmp_path)
    assert train.code == 0, train.err
    assert "step" not in train.err
    start, *_, end = lines(tmp_path / "run" / "events.jsonl")
    assert (start["event"], start["world_size"], start["layout"]["dp_shard"]) == ("start", 2, 2)
    assert Path(start["loaded"]).name == "step-0"
    assert (end["event"], end["step"]) == ("end", 4)
    assert [record["step"] for record in lines(tmp_path / "run" / "metrics.jsonl")] == [1, 2, 3, 4]

    # Once more: rank 0, shown by default, says that there is nothing to do.
    again = shell(f"NGPU=2 CONFIG=mine.toml {words}", cwd=tmp_path)
    assert again.code == 0, again.err
    assert "[0] run/checkpoint/step-4 has reached training.steps 4: nothing to do" in again.err


STOPPED = [
    ("run_llama_train.sh", "2", [signal.SIGTERM] * 5),
    ("scripts/torchrun_nodes.sh", "1", [signal.SIGUSR1]),
    ("reshard train", "1", [signal.SIGINT]),
]


@pytest.mark.slow
@pytest.mark.parametrize(("program", "ngpu", "signals"), STOPPED, ids=str)
def test_a_run_that_a_signal_stops_has_saved_and_says_by_75_that_it_is_not_finished(
    program: str, ngpu: str, signals: list[signal.Signals], tiny: str, tmp_path: Path, project: Path
) -> None:
    """The signals go to the script's own process alone, as from a scheduler that knows nothing else."""
    words = f"{DEBUG} {tiny} --checkpoint.enable_checkpoint --job.dump_folder {tmp_path}/run".split()
    words += ["--training.steps", "100000", "--checkpoint.interval", "100000"]
    given = {"NGPU": ngpu, "NNODES": "1", "HEAD": "localhost", "PORT": free_port(), "OMP_NUM_THREADS": "1"}
    if program == "run_llama_train.sh":
        given["CONFIG"] = words.pop(0)
    command = [sys.executable, "-m", *program.split()] if " " in program else [str(project / program)]
    environment = {**os.environ, **given, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    run = subprocess.Popen([*command, *words], cwd=project, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        metrics = tmp_path / "run" / "metrics.jsonl"
        while run.poll() is None and not (metrics.exists() and metrics.stat().st_size):
            time.sleep(0.1)
        for number in signals:
            run.send_signal(number)
        _, said = run.communicate(timeout=240)
    finally:
        run.kill()
    assert run.returncode == 75, said
    *_, end = lines(tmp_path / "run" / "events.jsonl")
    assert (end["event"], end["stopped"]) == ("end", signals[0].name)
    [entry] = entries(tmp_path / "run" / "checkpoint")
    assert entry.manifest is not None
    assert (entry.step, entry.manifest.kind) == (end["step"], "full")


def test_config_goes_before_config_file(shell: Any) -> None:
    both = shell("NGPU=1 CONFIG=this.toml CONFIG_FILE=that.toml ./run_llama_train.sh")
    assert (both.code, both.sentence) == (2, "config file `this.toml` does not exist")
    old = shell("NGPU=1 CONFIG_FILE=that.toml ./run_llama_train.sh")
    assert (old.code, old.sentence) == (2, "config file `that.toml` does not exist")


def test_the_debug_model_is_the_default(shell: Any, tmp_path: Path, project: Path) -> None:
    done = shell(f"NGPU=16 {project}/run_llama_train.sh --training.tensor_parallel_degree 16", cwd=tmp_path)
    assert (done.code, done.sentence) == (2, "8 KV heads do not divide among tensor_parallel_degree 16")


def test_more_than_one_process_makes_no_seed(shell: Any, tmp_path: Path) -> None:
    words = f"--checkpoint.enable_checkpoint --checkpoint.create_seed_checkpoint --job.dump_folder {tmp_path}/run"
    done = shell(f"NGPU=2 CONFIG={DEBUG} ./run_llama_train.sh {words}")
    assert (done.code, done.out) == (2, "")
    assert done.sentence == "a seed checkpoint is made by one process, but 2 are to be started"
    assert done.hint == "NGPU=1, or `reshard seed`"
    assert list(tmp_path.iterdir()) == []
    assert shell(f"NGPU=2 CONFIG={DEBUG} {GUIDE} --job.dump_folder {tmp_path}/run").code == 2


@pytest.mark.parametrize(
    ("ngpu", "words", "sentence"),
    [
        ("3", "--training.tensor_parallel_degree 2",
         "3 ranks do not divide by the fixed degrees (dp_replicate 1 x dp_shard -1 x cp 1 x tp 2 x pp 1): 3 / 2"),
        ("4", "--training.data_parallel_shard_degree 2",
         "the degrees multiply to 2, but 4 rank(s) were started (dp_replicate 1 x dp_shard 2 x cp 1 x tp 1 x pp 1)"),
        ("2", "--training.stepz 3", "config key `training.stepz` in the command line is not known"),
        ("4", "--experimental.pipeline_parallel_degree 3",
         "4 ranks do not divide by the fixed degrees (dp_replicate 1 x dp_shard -1 x cp 1 x tp 1 x pp 3): 4 / 3"),
    ],
)  # fmt: skip
def test_what_cannot_run_is_refused_before_torchrun(
    shell: Any, tmp_path: Path, ngpu: str, words: str, sentence: str
) -> None:
    done = shell(f"NGPU={ngpu} CONFIG={DEBUG} ./run_llama_train.sh --job.dump_folder {tmp_path}/run {words}")
    assert (done.code, done.out) == (2, "")  # torchrun itself would exit with 1
    assert done.sentence == sentence
    assert list(tmp_path.iterdir()) == []


def test_a_number_of_processes_that_is_none(shell: Any) -> None:
    for ngpu in ("two", "0", "-1"):
        done = shell(f"NGPU={ngpu} CONFIG={DEBUG} ./run_llama_train.sh")
        assert done.code == 2
        assert "Traceback" not in done.err
        assert ngpu in done.err.splitlines()[-1]


@pytest.mark.slow
def test_the_slurm_script_on_one_node(shell: Any, tiny: str, tmp_path: Path, project: Path) -> None:
    """With two stand-ins of three lines for SLURM's own commands; the rest is as on a cluster, on one node."""
    for name, body in (("srun", 'shift\nexec "$@"'), ("scontrol", "echo localhost")):
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    words = f"{DEBUG} {tiny} --checkpoint.enable_checkpoint --job.dump_folder {tmp_path}/run"
    given = {
        "SLURM_NNODES": "1",
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "localhost",
        "SLURM_GPUS_ON_NODE": "h100:2",
    }
    given |= {"SLURM_SUBMIT_DIR": str(project), "MASTER_PORT": free_port()}
    script = f"cp scripts/slurm_train.sh {tmp_path}/slurm_script && PATH={tmp_path}:$PATH {tmp_path}/slurm_script"
    done = shell(f"{script} {words}", cwd=project, **given)
    assert done.code == 0, done.err
    start = lines(tmp_path / "run" / "events.jsonl")[0]
    assert (start["world_size"], start["layout"]["dp_shard"]) == (2, 2)
    assert (tmp_path / "run" / "checkpoint" / "step-4" / "manifest.json").exists()

    refused = shell(f"{script} {words} --training.tensor_parallel_degree 3", cwd=project, **given)
    assert refused.code == 2
    assert "2 ranks do not divide by the fixed degrees" in refused.sentence


@pytest.mark.slow
def test_two_nodes_without_a_scheduler(shell: Any, tiny: str, tmp_path: Path, project: Path) -> None:
    """The same line on each node; both "nodes" are this machine, with one process each."""
    given = {"NNODES": "2", "HEAD": "localhost", "PORT": free_port(), "NGPU": "1"}
    words = f"{DEBUG} {tiny} --checkpoint.enable_checkpoint --job.dump_folder {tmp_path}/run"
    line = f"scripts/torchrun_nodes.sh {words}"
    done = shell(f"{line} & {line}; code=$?; wait $! && exit $code", cwd=project, timeout_s=240, **given)
    assert done.code == 0, done.err
    start, *_, end = lines(tmp_path / "run" / "events.jsonl")
    assert (start["world_size"], start["layout"]["dp_shard"], end["step"]) == (2, 2, 4)
    assert (tmp_path / "run" / "checkpoint" / "step-4" / "manifest.json").exists()


@pytest.mark.parametrize("missing", ["NNODES", "HEAD", "CONFIG"])
def test_nodes_need_to_be_told_where_and_what(shell: Any, missing: str) -> None:
    given = {"NNODES": "2", "HEAD": "localhost", "NGPU": "2"}
    given.pop(missing, None)
    done = shell(f"scripts/torchrun_nodes.sh {DEBUG if missing != 'CONFIG' else ''}", **given)
    assert done.code != 0
    assert "usage: NNODES=2 HEAD=node1 scripts/torchrun_nodes.sh CONFIG.toml" in done.err


def test_nodes_refuse_what_cannot_run_before_they_wait(shell: Any, tmp_path: Path) -> None:
    words = f"{DEBUG} --job.dump_folder {tmp_path}/run --training.tensor_parallel_degree 3"
    done = shell(f"scripts/torchrun_nodes.sh {words}", NNODES="2", HEAD="nowhere.invalid", NGPU="2")
    assert done.code == 2
    assert "4 ranks do not divide by the fixed degrees" in done.sentence


def test_the_scripts_are_bash(shell: Any, project: Path) -> None:
    scripts = [project / "run_llama_train.sh", *(project / "scripts").glob("*.sh")]
    assert len(scripts) == 3
    for script in scripts:
        assert script.stat().st_mode & 0o111
        assert script.read_text().startswith("#!/usr/bin/env bash\n")
        assert shell(f"bash -n {script}").err == ""
