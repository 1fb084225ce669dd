"""Does a run see the same text on any number of ranks? One training, moved from layout to layout, sequence for sequence.

Sequences are compared by a digest of the tokens that the model was fed, padding left out; losses in float64.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2]))

from proof.launch import Ranks, Seen, base_config, on_layout
from reshard.text import TrainingText, prepare

# A batch of ten is 10, 5+5, 3+3+3+1, 4+4+2 and 2+2+2+2+2+0.
GLOBAL_BATCH, LEG = 10, 3  # sequences, steps between two moves


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    with Ranks(tmp_path_factory.mktemp("ranks")) as ranks:
        yield ranks


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("elastic")


def config_of(place: Path, layout: str, folder: Path, stop_after: int, *, first: bool, batch_size: int) -> Any:
    return on_layout(
        base_config(place), layout, folder,
        training={
            "dtype": "float64", "stop_after": stop_after, "batch_size": batch_size, "steps": 40,
            "global_batch_size": GLOBAL_BATCH if first else -1,  # then it is the checkpoint's
        },
        checkpoint={"enable_checkpoint": True, "interval": 1000},
    )  # fmt: skip


def stream(legs: list[tuple[str, list[Seen]]]) -> list[list[str]]:
    """The sequences of every step, in the order of the data-parallel ranks."""
    steps: list[list[str]] = []
    for name, seen in legs:
        (length,) = {len(rank.fed) for rank in seen}  # equally many micro-batches on every rank
        assert length % LEG == 0, name
        micro = length // LEG
        for step in range(LEG):
            steps.append([row for rank in seen for fed in rank.fed[step * micro : (step + 1) * micro] for row in fed])
    return steps


@pytest.mark.timeout(900)
def test_one_two_four_three_and_six_ranks_read_what_one_reads(ranks: Ranks, place: Path) -> None:
    way = ["1", "fsdp2", "rep2.fsdp2", "fsdp3", "rep2.fsdp3"]
    steps = LEG * len(way)
    straight = config_of(place, "1", place / "straight", steps, first=True, batch_size=2)
    ((alone,),) = ranks([straight], watch=True)
    legs = []
    for i, layout in enumerate(way):
        leg = config_of(place, layout, place / "moved", LEG * (i + 1), first=i == 0, batch_size=1 + i % 3)
        (seen,) = ranks([leg], watch=True)
        assert [one.error for one in seen] == [None] * len(seen)
        legs.append((layout, seen))
    assert [len(seen) for _, seen in legs] == [1, 2, 4, 3, 6]

    # The stream itself, from its definition.
    data, _ = prepare(straight, straight.model.vocab_size, progress=False)
    text = TrainingText(data.train, straight.training.seq_len, straight.training.rng_seed)
    expected = [hashlib.blake2b(text[i][:-1].tobytes(), digest_size=8).hexdigest() for i in range(steps * GLOBAL_BATCH)]
    assert len(set(expected)) == len(expected)
    by_step = [expected[i : i + GLOBAL_BATCH] for i in range(0, len(expected), GLOBAL_BATCH)]
    assert [row for fed in alone.fed for row in fed] == expected
    assert stream(legs) == by_step
    same_losses(place / "straight", place / "moved", steps)


@pytest.mark.timeout(900)
def test_and_so_do_pipelines_and_shared_sequences(ranks: Ranks, place: Path) -> None:
    way = ["fsdp3", "pp2:ZBVZeroBubble.fsdp2", "cp2.fsdp2", "pp2:Interleaved1F1B.rep3", "cp2.tp2", "1"]
    steps = LEG * len(way)
    straight = config_of(place, "1", place / "straight again", steps, first=True, batch_size=4)
    assert ranks.problems([straight]) == [None]
    for i, layout in enumerate(way):
        leg = config_of(place, layout, place / "moved again", LEG * (i + 1), first=i == 0, batch_size=1 + i % 3)
        assert ranks.problems([leg]) == [None]
    same_losses(place / "straight again", place / "moved again", steps)


def same_losses(one: Path, other: Path, steps: int) -> None:
    expected, found = read(one), read(other)
    assert [record["step"] for record in found] == list(range(1, steps + 1))
    assert [record["tokens_seen"] for record in found] == [record["tokens_seen"] for record in expected]
    for ours, theirs in zip(expected, found, strict=True):
        assert theirs["loss"] == pytest.approx(ours["loss"], abs=1e-11, rel=0)
        assert theirs["grad_norm"] == pytest.approx(ours["grad_norm"], rel=1e-11, abs=0)
    differences = [abs(a["loss"] - b["loss"]) for a, b in zip(expected, found, strict=True)]
    print(f"largest difference of the loss: {max(differences):.1e}")


def read(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
