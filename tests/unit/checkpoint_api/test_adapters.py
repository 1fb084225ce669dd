"""Do torch's own save and load work through the engine? Committed whole, checked on reading, in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

import reshard
from reshard.checkpoint.adapters import ReshardReader, ReshardWriter
from reshard.checkpoint.load import open_index
from reshard.checkpoint.verify import verify_checkpoint


def state() -> dict[str, Any]:
    torch.manual_seed(0)
    return {
        "model": {"a.b": torch.randn(300, 40), "scalar": torch.tensor(3.0), "empty": torch.zeros(0, 4)},
        "half": torch.randn(70, 9).bfloat16(),
        "strided": torch.randn(40, 30).t(),
        "list": [torch.arange(5), {"x": 1}],
        "groups": [{"lr": 0.1, "betas": (0.9, 0.95)}],
        "step": 7,
    }


def empty() -> dict[str, Any]:
    return {
        "model": {"a.b": torch.zeros(300, 40), "scalar": torch.tensor(0.0), "empty": torch.zeros(0, 4)},
        "half": torch.zeros(70, 9).bfloat16(),
        "strided": torch.zeros(30, 40),
        "list": [torch.zeros(5, dtype=torch.int64), {"x": 0}],
        "groups": [{"lr": 0.0, "betas": (0.0, 0.0)}],
        "step": 0,
    }


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    dcp.save(state(), storage_writer=ReshardWriter(tmp_path / "step-3"), no_dist=True)
    return tmp_path / "step-3"


def test_a_save_is_a_whole_checkpoint_and_nothing_else(saved: Path) -> None:
    verdict = verify_checkpoint(saved)
    assert (verdict.whole, verdict.step) == (True, 3)
    assert {path.name for path in saved.iterdir()} == {
        ".metadata", "__0_0.distcp", "__0_0.distcp.crc", "manifest.json",
    }  # fmt: skip
    assert list(saved.parent.iterdir()) == [saved]


@pytest.mark.parametrize("reader", [ReshardReader, dcp.FileSystemReader])
def test_what_we_write_is_read_by_us_and_by_plain_torch(saved: Path, reader: Any) -> None:
    found = empty()
    dcp.load(found, storage_reader=reader(saved), no_dist=True)
    assert same(found, state())


def test_we_read_what_plain_torch_writes(tmp_path: Path) -> None:
    dcp.save(state(), checkpoint_id=str(tmp_path / "theirs"), no_dist=True)
    found = empty()
    dcp.load(found, storage_reader=ReshardReader(tmp_path / "theirs"), no_dist=True)
    assert same(found, state())


def test_the_tensors_are_there_for_our_own_load_too(saved: Path) -> None:
    found = {"model": {"a.b": torch.zeros(300, 40)}}
    left = reshard.load(saved, found, strict=False)
    assert {"model.scalar", "model.empty", "half", "step", "groups.0.lr"} <= set(left)
    assert torch.equal(found["model"]["a.b"], state()["model"]["a.b"])


def test_checkpoint_id_takes_precedence_and_an_adapter_can_be_used_again(tmp_path: Path) -> None:
    writer, reader = ReshardWriter(), ReshardReader(tmp_path / "nowhere")
    for step in (1, 2):
        tensor = torch.full((4,), float(step))
        dcp.save({"a": tensor}, checkpoint_id=str(tmp_path / f"step-{step}"), storage_writer=writer, no_dist=True)
    for step in (1, 2):
        found = {"a": torch.zeros(4)}
        dcp.load(found, checkpoint_id=str(tmp_path / f"step-{step}"), storage_reader=reader, no_dist=True)
        assert float(found["a"][0]) == step


def test_an_older_checkpoint_is_replaced_when_the_new_one_is_whole(saved: Path) -> None:
    dcp.save({"a": torch.ones(4)}, storage_writer=ReshardWriter(saved), no_dist=True)
    assert verify_checkpoint(saved).whole
    assert list(open_index(saved)[1].tensors) == ["a"]
    assert list(saved.parent.iterdir()) == [saved]


def test_a_step_is_recorded_and_cannot_contradict_the_name(tmp_path: Path) -> None:
    dcp.save({"a": torch.ones(4)}, storage_writer=ReshardWriter(tmp_path / "best", step=8), no_dist=True)
    assert verify_checkpoint(tmp_path / "best").step == 8
    with pytest.raises(CheckpointException, match="expected 3"):
        dcp.save({"a": torch.ones(4)}, storage_writer=ReshardWriter(tmp_path / "step-3", step=8), no_dist=True)
    assert [path.name for path in tmp_path.iterdir()] == ["best"]


def test_a_large_tensor_is_cut_into_chunks(tmp_path: Path) -> None:
    large = torch.arange(3000 * 8192, dtype=torch.int32).reshape(3000, 8192)  # 98 MB
    dcp.save({"large": large}, storage_writer=ReshardWriter(tmp_path / "x"), no_dist=True)
    chunks = dcp.FileSystemReader(tmp_path / "x").read_metadata().state_dict_metadata["large"].chunks
    assert len(chunks) == 2
    for reader in (ReshardReader(tmp_path / "x"), dcp.FileSystemReader(tmp_path / "x")):
        found = {"large": torch.zeros_like(large)}
        dcp.load(found, storage_reader=reader, no_dist=True)
        assert torch.equal(found["large"], large)


@pytest.mark.parametrize("what", ["tensor", "object"])
@pytest.mark.parametrize("writer", [ReshardWriter, dcp.FileSystemWriter])
def test_a_flipped_bit_is_an_error(what: str, writer: Any, tmp_path: Path) -> None:
    dcp.save({"a": torch.ones(400), "b": "some words"}, storage_writer=writer(tmp_path / "x"), no_dist=True)
    path = tmp_path / "x/__0_0.distcp"
    content = bytearray(path.read_bytes())
    at = content.find(torch.ones(4).numpy().tobytes() if what == "tensor" else b"some words")
    assert at > 0
    content[at + 2] ^= 1
    path.write_bytes(content)
    found = {"a": torch.zeros(400)} if what == "tensor" else {"b": ""}
    with pytest.raises(CheckpointException) as caught:
        dcp.load(found, storage_reader=ReshardReader(tmp_path / "x"), no_dist=True)
    assert "CRC32" in str(caught.value)


def test_what_cannot_be_stored_leaves_no_checkpoint_and_the_next_save_tidies_up(tmp_path: Path) -> None:
    writer = ReshardWriter(tmp_path / "x")
    with pytest.raises(CheckpointException, match="sparse"):
        dcp.save({"ok": torch.ones(9), "s": torch.eye(3).to_sparse()}, storage_writer=writer, no_dist=True)
    assert not (tmp_path / "x").exists()
    dcp.save({"ok": torch.ones(9)}, storage_writer=writer, no_dist=True)
    assert list(tmp_path.iterdir()) == [tmp_path / "x"]


def test_torchs_plan_cache_is_refused_rather_than_written_to_the_wrong_place(tmp_path: Path) -> None:
    planner = dcp.DefaultSavePlanner(enable_plan_caching=True)
    writer = ReshardWriter(tmp_path / "x")
    dcp.save({"a": torch.ones(9)}, storage_writer=writer, planner=planner, no_dist=True)
    planner = dcp.DefaultSavePlanner(enable_plan_caching=True)
    with pytest.raises(CheckpointException, match="enable_plan_caching"):
        dcp.save({"a": torch.zeros(9)}, storage_writer=writer, planner=planner, no_dist=True)
    found = {"a": torch.zeros(9)}
    reshard.load(tmp_path / "x", found)
    assert torch.equal(found["a"], torch.ones(9))


def test_ranks_that_do_not_save_together_are_refused(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="use_collectives"):
        dcp.save(
            {"a": torch.ones(9)}, storage_writer=ReshardWriter(tmp_path / "x"), no_dist=True, use_collectives=False
        )


def test_no_name_is_an_error() -> None:
    with pytest.raises(CheckpointException, match="no checkpoint was named"):
        dcp.load({"a": torch.ones(9)}, storage_reader=ReshardReader(), no_dist=True)
