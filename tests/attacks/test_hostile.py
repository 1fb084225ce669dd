"""Files from an enemy, given to every verb that opens such files: refused by name, and no code of theirs runs.

Two tables: what an enemy may send (HOSTILE), and who opens it (VERBS). A verb that is new adds its row; so does an attack.
Each verb runs as a command in a process of its own, with a limit on memory and time. What the readers themselves refuse
is tested in more detail in test_metadata.py and test_pth.py.
"""

from __future__ import annotations

import copy
import io
import json
import os
import pickle
import shutil
import struct
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import MetadataIndex

sys.path.append(str(Path(__file__).resolve().parents[1]))

from faults.runs import TINIER, Workshop, train_words, workshop
from reshard.checkpoint.manifest import FileEntry, crc32, crc32_hex, manifest_bytes, read_manifest

pytestmark = pytest.mark.slow  # a minute in all

MEGABYTES, SECONDS = 500, 30  # that a command may take beyond what it begins with
VICTIM = "norm.weight"  # the tensor whose bytes are replaced

# -- how such files are made ------------------------------------------------------------------------------------------


class Runs:
    """Pickled, it is a command that whoever unpickles it runs."""

    def __init__(self, marker: Path) -> None:
        self._marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self._marker}",)


@dataclass(frozen=True)
class Attack:
    """make: changes a whole, honest directory (or writes a file); says: what the refusal must name, one of them."""

    make: Callable[[Path, Path], object]
    says: str | tuple[str, ...]
    kind: str = "dcp"  # or "pth": a file


def sign(directory: Path) -> None:
    """Where there is a manifest, let it agree with the files: that much an enemy can do."""
    if not (directory / "manifest.json").exists():
        return
    manifest = read_manifest_unchecked(directory)
    files = {}
    for name in manifest.files:
        content = (directory / name).read_bytes()
        files[name] = FileEntry(len(content), crc32_hex(content))
    (directory / "manifest.json").write_bytes(manifest_bytes(replace(manifest, files=files)))


def read_manifest_unchecked(directory: Path) -> Any:
    """The honest manifest, after files have been changed under it."""
    honest = Path(f"{directory}.honest")
    return read_manifest(honest)


def index_of(directory: Path) -> Any:
    return pickle.loads((directory / ".metadata").read_bytes())


def put_index(directory: Path, index: Any, protocol: int = 4) -> None:
    (directory / ".metadata").write_bytes(pickle.dumps(index, protocol=protocol))


def put_item(directory: Path, content: bytes) -> None:
    """Let the victim's chunk be other bytes: put at the end of the data file, with the index and the sidecar to fit."""
    index = index_of(directory)
    (key,) = [k for k in index.storage_data if k.fqn == VICTIM]
    info = index.storage_data[key]
    path = directory / info.relative_path
    with path.open("ab") as file:
        info.offset = file.tell()
        info.length = len(content)
        file.write(content)
    put_index(directory, index)
    sidecar = Path(f"{path}.crc")
    if sidecar.exists():
        data = path.read_bytes()
        crcs = [crc32(data[i : i + 65_536]) for i in range(0, len(data), 65_536)]
        sidecar.write_bytes(struct.pack(f"<8sIIQ{len(crcs)}I", b"RSHCRC1\n", 65_536, 0, len(data), *crcs))


def saved(value: Any) -> bytes:
    out = io.BytesIO()
    torch.save(value, out)
    return out.getvalue()


def repacked(content: bytes, change: Callable[[str, bytes], bytes] = lambda _, data: data, **options: Any) -> bytes:
    """The same archive with other records."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(out, "w") as new:
        for entry in old.infolist():
            new.writestr(entry.filename, change(entry.filename, old.read(entry)), **options)
    return out.getvalue()


def weights() -> torch.Tensor:
    return torch.ones(8)


def more_numbers() -> bytes:
    """A pickle that says 8 numbers, beside a record of 2."""
    return repacked(saved(weights()), lambda name, data: data[:8] if name.endswith("data/0") else data)


def bomb() -> bytes:
    """200 MB of zeros in 200 KB."""
    return repacked(
        saved(weights()), lambda n, d: bytes(200 << 20) if n.endswith("data/0") else d, compress_type=zipfile.ZIP_DEFLATED
    )  # fmt: skip


def hostile_index(directory: Path, marker: Path, protocol: int = 4) -> None:
    index = index_of(directory)
    index.planner_data = {"x": Runs(marker)}
    put_index(directory, index, protocol)


def huge(directory: Path, marker: Path) -> None:
    index = index_of(directory)
    entry = index.state_dict_metadata[VICTIM]
    entry.size = torch.Size([1 << 40])
    entry.chunks[0].sizes = torch.Size([1 << 40])
    put_index(directory, index)


def overlapping(directory: Path, marker: Path) -> None:
    """Two chunks that hold as many numbers as the tensor, but not each of them: the last two would be left as they were."""
    put_item(directory, saved(torch.ones(4)) + saved(torch.ones(4)))
    index = index_of(directory)
    (key,) = [k for k in index.storage_data if k.fqn == VICTIM]
    info, entry = index.storage_data.pop(key), index.state_dict_metadata[VICTIM]
    half, chunks = info.length // 2, []
    for number, start in enumerate((0, 2)):
        place, chunk = copy.copy(info), copy.copy(entry.chunks[0])
        place.offset, place.length = info.offset + number * half, half
        chunk.offsets, chunk.sizes = torch.Size([start]), torch.Size([4])
        index.storage_data[MetadataIndex(VICTIM, chunk.offsets)] = place
        chunks.append(chunk)
    entry.chunks = chunks
    put_index(directory, index)


def pointing(path: str) -> Callable[[Path, Path], None]:
    def make(directory: Path, marker: Path) -> None:
        index = index_of(directory)
        for info in index.storage_data.values():
            info.relative_path = path
        put_index(directory, index)

    return make


def unknown_chunk(directory: Path, marker: Path) -> None:
    index = index_of(directory)
    (key,) = [k for k in index.storage_data if k.fqn == VICTIM]
    index.storage_data[MetadataIndex(VICTIM, torch.Size([3]))] = index.storage_data.pop(key)
    put_index(directory, index)


def linked(directory: Path, marker: Path) -> None:
    """The data file is a link to something that is not ours to show."""
    secret = marker.with_name("secret")
    secret.write_text("the secret\n" * 10_000)
    (directory / "__0_0.distcp").unlink()
    (directory / "__0_0.distcp").symlink_to(secret)


def pipe(name: str) -> Callable[[Path, Path], None]:
    """Who opens it waits for ever."""

    def make(directory: Path, marker: Path) -> None:
        (directory / name).unlink()
        os.mkfifo(directory / name)

    return make


def pth(value: Callable[[Path], Any]) -> Callable[[Path, Path], None]:
    return lambda path, marker: path.write_bytes(saved(value(marker)))


HOSTILE: dict[str, Attack] = {
    "an index that runs a command": Attack(lambda d, m: (d / ".metadata").write_bytes(pickle.dumps(Runs(m))), "system`"),
    "the same, hidden in an honest one": Attack(hostile_index, "system`"),
    "the same, in protocol 2": Attack(lambda d, m: hostile_index(d, m, 2), "system`"),
    "an index that evaluates": Attack(
        lambda d, m: (d / ".metadata").write_bytes(b"\x80\x02cbuiltins\neval\nX\x03\x00\x00\x001+1\x85R."),
        "`builtins.eval`",
    ),
    "an index that loads more": Attack(
        lambda d, m: (d / ".metadata").write_bytes(b"\x80\x02ctorch\nload\nX\x01\x00\x00\x00x\x85R."), "`torch.load`"
    ),
    "an item that runs a command": Attack(lambda d, m: put_item(d, saved(Runs(m))), VICTIM),
    "an item that is compressed": Attack(
        lambda d, m: put_item(d, repacked(saved(weights()), compress_type=zipfile.ZIP_DEFLATED)), VICTIM
    ),
    "an item that unpacks to 200 MB": Attack(lambda d, m: put_item(d, bomb()), VICTIM),
    "an item with fewer numbers than it says": Attack(lambda d, m: put_item(d, more_numbers()), VICTIM),
    "an item of another shape": Attack(lambda d, m: put_item(d, saved(torch.ones(800))), VICTIM),
    "an item that is no tensor": Attack(lambda d, m: put_item(d, saved({"w": weights()})), VICTIM),
    "a tensor of 2^40 numbers": Attack(huge, VICTIM),
    "chunks that overlap": Attack(overlapping, VICTIM),
    "a chunk that is nowhere": Attack(unknown_chunk, VICTIM),
    "a path to the folder above": Attack(pointing("../__0_0.distcp"), "outside of the directory"),
    "a path from the root": Attack(pointing("/etc/passwd"), "outside of the directory"),
    "a data file that is a link to a secret": Attack(linked, "__0_0.distcp"),
    "a data file that is a pipe": Attack(pipe("__0_0.distcp"), "__0_0.distcp"),
    "an index that is a pipe": Attack(pipe(".metadata"), (".metadata", "no whole checkpoint", "no manifest.json")),
    "an index of 5 GB": Attack(lambda d, m: os.truncate(d / ".metadata", 5 << 30), ".metadata"),
    "a .pth that runs a command": Attack(pth(lambda m: {"w": weights(), "x": Runs(m)}), "system`", "pth"),
    "a .pth that is compressed": Attack(
        lambda p, m: p.write_bytes(repacked(saved({"w": weights()}), compress_type=zipfile.ZIP_DEFLATED)),
        "compressed", "pth",
    ),
    "a .pth with fewer numbers than it says": Attack(
        lambda p, m: p.write_bytes(
            repacked(saved({"w": weights()}), lambda n, data: data[:8] if n.endswith("data/0") else data)
        ),
        "w [8] float32 needs bytes", "pth",
    ),
}  # fmt: skip

# Of ours, what only a manifest can do.
MANIFESTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a deep one": (lambda d: (d / "manifest.json").write_text("[" * 200_000 + "]" * 200_000), "manifest.json"),
    "a deep one inside": (lambda d: signed(d, inside="[" * 50_000 + "]" * 50_000, source={"a": "@"}), "manifest.json"),
    "one of 5 GB": (lambda d: os.truncate(d / "manifest.json", 5 << 30), "manifest.json"),
    "a list": (lambda d: (d / "manifest.json").write_text("[1]"), "manifest.json"),
    "a number with a million digits": (lambda d: (d / "manifest.json").write_text("1" * 1_000_000), "manifest.json"),
    "other types": (lambda d: signed(d, step="7"), "step"),
    "a negative size": (lambda d: signed(d, files={"x": {"bytes": -1, "crc32": "00000000"}}), "files"),
    "a file outside": (lambda d: signed(d, files={"../x": {"bytes": 1, "crc32": "00000000"}}), "outside"),
    "a save id that is a path": (lambda d: signed(d, save_id="../../x"), "save_id"),
    "no index": (lambda d: signed(d, files={}), ".metadata"),
    "a pipe": (lambda d: ((d / "manifest.json").unlink(), os.mkfifo(d / "manifest.json")), "manifest.json"),
}


def signed(directory: Path, inside: str = "", **changes: Any) -> None:
    """A manifest with other fields and the right digest. inside: what to put in the place of "@"."""
    body = json.loads((directory / "manifest.json").read_text()) | changes
    del body["digest"]
    text = json.dumps(body, sort_keys=True, separators=(",", ":")).replace('"@"', inside or '"@"')
    (directory / "manifest.json").write_text(f'{text[:-1]},"digest":"{crc32_hex(text.encode())}"}}')


# -- who opens it -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """A hostile path, a place to work in, and a text to train on. ours: it says itself which model it is."""

    path: Path
    work: Path
    text: Path
    ours: bool = False

    @property
    def model(self) -> list[str]:
        return [] if self.ours else ["--model", "debugmodel"]


def _as_step_0(place: Place) -> list[str]:
    (place.work / "a/checkpoint").mkdir(parents=True)
    shutil.copytree(place.path, place.work / "a/checkpoint/step-0", symlinks=True, copy_function=_copy)
    return train_words(place.work / "a", place.text, steps=1, model=TINIER)


def _copy(source: str, target: str, **_: Any) -> None:
    """A copy of a sparse file stays sparse, a pipe stays a pipe."""
    os.link(source, target, follow_symlinks=False)


def _as_initial_weights(place: Place) -> list[str]:
    return train_words(place.work / "b", place.text, steps=1, initial_load_path=place.path, model=TINIER)


def _in_a_meta_directory(place: Place) -> Path:
    directory = place.work / "meta"
    if not directory.exists():
        directory.mkdir()
        (directory / "params.json").write_text(
            '{"dim": 8, "n_layers": 1, "n_heads": 2, "vocab_size": 264, "norm_eps": 1e-05}'
        )
        os.link(place.path, directory / "consolidated.00.pth")
    return directory


def _in_a_run(place: Place) -> Path:
    run = place.work / "seen"
    (run / "checkpoint").mkdir(parents=True)
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    (run / "checkpoint/step-3").symlink_to(place.path)
    return run


# verb -> the commands that open a DCP directory, and those that open a .pth. Each must refuse.
VERBS: dict[str, tuple[Callable[[Place], list[str]] | None, Callable[[Place], list[str]] | None]] = {
    "verify": (lambda p: ["verify", str(p.path)], lambda p: ["verify", str(p.path)]),
    "train from step-0": (_as_step_0, None),
    "train from initial_load_path": (_as_initial_weights, None),
    "convert": (
        lambda p: ["convert", str(p.path), str(p.work / "c.pt"), *p.model],
        lambda p: ["convert", str(_in_a_meta_directory(p)), str(p.work / "c")],
    ),
    "diff": (
        lambda p: ["diff", str(p.path), str(p.path), *p.model],
        lambda p: ["diff", str(_in_a_meta_directory(p)), str(_in_a_meta_directory(p))],
    ),
    "eval": (
        lambda p: ["eval", str(p.path), *p.model, "--data", str(p.text)],
        lambda p: ["eval", str(p.path), *p.model, "--data", str(p.text)],
    ),
    "generate": (
        lambda p: ["generate", str(p.path), "--prompt", "a", *p.model],
        lambda p: ["generate", str(p.path), "--prompt", "a", *p.model],
    ),
}
# These show what a file says of itself and may do so; they run nothing either.
SHOWING: dict[str, Callable[[Place], list[str]]] = {
    "inspect": lambda p: ["inspect", str(p.path), *p.model],
    "inspect a tensor": lambda p: ["inspect", str(p.path), "--tensor", VICTIM, *p.model],
    "report": lambda p: ["report", str(_in_a_run(p)), "--verify"],
    "verify files": lambda p: ["verify", str(p.path), "--level", "files"],
}


@pytest.fixture(scope="module")
def shop() -> Iterator[Workshop]:
    with workshop() as made:
        yield made


@pytest.fixture(scope="module")
def honest(shop: Workshop) -> Path:
    """A seed of ours; without its manifest and sidecars it is a foreign DCP directory."""
    words = train_words(shop.place / "seed", shop.text, model=TINIER)[1:]
    ended = shop.runs.run(["seed", *words])
    assert ended.code == 0, ended.err[0]
    return shop.place / "seed/checkpoint/step-0"


def prepared(honest: Path, work: Path, *, ours: bool) -> Path:
    path = work / "hostile"
    shutil.copytree(honest, path)
    if not ours:
        for name in ("manifest.json", "__0_0.distcp.crc"):
            (path / name).unlink()
    else:
        Path(f"{path}.honest").symlink_to(honest)
    return path


def ran(shop: Workshop, work: Path, commands: dict[str, list[str]]) -> dict[str, tuple[int, str]]:
    """Exit code and everything said, by verb."""
    (work / "said").mkdir()
    ended = shop.runs.run(
        call="faults.onranks:each_command", commands=list(commands.values()), place=str(work / "said"),
        megabytes=MEGABYTES, seconds=SECONDS,
    )  # fmt: skip
    assert ended.code == 0, ended.err[0]
    return {
        verb: (
            int((work / f"said/code-{i}").read_text()),
            (work / f"said/out-{i}").read_text(errors="replace") + (work / f"said/err-{i}").read_text(errors="replace"),
        )
        for i, verb in enumerate(commands)
    }


def check(said: dict[str, tuple[int, str]], says: str | tuple[str, ...]) -> None:
    for verb, (code, text) in said.items():
        assert "Traceback" not in text, (verb, text)
        assert "the secret" not in text, verb
        if verb in SHOWING:
            assert code in (0, 1, 2), (verb, code, text)
            continue
        assert code in ((1, 2) if verb == "verify" else (2,)), (verb, code, text)
        assert any(word in text for word in ((says,) if isinstance(says, str) else says)), (verb, text)


@pytest.mark.parametrize("owner", ["ours", "foreign"])
@pytest.mark.parametrize("attack", [name for name, attack in HOSTILE.items() if attack.kind == "dcp"])
def test_a_hostile_file_is_refused_by_name_and_runs_nothing(
    attack: str, owner: str, shop: Workshop, honest: Path, tmp_path: Path
) -> None:
    marker, path = tmp_path / "marker", prepared(honest, tmp_path, ours=owner == "ours")
    HOSTILE[attack].make(path, marker)
    if not any(word in attack for word in ("pipe", "5 GB", "link")):  # those cannot be signed, sizes would not fit
        sign(path)
    place = Place(path, tmp_path, shop.text, owner == "ours")
    commands = {verb: make(place) for verb, (make, _) in VERBS.items() if make is not None}
    commands |= {verb: make(place) for verb, make in SHOWING.items()}
    check(ran(shop, tmp_path, commands), HOSTILE[attack].says)
    assert not marker.exists()


@pytest.mark.parametrize("attack", [name for name, attack in HOSTILE.items() if attack.kind == "pth"])
def test_a_hostile_pth_is_refused_by_name_and_runs_nothing(attack: str, shop: Workshop, tmp_path: Path) -> None:
    marker, path = tmp_path / "marker", tmp_path / "hostile.pth"
    HOSTILE[attack].make(path, marker)
    place = Place(path, tmp_path, shop.text)
    commands = {verb: make(place) for verb, (_, make) in VERBS.items() if make is not None}
    commands |= {verb: make(place) for verb, make in SHOWING.items()}
    check(ran(shop, tmp_path, commands), HOSTILE[attack].says)
    assert not marker.exists()


@pytest.mark.parametrize("attack", MANIFESTS)
def test_a_hostile_manifest_is_refused(attack: str, shop: Workshop, honest: Path, tmp_path: Path) -> None:
    change, says = MANIFESTS[attack]
    path = prepared(honest, tmp_path, ours=True)
    change(path)
    place = Place(path, tmp_path, shop.text)
    commands = {
        verb: make(place) for verb, (make, _) in VERBS.items() if make is not None and verb != "train from step-0"
    }
    check(ran(shop, tmp_path, commands), says)


def test_a_hostile_step_is_not_resumed(shop: Workshop, tmp_path: Path) -> None:
    """A full checkpoint of ours, signed, with an index that runs a command: the run stops, and nothing is renamed."""
    words = train_words(tmp_path / "run", shop.text, steps=2, interval=1, model=TINIER)
    assert shop.runs.run([*words, "--training.stop_after", "1"]).code == 0
    step, marker = tmp_path / "run/checkpoint/step-1", tmp_path / "marker"
    shutil.copytree(step, f"{step}.honest")
    hostile_index(step, marker)
    sign(step)
    ended = shop.runs.run(words)
    assert ended.code == 2
    assert "system`" in ended.sentences[0]
    assert step.is_dir()
    assert not marker.exists()


@pytest.mark.parametrize("owner", ["ours", "foreign"])
def test_the_honest_ones_pass(owner: str, shop: Workshop, honest: Path, tmp_path: Path) -> None:
    """Otherwise the refusals above would prove nothing."""
    path = prepared(honest, tmp_path, ours=owner == "ours")
    place = Place(path, tmp_path, shop.text, owner == "ours")
    commands = {verb: make(place) for verb, (make, _) in VERBS.items() if make is not None}
    for verb, (code, text) in ran(shop, tmp_path, commands).items():
        if owner == "ours" or verb not in ("convert", "diff", "eval", "generate"):  # the debug model is not this one
            assert code == 0, (verb, text)


def test_the_attacks_are_live(honest: Path, tmp_path: Path) -> None:
    """The usual way to open such an index does run the command."""
    path, marker = prepared(honest, tmp_path, ours=False), tmp_path / "marker"
    hostile_index(path, marker)
    pickle.loads((path / ".metadata").read_bytes())
    assert marker.exists()
