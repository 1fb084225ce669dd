"""Does the demo's change of layout change what is learned? The same run to the end with FSDP, and with tensor parallel."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

PROJECT = Path(__file__).resolve().parents[3]
TOLERANCE = 1e-3  # what was asked for; 6e-8 was measured


@pytest.fixture(scope="module")
def demo() -> ModuleType:
    """The demo's own settings."""
    found = importlib.util.spec_from_file_location("demo", PROJECT / "scripts" / "demo.py")
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def last(folder: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    return record


def layouts(folder: Path) -> list[tuple[int, int]]:
    """Of each start of a run: the degrees of FSDP and tensor parallel."""
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    return [(e["layout"]["dp_shard"], e["layout"]["tp"]) for e in events if e["event"] == "start"]


@pytest.mark.timeout(1800)
def test_the_layouts_end_alike(shell: Any, demo: ModuleType, tmp_path: Path) -> None:
    def run(words: str) -> None:
        done = shell(f"{words} --training.cache_folder {tmp_path}/tokens", timeout_s=900)
        assert done.code == 0, done.err

    def trained(folder: Path, words: str) -> None:
        run(f"NGPU=2 CONFIG={demo.CONFIG} ./run_llama_train.sh {demo.SAVE} --job.dump_folder {folder} {words}")

    def held_out(checkpoint: Path) -> float:
        done = shell(f"reshard eval {checkpoint} {demo.HELD_OUT} --json")
        assert done.code == 0, done.err
        assert json.loads(done.out)["loss"] < json.loads(done.out)["unigram_entropy"]
        return float(json.loads(done.out)["loss"])

    fsdp, tp = tmp_path / "fsdp", tmp_path / "tp"
    run(f"NGPU=1 CONFIG={demo.CONFIG} ./run_llama_train.sh {demo.SEED} --job.dump_folder {fsdp}")
    trained(fsdp, f"--training.stop_after {demo.STOP_AFTER}")
    shutil.copytree(fsdp, tp)
    trained(fsdp, demo.WEIGHTS_LAST)
    trained(tp, f"{demo.TENSOR_PARALLEL} {demo.WEIGHTS_LAST}")

    assert layouts(fsdp) == [(2, 1), (2, 1)]
    assert layouts(tp) == [(2, 1), (1, 2)]
    assert last(fsdp)["step"] == last(tp)["step"] == demo.STEPS
    assert last(fsdp)["tokens_seen"] == last(tp)["tokens_seen"]
    final = f"checkpoint/step-{demo.STEPS}"
    losses = {
        "training": (last(fsdp)["loss"], last(tp)["loss"]),
        "held-out": (held_out(fsdp / final), held_out(tp / final)),
    }
    print(losses)
    for name, (without, with_change) in losses.items():
        assert abs(without - with_change) < TOLERANCE, (name, without, with_change)
