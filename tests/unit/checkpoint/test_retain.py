"""Which checkpoints may go? Only ours, only committed, the oldest saves first, never the last resort."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from reshard.checkpoint.retain import retain


def steps(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_zero_keeps_all(folder: Path, make: Any) -> None:
    for step in (1, 2, 3):
        make(step)
    assert retain(folder, 0) == []
    assert steps(folder) == {"step-1", "step-2", "step-3"}


@pytest.mark.parametrize(
    ("k", "left"), [(1, {"step-4"}), (2, {"step-3", "step-4"}), (9, {"step-1", "step-2", "step-3", "step-4"})]
)
def test_the_latest_k_stay(k: int, left: set[str], folder: Path, make: Any) -> None:
    for step in (1, 2, 3, 4):
        make(step)
    gone = retain(folder, k)
    assert steps(folder) == left
    assert {path.name for path in gone} == {"step-1", "step-2", "step-3", "step-4"} - left


def test_latest_is_what_was_saved_last_not_the_highest_number(folder: Path, make: Any) -> None:
    first = make(10)
    second = make(20, parent=first)
    make(30, parent=second)
    make(15, parent=first)  # back to 10, and on from there
    retain(folder, 2)
    assert steps(folder) == {"step-10", "step-15"}


def test_the_abandoned_branch_goes_first(folder: Path, make: Any) -> None:
    first = make(10)
    for step in (20, 30, 40):
        make(step, parent=first)
    back = make(11, parent=first)
    make(12, parent=back)
    retain(folder, 3)
    assert steps(folder) == {"step-10", "step-11", "step-12"}


def test_the_seed_stays(folder: Path, make: Any) -> None:
    make(0, kind="model")
    for step in (1, 2, 3):
        make(step)
    retain(folder, 1)
    assert steps(folder) == {"step-0", "step-3"}


def test_the_newest_full_one_stays(folder: Path, make: Any) -> None:
    for step in (1, 2):
        make(step)
    make(3, kind="model")
    retain(folder, 1)
    assert steps(folder) == {"step-2", "step-3"}


def test_what_was_handed_over_stays(folder: Path, make: Any) -> None:
    second = make(2)
    make(3, kind="model", parent=second)  # the end of the run, which was trained longer later
    fourth = make(4, parent=second)
    make(5, parent=fourth)
    retain(folder, 1)
    assert steps(folder) == {"step-3", "step-5"}


def test_the_one_that_was_loaded_stays(folder: Path, make: Any) -> None:
    for step in (1, 2, 3, 4):
        make(step)
    retain(folder, 1, protected=folder / "step-2")
    assert steps(folder) == {"step-2", "step-4"}


def test_what_is_torn_damaged_or_not_ours_is_neither_counted_nor_deleted(folder: Path, make: Any) -> None:
    for step in (1, 2, 3, 4, 5):
        make(step)
    (folder / "step-5/manifest.json").unlink()
    (folder / "step-2/__0_0.distcp").write_bytes(b"")
    for name in ("old-step-9", "step-9-keep", "step-7.damaged"):
        shutil.copytree(folder / "step-1", folder / name)
    (folder / "notes.txt").write_text("mine")
    retain(folder, 2)
    assert steps(folder) == {
        "step-2",
        "step-3",
        "step-4",
        "step-5",
        "old-step-9",
        "step-9-keep",
        "step-7.damaged",
        "notes.txt",
    }


def test_a_link_to_a_checkpoint_elsewhere_does_not_delete_what_it_points_to(
    folder: Path, make: Any, tmp_path: Path
) -> None:
    make(1)
    shutil.move(folder / "step-1", tmp_path / "elsewhere")
    (folder / "step-1").symlink_to(tmp_path / "elsewhere")
    for step in (2, 3):
        make(step)
    retain(folder, 1)
    assert (tmp_path / "elsewhere/manifest.json").exists()


def test_an_absent_folder_is_fine(tmp_path: Path) -> None:
    assert retain(tmp_path / "absent", 1) == []
