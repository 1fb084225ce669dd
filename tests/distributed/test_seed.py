"""Does everybody begin with the same bits? The seed checkpoint, and training without one, on every layout."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import reshard
from reshard.commands.convert import run as convert
from reshard.commands.inspect import run as inspect

LAYOUTS = ["1", "fsdp2", "fsdp4", "hsdp2x2", "tp2", "fsdp2xtp2"]
CASES: dict[str, dict[str, Any]] = {
    "float32": {"training": {"dtype": "float32"}},
    "float64": {"training": {"dtype": "float64"}},
    "bfloat16": {"training": {"dtype": "bfloat16"}},
    "tied": {"model": {"tied_embeddings": True}},
    "ragged": {"model": {"ffn_dim": 130, "vocab_size": 518}},
    "another seed": {"training": {"rng_seed": 11}},
}


@pytest.fixture(scope="module")
def seeds(launch: Any, tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("seeds")
    made = launch.each([tiny(folder / name, **changes) for name, changes in CASES.items()], verb="seed")
    return {name: Path(rank.checkpoint) for name, (rank,) in zip(CASES, made, strict=True)}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_without_a_seed_begins_with_the_bits_of_the_seed(
    layout: str, launch: Any, tiny: Any, seeds: dict[str, Path], stored: Any, tmp_path: Path
) -> None:
    configs = []
    for name, changes in CASES.items():
        once = {"training": {**changes.get("training", {}), "steps": 1}, "checkpoint": {"enable_checkpoint": False}}
        configs.append(tiny(tmp_path / name, layout, **{**changes, **once}))
    for name, ranks in zip(CASES, launch.each(configs, tensors=True), strict=True):
        weights = stored(seeds[name])
        for rank in ranks:
            begun = {n.removeprefix("model."): d for n, d in rank.before.items() if n.startswith("model.")}
            if name == "tied":  # a seed is weights only, so it has the embedding under both names
                assert weights["output.weight"] == weights["tok_embeddings.weight"]
                begun["output.weight"] = begun["tok_embeddings.weight"]
            assert begun == weights


def test_a_seed_is_weights_only_in_the_training_dtype(seeds: dict[str, Path], plain: Any) -> None:
    for name, directory in seeds.items():
        manifest = json.loads((directory / "manifest.json").read_text())
        assert directory.name == "step-0"
        assert (manifest["kind"], manifest["step"], manifest["source"]["kind"]) == ("model", 0, "seed")
        dtypes = {str(tensor.dtype) for tensor in plain(directory).values()}
        assert dtypes == {f"torch.{CASES[name].get('training', {}).get('dtype', 'float32')}"}


def test_the_same_config_makes_the_same_seed_and_another_rng_seed_another(
    launch: Any, tiny: Any, seeds: dict[str, Path], tmp_path: Path, stored: Any
) -> None:
    # export_dtype and model_weights_only are not for seeds.
    again = tiny(tmp_path, checkpoint={"model_weights_only": True, "export_dtype": "bfloat16"})
    (rank,) = launch(again, verb="seed")
    assert stored(Path(rank.checkpoint)) == stored(seeds["float32"])
    one, other = stored(seeds["float32"]), stored(seeds["another seed"])
    assert {name for name in one if one[name] == other[name]} == {name for name in one if name.endswith("norm.weight")}


def test_float64_and_bfloat16_seeds_are_the_float32_one_cast(seeds: dict[str, Path], plain: Any) -> None:
    base = plain(seeds["float32"])
    for name in ("float64", "bfloat16"):
        for fqn, tensor in plain(seeds[name]).items():
            assert torch.equal(tensor, base[fqn].to(tensor.dtype))


def test_large_tensors_are_stored_in_chunks_that_no_reader_needs_whole(
    launch: Any, tiny: Any, tmp_path: Path, plain: Any
) -> None:
    import torch.distributed.checkpoint as dcp

    model = {"dim": 2048, "n_layers": 1, "n_heads": 8, "n_kv_heads": 2, "ffn_dim": 64, "vocab_size": 20_000}
    (rank,) = launch(tiny(tmp_path, model=model), verb="seed")
    described = dcp.FileSystemReader(rank.checkpoint).read_metadata().state_dict_metadata
    chunks = [chunk.sizes.numel() * 4 for chunk in described["tok_embeddings.weight"].chunks]
    assert sum(chunks) == 20_000 * 2048 * 4
    assert len(chunks) > 1
    assert max(chunks) <= 64 << 20


def test_a_seed_where_there_is_one_is_refused(launch: Any, tiny: Any, tmp_path: Path, stored: Any) -> None:
    (rank,) = launch(tiny(tmp_path), verb="seed")
    before = stored(Path(rank.checkpoint))
    (rank,) = launch(tiny(tmp_path, training={"rng_seed": 1}), verb="seed")
    assert rank.error["type"] == "NotACheckpoint"
    assert "exists already" in rank.error["message"]
    assert stored(tmp_path / "checkpoint/step-0") == before


def test_step_0_never_throws_a_trained_run_away(
    launch: Any, tiny: Any, tmp_path: Path, stored: Any, caplog: Any
) -> None:
    run, cut = tmp_path / "run", {"interval": 1}
    launch(tiny(run, training={"steps": 4}, checkpoint=cut))
    (rank,) = launch(tiny(tmp_path / "elsewhere", training={"rng_seed": 1}), verb="seed")
    ways = ["seed", "seed beside damage", "convert", "copy"]
    for way in ways:
        shutil.copytree(run, tmp_path / way)
        shutil.rmtree(tmp_path / way / "checkpoint/step-4")
    damaged = tmp_path / "seed beside damage/checkpoint"
    for step in (1, 2):
        shutil.rmtree(damaged / f"step-{step}")
    (damaged / "step-3").rename(damaged / "step-3.damaged")
    for (refused,) in launch.each([tiny(tmp_path / way) for way in ways[:2]], verb="seed"):
        assert refused.error["type"] == "NotACheckpoint"
        assert "step-0" in refused.error["message"]
        assert "step-3" in refused.error["message"]
        assert refused.error["hint"].endswith("--checkpoint.folder checkpoint-2")
    (other,) = launch(tiny(tmp_path / "seed", checkpoint={"folder": "checkpoint-2"}), verb="seed")  # as the hint says
    assert other.error is None
    convert(Path(rank.checkpoint), tmp_path / "convert/checkpoint/step-0")
    assert "goes on from step-3" in caplog.text
    shutil.copytree(rank.checkpoint, tmp_path / "copy/checkpoint/step-0")
    configs = [tiny(tmp_path / way, training={"steps": 4}, checkpoint=cut) for way in ("seed", "convert", "copy")]
    wanted = {f"step-{step}": stored(run / f"checkpoint/step-{step}") for step in (1, 2, 3, 4)}
    for config, (ended,) in zip(configs, launch.each(configs), strict=True):
        assert (ended.error, ended.step) == (None, 4)
        folder = Path(config["job"]["dump_folder"]) / "checkpoint"
        assert {name: stored(folder / name) for name in wanted} == wanted  # bit for bit, and none is lost
        assert reshard.newest(folder) == folder / "step-4"
        assert [row["line"] for row in inspect(folder)["steps"] if row["step"] == 4] == ["current"]


@pytest.mark.parametrize("layout", ["fsdp2", "tp2"])
def test_more_than_one_process_is_refused(layout: str, launch: Any, tiny: Any, tmp_path: Path) -> None:
    for rank in launch(tiny(tmp_path, layout), verb="seed"):
        assert rank.error["type"] == "LayoutError"
        assert "2" in rank.error["message"]
    assert not (tmp_path / "checkpoint/step-0").exists()
