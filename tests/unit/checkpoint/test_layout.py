"""Which names are ours? Nothing else is loaded, counted or touched."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from reshard.checkpoint.layout import all_leftovers, entries, is_foreign, leftovers, step_directory, step_of
from reshard.errors import IntegrityError, StorageError, TornCheckpoint


@pytest.mark.parametrize(
    ("name", "step"), [("step-0", 0), ("step-7", 7), ("step-500", 500), ("step-123456789", 123456789)]
)
def test_names_of_steps(name: str, step: int, tmp_path: Path) -> None:
    assert step_of(tmp_path / name) == step
    assert step_directory(tmp_path, step) == tmp_path / name


@pytest.mark.parametrize(
    "name",
    [
        "old-step-900", "step-900-keep", "step-900.damaged", "step-900.damaged-2", "step-900.tmp-0123456789abcdef",
        "step-900.old-0123456789abcdef", "step-", "step--9", "step-9a", "step-1.5", "step-9 ", " step-9", "Step-9", "step_9",
        "9", "step-9\n", "step-\u0663",
    ],
)  # fmt: skip
def test_names_that_are_not(name: str, tmp_path: Path) -> None:
    assert step_of(tmp_path / name) is None


def test_entries_are_in_the_order_of_saving_not_of_numbers(folder: Path, make: Any) -> None:
    for step in (10, 20, 30, 15):  # 15: after going back to 10
        make(step)
    assert [e.step for e in entries(folder)] == [10, 20, 30, 15]
    assert all(e.committed for e in entries(folder))


def test_a_step_that_was_saved_again_is_the_newest(folder: Path, make: Any) -> None:
    for step in (10, 20, 30, 10):
        make(step)
    assert [e.step for e in entries(folder)] == [20, 30, 10]


def test_what_is_not_committed_is_listed_with_the_reason_and_comes_first(folder: Path, make: Any) -> None:
    for step in (1, 2, 3, 4):
        make(step)
    (folder / "step-2/manifest.json").unlink()
    (folder / "step-4/__0_0.distcp").write_bytes(b"short")
    found = entries(folder)
    assert [(e.step, e.committed) for e in found] == [(2, False), (4, False), (1, True), (3, True)]
    assert isinstance(found[0].problem, TornCheckpoint)
    assert isinstance(found[1].problem, IntegrityError)


def test_files_and_strangers_are_no_entries(folder: Path, make: Any) -> None:
    make(1)
    (folder / "step-5").write_text("a file")
    for name in ("old-step-9", "step-9-keep", "notes"):
        shutil.copytree(folder / "step-1", folder / name)
    assert [e.step for e in entries(folder)] == [1]


def test_an_absent_folder_has_no_entries(tmp_path: Path) -> None:
    assert entries(tmp_path / "absent") == []


def test_a_folder_that_is_a_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "checkpoint").write_text("")
    with pytest.raises(StorageError, match="is a file"):
        entries(tmp_path / "checkpoint")


def test_a_folder_that_cannot_be_read_is_an_error_not_an_empty_folder(
    folder: Path, make: Any, unprivileged: Any
) -> None:
    make(1)
    folder.chmod(0o755)
    with unprivileged():
        assert len(entries(folder)) == 1
    folder.chmod(0)
    try:
        with unprivileged(), pytest.raises(StorageError):
            entries(folder)
    finally:
        folder.chmod(0o755)


def test_leftovers_are_ours_by_their_whole_name(folder: Path) -> None:
    ours = ["step-5.tmp-0123456789abcdef", "step-5.old-fedcba9876543210"]
    others = [
        "step-55.tmp-0123456789abcdef", "step-5.tmp-xyz", "step-5.tmp-0123456789abcdef.bak", "step-5.tmp", "step-5.old",
        "step-5.damaged", "my-step-5.tmp-0123456789abcdef",
    ]  # fmt: skip
    for name in (*ours, *others):
        (folder / name).mkdir(parents=True)
    (folder / "step-6.tmp-0123456789abcdef").write_text("a file")
    assert sorted(p.name for p in leftovers(folder / "step-5")) == sorted(ours)
    assert sorted(p.name for p in all_leftovers(folder)) == sorted([*ours, "step-55.tmp-0123456789abcdef"])


def test_foreign_is_dcp_without_our_manifest(folder: Path, make: Any, tmp_path: Path) -> None:
    make(1)
    assert not is_foreign(folder / "step-1")
    (folder / "step-1/manifest.json").unlink()
    assert is_foreign(folder / "step-1")
    assert not is_foreign(tmp_path)
    assert not is_foreign(tmp_path / "absent")
