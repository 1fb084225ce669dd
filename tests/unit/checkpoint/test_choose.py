"""What does a run start from? Every rule of `choose`, on real folders."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file

import reshard
from reshard.checkpoint.load import Start, choose
from reshard.checkpoint.retain import retain
from reshard.errors import CheckpointError, IntegrityError, NotACheckpoint, TornCheckpoint


def chosen(folder: Path, *, load_step: int = -1, steps: int = 100, initial: Path | None = None) -> Start:
    return choose(folder, load_step=load_step, steps=steps, initial_load_path=str(initial) if initial else None)


def foreign(directory: Path) -> Path:
    dcp.save({"model": {"a.weight": torch.ones(2)}}, checkpoint_id=str(directory), no_dist=True)
    return directory


def test_an_empty_or_absent_folder_is_a_fresh_start(folder: Path) -> None:
    assert chosen(folder) == Start()
    folder.mkdir()
    (folder / ".lock").touch()
    assert chosen(folder) == Start()


def test_the_newest_save_is_resumed(folder: Path, make: Any) -> None:
    for step in (10, 20, 30):
        make(step)
    start = chosen(folder)
    assert (start.directory, start.resume, start.finished) == (folder / "step-30", True, False)
    assert start.manifest is not None
    assert start.manifest.step == 30


def test_newest_is_by_lineage_not_by_number(folder: Path, make: Any) -> None:
    for step in (10, 20, 30, 15):
        make(step)
    assert chosen(folder).directory == folder / "step-15"


def test_step_0_brings_weights_only(folder: Path, make: Any) -> None:
    make(0, kind="model")
    start = chosen(folder)
    assert (start.directory, start.resume) == (folder / "step-0", False)
    assert chosen(folder, load_step=0).resume is False


def test_later_steps_win_over_the_seed(folder: Path, make: Any) -> None:
    make(0, kind="model")
    make(10)
    assert chosen(folder).directory == folder / "step-10"
    assert chosen(folder, load_step=0).directory == folder / "step-0"


@pytest.mark.parametrize(
    "how", ["saved", "saved in full", "copied in", "copied in from a longer run", "another program's"]
)
def test_a_step_0_that_is_made_later_is_never_newer_than_trained_steps(
    folder: Path, make: Any, tmp_path: Path, how: str
) -> None:
    for step in (10, 20, 5):  # the last by a rollback
        make(step)
    if how == "another program's":
        foreign(folder / "step-0")
    elif how.startswith("saved"):
        make(0, kind="full" if how == "saved in full" else "model")
    else:
        for step in range(100, 105):
            make(step)  # the sequence counts on
        shutil.move(folder / "step-104", folder / "step-0")
        for step in range(100, 104):
            shutil.move(folder / f"step-{step}", tmp_path / f"step-{step}")
    start = chosen(folder)
    assert (start.directory, start.resume) == (folder / "step-5", True)
    assert any("step-0" in note for note in start.notes)
    assert reshard.newest(folder) == folder / "step-5"
    retain(folder, 1)  # and step-0 takes nobody's place
    assert {path.name for path in folder.iterdir()} == {"step-0", "step-5"}
    make(6)
    assert chosen(folder).directory == folder / "step-6"


def test_weights_only_beside_a_full_step_0_is_not_a_fresh_start(folder: Path, make: Any) -> None:
    make(30, kind="model")
    make(0)
    with pytest.raises(NotACheckpoint, match="step-30"):
        chosen(folder)


@pytest.mark.parametrize("kind", ["full", "model"])
@pytest.mark.parametrize("steps", [30, 29])
def test_a_run_that_has_reached_its_steps_is_finished(folder: Path, make: Any, kind: str, steps: int) -> None:
    make(20)
    make(30, kind=kind)
    start = chosen(folder, steps=steps)
    assert start.finished
    assert start.directory == folder / "step-30"
    assert not chosen(folder, steps=31).finished


def test_a_seed_is_never_the_end(folder: Path, make: Any) -> None:
    make(0, kind="model")
    assert not chosen(folder, steps=0).finished


def test_weights_only_then_more_steps_takes_the_newest_full_one_and_says_so(folder: Path, make: Any) -> None:
    for step in (10, 20):
        make(step)
    make(30, kind="model")
    start = chosen(folder)
    assert (start.directory, start.resume) == (folder / "step-20", True)
    (note,) = start.notes
    assert "step-30 holds weights only" in note
    assert "step-20" in note


def test_weights_only_and_nothing_else_is_an_error(folder: Path, make: Any) -> None:
    make(30, kind="model")
    with pytest.raises(NotACheckpoint) as caught:
        chosen(folder)
    assert "initial_load_path" in (caught.value.hint or "")


# -- load_step --------------------------------------------------------------------------------------------------------


def test_a_named_step_is_taken(folder: Path, make: Any) -> None:
    for step in (10, 20, 30):
        make(step)
    start = chosen(folder, load_step=20)
    assert (start.directory, start.resume) == (folder / "step-20", True)


def test_a_missing_named_step_lists_what_there_is(folder: Path, make: Any) -> None:
    for step in (10, 20):
        make(step)
    with pytest.raises(NotACheckpoint) as caught:
        chosen(folder, load_step=15)
    assert "15" in caught.value.message
    assert "10, 20" in (caught.value.hint or "")
    with pytest.raises(NotACheckpoint):
        chosen(folder / "other", load_step=15)


def test_a_named_step_of_weights_only_is_refused(folder: Path, make: Any) -> None:
    make(10)
    make(20, kind="model")
    with pytest.raises(NotACheckpoint, match="weights only"):
        chosen(folder, load_step=20)


def test_a_damaged_or_torn_named_step_is_refused_and_whole_ones_are_named(folder: Path, make: Any) -> None:
    for step in (10, 20, 30):
        make(step)
    (folder / "step-20/__0_0.distcp").write_bytes(b"")
    (folder / "step-10/manifest.json").unlink()
    with pytest.raises(IntegrityError) as caught:
        chosen(folder, load_step=20)
    assert "30" in (caught.value.hint or "")
    with pytest.raises(TornCheckpoint):
        chosen(folder, load_step=10)


def test_a_named_step_applies_once(folder: Path, make: Any) -> None:
    ten = make(10)
    make(20)
    make(30)
    back = {"load_step": 10, "load_save_id": ten.save_id}
    assert chosen(folder, load_step=10).directory == folder / "step-10"
    make(12, **back)
    make(14, **back)
    start = chosen(folder, load_step=10)
    assert start.directory == folder / "step-14"
    assert "applied before" in start.notes[-1]
    make(100, kind="model", **back)
    assert chosen(folder, load_step=10).finished
    assert chosen(folder, load_step=10, steps=200).directory == folder / "step-14"


def test_it_applies_again_to_a_step_that_was_saved_anew(folder: Path, make: Any) -> None:
    old = make(10)
    make(20, load_step=10, load_save_id=old.save_id)
    make(10)  # another save under the same number
    assert chosen(folder, load_step=10).directory == folder / "step-10"


# -- torn, damaged, foreign -------------------------------------------------------------------------------------------


def test_torn_steps_are_passed_over_with_a_note(folder: Path, make: Any) -> None:
    for step in (10, 20, 30):
        make(step)
    (folder / "step-30/manifest.json").unlink()
    start = chosen(folder)
    assert start.directory == folder / "step-20"
    assert any(note.startswith("ignored step-30") for note in start.notes)


def test_torn_steps_alone_are_never_a_fresh_start(folder: Path, make: Any) -> None:
    make(10)
    (folder / "step-10/manifest.json").unlink()
    with pytest.raises(TornCheckpoint) as caught:
        chosen(folder)
    assert "step-10" in caught.value.message
    assert "initial_load_path" in (caught.value.hint or "")


def test_a_foreign_step_0_gives_its_weights(folder: Path) -> None:
    foreign(folder / "step-0")
    for load_step in (-1, 0):
        start = chosen(folder, load_step=load_step)
        assert (start.directory, start.manifest, start.resume) == (folder / "step-0", None, False)
        assert "another program" in start.notes[-1]


def test_our_own_steps_win_over_a_foreign_step_0(folder: Path, make: Any) -> None:
    foreign(folder / "step-0")
    make(10)
    assert chosen(folder).directory == folder / "step-10"


def test_a_foreign_later_step_is_not_resumed(folder: Path) -> None:
    foreign(folder / "step-10")
    for load_step in (-1, 10):
        with pytest.raises(CheckpointError, match="step-10"):
            chosen(folder, load_step=load_step)


# -- initial_load_path ------------------------------------------------------------------------------------------------


def test_initial_load_path_gives_weights_to_an_empty_folder(folder: Path, make: Any, tmp_path: Path) -> None:
    make(40)
    start = chosen(tmp_path / "new", initial=folder / "step-40")
    assert (start.directory, start.resume) == (folder / "step-40", False)
    theirs = foreign(tmp_path / "theirs")
    start = chosen(tmp_path / "new", initial=theirs)
    assert (start.directory, start.manifest, start.resume) == (theirs, None, False)


def test_initial_load_path_is_not_for_folders_with_checkpoints(folder: Path, make: Any, tmp_path: Path) -> None:
    make(40)
    assert chosen(folder, initial=foreign(tmp_path / "theirs")).directory == folder / "step-40"


def test_an_initial_load_path_that_is_nothing_whole_is_an_error(folder: Path, make: Any, tmp_path: Path) -> None:
    with pytest.raises(NotACheckpoint):
        chosen(tmp_path / "new", initial=tmp_path / "absent")
    make(40)
    (folder / "step-40/__0_0.distcp").unlink()
    with pytest.raises(IntegrityError):
        chosen(tmp_path / "new", initial=folder / "step-40")


@pytest.mark.parametrize(
    ("what", "words", "hint"),
    [
        ("a folder of steps", "a folder of checkpoints (step-10, step-20)", "--checkpoint.initial_load_path {in}/step-20"),
        ("a run's folder", "a run's folder, with step-10, step-20", "--checkpoint.initial_load_path {in}/checkpoint/step-20"),
        ("Hugging Face", "a Hugging Face directory", "reshard convert {in} {step_0}"),
        ("one safetensors file", "is a file", "reshard convert {in} {step_0}"),
        ("Meta", "Meta's files", "reshard convert {in} {step_0}"),
        ("a .pt", "is a file", "reshard convert {in} {step_0}"),
        ("a folder with a .pt", "holds model.pt", "reshard convert {in} {step_0}"),
        ("notes", "holds notes.txt", "step-N"),
        ("an empty path", "is empty", "leave it out"),
    ],
)  # fmt: skip
def test_what_is_no_checkpoint_is_called_by_its_name(
    folder: Path, make: Any, tmp_path: Path, what: str, words: str, hint: str
) -> None:
    there: Path | str = tmp_path / "in"
    assert isinstance(there, Path)
    files = {"Hugging Face": ["config.json", "model.safetensors"], "Meta": ["params.json", "consolidated.00.pth"],
             "a folder with a .pt": ["model.pt"], "notes": ["notes.txt"]}  # fmt: skip
    if what in files:
        there.mkdir()
        for name in files[what]:
            (there / name).write_text("{}")
    elif what == "an empty path":
        there = ""
    elif what in ("a .pt", "one safetensors file"):
        there = tmp_path / {"a .pt": "w.pt", "one safetensors file": "model.safetensors"}[what]
        there.write_bytes(b"weights")
    else:
        make(10)
        make(20)
        shutil.move(folder, there if what == "a folder of steps" else there / "checkpoint")
    new = tmp_path / "new"
    with pytest.raises(NotACheckpoint) as caught:
        choose(new, load_step=-1, steps=100, initial_load_path=str(there))
    assert words in caught.value.message
    assert "torn" not in str(caught.value)
    assert "did not finish" not in str(caught.value)
    assert hint.replace("{in}", str(there)).replace("{step_0}", str(new / "step-0")) in (caught.value.hint or "")


def test_other_weights_as_step_0_are_called_by_their_name_and_the_hint_works(folder: Path, tmp_path: Path) -> None:
    (folder / "step-0").mkdir(parents=True)
    save_file({"model.norm.weight": torch.ones(4)}, folder / "step-0/model.safetensors")
    (folder / "step-0/config.json").write_text("{}")
    with pytest.raises(NotACheckpoint, match="Hugging Face") as caught:
        chosen(folder)
    aside = folder / "step-0.kept"
    assert (caught.value.hint or "").endswith(
        f": mv {folder / 'step-0'} {aside} && reshard convert {aside} {folder / 'step-0'}"
    )


def test_looking_changes_nothing(folder: Path, make: Any) -> None:
    make(10)
    make(20)
    (folder / "step-20/manifest.json").unlink()
    (folder / "step-5.tmp-0123456789abcdef").mkdir()
    before = sorted(str(path) for path in folder.rglob("*"))
    chosen(folder)
    assert sorted(str(path) for path in folder.rglob("*")) == before
