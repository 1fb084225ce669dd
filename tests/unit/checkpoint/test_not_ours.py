"""Is what others keep in a directory safe from us? Refused by name where it is in the way; never deleted, never renamed."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

import reshard
from reshard.checkpoint.adapters import ReshardWriter
from reshard.checkpoint.commit import recover
from reshard.checkpoint.manifest import FORMAT_VERSION, MANIFEST, manifest_bytes, read_manifest
from reshard.checkpoint.quarantine import set_aside, set_damaged_aside
from reshard.checkpoint.retain import retain
from reshard.checkpoint.save import About, commit_weights
from reshard.checkpoint.verify import verify_checkpoint
from reshard.config import Config
from reshard.errors import CheckpointError, NotACheckpoint, ReshardError
from reshard.train.start import first_choice

ID = "0123456789abcdef"
STATE = {"w": torch.ones(2)}


def tree(folder: Path) -> dict[str, str | bytes]:
    """All that lies there, links as links."""
    found: dict[str, str | bytes] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        found[name] = (
            f"-> {path.readlink()}" if path.is_symlink() else path.read_bytes() if path.is_file() else "directory"
        )
    return found


def save_by_writer(path: Path) -> None:
    try:
        dcp.save(STATE, storage_writer=ReshardWriter(path), no_dist=True)
    except CheckpointException as error:  # torch's wrapper: of each rank's error
        (inner,) = error.failures.values()
        raise inner[0] from None


def begin_in_background(path: Path) -> None:
    """Refused by `save` already, not by the thread."""
    saver = reshard.AsyncSaver()
    try:
        saver.save(path, STATE)
    finally:
        saver.wait()


SAVES: dict[str, Callable[[Path], None]] = {
    "reshard.save": lambda path: reshard.save(path, STATE),
    "AsyncSaver": begin_in_background,
    "ReshardWriter": save_by_writer,
}


@pytest.fixture(params=list(SAVES))
def save(request: pytest.FixtureRequest) -> Callable[[Path], None]:
    return SAVES[request.param]


def foreign(path: Path) -> None:
    dcp.save(STATE, checkpoint_id=str(path), no_dist=True)


def a_later_format(path: Path) -> None:
    reshard.save(path, STATE)
    manifest = replace(read_manifest(path), format_version=FORMAT_VERSION + 1)
    (path / MANIFEST).write_bytes(manifest_bytes(manifest))


def of_another_step(path: Path) -> None:
    reshard.save(path.with_name("step-3"), STATE)
    shutil.copytree(path.with_name("step-3"), path)


def torn_with_notes(path: Path) -> None:
    reshard.save(path, STATE)
    (path / MANIFEST).unlink()
    (path / "notes.txt").write_text("mine")


def a_file_in(path: Path, name: str) -> None:
    (path / name).parent.mkdir(parents=True, exist_ok=True)
    (path / name).write_text("mine")


def a_web_page(path: Path) -> None:
    path.mkdir()
    (path / MANIFEST).write_text('{"name": "a page", "icons": []}')


def link(path: Path, target: str, make: Callable[[Path], None] | None = None) -> None:
    if make is not None:
        make(path.with_name(target))
    path.symlink_to(target)


def beside_a_checkpoint(path: Path) -> None:
    reshard.save(path, STATE)
    a_file_in(path, "meta.pt")
    a_file_in(path, "tokenizer/vocab.txt")


def data_that_no_manifest_names(path: Path) -> None:
    reshard.save(path, STATE)
    a_file_in(path, "__7_0.distcp")


# What is in the way -> the words that an error says of it.
OTHERS: dict[str, tuple[Callable[[Path], None], list[str]]] = {
    "files beside a checkpoint": (beside_a_checkpoint, ["meta.pt, tokenizer"]),
    "a data file that its manifest does not name": (data_that_no_manifest_names, ["__7_0.distcp"]),
    "a directory of the user's": (lambda path: a_file_in(path, "config.json"), ["config.json"]),
    "with an empty directory in it": (lambda path: (path / "logs").mkdir(parents=True), ["logs"]),
    "another program's manifest.json": (a_web_page, [MANIFEST]),
    "files beside a torn checkpoint": (torn_with_notes, ["notes.txt"]),
    "another program's checkpoint": (foreign, ["DCP checkpoint of another program"]),
    "a checkpoint of a later format": (a_later_format, [f"format version {FORMAT_VERSION + 1}"]),
    "a copy of another step": (of_another_step, ["step 3"]),
    "a file": (lambda path: path.write_text("mine"), ["is a file"]),
    "a link to a checkpoint": (lambda path: link(path, "x", lambda x: reshard.save(x, STATE)), ["is a link to `x`"]),
    "a link to an empty directory": (lambda path: link(path, "x", Path.mkdir), ["is a link to `x`"]),
    "a link to nowhere": (lambda path: link(path, "nowhere"), ["is a link to `nowhere`"]),
}


@pytest.mark.parametrize("what", list(OTHERS))
def test_what_is_in_the_way_is_refused_by_name_and_stays(what: str, save: Any, tmp_path: Path) -> None:
    make, words = OTHERS[what]
    make(tmp_path / "step-5")
    before = tree(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        save(tmp_path / "step-5")
    assert all(word in caught.value.message for word in [*words, str(tmp_path / "step-5")]), caught.value.message
    assert tree(tmp_path) == before
    command = (caught.value.hint or "").rpartition(": ")[2].split()  # typed as it stands, the hint works
    assert command[0] == "mv"
    os.rename(*command[1:])
    save(tmp_path / "step-5")
    assert verify_checkpoint(tmp_path / "step-5").whole


def test_an_empty_directory_is_used(save: Any, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    save(tmp_path / "run")
    assert verify_checkpoint(tmp_path / "run").whole
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("before", ["nothing", "an empty directory", "a checkpoint"])
def test_what_comes_while_a_save_is_under_way_is_found_at_its_end(before: str, tmp_path: Path) -> None:
    target, notes = tmp_path / "step-5", tmp_path / "step-5/notes.txt"

    class SomebodyElse(dcp.DefaultSavePlanner):
        """Puts a file there while the tensors are written."""

        def resolve_data(self, item: Any) -> Any:
            a_file_in(target, notes.name)
            return super().resolve_data(item)

    def by_writer() -> None:
        dcp.save(STATE, storage_writer=ReshardWriter(target), planner=SomebodyElse(), no_dist=True)

    def in_background() -> None:
        with reshard.AsyncSaver(write_limit_mb_s=4) as saver:
            saver.save(target, {"w": torch.ones(400_000)})
            a_file_in(target, notes.name)

    for save in (by_writer, in_background):
        if before == "an empty directory":
            target.mkdir()
        elif before == "a checkpoint":
            reshard.save(target, STATE)
        old = {path.name: path.read_bytes() for path in target.iterdir()} if target.exists() else {}
        with pytest.raises((CheckpointError, CheckpointException), match=r"notes\.txt"):
            save()
        assert {path.name: path.read_bytes() for path in target.iterdir()} == {**old, "notes.txt": b"mine"}
        assert [path.name for path in tmp_path.iterdir()] == ["step-5"]  # nothing is left of the save
        shutil.rmtree(target)


# -- putting a folder in order ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [f"step-5.tmp-{ID}", f"step-5.old-{ID}"])
@pytest.mark.parametrize("others", ["notes.txt", "sub/notes.txt", "a link"])
@pytest.mark.parametrize("half", [False, True], ids=["a directory of the user's", "of ours, with a file of the user's"])
def test_what_looks_like_a_leftover_is_left_and_said(
    half: bool, others: str, name: str, folder: Path, make: Any, tmp_path: Path
) -> None:
    make(4)
    make(5)
    if half:
        shutil.copytree(folder / "step-5", folder / name)
        (folder / name / MANIFEST).unlink()
    if others == "a link":
        (tmp_path / "elsewhere").mkdir()
        if half:
            (folder / name / "link").symlink_to(tmp_path / "elsewhere")
        else:
            (folder / name).symlink_to(tmp_path / "elsewhere")
    else:
        a_file_in(folder / name, others)
    before = tree(folder)
    said = recover(folder)
    assert all(line.startswith(f"left {name}: it ") for line in said)
    assert said
    assert tree(folder) == before
    make(5, number=6)  # and a save of that step does not touch it either
    assert {path.name for path in folder.iterdir()} == {"step-4", "step-5", name}


def test_a_step_is_not_put_back_in_the_place_of_what_is_not_ours(folder: Path, make: Any) -> None:
    make(5)
    os.rename(folder / "step-5", folder / f"step-5.old-{ID}")
    a_file_in(folder / "step-5", "notes.txt")
    before = tree(folder)
    with pytest.raises(CheckpointError, match=r"notes\.txt"):
        recover(folder)
    assert tree(folder) == before
    (folder / "step-5/notes.txt").unlink()  # an empty directory makes room
    assert recover(folder) == ["put step-5 back, its replacement did not finish"]
    assert verify_checkpoint(folder / "step-5").whole


def test_retention_keeps_a_step_with_notes_and_says_so_once(
    folder: Path, make: Any, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (1, 2, 3, 4):
        make(step)
    a_file_in(folder / "step-1", "why this one is good.txt")
    before = tree(folder / "step-1")
    with caplog.at_level(logging.WARNING):
        assert [path.name for path in retain(folder, 2)] == ["step-2"]
        make(5)
        assert [path.name for path in retain(folder, 2)] == ["step-3"]
    assert tree(folder / "step-1") == before
    assert [record.getMessage() for record in caplog.records] == [
        f"kept `{folder / 'step-1'}`, which keep_latest_k would delete: it holds why this one is good.txt, "
        "not part of a checkpoint of ours"
    ]


def test_a_damaged_step_with_notes_is_not_set_aside(folder: Path, make: Any) -> None:
    make(5)
    os.truncate(folder / "step-5/__0_0.distcp", 10)
    a_file_in(folder / "step-5", "notes.txt")
    before = tree(folder)
    for put_in_order in (lambda: set_aside(folder / "step-5"), lambda: set_damaged_aside(folder)):
        with pytest.raises(CheckpointError, match=r"is damaged .*holds notes\.txt"):
            put_in_order()
    assert tree(folder) == before
    (folder / "step-5/notes.txt").unlink()
    (aside,) = set_damaged_aside(folder)
    assert aside.now.name == "step-5.damaged"


# -- the start of a run -----------------------------------------------------------------------------------------------


def config(folder: Path, **sections: dict[str, Any]) -> Config:
    base: dict[str, dict[str, Any]] = {
        "checkpoint": {"enable_checkpoint": True, "folder": folder.name, "interval": 2},
        "training": {"steps": 7},
    }
    for section, values in sections.items():
        base[section] = {**base[section], **values}
    return Config(job={"dump_folder": str(folder.parent)}, **base)  # type: ignore[arg-type]


@pytest.mark.parametrize("what", list(OTHERS))
def test_a_run_is_refused_at_its_start_where_it_would_save(what: str, folder: Path, make: Any) -> None:
    folder.mkdir()
    put, words = OTHERS[what]
    put(folder / "step-4")
    make(2)  # saved last: after a rollback, say
    before = tree(folder)
    with pytest.raises(ReshardError) as caught:
        first_choice(config(folder))
    assert all(word in caught.value.message for word in words), caught.value.message
    assert f"mv {folder / 'step-4'}" in (caught.value.hint or "")
    assert tree(folder) == before


def test_a_run_is_refused_only_where_it_would_save(folder: Path, make: Any) -> None:
    make(2)
    foreign(folder / "step-0")
    a_file_in(folder / "step-2", "notes.txt")  # it begins there
    for step in (1, 3, 5, 8):  # before it, between two saves, after its end
        a_file_in(folder / f"step-{step}", "notes.txt")
    before = tree(folder)
    start, aside = first_choice(config(folder))
    assert (start.directory, aside) == (folder / "step-2", [])
    first_choice(config(folder, training={"stop_after": 6}))
    for others in (
        {"training": {"steps": 8}}, {"training": {"stop_after": 5}}, {"checkpoint": {"interval": 3}},
        {"checkpoint": {"interval_type": "seconds"}},
    ):  # fmt: skip
        with pytest.raises(CheckpointError, match=r"notes\.txt"):
            first_choice(config(folder, **others))
    make(7)
    a_file_in(folder / "step-7", "notes.txt")
    assert first_choice(config(folder))[0].finished  # it saves no more
    assert {name: content for name, content in tree(folder).items() if not name.startswith("step-7")} == before


def test_a_run_uses_an_empty_directory(folder: Path, make: Any) -> None:
    (folder / "step-4").mkdir(parents=True)
    assert first_choice(config(folder))[0].directory is None
    make(4)
    assert verify_checkpoint(folder / "step-4").whole
    assert [path.name for path in folder.iterdir()] == ["step-4"]


def test_what_is_torn_and_ours_is_still_set_aside_whole(folder: Path, make: Any) -> None:
    make(2)
    make(4)
    (folder / "step-4" / MANIFEST).unlink()
    before = tree(folder / "step-4")
    assert first_choice(config(folder))[0].directory == folder / "step-2"
    make(4, number=5)
    assert tree(folder / "step-4.damaged") == before


def test_an_older_save_of_the_same_step_is_replaced(folder: Path, make: Any, number_in: Any) -> None:
    make(2)
    make(4, number=1)
    assert first_choice(config(folder, checkpoint={"load_step": 2}))[0].directory == folder / "step-2"
    make(4, number=2)
    assert number_in(4) == 2
    assert {path.name for path in folder.iterdir()} == {"step-2", "step-4"}


# -- conversions ------------------------------------------------------------------------------------------------------


def test_weights_are_never_committed_over_what_came_meanwhile(folder: Path, make: Any) -> None:
    def write(temporary: Path) -> Any:
        make(0)
        return None

    with pytest.raises(NotACheckpoint, match="exists already"):
        commit_weights(folder / "step-0", write, About(step=0, kind="model", source={}))
    assert json.loads((folder / "step-0" / MANIFEST).read_text())["kind"] == "full"
    assert [path.name for path in folder.iterdir()] == ["step-0"]
