"""What if the disk says no? All ranks raise the same error, the older checkpoints are whole, and the run goes on later.

Disks fail for real: RLIMIT_FSIZE makes a write fail in the kernel with EFBIG, a small tmpfs with ENOSPC.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from reshard.checkpoint.lock import own_folder
from reshard.checkpoint.ranks import Ranks

CONSTANT = {"lr_scheduler": {"decay_type": "constant"}}


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if not path.name.startswith(".")}


def the_error(ranks: list[Any]) -> dict[str, Any]:
    """All ranks got one, and the same."""
    errors = [rank.error for rank in ranks]
    assert all(error is not None for error in errors)
    assert all(error == errors[0] for error in errors)
    assert isinstance(errors[0], dict)
    return errors[0]


@pytest.mark.parametrize(
    ("layout", "failing"),
    [("1", [0]), ("fsdp2", [1]), ("fsdp2", [0]), ("tp2", [1]), ("fsdp4", [2]), ("hsdp2x2", [1, 3])],
    ids=lambda value: str(value).replace(" ", ""),
)
def test_one_rank_that_cannot_write_is_everybodys_error(
    layout: str, failing: list[int], launch: Any, tiny: Any, tmp_path: Path, stored: Any, metrics: Any
) -> None:
    folder = tmp_path / "run/checkpoint"
    launch(tiny(tmp_path / "run", layout, training={"steps": 6, "stop_after": 2}))
    whole = stored(folder / "step-2")
    config = tiny(tmp_path / "run", layout, training={"steps": 6, "stop_after": 4})
    error = the_error(launch(config, file_size_limit=dict.fromkeys(failing, 100_000)))
    assert error["type"] == "StorageError"
    assert "step-4" in error["message"]
    assert "File too large" in error["message"]
    assert f"__{failing[0]}_0.distcp" in error["message"]  # and which file it was
    assert names_in(folder) == {"step-2"}
    assert stored(folder / "step-2") == whole
    # With the disk back, the run takes the lost steps again and is where it would have been.
    launch(tiny(tmp_path / "run", layout, training={"steps": 6}))
    launch(tiny(tmp_path / "other", layout, training={"steps": 6}))
    assert stored(folder / "step-6") == stored(tmp_path / "other/checkpoint/step-6")
    last = {step: values for step, *values in metrics(tmp_path / "run")}
    assert last == {step: values for step, *values in metrics(tmp_path / "other")}


def test_a_save_of_the_same_step_that_fails_leaves_the_old_one_whole(
    launch: Any, tiny: Any, tmp_path: Path, stored: Any
) -> None:
    folder = tmp_path / "run/checkpoint"
    changes = {"training": {"steps": 4}, **CONSTANT}
    launch(tiny(tmp_path / "run", "fsdp2", checkpoint={"interval": 2}, **changes))
    before = {step: stored(folder / f"step-{step}") for step in (2, 4)}
    back = tiny(
        tmp_path / "run", "fsdp2", optimizer={"lr": 5e-3}, checkpoint={"interval": 2, "load_step": 2}, **changes
    )
    assert the_error(launch(back, file_size_limit={1: 100_000}))["type"] == "StorageError"
    assert names_in(folder) == {"step-2", "step-4"}
    assert {step: stored(folder / f"step-{step}") for step in (2, 4)} == before
    assert launch(back)[0].error is None  # and without the fault it is replaced
    assert names_in(folder) == {"step-2", "step-4"}
    assert stored(folder / "step-2") == before[2]
    assert stored(folder / "step-4") != before[4]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Any]:
    """Makes a file system of so many bytes; needs the right to mount."""
    mounted = []

    def make(nbytes: int) -> Path:
        place = tmp_path / f"disk{len(mounted)}"
        place.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={nbytes}", "tmpfs", place]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        if done.returncode != 0:
            pytest.skip(f"cannot mount a tmpfs here: {done.stderr.strip()}")
        mounted.append(place)
        return place

    yield make
    for place in mounted:
        subprocess.run(["umount", place], check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a tmpfs; RLIMIT_FSIZE above works for everybody")
@pytest.mark.parametrize("layout", ["1", "fsdp2"])
def test_a_disk_that_fills_up_during_a_save(
    layout: str, launch: Any, tiny: Any, tmp_path: Path, stored: Any, small_disk: Any
) -> None:
    disk = small_disk(3_000_000)  # one checkpoint has room, two have not
    config = tiny(tmp_path / "run", layout, checkpoint={"folder": str(disk / "checkpoint"), "interval": 2})
    error = the_error(launch(config))
    assert error["type"] == "StorageError"
    assert "no space left" in error["message"]
    assert "step-4" in error["message"]
    assert "keep_latest_k" in error["hint"]
    assert names_in(disk / "checkpoint") == {"step-2"}
    assert "model.norm.weight" in stored(disk / "checkpoint/step-2")
    shutil.copytree(disk / "checkpoint", tmp_path / "run/checkpoint")
    assert launch(tiny(tmp_path / "run", layout))[0].step == 4


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a tmpfs")
def test_a_disk_that_has_no_room_is_refused_before_the_first_step(
    launch: Any, tiny: Any, tmp_path: Path, small_disk: Any
) -> None:
    disk = small_disk(1_000_000)
    config = tiny(tmp_path / "run", "fsdp2", checkpoint={"folder": str(disk / "checkpoint")})
    error = the_error(launch(config))
    assert error["type"] == "StorageError"
    assert "GB free" in error["message"]
    assert not (tmp_path / "run/metrics.jsonl").exists() or not (tmp_path / "run/metrics.jsonl").read_text()


def test_a_folder_that_another_run_owns_is_refused_on_every_rank(launch: Any, tiny: Any, tmp_path: Path) -> None:
    with own_folder(tmp_path / "checkpoint", Ranks()):
        error = the_error(launch(tiny(tmp_path, "fsdp2")))
        assert error["type"] == "FolderInUse"
        assert f"process {os.getpid()}" in error["message"]
        assert names_in(tmp_path / "checkpoint") == set()
    assert launch(tiny(tmp_path, "fsdp2"))[0].error is None


def test_a_folder_that_the_ranks_do_not_share_is_noticed_before_a_step(launch: Any, tiny: Any, tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    config = tiny(tmp_path / "a", "fsdp2")
    for rank in launch(config, own={1: {"job": {"dump_folder": str(tmp_path / "b")}}}):
        assert rank.error["type"] == "StorageError"
        assert "not shared" in rank.error["message"]  # each names the folder as it knows it
    assert names_in(tmp_path / "a/checkpoint") == set()


def test_a_folder_that_cannot_be_made(launch: Any, tiny: Any, tmp_path: Path) -> None:
    (tmp_path / "a").write_text("a file")
    config = tiny(tmp_path / "run", "fsdp2", checkpoint={"folder": str(tmp_path / "a/checkpoint")})
    assert the_error(launch(config))["type"] == "StorageError"


def test_what_a_killed_save_has_left_is_removed_at_the_next_start(
    launch: Any, tiny: Any, tmp_path: Path, stored: Any
) -> None:
    folder = tmp_path / "checkpoint"
    launch(tiny(tmp_path, "fsdp2", training={"steps": 4, "stop_after": 2}))
    whole = stored(folder / "step-2")
    half = folder / "step-4.tmp-0123456789abcdef"
    shutil.copytree(folder / "step-2", half)
    (half / "manifest.json").unlink()
    (half / "__1_0.distcp").write_bytes(b"PK")
    ranks = launch(tiny(tmp_path, "fsdp2"))
    assert any("removed step-4.tmp-0123456789abcdef" in line for line in ranks[0].log)
    assert names_in(folder) == {"step-2", "step-4"}
    assert stored(folder / "step-2") == whole
