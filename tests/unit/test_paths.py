"""Is an address refused wherever a checkpoint's path is taken, and nothing made of it?"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

import reshard
from reshard.checkpoint.adapters import ReshardReader, ReshardWriter
from reshard.cli import cli
from reshard.paths import is_address, local_path

PROJECT = Path(__file__).resolve().parents[2]
FILE = "file://" + "/tmp/x"
ADDRESSES = (
    "s3://bucket/step-1", FILE, "gs://b", "hf://org/name", "simplecache::s3://b/x", "dbfs:/mnt/x", "file:/tmp/x",
    "/mnt/s3://bucket/x",
)  # fmt: skip


@pytest.mark.parametrize("text", ADDRESSES)
def test_an_address_is_one_as_text_and_as_a_path(text: str) -> None:
    for path in (text, Path(text)):
        assert is_address(path) or (text.startswith("/") and path == Path(text))  # /mnt/s3:/bucket is a path


@pytest.mark.parametrize(
    "text", ["outputs/step-1", "/a/b", "a:b/c", "./x", "../x", "C", "a b/c", "run:1", "/data/exp:/x"]
)
def test_a_path_is_taken_as_it_is(text: str) -> None:
    assert local_path(text) == Path(text)


CALLS: dict[str, Callable[[str], Any]] = {
    "save": lambda path: reshard.save(path, {"w": torch.ones(1)}),
    "load": lambda path: reshard.load(path, {"w": torch.ones(1)}),
    "newest": reshard.newest,
    "AsyncSaver": lambda path: reshard.AsyncSaver().save(path, {"w": torch.ones(1)}),
    "ReshardWriter": ReshardWriter,
    "ReshardReader": ReshardReader,
    "dcp.save": lambda path: dcp.save(
        {"w": torch.ones(1)}, checkpoint_id=path, storage_writer=ReshardWriter(), no_dist=True
    ),
    "dcp.load": lambda path: dcp.load(
        {"w": torch.ones(1)}, checkpoint_id=path, storage_reader=ReshardReader(), no_dist=True
    ),
    "inspect": reshard.inspect,
    "verify": reshard.verify,
    "convert from": lambda path: reshard.convert(path, "x"),
    "convert to": lambda path: reshard.convert("x", path),
    "diff": lambda path: reshard.diff("x", path),
    "dump_folder": lambda path: reshard.load_config(None, ["--job.dump_folder", path]),
    "folder": lambda path: reshard.Config().with_values(checkpoint={"folder": path}),
    "initial_load_path": lambda path: reshard.load_config(None, ["--checkpoint.initial_load_path", path]),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("text", ["s3://bucket/step-1", FILE])
def test_python_refuses_it(call: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises((reshard.ReshardError, CheckpointException)) as caught:
        CALLS[call](text)
    assert text in str(caught.value)
    assert "a file system of this machine" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "words",
    [
        ["inspect", "@"], ["verify", "@"], ["verify", "x", "@"], ["convert", "@", "x"], ["convert", "x", "@"],
        ["diff", "x", "@"],
        ["eval", "@"], ["generate", "@"], ["report", "@"], ["report", "x", "--output", "@"],
        ["seed", "--checkpoint.folder", "@"],
        ["train", "--job.dump_folder", "@"], ["config", "--checkpoint.initial_load_path", "@"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_commands_refuse_it(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(reshard.ReshardError) as caught:
        cli([word.replace("@", "s3://bucket/x") for word in words], standalone_mode=False)
    assert "s3://bucket/x" in caught.value.message
    assert str(caught.value.hint).startswith("save to a folder")
    assert list(tmp_path.iterdir()) == []


def test_the_specifications_script_refuses_it(tmp_path: Path) -> None:
    command = [sys.executable, PROJECT / "scripts/convert_llama_to_dcp.py", "s3://bucket/original", "out"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "s3:/bucket/original` is an address" in done.stderr


def test_what_another_run_has_saved_of_itself_is_read(tmp_path: Path) -> None:
    """A stored config may name a store: of a checkpoint that was copied here, say."""
    said = reshard.Config().model_dump()
    said["job"]["dump_folder"] = "s3://bucket/run"
    assert reshard.Config.model_validate(said, strict=True).with_values(training={"steps": 3}).training.steps == 3
