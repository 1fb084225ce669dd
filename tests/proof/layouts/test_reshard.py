"""Is a checkpoint free of the layout that wrote it? Bit for bit: loaded on any other layout, and resumed on the same one.

What is on disk is read by torch.load alone, item by item; what a rank holds is put together by DTensor alone. None of our
loader is in either, so that a save and a load cannot hide each other's mistakes.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2]))

import torch
import torch.distributed.checkpoint as dcp

from proof.launch import Ranks, base_config, digest, on_layout, stored_items

SAVED = 2
FROM = (
    "1", "fsdp4", "rep2.fsdp2", "tp2", "cp2.tp2", "pp4", "pp2:Interleaved1F1B.fsdp2", "pp2:ZBVZeroBubble.tp2",
    "pp2.fsdp2.tp2",
)  # fmt: skip
TO = ("1", "fsdp3", "fsdp2.tp2", "rep2.cp2", "pp2:Interleaved1F1B", "pp2:ZBVZeroBubble.fsdp2", "pp2.cp2.tp2")
# Rows that do not divide, five layers; and one tensor at both ends of the pipeline.
MODELS: dict[str, dict[str, Any]] = {
    "untied": {"n_layers": 5, "vocab_size": 518, "ffn_dim": 130},
    "tied": {"tied_embeddings": True},
}
TIED_FROM = ("fsdp2", "pp2", "pp2:ZBVZeroBubble", "pp2:Interleaved1F1B.fsdp2")
TIED_TO = ("1", "tp2", "pp4", "pp2:ZBVZeroBubble", "pp2.fsdp2")
PAIRS = [
    *(("untied", a, b) for a in FROM for b in TO if a != b),
    *(("tied", a, b) for a in TIED_FROM for b in TIED_TO if a != b),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("reshard")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    with Ranks(tmp_path_factory.mktemp("ranks")) as ranks:
        yield ranks


def config_of(place: Path, layout: str, folder: Path, stop_after: int, **sections: dict[str, Any]) -> Any:
    changes = {"checkpoint": {"enable_checkpoint": True, "interval": 1000}, "training": {"stop_after": stop_after}}
    for section, values in sections.items():
        changes[section] = changes.get(section, {}) | values
    return on_layout(base_config(place), layout, folder, **changes)


@pytest.fixture(scope="module")
def saved(place: Path, ranks: Ranks) -> Callable[[str, str], Path]:
    """(model, layout) -> a checkpoint that it saved."""
    done: dict[tuple[str, str], Path] = {}

    def save(model: str, layout: str) -> Path:
        if (model, layout) not in done:
            folder = place / "from" / model / layout.replace(":", "-")
            assert ranks.problems([config_of(place, layout, folder, SAVED, model=MODELS[model])]) == [None]
            done[model, layout] = folder / f"checkpoint/step-{SAVED}"
        return done[model, layout]

    return save


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("model", "source", "target"), PAIRS, ids=lambda value: value)
def test_every_parameter_and_moment_is_bit_equal_on_the_other_layout(
    model: str, source: str, target: str, saved: Any, ranks: Ranks, place: Path
) -> None:
    directory = saved(model, source)
    folder = place / "to" / model / f"{source}-to-{target}".replace(":", "-")
    shutil.copytree(directory, folder / "checkpoint" / directory.name)
    (seen,) = ranks([config_of(place, target, folder, SAVED + 1, model=MODELS[model])], watch=True)
    assert [one.error for one in seen] == [None] * len(seen)
    on_disk = {n: t for n, t in stored_items(directory).items() if n.startswith(("model.", "optimizer.state."))}
    assert all(tensor.any() for tensor in on_disk.values())  # moments have moved
    expected = {name: digest(tensor) for name, tensor in on_disk.items()}
    held: dict[str, str] = {}
    for one in seen:
        assert one.held
        for name, value in one.held.items():
            stored = name.replace("output.weight", "tok_embeddings.weight") if model == "tied" else name
            assert value == expected[stored], f"{name} differs"
            held[stored] = value
    assert held == expected  # and between them the ranks hold all of it


def test_there_are_enough_pairs() -> None:
    assert len(set(PAIRS)) >= 60
    looped = [(a, b) for _, a, b in PAIRS if "Interleaved" in a + b or "ZBV" in a + b]
    assert len(looped) >= 30


def test_plain_torch_reads_the_same_as_the_items_say(saved: Any) -> None:
    for model, layout in (("untied", "pp2:ZBVZeroBubble.tp2"), ("tied", "pp2:Interleaved1F1B.fsdp2")):
        items = stored_items(saved(model, layout))
        plain = {name: torch.zeros_like(tensor) for name, tensor in items.items()}
        dcp.load(plain, storage_reader=dcp.FileSystemReader(str(saved(model, layout))), no_dist=True)
        assert all(torch.equal(items[name], plain[name]) for name in items)


# -- the same layout: stopped and resumed is never stopped, in float32 and to the last bit

SAME = (
    "1", "rep2", "fsdp2", "cp2", "tp2", "pp2", "pp2:GPipe", "pp2:Interleaved1F1B", "pp2:ZBVZeroBubble",
    "pp2.fsdp2.tp2", "rep2.fsdp2.cp2", "pp2:ZBVZeroBubble.cp2.tp2",
)  # fmt: skip


@pytest.mark.timeout(900)
@pytest.mark.parametrize("layout", SAME)
def test_a_resumed_run_is_bitwise_the_one_that_was_not_stopped(layout: str, ranks: Ranks, place: Path) -> None:
    stop, end = 3, 6
    straight, stopped = (place / "same" / f"{layout}-{name}".replace(":", "-") for name in ("straight", "stopped"))
    tied = {"tied_embeddings": "ZBV" in layout or "." in layout}
    for folder, last in ((straight, end), (stopped, stop), (stopped, end)):
        assert ranks.problems([config_of(place, layout, folder, last, model=tied)]) == [None]
    events = [json.loads(line) for line in (stopped / "events.jsonl").read_text().splitlines()]
    assert [one["resumed"] for one in events if one["event"] == "start"] == [False, True]
    assert curve(straight) == curve(stopped)
    assert len({loss for _, loss, _, _ in curve(straight)}) == end
    ours, theirs = (stored_items(folder / f"checkpoint/step-{end}") for folder in (straight, stopped))
    assert {n: digest(t) for n, t in ours.items()} == {n: digest(t) for n, t in theirs.items()}
    assert {tensor.dtype for name, tensor in ours.items() if name.startswith("model.")} == {torch.float32}


def curve(folder: Path) -> list[tuple[int, float, float, float]]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(record["step"], record["loss"], record["grad_norm"], record["lr"]) for record in records]


# -- the specification's own words


@pytest.mark.timeout(900)
def test_the_specifications_seed_gives_every_layout_the_first_loss_of_one_process(shell: Any, tmp_path: Path) -> None:
    config = "train_configs/debug_model.toml"
    made = shell(
        f"NGPU=1 CONFIG={config} ./run_llama_train.sh --checkpoint.enable_checkpoint --checkpoint.create_seed_checkpoint "
        "--training.data_parallel_replicate_degree 1 --training.data_parallel_shard_degree 1 "
        "--training.tensor_parallel_degree 1 --experimental.pipeline_parallel_degree 1 "
        f"--experimental.context_parallel_degree 1 --job.dump_folder {tmp_path}/seed"
    )
    assert made.code == 0, made.err
    losses = {}
    for name, words in {
        "1": "",
        "8": "--experimental.pipeline_parallel_degree 2 --training.data_parallel_shard_degree 2 "
        "--training.tensor_parallel_degree 2",
    }.items():
        folder = tmp_path / name
        shutil.copytree(tmp_path / "seed/checkpoint", folder / "checkpoint")
        done = shell(
            f"NGPU={name} CONFIG={config} ./run_llama_train.sh --checkpoint.enable_checkpoint {words} "
            f"--training.global_batch_size 8 --training.stop_after 2 --job.dump_folder {folder} "
            f"--training.cache_folder {tmp_path}/tokens",
            timeout_s=600,
        )
        assert done.code == 0, done.err
        started = next(json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines())
        assert started["loaded"].endswith("step-0")
        assert started["world_size"] == int(name)
        losses[name] = [loss for _, loss, _, _ in curve(folder)]
    print(losses)
    # float32: the same sum in another order. 5e-7 was measured; the weights of another seed change it by 1e-3.
    assert losses["8"][0] == pytest.approx(losses["1"][0], abs=2e-6, rel=0)
    assert losses["8"][1] == pytest.approx(losses["1"][1], abs=1e-4, rel=0)
