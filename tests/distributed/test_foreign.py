"""Do other programs' DCP directories start a run? Made here by plain torch.distributed.checkpoint, as those make them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from reshard.model.spec import LlamaSpec, parameter_shapes

SPEC = LlamaSpec(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=128, vocab_size=512)
FREQUENCIES = torch.polar(torch.ones(64, 8), torch.outer(torch.arange(64.0), torch.arange(1.0, 9.0)))


def weights(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        name: (torch.randn(shape, generator=generator) * 0.05).to(dtype)
        for name, shape in parameter_shapes(SPEC).items()
    }


def torchtitan_early_2025(dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """What its CheckpointManager saved: nested parts, the rotary table among the weights, objects as pickled bytes."""
    model = weights(dtype)
    moments = {f"state.{name}.exp_avg": torch.ones_like(t) for name, t in model.items()}
    groups = {f"param_groups.{name}.lr": 3e-4 for name in model}
    return {
        "model": {**model, "freqs_cis": FREQUENCIES},
        "optimizer": {**moments, **groups},
        "lr_scheduler": {"last_epoch": 7, "_step_count": 8, "base_lrs": [3e-4]},
        "dataloader": {"dp_rank_0": b"a pickle of its own", "world_size": 1},
        "train_state": {"step": torch.tensor(7), "global_avg_losses": [1.5, 1.25]},
    }


KINDS = {
    "flat": weights,
    "flat with freqs_cis": lambda dtype: {**weights(dtype), "freqs_cis": FREQUENCIES},
    "weights under model.": lambda dtype: {"model": {**weights(dtype), "freqs_cis": FREQUENCIES}},
    "torchtitan, full": torchtitan_early_2025,
}


def plain_save(state: dict[str, Any], directory: Path) -> Path:
    dcp.save(state, checkpoint_id=str(directory), no_dist=True)
    return directory


def refused(ranks: list[Any]) -> dict[str, Any]:
    assert all(rank.error == ranks[0].error for rank in ranks)
    error: dict[str, Any] = ranks[0].error
    return error


@pytest.mark.parametrize("layout", ["1", "fsdp2xtp2"])
def test_foreign_weights_start_a_run(
    layout: str, launch: Any, tiny: Any, tmp_path: Path, stored: Any, events: Any
) -> None:
    wanted = stored(plain_save(weights(), tmp_path / "wanted"))
    configs = []
    for kind, make in KINDS.items():
        step_0, named = tmp_path / kind / "as step-0", tmp_path / kind / "as initial"
        plain_save(make(torch.float32), step_0 / "checkpoint/step-0")
        shutil.copytree(step_0 / "checkpoint/step-0", tmp_path / kind / "weights")
        configs.append(tiny(step_0, layout, training={"steps": 1}))
        initial = {"initial_load_path": str(tmp_path / kind / "weights")}
        configs.append(tiny(named, layout, training={"steps": 1}, checkpoint=initial))
    for config, ranks in zip(configs, launch.each(configs, tensors=True), strict=True):
        for rank in ranks:
            assert rank.error is None
            assert {name: rank.before[f"model.{name}"] for name in wanted} == wanted
            zeros = stored_zeros(rank.before)
            assert zeros, "no moments were found"
        assert any("another program" in line for line in ranks[0].log)
        start = events(Path(config["job"]["dump_folder"]))[0]
        assert (start["step"], start["resumed"]) == (0, False)


def stored_zeros(before: dict[str, str]) -> bool:
    """All moments of one shape are the same tensor: zeros, not the foreign ones."""
    shapes = parameter_shapes(SPEC)
    by_shape: dict[Any, set[str]] = {}
    for name, shape in shapes.items():
        by_shape.setdefault(shape, set()).update(
            before[f"optimizer.state.{name}.{key}"] for key in ("exp_avg", "exp_avg_sq")
        )
    return all(len(digests) == 1 for digests in by_shape.values())


def test_foreign_weights_of_another_dtype_are_cast_and_it_is_said(
    launch: Any, tiny: Any, tmp_path: Path, stored: Any
) -> None:
    plain_save(torchtitan_early_2025(torch.bfloat16), tmp_path / "run/checkpoint/step-0")
    as_float = {name: tensor.float() for name, tensor in weights(torch.bfloat16).items()}
    wanted = stored(plain_save(as_float, tmp_path / "wanted"))
    (rank,) = launch(tiny(tmp_path / "run", training={"steps": 1}), tensors=True)
    assert {name: rank.before[f"model.{name}"] for name in wanted} == wanted
    assert [line for line in rank.log if "from bfloat16 to float32" in line]


def test_a_run_from_foreign_weights_saves_and_resumes_as_any_other(
    launch: Any, tiny: Any, tmp_path: Path, metrics: Any
) -> None:
    plain_save(torchtitan_early_2025(), tmp_path / "run/checkpoint/step-0")
    plain_save(torchtitan_early_2025(), tmp_path / "other/checkpoint/step-0")
    launch(tiny(tmp_path / "run", "fsdp2", training={"stop_after": 2}))
    launch(tiny(tmp_path / "run", "fsdp2"))
    launch(tiny(tmp_path / "other", "fsdp2"))
    assert metrics(tmp_path / "run") == metrics(tmp_path / "other")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"norm.weight": None}, ["norm.weight"]),
        ({"layers.2.attention.wq.weight": torch.zeros(64, 64)}, ["layers.2.attention.wq.weight"]),
        ({"output.weight": torch.zeros(512, 32)}, ["output.weight", "(512, 64)", "(512, 32)"]),
        ({"layers.0.attention.wqkv.weight": torch.zeros(4, 4)}, ["layers.0.attention.wqkv.weight"]),
    ],
    ids=["missing", "one too many", "shape", "unknown"],
)
def test_foreign_weights_that_do_not_fit_are_refused(
    change: dict[str, Any], words: list[str], launch: Any, tiny: Any, tmp_path: Path
) -> None:
    state = {name: tensor for name, tensor in {**weights(), **change}.items() if tensor is not None}
    plain_save(state, tmp_path / "checkpoint/step-0")
    error = refused(launch(tiny(tmp_path, "fsdp2")))
    assert error["type"] == "TensorMismatch"
    assert all(word in error["message"] for word in words)


def test_a_foreign_step_that_is_not_step_0_is_not_resumed(launch: Any, tiny: Any, tmp_path: Path) -> None:
    # Its moments and its position in the data are not ours: a fresh start in that folder would pass it over in silence.
    plain_save(torchtitan_early_2025(), tmp_path / "checkpoint/step-7")
    error = refused(launch(tiny(tmp_path, "fsdp2")))
    assert error["type"] == "TornCheckpoint"
    assert "step-7" in error["message"]
    assert "initial_load_path" in error["hint"]
    (rank,) = launch(tiny(tmp_path, checkpoint={"load_step": 7}))
    assert rank.error is not None


def test_a_damaged_foreign_file_is_found_by_its_stored_crc(launch: Any, tiny: Any, tmp_path: Path) -> None:
    directory = plain_save(torchtitan_early_2025(), tmp_path / "checkpoint/step-0")
    metadata = dcp.FileSystemReader(str(directory)).read_metadata()
    ((_, place),) = (
        (i, p) for i, p in metadata.storage_data.items() if i.fqn == "model.layers.1.feed_forward.w2.weight"
    )
    path = directory / place.relative_path
    content = bytearray(path.read_bytes())
    content[place.offset + place.length // 2] ^= 1
    path.write_bytes(content)
    error = refused(launch(tiny(tmp_path, "fsdp2")))
    assert error["type"] == "IntegrityError", error
    assert path.name in error["message"]
    assert "layers.1.feed_forward.w2.weight" in error["message"]
