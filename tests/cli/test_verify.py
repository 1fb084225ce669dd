"""Does `reshard verify` say what is wrong: which file, which tensor, which rank? Exit 0 whole, 1 damaged, 2 cannot tell."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from reshard.checkpoint.index import read_index
from reshard.checkpoint.manifest import crc32_hex, manifest_bytes, read_manifest
from reshard.cli import main

GOLDEN = Path(__file__).resolve().parents[1] / "golden/v1/step-7"  # of two ranks


@dataclass(frozen=True)
class Said:
    code: int
    out: str
    err: str

    @property
    def verdicts(self) -> list[dict[str, Any]]:
        """Of --json: one object a line."""
        return [json.loads(line) for line in self.out.splitlines()]


Verify = Callable[..., Said]


@pytest.fixture
def verify(capsys: pytest.CaptureFixture[str]) -> Verify:
    def run(*words: object) -> Said:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main(["verify", *map(str, words)])
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return Said(int(stop.value.code or 0), captured.out, captured.err)

    return run


@pytest.fixture
def step(tmp_path: Path) -> Path:
    return Path(shutil.copytree(GOLDEN, tmp_path / "checkpoint/step-7"))


def place_of(step: Path, name: str, *, last: bool = False) -> tuple[str, int]:
    """File and byte of the middle of a tensor's first or last chunk."""
    chunk = read_index((step / ".metadata").read_bytes(), step).tensors[name].chunks[-1 if last else 0]
    return chunk.file, chunk.offset + chunk.length // 2


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 16
    path.write_bytes(content)


def sign(step: Path, name: str, content: bytes) -> None:
    """Put a file there, and let the manifest agree with it: what only an author can do."""
    (step / name).write_bytes(content)
    body = json.loads((step / "manifest.json").read_text())
    body["files"][name] = {"bytes": len(content), "crc32": crc32_hex(content)}
    del body["digest"]
    digest = crc32_hex(json.dumps(body, sort_keys=True, separators=(",", ":")).encode())
    (step / "manifest.json").write_text(json.dumps(body | {"digest": digest}, indent=1, sort_keys=True) + "\n")


# -- ours -------------------------------------------------------------------------------------------------------------


def test_a_whole_checkpoint(verify: Verify, step: Path) -> None:
    said = verify(step)
    assert said.code == 0
    assert said.out.startswith(f"whole    {step}  checkpoint (full, step 7), 0.1 MB checked")
    assert len(said.out.splitlines()) == 1
    assert said.err == ""


def test_a_whole_checkpoint_as_json(verify: Verify, step: Path) -> None:
    (verdict,) = verify(step, "--json").verdicts
    assert (verdict["whole"], verdict["step"], verdict["findings"], verdict["problem"]) == (True, 7, [], "")
    assert verdict["path"] == str(step)
    assert verdict["bytes_checked"] == sum(entry.bytes for entry in read_manifest(step).files.values())


DAMAGE: dict[str, tuple[Callable[[Path], object], str, str, int | None]] = {
    # what: (how, file, a part of the problem, rank)
    "a flipped bit": (lambda s: flip(s / "__1_0.distcp", 3000), "__1_0.distcp", "blocks are damaged, the first at", 1),
    "a zeroed file": (lambda s: (s / "__0_0.distcp").write_bytes(bytes((s / "__0_0.distcp").stat().st_size)),
                      "__0_0.distcp", "blocks are damaged", 0),
    "a cut file": (lambda s: os.truncate(s / "__1_0.distcp", 1000), "__1_0.distcp", "has 1000 bytes, expected", None),
    "an empty file": (lambda s: os.truncate(s / "__0_0.distcp", 0), "__0_0.distcp", "has 0 bytes", None),
    "a longer file": (lambda s: (s / "__0_0.distcp").write_bytes((s / "__0_0.distcp").read_bytes() + b"x"),
                      "__0_0.distcp", "expected", None),
    "a missing file": (lambda s: (s / "__1_0.distcp").unlink(), "__1_0.distcp", "is missing", None),
    "a directory": (lambda s: ((s / "__1_0.distcp").unlink(), (s / "__1_0.distcp").mkdir()), "__1_0.distcp",
                    "is not a file", None),
    "a pipe": (lambda s: ((s / "__1_0.distcp").unlink(), os.mkfifo(s / "__1_0.distcp")), "__1_0.distcp",
               "is not a file", None),
    "a flipped bit in a sidecar": (lambda s: flip(s / "__0_0.distcp.crc", 26), "__0_0.distcp.crc", "has CRC32", 0),
    "a missing sidecar": (lambda s: (s / "__0_0.distcp.crc").unlink(), "__0_0.distcp.crc", "is missing", None),
    "a flipped bit in the index": (lambda s: flip(s / ".metadata", 500), ".metadata", "has CRC32", None),
    "a missing index": (lambda s: (s / ".metadata").unlink(), ".metadata", "is missing", None),
    "a flipped bit in the manifest": (lambda s: flip(s / "manifest.json", 300), "manifest.json", "is damaged", None),
    "a cut manifest": (lambda s: os.truncate(s / "manifest.json", 300), "manifest.json", "not the JSON", None),
    "a manifest that is a directory": (
        lambda s: ((s / "manifest.json").unlink(), (s / "manifest.json").mkdir()), "manifest.json", "not a file", None),
}  # fmt: skip


@pytest.mark.parametrize("what", DAMAGE)
def test_every_damage_is_named(what: str, verify: Verify, step: Path) -> None:
    how, file, problem, rank = DAMAGE[what]
    how(step)
    said = verify(step)
    assert said.code == 1
    assert said.out.startswith(f"DAMAGED  {step}")
    assert file in said.out
    assert problem in said.out
    (verdict,) = verify(step, "--json").verdicts
    assert verdict["whole"] is False
    assert len(verdict["findings"]) == 1
    if rank is not None:
        assert verdict["findings"][0]["rank"] == rank
        assert f"{file} (written by rank {rank})" in said.out


@pytest.mark.parametrize("name", ["model.uneven", "model.columns", "optimizer.state.rows.exp_avg", "train_state.step"])
def test_a_damaged_tensor_is_named(name: str, verify: Verify, step: Path) -> None:
    file, position = place_of(step, name, last=True)
    flip(step / file, position)
    (verdict,) = verify(step, "--json").verdicts
    (finding,) = verdict["findings"]
    assert finding["file"] == file
    assert name in finding["tensors"]
    assert f"tensors: {finding['tensors'][0]}" in verify(step).out


def test_a_tensor_in_an_undamaged_block_is_not_named(verify: Verify, step: Path) -> None:
    """One tensor of the golden checkpoint reaches over several blocks."""
    file, _ = place_of(step, "model.whole")
    index = read_index((step / ".metadata").read_bytes(), step)
    (chunk,) = index.tensors["model.whole"].chunks
    flip(step / file, chunk.offset + chunk.length - 2000)
    (finding,) = verify(step, "--json").verdicts[0]["findings"]
    assert "model.whole" in finding["tensors"]
    far = [
        n
        for n, t in index.tensors.items()
        for c in t.chunks
        if c.file == file and abs(c.offset - chunk.offset) > 1 << 17
    ]
    assert not set(far) & set(finding["tensors"])


def test_several_damages_are_all_said(verify: Verify, step: Path) -> None:
    flip(step / "__0_0.distcp", 100)
    flip(step / "__1_0.distcp", 100)
    flip(step / ".metadata", 100)
    (verdict,) = verify(step, "--json").verdicts
    assert [finding["file"] for finding in verdict["findings"]] == [".metadata", "__0_0.distcp", "__1_0.distcp"]


def test_swapped_files(verify: Verify, step: Path) -> None:
    a, b = step / "__0_0.distcp.crc", step / "__1_0.distcp.crc"
    a.rename(step / "x")
    b.rename(a)
    (step / "x").rename(b)
    assert verify(step).code == 1


def test_what_an_author_has_changed(verify: Verify, step: Path) -> None:
    """All digests are right, and still no load would take it."""
    sign(step, ".metadata", b"\x80\x04cos\nsystem\nX\x04\x00\x00\x00true\x85R.")
    said = verify(step)
    assert said.code == 1
    assert "`os.system`" in said.out


def test_files_that_are_not_in_the_manifest_are_only_noted(verify: Verify, step: Path) -> None:
    (step / "notes.txt").write_text("mine")
    said = verify(step)
    assert said.code == 0
    assert "note: notes.txt is not in the manifest" in said.err
    assert said.out.startswith("whole")


def test_a_torn_step(verify: Verify, step: Path) -> None:
    (step / "manifest.json").unlink()
    (step / ".metadata").unlink()
    said = verify(step)
    assert said.code == 1
    assert "torn" in said.out


@pytest.mark.parametrize("level", ["files", "bytes"])
def test_what_cannot_be_told(level: str, verify: Verify, step: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    shutil.copytree(step, step.with_name("step-9"))
    newer = read_manifest(step)
    body = json.loads(manifest_bytes(newer)) | {"format_version": 99}
    del body["digest"]
    digest = crc32_hex(json.dumps(body, sort_keys=True, separators=(",", ":")).encode())
    shutil.copytree(step, tmp_path / "newer")
    (tmp_path / "newer/manifest.json").write_text(json.dumps(body | {"digest": digest}))
    for path, problem in (
        (tmp_path / "nowhere", "does not exist"),
        (tmp_path / "nowhere.pth", "does not exist"),
        (tmp_path / "nowhere.safetensors", "cannot be read"),
        (tmp_path / "empty", "is empty"),
        (step.with_name("step-9"), "holds step 7: it was renamed or copied"),
        (tmp_path / "newer", "has format version 99"),
        (step / "manifest.json", "is a file, expected a checkpoint directory"),
    ):
        said = verify(path, "--level", level)
        assert said.code == 2, (path, said)
        assert said.out.startswith("unknown"), (path, said)
        assert problem in said.out, (path, said)


# -- levels, folders, several paths -----------------------------------------------------------------------------------


@pytest.mark.parametrize("what", DAMAGE)
def test_level_files_finds_what_names_and_sizes_show(what: str, verify: Verify, step: Path) -> None:
    how, _, problem, _ = DAMAGE[what]
    how(step)
    only_bytes = "CRC32" in problem or "blocks" in problem
    assert verify(step, "--level", "files").code == (0 if only_bytes else 1)


@pytest.mark.parametrize("words", [["--level", "files"], []], ids=["files", "bytes"])
@pytest.mark.parametrize("kind", ["whole", "damaged", "foreign"])
def test_no_torch_is_needed(words: list[str], kind: str, step: Path, plain_dcp: Path) -> None:
    """Importing it takes seconds; naming the tensors that damage has hit does not need it either."""
    if kind == "damaged":
        flip(step / "__0_0.distcp", 5000)
    path = plain_dcp if kind == "foreign" else step
    code = (
        "import sys\nfrom reshard.cli import main\n"
        f"try:\n    main(['verify', {str(path)!r}, *{words!r}])\nexcept SystemExit:\n    pass\n"
        "print('torch' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"


def test_a_folder_of_steps(verify: Verify, step: Path) -> None:
    shutil.copytree(step, step.with_name("step-0"))
    for name in ("step-7.tmp-0123456789abcdef", "step-7.damaged", "other"):
        shutil.copytree(step, step.with_name(name))
    said = verify(step.parent)
    assert said.code == 0
    assert [line.split()[1] for line in said.out.splitlines()] == [str(step.with_name("step-0")), str(step)]
    flip(step / "__0_0.distcp", 5000)
    said = verify(step.parent)
    assert said.code == 1
    assert [line.split()[0] for line in said.out.splitlines() if not line.startswith(" ")] == ["whole", "DAMAGED"]


def test_several_paths_and_their_exit_codes(verify: Verify, step: Path, tmp_path: Path) -> None:
    damaged = Path(shutil.copytree(step, tmp_path / "damaged"))
    flip(damaged / "__0_0.distcp", 5000)
    assert verify(step, step).code == 0
    assert verify(step, damaged).code == 1
    assert verify(step, tmp_path / "nowhere").code == 2
    assert verify(tmp_path / "nowhere", damaged).code == 1
    assert len(verify(step, damaged, tmp_path / "nowhere", "--json").verdicts) == 3


def test_no_progress_bar_where_nobody_looks(shell: Any, step: Path) -> None:
    done = shell(f"reshard verify {step}")
    assert (done.code, done.err) == (0, "")


# -- foreign DCP ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def plain_dcp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch
    import torch.distributed.checkpoint as dcp

    folder = tmp_path_factory.mktemp("plain") / "theirs"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(
            {"w": torch.arange(600.0).reshape(20, 30), "b": torch.ones(7), "note": {"text": 1}}, checkpoint_id=folder
        )
    return folder


@pytest.fixture
def foreign(plain_dcp: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(plain_dcp, tmp_path / "theirs"))


def test_a_whole_foreign_checkpoint(verify: Verify, foreign: Path) -> None:
    said = verify(foreign)
    assert said.code == 0
    assert "foreign DCP checkpoint" in said.out
    assert "the index and what lies between the records have no checksum" in said.err
    assert "1 pickled objects were not opened" in said.err


@pytest.mark.parametrize("name", ["w", "b"])
def test_a_flipped_bit_of_a_foreign_tensor(name: str, verify: Verify, foreign: Path) -> None:
    chunk = read_index((foreign / ".metadata").read_bytes(), foreign).tensors[name].chunks[0]
    content = (foreign / chunk.file).read_bytes()
    numbers = content.index(b"data/0", chunk.offset) + 64
    flip(foreign / chunk.file, numbers + 20)
    (verdict,) = verify(foreign, "--json").verdicts
    assert verdict["whole"] is False
    (finding,) = verdict["findings"]
    assert (finding["file"], finding["tensors"], finding["rank"]) == (chunk.file, [name], 0)
    assert "does not have its stored CRC32" in finding["problem"]
    assert verify(foreign, "--level", "files").code == 0


@pytest.mark.parametrize(
    ("how", "problem"),
    [
        (lambda d: (d / "__0_0.distcp").unlink(), "is missing"),
        (lambda d: os.truncate(d / "__0_0.distcp", 900), "are wanted, it has 900"),
        (lambda d: ((d / "__0_0.distcp").unlink(), (d / "__0_0.distcp").mkdir()), "is not a file"),
        (lambda d: ((d / "__0_0.distcp").unlink(), os.mkfifo(d / "__0_0.distcp")), "is not a file"),
        (lambda d: (d / ".metadata").write_bytes(b"\x80\x04cos\nsystem\nX\x04\x00\x00\x00true\x85R."), "`os.system`"),
        (lambda d: (d / ".metadata").write_bytes(b""), "damaged"),
    ],
    ids=["missing", "cut", "a directory", "a pipe", "a hostile index", "an empty index"],
)
@pytest.mark.parametrize("level", ["files", "bytes"])
def test_damage_to_a_foreign_checkpoint(how: Any, problem: str, level: str, verify: Verify, foreign: Path) -> None:
    how(foreign)
    said = verify(foreign, "--level", level)
    assert said.code == 1
    assert problem in said.out


# -- single files -----------------------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path: Path) -> Path:
    import torch
    from safetensors.torch import save_file

    tensors = {"w": torch.arange(1000.0), "b": torch.ones(7)}
    torch.save(tensors, tmp_path / "consolidated.00.pth")
    torch.save(tensors, tmp_path / "model.pt")
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path


@pytest.mark.parametrize("name", ["consolidated.00.pth", "model.pt", "model.safetensors"])
def test_a_single_file(name: str, verify: Verify, files: Path) -> None:
    path = files / name
    said = verify(path)
    assert said.code == 0
    assert "2 tensors" in said.out
    os.truncate(path, path.stat().st_size - 1000)
    said = verify(path)
    assert said.code == 1
    assert said.out.startswith("DAMAGED")
    assert name in said.out
    path.write_bytes(b"<html>404</html>")
    assert verify(path).code == 1


@pytest.mark.parametrize("name", ["consolidated.00.pth", "model.pt"])
def test_a_flipped_bit_in_a_pth(name: str, verify: Verify, files: Path) -> None:
    flip(files / name, (files / name).read_bytes().index(b"data/0") + 1500)
    assert verify(files / name, "--level", "files").code == 0
    said = verify(files / name)
    assert said.code == 1
    assert "CRC32" in said.out


def test_a_hostile_pth(verify: Verify, tmp_path: Path) -> None:
    import torch

    class Runs:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {tmp_path}/marker",)

    torch.save({"w": Runs()}, tmp_path / "x.pth")
    said = verify(tmp_path / "x.pth")
    assert said.code == 1
    assert "system`" in said.out
    assert not (tmp_path / "marker").exists()


def test_safetensors_have_no_checksums_and_that_is_said(verify: Verify, files: Path) -> None:
    said = verify(files / "model.safetensors")
    assert "stores no checksums" in said.err


def test_a_folder_of_weights(verify: Verify, files: Path) -> None:
    assert len(verify(files, "--json").verdicts) == 3
