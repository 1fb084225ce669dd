"""Does a manifest know when it lies? Against itself, and against the files beside it."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from reshard.checkpoint.manifest import MANIFEST, Manifest, crc32_hex, manifest_bytes, read_manifest
from reshard.errors import CheckpointError, IntegrityError, NotACheckpoint, TornCheckpoint


@pytest.fixture
def directory(folder: Path, make: Any) -> Path:
    make(5, load_step=3)
    return folder / "step-5"


def test_what_was_saved_is_what_is_read(directory: Path, folder: Path, make: Any) -> None:
    written = make(6)
    assert read_manifest(folder / "step-6") == written
    content = (folder / "step-6" / MANIFEST).read_bytes()
    assert content == manifest_bytes(written)


def test_it_says_what_a_reader_wants_to_know(directory: Path) -> None:
    manifest = read_manifest(directory)
    assert (manifest.step, manifest.kind, manifest.source["load_step"]) == (5, "full", 3)
    assert manifest.tensors["model.a.weight"].shape == (6, 4)
    assert manifest.tensors["model.a.weight"].dtype == "float32"
    assert manifest.created_at.endswith("+00:00")
    assert {"reshard", "torch"} == set(manifest.versions)
    on_disk = {path.name: path for path in directory.iterdir() if path.name != MANIFEST}
    assert set(manifest.files) == set(on_disk)
    for name, entry in manifest.files.items():
        content = on_disk[name].read_bytes()
        assert (entry.bytes, entry.crc32) == (len(content), crc32_hex(content))
    assert manifest.bytes == sum(path.stat().st_size for path in on_disk.values())


def test_it_is_text_for_people_and_for_git(directory: Path) -> None:
    lines = (directory / MANIFEST).read_text().splitlines()
    assert len(lines) > 20
    body = json.loads("\n".join(lines))
    assert list(body) == sorted(body)


def test_every_save_has_an_id_of_its_own(folder: Path, make: Any) -> None:
    ids = {make(step).save_id for step in (1, 2, 3, 1)}
    assert len(ids) == 4
    assert [e.sequence for e in (read_manifest(folder / f"step-{s}") for s in (2, 3, 1))] == [2, 3, 4]


def test_any_flipped_bit_is_noticed(directory: Path) -> None:
    path = directory / MANIFEST
    whole = path.read_bytes()
    rng = random.Random(0)
    places = [rng.randrange(len(whole) * 8) for _ in range(400)]
    for place in places:
        content = bytearray(whole)
        content[place // 8] ^= 1 << place % 8
        path.write_bytes(content)
        with pytest.raises(IntegrityError) as caught:
            read_manifest(directory)
        assert caught.value.files == (MANIFEST,), place
    path.write_bytes(whole)
    read_manifest(directory)


@pytest.mark.parametrize("kept", [0, 1, 10, 500, -2])
def test_a_cut_manifest_is_noticed(directory: Path, kept: int) -> None:
    path = directory / MANIFEST
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(IntegrityError):
        read_manifest(directory)


def test_a_value_that_was_edited_by_hand_is_noticed(directory: Path) -> None:
    path = directory / MANIFEST
    path.write_text(path.read_text().replace('"step": 5', '"step": 9'))
    with pytest.raises(IntegrityError, match="digest"):
        read_manifest(directory)


def test_reformatting_is_not_damage(directory: Path) -> None:
    path = directory / MANIFEST
    body = json.loads(path.read_text())
    before = read_manifest(directory)
    path.write_text(json.dumps(body, indent=4))
    assert read_manifest(directory) == before


def signed(directory: Path, **changes: Any) -> None:
    """Write a manifest with other values and the right digest, as only its author can."""
    (directory / MANIFEST).write_bytes(manifest_bytes(replace(read_manifest(directory), **changes)))


def test_a_newer_format_says_that_reshard_is_too_old(directory: Path) -> None:
    signed(directory, format_version=99)
    with pytest.raises(NotACheckpoint) as caught:
        read_manifest(directory)
    assert "99" in caught.value.message
    assert "upgrade" in (caught.value.hint or "")


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata"])
def test_a_file_of_another_size_is_named(directory: Path, name: str) -> None:
    with open(directory / name, "ab") as file:
        file.write(b"x")
    with pytest.raises(IntegrityError) as caught:
        read_manifest(directory)
    assert name in caught.value.message
    assert str((directory / name).stat().st_size) in caught.value.message


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata"])
def test_a_missing_file_is_named(directory: Path, name: str) -> None:
    (directory / name).unlink()
    with pytest.raises(IntegrityError) as caught:
        read_manifest(directory)
    assert f"{name} is missing" in caught.value.message


def test_a_directory_in_the_place_of_a_file_is_damage(directory: Path) -> None:
    (directory / "__0_0.distcp").unlink()
    (directory / "__0_0.distcp").mkdir()
    with pytest.raises(IntegrityError):
        read_manifest(directory)


def test_files_without_a_manifest_are_torn(directory: Path) -> None:
    (directory / MANIFEST).unlink()
    with pytest.raises(TornCheckpoint, match="DCP files"):
        read_manifest(directory)
    (directory / ".metadata").unlink()
    with pytest.raises(TornCheckpoint, match="torn"):
        read_manifest(directory)


def test_nothing_is_not_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    for name in ("absent", "empty", "file"):
        with pytest.raises(NotACheckpoint, match=name):
            read_manifest(tmp_path / name)


def test_a_file_that_is_not_in_the_manifest_does_no_harm(directory: Path) -> None:
    (directory / "README").write_text("mine")
    read_manifest(directory)


def test_it_stays_small_at_a_thousand_ranks(directory: Path) -> None:
    manifest = read_manifest(directory)
    (entry,) = (e for name, e in manifest.files.items() if name == "__0_0.distcp")
    many = replace(manifest, files={f"__{rank}_0.distcp": entry for rank in range(1000)})
    assert len(manifest_bytes(many)) < 200_000


@pytest.mark.parametrize(
    "content", [b"", b"null", b"[]", b"17", b'"x"', b"{}", b"\x00\xff", b'{"digest": 3}', b"[" * 100_000]
)
def test_other_json_is_damage_not_a_crash(directory: Path, content: bytes) -> None:
    (directory / MANIFEST).write_bytes(content)
    with pytest.raises(IntegrityError):
        read_manifest(directory)


@pytest.mark.parametrize("field", [f for f in Manifest.__dataclass_fields__ if f not in ("format_version", "versions")])
def test_a_missing_field_is_damage_not_a_crash(directory: Path, field: str) -> None:
    body = json.loads((directory / MANIFEST).read_text())
    del body[field], body["digest"]
    digest = crc32_hex(json.dumps(body, sort_keys=True, separators=(",", ":")).encode())
    (directory / MANIFEST).write_text(json.dumps({**body, "digest": digest}))
    with pytest.raises(CheckpointError):
        read_manifest(directory)
