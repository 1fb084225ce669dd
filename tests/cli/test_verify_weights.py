"""Half a download is never whole: what `reshard verify` says of other programs' files, made by those programs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import reshard
from reshard.cli import main

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 4976698672\n"


def verified(path: Path, capsys: pytest.CaptureFixture[str], level: str = "files") -> tuple[int, str]:
    """Exit code and all that is printed; the Python function must agree with the command."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(["verify", "--level", level, str(path)])
    said = capsys.readouterr()
    assert "Traceback" not in said.err
    answers = [verdict.whole for verdict in reshard.verify(path, level=level)]
    assert stop.value.code == (1 if False in answers else 2 if None in answers else 0)
    return int(stop.value.code), said.out + said.err


def numbers(*shape: int) -> torch.Tensor:
    return torch.arange(1.0, 1 + int(np.prod(shape))).reshape(shape)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every kind of model that is all there, in a folder or file each."""
    root = tmp_path_factory.mktemp("made")
    parts = [{"a.weight": numbers(8, 4), "b.weight": numbers(3)}, {"c.weight": numbers(5, 5), "d.weight": numbers(2)}]
    for kind, suffix, stem in (("hf", "safetensors", "model"), ("bin", "bin", "pytorch_model")):
        folder = root / kind
        folder.mkdir()
        names = [f"{stem}-{i + 1:05d}-of-00002.{suffix}" for i in range(2)]
        for name, part in zip(names, parts, strict=True):
            save_file(part, folder / name) if kind == "hf" else torch.save(part, folder / name)
        weight_map = {tensor: name for name, part in zip(names, parts, strict=True) for tensor in part}
        index = "model.safetensors.index.json" if kind == "hf" else "pytorch_model.bin.index.json"
        (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
        (folder / "tokenizer.json").write_text(json.dumps({"model": {}}))
    (root / "meta").mkdir()
    (root / "meta" / "params.json").write_text(json.dumps({"dim": 16, "n_layers": 1, "n_heads": 4}))
    for i in range(2):
        half = {"layers.0.attention.wq.weight": numbers(8, 16), "norm.weight": numbers(16)}
        torch.save(half, root / "meta" / f"consolidated.{i:02d}.pth")
    torch.save({"model": parts[0], "optimizer": {"state": [parts[1]]}, "step": 3}, root / "model.pt")
    save_file(parts[0], root / "model.safetensors")
    write_gguf(root / "m.gguf")
    (root / "split").mkdir()
    write_gguf(root / "split" / "m.gguf", split=2)
    return root


def write_gguf(path: Path, split: int = 0) -> None:
    writer = gguf.GGUFWriter(path, "llama", split_max_tensors=split)
    writer.add_context_length(128)
    for i in range(4):
        data = np.arange(1, 257, dtype=np.float32).reshape(4, 64) + i
        kind = gguf.GGMLQuantizationType.Q8_0 if i == 3 else None
        data = gguf.quants.quantize(data, kind) if kind else data
        writer.add_tensor(f"blk.{i}.weight", data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def models(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "models"))


WHOLE = ["hf", "bin", "meta", "split", "m.gguf", "model.pt", "model.safetensors"]
FIRST_OF_SPLIT = "split/m-00001-of-00002.gguf"


@pytest.mark.parametrize("level", ["files", "bytes"])
def test_what_is_all_there_is_whole(level: str, made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in [*WHOLE, FIRST_OF_SPLIT]:
        code, said = verified(made / name, capsys, level)
        assert code == 0, said
        assert "whole" in said
        assert ("no checksums" in said) == (name not in ("bin", "meta", "model.pt"))


def cut(path: Path, size: int) -> None:
    os.truncate(path, size)


def edited(path: Path, change: Callable[[Any], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


HF2 = "model-00002-of-00002.safetensors"
HALF = {
    "a shard of the index": ("hf", lambda d: (d / HF2).unlink(), HF2),
    "all of the index's": ("hf", lambda d: [p.unlink() for p in d.glob("model-*")], "is missing"),
    "a shard that is a dead link": ("hf", lambda d: ((d / HF2).unlink(), (d / HF2).symlink_to("gone")), HF2),
    "a shard cut": ("hf", lambda d: cut(d / HF2, (d / HF2).stat().st_size - 4), "its header describes"),
    "a shard with more": ("hf", lambda d: (d / HF2).write_bytes((d / HF2).read_bytes() + b"\1"), "its header describes"),
    "a shard empty": ("hf", lambda d: cut(d / HF2, 0), "is empty"),
    "a shard is a pointer": ("hf", lambda d: (d / HF2).write_text(POINTER), "Git LFS pointer, the file of 4,976,698,672"),
    "the index is a pointer": ("hf", lambda d: (d / "model.safetensors.index.json").write_text(POINTER), "Git LFS"),
    "the index cut": ("hf", lambda d: cut(d / "model.safetensors.index.json", 90), "is not JSON"),
    "a tensor that is in no shard": (
        "hf",
        lambda d: edited(d / "model.safetensors.index.json", lambda c: c["weight_map"].update({"lm_head.weight": HF2})),
        "lm_head.weight",
    ),
    "config.json cut": ("hf", lambda d: cut(d / "config.json", 10), "config.json"),
    "tokenizer.json cut": ("hf", lambda d: cut(d / "tokenizer.json", 10), "tokenizer.json"),
    "tokenizer.model of zeros": ("hf", lambda d: (d / "tokenizer.model").write_bytes(bytes(99)), "tokenizer.model"),
    "aria2 at work": ("hf", lambda d: (d / f"{HF2}.aria2").write_bytes(b"x"), "aria2"),
    "a browser at work": ("hf", lambda d: (d / "tokenizer.model.crdownload").write_bytes(b"x"), "crdownload"),
    "a .bin missing": ("bin", lambda d: (d / "pytorch_model-00001-of-00002.bin").unlink(), "pytorch_model-00001"),
    "a .bin cut": ("bin", lambda d: cut(d / "pytorch_model-00001-of-00002.bin", 900), "truncated"),
    "the last of Meta's": ("meta", lambda d: (d / "consolidated.01.pth").unlink(), "consolidated.01.pth: is missing"),
    "the first of Meta's": ("meta", lambda d: (d / "consolidated.00.pth").unlink(), "consolidated.00.pth: is missing"),
    "all of Meta's": ("meta", lambda d: [p.unlink() for p in d.glob("*.pth")], "consolidated.00.pth"),
    "a part of a split GGUF": ("split", lambda d: (d / "m-00002-of-00002.gguf").unlink(), "m-00002-of-00002.gguf"),
    "a part under another's name": (
        "split", lambda d: shutil.copy(d / "m-00001-of-00002.gguf", d / "m-00002-of-00002.gguf"), "part 0",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", HALF)
def test_half_a_folder_is_not_whole(what: str, models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name, break_it, words = HALF[what]
    break_it(models / name)
    code, said = verified(models / name, capsys)
    assert code == 1, said
    assert words in said
    if name == "split" and (models / FIRST_OF_SPLIT).exists():  # the name by which llama.cpp opens it
        assert verified(models / FIRST_OF_SPLIT, capsys)[0] == 1


@pytest.mark.parametrize("name", ["m.gguf", "model.pt", "model.safetensors"])
def test_a_file_that_is_cut_anywhere_is_not_whole(name: str, made: Path, tmp_path: Path) -> None:
    content = (made / name).read_bytes()
    padding = 31 if name == "m.gguf" else 0  # behind the last number
    for size in {*range(0, len(content) - padding, 97), len(content) - padding - 1}:
        (tmp_path / name).write_bytes(content[:size])
        (verdict,) = reshard.verify(tmp_path / name, level="files")
        assert verdict.whole is False, (size, verdict)


def test_a_bit_in_a_pt_is_found_where_every_byte_is_read(models: Path) -> None:
    content = bytearray((models / "model.pt").read_bytes())
    with zipfile.ZipFile(models / "model.pt") as archive:
        at = next(i.header_offset for i in archive.infolist() if i.filename.endswith("data/2"))
    content[at + 140] ^= 1  # torch puts the numbers at the next multiple of 64
    (models / "model.pt").write_bytes(content)
    with zipfile.ZipFile(models / "model.pt") as archive:
        assert archive.testzip() is not None
    assert reshard.verify(models / "model.pt", level="bytes")[0].whole is False
    assert reshard.verify(models / "model.pt", level="files")[0].whole is True


def test_what_cannot_be_told_exits_2(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (models / "hf" / "model.safetensors.index.json").unlink()
    torch.save({"w": numbers(3)}, models / "old.pt", _use_new_zipfile_serialization=False)
    with zipfile.ZipFile(models / "packed.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", b"\x80\x02}.")
    start = b"GGUF" + (9).to_bytes(4, "little")
    (models / "newer.gguf").write_bytes(start + bytes(100))
    room = (models / "model.safetensors").read_bytes()
    (models / "room.safetensors").write_bytes(room[: len(room) - 12] + bytes(12))  # b.weight: 3 numbers of 4 bytes
    (models / "bin" / ".cache/huggingface/download").mkdir(parents=True)
    (models / "bin" / ".cache/huggingface/download/xyz.incomplete").write_bytes(b"x")
    (models / "meta" / "params.json").unlink()
    for name, words in {
        "hf": "no index.json says", "old.pt": "before torch 1.6", "packed.pt": "compressed", "newer.gguf": "version",
        "room.safetensors": "nothing but zeros", "bin": "incomplete", "meta": "no params.json",
    }.items():  # fmt: skip
        code, said = verified(models / name, capsys)
        assert code == 2, (name, said)
        assert words in said


def test_what_was_left_out_on_purpose_is_only_noted(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`hf download --exclude "*.bin" "*.pth"` leaves the index of the one and the params.json of the other."""
    shutil.copy(models / "bin" / "pytorch_model.bin.index.json", models / "hf")
    (models / "hf" / "original").mkdir()
    shutil.copy(models / "meta" / "params.json", models / "hf" / "original")
    code, said = verified(models / "hf", capsys)
    assert code == 0, said
    assert "none of the files that pytorch_model.bin.index.json names is there" in said
    assert "none of the files that original/params.json names is there" in said
    shutil.copy(models / "bin" / "pytorch_model-00001-of-00002.bin", models / "hf")
    assert verified(models / "hf", capsys)[0] == 1


def test_links_as_the_hubs_cache_has_them(models: Path) -> None:
    (models / "snapshot").mkdir()
    for file in (models / "hf").iterdir():
        (models / "snapshot" / file.name).symlink_to(file)
    assert all(verdict.whole for verdict in reshard.verify(models / "snapshot"))


def test_sizes_of_blocks_are_those_of_the_gguf_library() -> None:
    from reshard.formats.gguf_file import BLOCKS

    theirs = {int(kind): sizes for kind, sizes in gguf.GGML_QUANT_SIZES.items()}
    assert {kind: theirs.get(kind, sizes) for kind, sizes in BLOCKS.items()} == BLOCKS


def test_no_torch_is_needed(made: Path) -> None:
    code = (
        "import sys\nfrom reshard.cli import main\n"
        f"try:\n    main(['verify', *{[str(made / name) for name in WHOLE]!r}])\n"
        "except SystemExit as stop:\n    print(stop.code, sorted({'torch', 'gguf', 'transformers'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0 []"
