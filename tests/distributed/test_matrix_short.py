"""Does every axis, and every schedule, compute what one process computes? Short: proof/layouts/test_matrix.py."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1]))

from proof.launch import Ranks, base_config, on_layout
from reshard.commands import parity
from reshard.errors import LayoutError, TrainingError

# Five layers and seven sequences, which only one process runs without padding; rows that 3 and 4 ranks do not share
# evenly; embedding and output are one.
UNEVEN = {
    "model": {"n_layers": 5, "vocab_size": 518, "ffn_dim": 130, "n_kv_heads": 4, "tied_embeddings": True},
    "training": {"global_batch_size": 7, "batch_size": 7},
}
LAYOUTS = "fsdp3; cp2; pp2; pp2:Interleaved1F1B; pp2:ZBVZeroBubble; pp2:GPipe.tp2; pp2:ZBVZeroBubble.fsdp2; fsdp2.cp2"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("matrix")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    with Ranks(tmp_path_factory.mktemp("ranks")) as ranks:
        yield ranks


@pytest.fixture(scope="module")
def rows(place: Path, ranks: Ranks) -> dict[str, parity.Row]:
    config = base_config(place, **UNEVEN)
    found = parity.rows(config, parity.parse_layouts(LAYOUTS), ranks.problems, steps=4, folder=place / "runs")
    print(f"\n{parity.table(found)}")
    return {row.layout: row for row in found}


@pytest.mark.parametrize("name", [wanted.name for wanted in parity.parse_layouts(LAYOUTS)])
def test_a_layout_computes_what_one_process_computes(name: str, rows: dict[str, parity.Row]) -> None:
    row = rows[name]
    assert row.problem is None, row.problem
    assert row.steps == 4
    assert row.loss is not None
    assert row.loss <= 1e-11
    assert row.grad_norm is not None
    assert row.grad_norm <= 1e-11
    assert row.same


def test_a_layout_that_computes_something_else_is_told(place: Path, ranks: Ranks) -> None:
    def another_seed(configs: list[Any]) -> list[str | None]:
        one, other = configs
        return ranks.problems([one, other.with_values(training={"rng_seed": 1})])

    folder = place / "another seed"
    (row,) = parity.rows(base_config(place), parity.parse_layouts("fsdp2"), another_seed, steps=2, folder=folder)
    assert row.same is False
    assert row.loss is not None
    assert row.loss > 1e-4
    assert parity.exit_code([row]) == 1
    assert "NO" in parity.table([row])


def test_a_run_that_fails_cannot_be_told(place: Path) -> None:
    def fails(problems: list[str | None]) -> Any:
        def run_all(configs: list[Any]) -> list[str | None]:
            for config, problem in zip(configs, problems, strict=True):
                folder = Path(config.job.dump_folder)
                folder.mkdir(parents=True, exist_ok=True)
                if problem is None:
                    (folder / "metrics.jsonl").write_text('{"loss": 1.0, "grad_norm": 1.0}\n')
            return problems

        return run_all

    layouts = parity.parse_layouts("fsdp2; tp2")
    config, folder = base_config(place), place / "failing"
    fsdp, tp = parity.rows(config, layouts, fails([None, "it broke", None]), steps=1, folder=folder)
    assert (fsdp.same, fsdp.problem) == (None, "it broke")
    assert tp.same is True
    assert parity.exit_code([fsdp, tp]) == 2
    assert "it broke" in parity.table([fsdp, tp])
    with pytest.raises(TrainingError, match="one process alone failed: no luck"):
        parity.rows(config, layouts, fails(["no luck", None, None]), steps=1, folder=folder)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "names no layout"),
        (";", "names no layout"),
        ("foo2", "`foo2` is not one of rep, fsdp, cp, tp, pp"),
        ("tp", "`tp` is not one of"),
        ("tp0", "`tp0` is not one of"),
        ("tp2,pp2", "`tp2,pp2` is not one of"),
        ("fsdp2.tp2.fsdp2", "gives fsdp twice"),
        ("pp2:ZBV", "`ZBV` is not a schedule of pp"),
        ("tp2:GPipe", "`GPipe` is not a schedule of pp"),
        ("tp2;cp2..tp2", "layout `cp2..tp2`: `` is not one of"),
    ],
)
def test_a_layout_that_cannot_be_read_is_refused(text: str, words: str) -> None:
    with pytest.raises(LayoutError) as caught:
        parity.parse_layouts(text)
    assert words in caught.value.message


def test_how_layouts_are_written() -> None:
    one, two, three = parity.parse_layouts(" fsdp4;pp2:ZBVZeroBubble.rep2.tp4 ; 1; fsdp4")
    assert (one.layout.to_dict(), one.schedule) == (on("dp_shard", 4), None)
    assert two.layout.to_dict() == {"dp_replicate": 2, "dp_shard": 1, "cp": 1, "tp": 4, "pp": 2}
    assert two.schedule == "ZBVZeroBubble"
    assert three == parity.ONE


def on(axis: str, degree: int) -> dict[str, int]:
    return {**dict.fromkeys(("dp_replicate", "dp_shard", "cp", "tp", "pp"), 1), axis: degree}


def test_a_layout_that_cannot_run_is_refused_by_name_before_any_runs(place: Path) -> None:
    def never(_configs: list[Any]) -> list[str | None]:
        raise AssertionError

    with pytest.raises(LayoutError, match="layout `tp3`: 8 query heads do not divide"):
        parity.rows(base_config(place), parity.parse_layouts("fsdp2;tp3"), never, steps=1, folder=place / "none")


def test_the_command_reports_in_its_exit_code_and_on_stdout(shell: Any, place: Path) -> None:
    from reshard.config import config_to_toml

    toml = place / "parity.toml"
    toml.write_text(config_to_toml(on_layout(base_config(place), "1", place / "command")))
    done = shell(f"reshard parity {toml} --layouts pp2 --steps 2 --model.n_layers 2 --json")
    assert done.code == 0, done.err
    assert '"layout": "pp2", "world_size": 2, "steps": 2' in done.out
    assert '"same": true' in done.out
    assert (place / "command/parity/pp2/output.log").read_text()
    refused = shell(f"reshard parity {toml} --layouts pp2:zbv")
    assert refused.code == 2
    assert refused.hint == "e.g. pp2:ZBVZeroBubble"
