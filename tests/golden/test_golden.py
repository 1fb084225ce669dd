"""Can checkpoints that were written long ago still be read, bit for bit? One of each version of the directory format."""

from __future__ import annotations

import json
import pickletools
import re
import shutil
import sys
import warnings
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1]))

from golden import spec_reader
from golden.content import TENSORS, numbers, raw

GOLDEN = Path(__file__).resolve().parent
PROJECT = GOLDEN.parents[1]
VERSIONS = sorted(path.name for path in GOLDEN.glob("v*"))


# Of version 1, as Python 3.11.0 to 3.11.3 wrote it before enums were written by value: index and manifest; data as in v1.
BY_AN_OLD_PYTHON = "python-3.11.2"


@pytest.fixture(params=[*VERSIONS, BY_AN_OLD_PYTHON])
def step(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    if request.param != BY_AN_OLD_PYTHON:
        return GOLDEN / request.param / "step-7"
    shutil.copytree(GOLDEN / "v1/step-7", tmp_path / "old/step-7")
    for name in (".metadata", "manifest.json"):
        shutil.copy(GOLDEN / BY_AN_OLD_PYTHON / name, tmp_path / "old/step-7")
    return tmp_path / "old/step-7"


def test_an_old_python_names_a_member_of_an_enum_by_getattr() -> None:
    """What makes that golden checkpoint another one."""
    operations = [
        (op.name, arg) for op, arg, _ in pickletools.genops((GOLDEN / BY_AN_OLD_PYTHON / ".metadata").read_bytes())
    ]
    assert ("SHORT_BINUNICODE", "getattr") in operations
    assert ("SHORT_BINUNICODE", "TORCH_CONTIGUOUS_FORMAT") in operations


def test_there_is_one_of_each_version() -> None:
    from reshard.checkpoint.manifest import FORMAT_VERSION

    assert [f"v{number}" for number in range(1, FORMAT_VERSION + 1)] == VERSIONS
    for version in VERSIONS:
        manifest = json.loads((GOLDEN / version / "step-7/manifest.json").read_text())
        assert manifest["format_version"] == int(version[1:])


def test_it_is_small(step: Path) -> None:
    assert sum(path.stat().st_size for path in step.iterdir()) < 200_000


def test_reshard_reads_it(step: Path) -> None:
    """Through its manifest, into tensors of the names, shapes and dtypes that were saved."""
    import torch

    from reshard.checkpoint.load import choose, load
    from reshard.checkpoint.ranks import Ranks
    from reshard.checkpoint.verify import verify_checkpoint

    start = choose(step.parent, load_step=7, steps=100, initial_load_path=None)
    assert start.directory == step
    assert start.resume
    wanted = {name: torch.full(shape, 99).to(getattr(torch, dtype)) for name, (shape, dtype) in TENSORS.items()}
    load(step, wanted, Ranks())
    for name, tensor in wanted.items():
        assert tensor.reshape(-1).view(torch.uint8).numpy().tobytes() == raw(name), name
        assert tensor.reshape(-1).tolist() == numbers(name), name
    verdict = verify_checkpoint(step)
    assert verdict.whole
    assert verdict.findings == ()


def test_the_manifest_says_what_was_given(step: Path) -> None:
    from reshard.checkpoint.manifest import read_manifest

    manifest = read_manifest(step)
    assert (manifest.step, manifest.kind, manifest.sequence, manifest.parent) == (7, "full", 1, "0123456789abcdef")
    assert manifest.layout == {"dp_replicate": 1, "dp_shard": 2, "cp": 1, "tp": 1, "pp": 1}
    assert manifest.config == {"optimizer": {"lr": 0.002, "eps": 1e-08}, "job": {"description": "golden: äöü"}}
    assert {name: (t.shape, t.dtype) for name, t in manifest.tensors.items()} == TENSORS


def test_plain_torch_reads_it(step: Path, tmp_path: Path) -> None:
    """None of our code: dcp.load under the stored names, and dcp_to_torch."""
    import torch
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    wanted = {name: torch.empty(shape, dtype=getattr(torch, dtype)) for name, (shape, dtype) in TENSORS.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(wanted, storage_reader=dcp.FileSystemReader(str(step)), no_dist=True)
        dcp_to_torch_save(step, tmp_path / "checkpoint.pt")
    nested = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    for name, tensor in wanted.items():
        part, _, rest = name.partition(".")
        assert tensor.reshape(-1).view(torch.uint8).numpy().tobytes() == raw(name), name
        assert torch.equal(nested[part][rest], tensor), name


def test_the_page_is_enough(step: Path) -> None:
    """docs/checkpoint-format.md, followed by a reader that knows neither reshard nor torch."""
    found = spec_reader.read(step)
    assert {name: (shape, dtype) for name, (shape, dtype, _) in found.items()} == TENSORS
    assert {name: content for name, (_, _, content) in found.items()} == {name: raw(name) for name in TENSORS}
    source = (GOLDEN / "spec_reader.py").read_text()
    assert not re.search(r"^\s*(from|import) (torch|reshard|numpy)", source, re.MULTILINE)


@pytest.mark.parametrize("name", ["manifest.json", ".metadata", "__0_0.distcp", "__1_0.distcp", "__0_0.distcp.crc"])
def test_the_reader_by_the_page_sees_damage(name: str, step: Path, tmp_path: Path) -> None:
    shutil.copytree(step, tmp_path / "step-7")
    content = bytearray((step / name).read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "step-7" / name).write_bytes(content)
    with pytest.raises((spec_reader.DamagedError, ValueError)):
        spec_reader.read(tmp_path / "step-7")


def test_every_test_that_the_page_names_is_there() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)`", (PROJECT / "docs/checkpoint-format.md").read_text())
    assert len(named) > 20
    for path, test in named:
        assert f"def {test}(" in (PROJECT / path).read_text(), f"{path}::{test}"


def test_inspect_shows_it(step: Path) -> None:
    from reshard.commands.inspect import answer

    report, lines = answer(step)
    assert report["step"] == 7
    assert any("tensors" in line for line in lines)
