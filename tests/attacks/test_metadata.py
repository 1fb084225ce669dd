"""A checkpoint directory from an enemy, or from a bad disk: no code of it runs, and nothing wrong is loaded in silence.

Hostile directories are made as an attacker makes them: valid in every other respect, with the digests recomputed.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, BytesStorageMetadata, MetadataIndex

from reshard.checkpoint.load import choose, load, stored_names
from reshard.checkpoint.manifest import FileEntry, crc32_hex, manifest_bytes, read_manifest
from reshard.checkpoint.ranks import Ranks
from reshard.checkpoint.save import About, save
from reshard.errors import FormatError, IntegrityError, ReshardError

torch.set_num_threads(1)

STATE = {
    "model": {f"layers.{i}.weight": torch.randn(8, 5, generator=torch.Generator().manual_seed(i)) for i in range(4)},
    "train_state": {"step": torch.tensor(7)},
}
FLAT: dict[str, Tensor] = {
    f"{part}.{name}": tensor for part, values in STATE.items() for name, tensor in values.items()
}


@pytest.fixture
def ours(tmp_path: Path) -> Path:
    save(tmp_path / "step-7", STATE, About(step=7, kind="full", source={}), Ranks())
    return tmp_path / "step-7"


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """By plain torch, without a manifest of ours: nothing but the stored CRCs speaks for its bytes."""
    state = {**STATE, "extra": {"losses": [1.0, 2.0]}}
    dcp.save(state, checkpoint_id=str(tmp_path / "step-0"), no_dist=True)
    return tmp_path / "step-0"


@pytest.fixture(params=["ours", "foreign"])
def directory(request: pytest.FixtureRequest) -> Path:
    return Path(request.getfixturevalue(request.param))


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "code-has-run"


def loaded(directory: Path) -> dict[str, Tensor]:
    wanted = {name: torch.full_like(tensor, 99) for name, tensor in FLAT.items()}
    load(directory, wanted, Ranks())
    return wanted


def resign(directory: Path) -> None:
    """Make the manifest agree with what lies there, as an author of a hostile checkpoint would."""
    if not (directory / "manifest.json").exists():
        return
    body = json.loads((directory / "manifest.json").read_text())
    for name in body["files"]:
        content = (directory / name).read_bytes()
        body["files"][name] = {"bytes": len(content), "crc32": crc32_hex(content)}
    del body["digest"]
    digest = crc32_hex(json.dumps(body, sort_keys=True, separators=(",", ":")).encode())
    (directory / "manifest.json").write_text(json.dumps({**body, "digest": digest}))


def metadata_of(directory: Path) -> Any:
    return pickle.loads((directory / ".metadata").read_bytes())  # our own test's file


def put_metadata(directory: Path, metadata: Any, protocol: int = 4) -> None:
    (directory / ".metadata").write_bytes(pickle.dumps(metadata, protocol=protocol))
    resign(directory)


class Runs:
    """Unpickles by calling something."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> Any:
        return self.function, self.arguments


def attacks(marker: Path) -> dict[str, tuple[str, Any]]:
    """Title -> (what an error must name, the object)."""
    code = f"open({str(marker)!r}, 'w')"
    return {
        "os.system": ("system", Runs(os.system, f"touch {marker}")),
        "eval": ("eval", Runs(eval, code)),
        "exec": ("exec", Runs(exec, code)),
        "open": ("open", Runs(io.open, str(marker), "w")),
        "getattr": ("getattr", Runs(getattr, "text", "upper")),
        "shutil.rmtree": ("rmtree", Runs(shutil.rmtree, str(marker.parent))),
        "torch.load": ("load", Runs(torch.load, str(marker))),
        "a method": ("", Runs(Path.touch, marker)),  # named in one way or another, as the protocol has it
    }


# -- hostile pickles --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attack", list(attacks(Path("x"))))
@pytest.mark.parametrize("place", ["whole file", "planner_data", "storage_meta", "a tensor's entry", "a chunk's place"])
def test_a_hostile_index_is_refused_by_name_and_runs_nothing(
    attack: str, place: str, directory: Path, marker: Path
) -> None:
    word, hostile = attacks(marker)[attack]
    metadata = metadata_of(directory)
    first = next(iter(metadata.storage_data))
    match place:
        case "whole file":
            metadata = hostile
        case "planner_data":
            metadata.planner_data = {"model.a": hostile}
        case "storage_meta":
            metadata.storage_meta = hostile
        case "a tensor's entry":
            metadata.state_dict_metadata[first.fqn] = hostile
        case "a chunk's place":
            metadata.storage_data[first] = hostile
    put_metadata(directory, metadata)
    for read in (loaded, stored_names):
        with pytest.raises(FormatError) as caught:
            read(directory)
        assert word in caught.value.message
        assert "nothing of it was run" in caught.value.message
        assert str(directory / ".metadata") in caught.value.message
    assert not marker.exists()


def hostile_members() -> list[Any]:
    """`getattr` for all but a member of the one enum that Python 3.11.0 to 3.11.3 pickles with it."""
    member = "TORCH_CONTIGUOUS_FORMAT"
    return [
        Runs(getattr, _MEM_FORMAT_ENCODING, "__class__"),
        Runs(getattr, _MEM_FORMAT_ENCODING, "mro"),
        Runs(getattr, _MEM_FORMAT_ENCODING, "_member_map_"),
        Runs(getattr, _MEM_FORMAT_ENCODING, "values"),  # an attribute of what stands for it here
        Runs(getattr, _MEM_FORMAT_ENCODING, "torch_contiguous_format"),
        Runs(getattr, _MEM_FORMAT_ENCODING, member, None),
        Runs(getattr, _MEM_FORMAT_ENCODING),
        Runs(getattr, Runs(getattr, _MEM_FORMAT_ENCODING, member), "value"),
        Runs(getattr, Runs(getattr, _MEM_FORMAT_ENCODING, "__init__"), "__globals__"),
        Runs(getattr, MetadataIndex, "__init__"),
        Runs(getattr, torch.Size, member),
        Runs(getattr, torch.serialization._get_layout, "__globals__"),
        Runs(getattr, getattr, "__self__"),
        Runs(getattr, member, member),
        Runs(setattr, _MEM_FORMAT_ENCODING, member, 7),
        Runs(vars, _MEM_FORMAT_ENCODING),
    ]


@pytest.mark.parametrize("place", ["a tensor's entry", "planner_data"])
def test_of_getattr_nothing_but_a_member_of_the_one_enum_is_read(place: str, directory: Path) -> None:
    whole = (directory / ".metadata").read_bytes()
    for hostile in hostile_members():
        metadata = pickle.loads(whole)
        if place == "planner_data":
            metadata.planner_data = {"model.a": hostile}
        else:
            metadata.state_dict_metadata["model.layers.0.weight"] = hostile
        put_metadata(directory, metadata)
        with pytest.raises(FormatError) as caught:
            loaded(directory)
        assert "nothing of it was run" in caught.value.message
        assert hostile.function.__name__ in caught.value.message


@pytest.mark.parametrize("protocol", [2, 4])
def test_getattr_under_other_names_is_refused(protocol: int, directory: Path) -> None:
    """Protocol 2 says `__builtin__.getattr`; and an attribute of an attribute is `MODULE.a.b` in 4."""
    metadata = metadata_of(directory)
    hostile = Runs(getattr, _MEM_FORMAT_ENCODING, "TORCH_CONTIGUOUS_FORMAT") if protocol == 2 else Runs(Path.touch, 1)
    metadata.planner_data = {"model.a": hostile}
    put_metadata(directory, metadata, protocol)
    with pytest.raises(FormatError, match="nothing of it was run"):
        loaded(directory)


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_no_pickle_protocol_lets_code_through(protocol: int, directory: Path, marker: Path) -> None:
    put_metadata(directory, Runs(os.system, f"touch {marker}"), protocol)
    with pytest.raises(ReshardError):
        loaded(directory)
    assert not marker.exists()


def replace_item(directory: Path, fqn: str, content: bytes) -> None:
    """Put other bytes in the place of a stored item, index and manifest agreeing."""
    metadata = metadata_of(directory)
    index = next(i for i in metadata.storage_data if i.fqn == fqn)
    place = metadata.storage_data[index]
    path = directory / place.relative_path
    data = path.read_bytes()
    metadata.storage_data[index] = replace(place, offset=len(data), length=len(content))
    path.write_bytes(data + content)
    if (directory / f"{path.name}.crc").exists():  # the sums of our blocks, made anew
        from reshard.checkpoint.blocks import BlockWriter

        path.unlink()
        (directory / f"{path.name}.crc").unlink()
        out = BlockWriter(path)
        out.append(data + content)
        out.close()
    put_metadata(directory, metadata)


def archive_of(thing: Any) -> bytes:
    out = io.BytesIO()
    torch.save(thing, out)
    return out.getvalue()


@pytest.mark.parametrize("attack", list(attacks(Path("x"))))
def test_a_hostile_item_is_refused_and_runs_nothing(attack: str, directory: Path, marker: Path) -> None:
    word, hostile = attacks(marker)[attack]
    replace_item(directory, "model.layers.2.weight", archive_of(hostile))
    with pytest.raises(ReshardError) as caught:
        loaded(directory)
    assert not marker.exists()
    assert "model.layers.2.weight" in caught.value.message
    if not (directory / "manifest.json").exists():  # ours are compared byte by byte and not even parsed
        assert word in caught.value.message


def test_a_tensor_with_a_hostile_companion_is_refused(directory: Path, marker: Path) -> None:
    state = {"tensor": FLAT["model.layers.2.weight"], "more": Runs(os.system, f"touch {marker}")}
    replace_item(directory, "model.layers.2.weight", archive_of(state))
    with pytest.raises(ReshardError):
        loaded(directory)
    assert not marker.exists()


def test_a_hostile_object_beside_the_tensors_is_never_opened(foreign: Path, marker: Path) -> None:
    # torch reads such items with weights_only=False; weights are loaded here without looking at them.
    hostile = archive_of(Runs(os.system, f"touch {marker}"))
    path = foreign / "__0_1.distcp"
    path.write_bytes(hostile)
    metadata = metadata_of(foreign)
    place = next(iter(metadata.storage_data.values()))
    metadata.state_dict_metadata["extra.code"] = BytesStorageMetadata()
    metadata.storage_data[MetadataIndex("extra.code")] = replace(
        place, relative_path=path.name, offset=0, length=len(hostile)
    )
    put_metadata(foreign, metadata)
    assert all(torch.equal(tensor, FLAT[name]) for name, tensor in loaded(foreign).items())
    assert "extra.code" not in stored_names(foreign)
    assert not marker.exists()


def test_an_object_in_the_place_of_a_tensor_is_refused(foreign: Path) -> None:
    metadata = metadata_of(foreign)
    metadata.state_dict_metadata["model.layers.0.weight"] = BytesStorageMetadata()
    put_metadata(foreign, metadata)
    with pytest.raises(ReshardError, match=r"model\.layers\.0\.weight"):
        loaded(foreign)


# -- paths that lead outside ------------------------------------------------------------------------------------------

OUTSIDE = ["../secret", "a/../../secret", "/etc/passwd", "..", "", "secret\0"]


@pytest.mark.parametrize("path", OUTSIDE)
def test_an_index_that_points_outside_is_refused(path: str, directory: Path) -> None:
    (directory.parent / "secret").write_bytes((directory / "__0_0.distcp").read_bytes())
    metadata = metadata_of(directory)
    index = next(i for i in metadata.storage_data if i.fqn == "model.layers.1.weight")
    metadata.storage_data[index] = replace(metadata.storage_data[index], relative_path=path)
    put_metadata(directory, metadata)
    with pytest.raises(IntegrityError) as caught:
        loaded(directory)
    assert ".metadata" in caught.value.message


@pytest.mark.parametrize("path", [*OUTSIDE, "sub/file", "."])
def test_a_manifest_that_names_files_outside_is_refused(path: str, ours: Path) -> None:
    (ours.parent / "secret").write_text("x")
    manifest = read_manifest(ours)
    files = {**manifest.files, path: FileEntry(1, "00000000")}
    (ours / "manifest.json").write_bytes(manifest_bytes(replace(manifest, files=files)))
    with pytest.raises(IntegrityError) as caught:
        read_manifest(ours)
    assert caught.value.files == ("manifest.json",)


def test_a_save_id_is_not_a_path(ours: Path) -> None:
    # It becomes part of a directory's name when a step is deleted or replaced.
    manifest = read_manifest(ours)
    (ours / "manifest.json").write_bytes(manifest_bytes(replace(manifest, save_id="/../../x")))
    with pytest.raises(IntegrityError):
        read_manifest(ours)


# -- an index that contradicts itself ---------------------------------------------------------------------------------


def _change(metadata: Any, what: str) -> None:
    name = "model.layers.1.weight"
    index = next(i for i in metadata.storage_data if i.fqn == name)
    place, entry = metadata.storage_data[index], metadata.state_dict_metadata[name]
    match what:
        case "not an index":
            metadata.storage_data = 17
        case "no places":
            metadata.storage_data = {}
        case "no place for one":
            del metadata.storage_data[index]
        case "a place of a number":
            metadata.storage_data[index] = 5
        case "a negative offset":
            metadata.storage_data[index] = replace(place, offset=-1)
        case "an offset beyond the file":
            metadata.storage_data[index] = replace(place, offset=1 << 40)
        case "a length beyond the file":
            metadata.storage_data[index] = replace(place, length=1 << 40)
        case "an empty length":
            metadata.storage_data[index] = replace(place, length=0)
        case "another item's bytes":
            other = next(i for i in metadata.storage_data if i.fqn == "model.layers.3.weight")
            metadata.storage_data[index] = metadata.storage_data[other]
        case "a chunk outside of the tensor":
            entry.chunks[0] = replace(entry.chunks[0], sizes=torch.Size([9, 5]))
        case "a chunk too few":
            entry.chunks.clear()
        case "a chunk twice":
            entry.chunks.append(entry.chunks[0])
        case "half a tensor":
            entry.chunks[0] = replace(entry.chunks[0], sizes=torch.Size([4, 5]))
        case "a negative size":
            entry.chunks[0] = replace(entry.chunks[0], offsets=torch.Size([-2, 0]))
        case "another shape":
            metadata.state_dict_metadata[name] = replace(entry, size=torch.Size([5, 8]))
        case "text for a shape":
            metadata.state_dict_metadata[name] = replace(entry, size="many")
        case "another dtype":
            entry.properties.dtype = torch.int32
        case "a dtype that is none":
            entry.properties.dtype = "float32"


CONTRADICTIONS = [
    "not an index", "no places", "no place for one", "a place of a number", "a negative offset", "an offset beyond the file",
    "a length beyond the file", "an empty length", "another item's bytes", "a chunk outside of the tensor", "a chunk too few",
    "a chunk twice", "half a tensor", "a negative size", "another shape", "text for a shape", "another dtype",
    "a dtype that is none",
]  # fmt: skip


@pytest.mark.parametrize("what", CONTRADICTIONS)
def test_an_index_that_contradicts_itself_is_an_error_not_a_crash(what: str, directory: Path) -> None:
    metadata = metadata_of(directory)
    _change(metadata, what)
    put_metadata(directory, metadata)
    with pytest.raises(ReshardError) as caught:
        loaded(directory)
    assert str(directory) in caught.value.message


@pytest.mark.parametrize(
    "content", [b"", b"\x80\x04.", b"not a pickle", b"\x80\x04N.", b"\x80\x04]\x94.", b"\x00" * 1000]
)
def test_an_index_that_is_none_is_an_error(content: bytes, directory: Path) -> None:
    (directory / ".metadata").write_bytes(content)
    resign(directory)
    with pytest.raises(ReshardError):
        loaded(directory)


# -- a bad disk -------------------------------------------------------------------------------------------------------


def test_the_tests_themselves_begin_with_whole_checkpoints(directory: Path) -> None:
    assert all(torch.equal(tensor, FLAT[name]) for name, tensor in loaded(directory).items())
    resign(directory)
    assert all(torch.equal(tensor, FLAT[name]) for name, tensor in loaded(directory).items())


@pytest.mark.parametrize("name", list(FLAT))
def test_a_flipped_byte_in_a_tensor_names_the_file_and_the_tensor(name: str, directory: Path) -> None:
    place = next(p for i, p in metadata_of(directory).storage_data.items() if i.fqn == name)
    path = directory / place.relative_path
    content = path.read_bytes()
    at = content.index(FLAT[name].numpy().tobytes(), place.offset)  # the numbers themselves
    assert at < place.offset + place.length
    path.write_bytes(content[:at] + bytes([content[at] ^ 0x10]) + content[at + 1 :])
    with pytest.raises(IntegrityError) as caught:
        loaded(directory)
    assert path.name in caught.value.message
    assert caught.value.files == (path.name,)
    if (directory / "manifest.json").exists():  # in ours, sums are of blocks, which small tensors share
        assert any(fqn in caught.value.message for fqn in FLAT)
    else:
        assert name in caught.value.message


def test_no_flipped_bit_anywhere_in_a_data_file_loads_a_wrong_number(directory: Path) -> None:
    path = directory / "__0_0.distcp"
    whole = path.read_bytes()
    rng = random.Random(0)
    noticed: list[str] = []
    for _ in range(250):
        at = rng.randrange(len(whole))
        content = bytearray(whole)
        content[at] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
        try:
            found = loaded(directory)
        except ReshardError as error:
            noticed.append(error.message)
        else:  # padding between items, or an item that nobody asked for
            assert all(torch.equal(tensor, FLAT[name]) for name, tensor in found.items()), at
    assert len(noticed) > 25
    assert all(path.name in message for message in noticed)


def test_in_ours_every_flipped_bit_of_what_is_read_is_noticed(ours: Path) -> None:
    path = ours / "__0_0.distcp"
    whole = path.read_bytes()
    rng = random.Random(1)
    for _ in range(100):
        content = bytearray(whole)
        content[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
        with pytest.raises(IntegrityError):
            loaded(ours)


def test_no_flipped_bit_in_the_index_loads_a_wrong_number(directory: Path) -> None:
    path = directory / ".metadata"
    whole = path.read_bytes()
    rng = random.Random(2)
    for _ in range(250):
        at = rng.randrange(len(whole))
        content = bytearray(whole)
        content[at] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
        try:
            found = loaded(directory)
        except ReshardError:
            continue
        assert not (directory / "manifest.json").exists()  # ours has a CRC of it
        assert all(torch.equal(tensor, FLAT[name]) for name, tensor in found.items()), at


@pytest.mark.parametrize("kept", [0, 1, 100, -1, -64, -200])
def test_a_truncated_data_file_is_an_error(kept: int, directory: Path) -> None:
    path = directory / "__0_0.distcp"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ReshardError) as caught:
        loaded(directory)
    assert isinstance(caught.value, IntegrityError | FormatError)
    assert path.name in caught.value.message


def test_a_missing_data_file_is_an_error_that_names_it(directory: Path) -> None:
    (directory / "__0_0.distcp").unlink()
    with pytest.raises(IntegrityError) as caught:
        loaded(directory)
    assert "__0_0.distcp" in caught.value.message
    assert "missing" in caught.value.message


def test_the_data_file_of_another_save_of_the_same_shape_is_noticed(ours: Path, tmp_path: Path) -> None:
    # Same names, same shapes, same sizes: only the digests tell them apart. Plain DCP takes it without a word.
    other = {part: {name: tensor + 1 for name, tensor in values.items()} for part, values in STATE.items()}
    save(tmp_path / "step-8", other, About(step=8, kind="full", source={}), Ranks())
    shutil.copy(tmp_path / "step-8/__0_0.distcp", ours / "__0_0.distcp")
    assert read_manifest(ours)  # names and sizes agree
    with pytest.raises(IntegrityError):
        loaded(ours)
    shutil.copy(tmp_path / "step-8/__0_0.distcp.crc", ours / "__0_0.distcp.crc")  # and with its sums, too
    with pytest.raises(IntegrityError):
        loaded(ours)


def test_a_zip_that_grows_without_end_does_not(foreign: Path) -> None:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as bomb:
        bomb.writestr("archive/data.pkl", b"\x80\x02N." + bytes(50_000_000))
        bomb.writestr("archive/version", b"3\n")
    assert len(out.getvalue()) < 100_000
    replace_item(foreign, "model.layers.2.weight", out.getvalue())
    with pytest.raises(ReshardError):
        loaded(foreign)


def test_a_flipped_bit_in_the_manifest_never_makes_a_run_start_afresh(ours: Path, tmp_path: Path) -> None:
    path = ours / "manifest.json"
    whole = path.read_bytes()
    rng = random.Random(3)
    for _ in range(60):
        content = bytearray(whole)
        content[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
        with pytest.raises(ReshardError):
            choose(tmp_path, load_step=-1, steps=100, initial_load_path=None)
        with pytest.raises(ReshardError):
            choose(tmp_path, load_step=7, steps=100, initial_load_path=None)
