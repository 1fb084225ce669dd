"""Attacks on the token cache: killed builders, flipped and missing bytes, full disks, data that changes underneath."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import pytest

from reshard.config import Config
from reshard.errors import DataError
from reshard.text import TokenData, Tokenizer, load_tokenizer, prepare


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(50):
        (folder / f"{i:02}.txt").write_text(
            f"document {i} says <|end_of_text|> and goes on. " * (i + 1), encoding="utf-8"
        )
    return folder


@pytest.fixture
def config(tmp_path: Path, corpus: Path) -> Config:
    return Config().with_values(
        job={"dump_folder": str(tmp_path / "outputs")}, training={"dataset": str(corpus), "seq_len": 16}
    )


def content(data: TokenData) -> tuple[list[int], list[int]]:
    return data.train.tolist(), data.validation.tolist()


def leftovers(config: Config) -> list[str]:
    return sorted(p.name for p in config.token_folder.iterdir() if ".tmp-" in p.name or ".torn-" in p.name)


def test_text_cannot_end_its_document(config: Config) -> None:
    data, tokenizer = prepare(config, 512)
    assert int((data.train == tokenizer.eos_id).sum() + (data.validation == tokenizer.eos_id).sum()) == 50


def _flip(folder: Path) -> None:
    data = bytearray((folder / "train.bin").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "train.bin").write_bytes(data)


def _flip_validation(folder: Path) -> None:
    data = bytearray((folder / "validation.bin").read_bytes())
    data[-1] ^= 64
    (folder / "validation.bin").write_bytes(data)


def _edit_meta(folder: Path, **changes: object) -> None:
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps({k: v for k, v in (meta | changes).items() if v is not ...}))


ATTACKS: dict[str, Callable[[Path], object]] = {
    "no meta": lambda f: (f / "meta.json").unlink(),
    "half a meta": lambda f: (f / "meta.json").write_bytes((f / "meta.json").read_bytes()[:40]),
    "empty meta": lambda f: (f / "meta.json").write_bytes(b""),
    "meta is a list": lambda f: (f / "meta.json").write_text("[]"),
    "meta without digest": lambda f: _edit_meta(f, digest=...),
    "meta with another type": lambda f: _edit_meta(f, train_tokens="many"),
    "meta with another count": lambda f: _edit_meta(f, train_tokens=7),
    "meta with another dtype": lambda f: _edit_meta(f, dtype="nonsense"),
    "object dtype": lambda f: _edit_meta(f, dtype="O"),
    "no train.bin": lambda f: (f / "train.bin").unlink(),
    "no validation.bin": lambda f: (f / "validation.bin").unlink(),
    "short train.bin": lambda f: os.truncate(f / "train.bin", 100),
    "longer train.bin": lambda f: os.truncate(f / "train.bin", (f / "train.bin").stat().st_size + 2),
    "emptied train.bin": lambda f: os.truncate(f / "train.bin", 0),
    "zeros": lambda f: (f / "train.bin").write_bytes(bytes((f / "train.bin").stat().st_size)),
    "one bit": _flip,
    "one bit of validation": _flip_validation,
    "train.bin is a folder": lambda f: ((f / "train.bin").unlink(), (f / "train.bin").mkdir()),
    "an empty folder": lambda f: (shutil.rmtree(f), f.mkdir()),
    "a file in its place": lambda f: (shutil.rmtree(f), f.write_text("hello")),
    "nothing": shutil.rmtree,
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_torn_cache_is_built_again(config: Config, attack: str) -> None:
    data, _ = prepare(config, 512)
    wanted = content(data)
    del data
    ATTACKS[attack](prepare(config, 512)[0].folder)
    again, _ = prepare(config, 512)
    assert not again.reused
    assert content(again) == wanted
    assert prepare(config, 512)[0].reused
    assert leftovers(config) == []


def test_readers_keep_their_tokens_while_a_damaged_cache_is_replaced(config: Config) -> None:
    data, _ = prepare(config, 512)
    wanted = content(data)
    (data.folder / "meta.json").unlink()
    assert not prepare(config, 512)[0].reused
    assert content(data) == wanted


BUILD = """
import resource, sys
from reshard.config import Config
from reshard.errors import DataError
from reshard.text import prepare
config = Config().with_values(
    job={"dump_folder": sys.argv[1]}, model={"tokenizer_path": sys.argv[3]}, training={"dataset": sys.argv[2], "seq_len": 16}
)
if len(sys.argv) > 4:
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[4]),) * 2)
try:
    prepare(config, 512)
except DataError as error:
    sys.exit(f"DataError: {error}")
"""


def build(config: Config, *more: str) -> subprocess.Popen[str]:
    env = os.environ | {"PYTHONPATH": ":".join(sys.path)}
    arguments = [config.job.dump_folder, config.training.dataset, config.model.tokenizer_path, *more]
    return subprocess.Popen([sys.executable, "-c", BUILD, *arguments], stderr=subprocess.PIPE, text=True, env=env)


def test_a_builder_that_is_killed_leaves_nothing_in_the_way(config: Config, corpus: Path) -> None:
    with open(corpus / "large.txt", "w") as file:
        for i in range(400):
            file.write(f"line {i} of a larger text that takes a while to tokenise\n" * 2000)
    (corpus / "zz.txt").write_text("the last document")
    config = config.with_values(model={"tokenizer_path": "bpe"})
    for _ in range(2):
        process = build(config)
        deadline = time.monotonic() + 60
        while not any(p.stat().st_size > 1 << 20 for p in config.token_folder.glob("*.tmp-*/train.bin")):
            assert process.poll() is None, "it was done before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert len(leftovers(config)) == 1
        assert not list(config.token_folder.glob("*/meta.json"))
    (corpus / "large.txt").write_text("a smaller text")
    # Another source has another key; the leftovers of this one go when this one is built again.
    assert not prepare(config, 512)[0].reused


def test_leftovers_of_a_killed_builder_are_removed(config: Config) -> None:
    folder = prepare(config, 512)[0].folder
    shutil.rmtree(folder)
    for suffix in (".tmp-123-abc", ".torn-9-def"):
        folder.with_name(folder.name + suffix).mkdir()
    folder.with_name("other.tmp-123-abc").mkdir()  # somebody else may be building that one right now
    prepare(config, 512)
    assert leftovers(config) == ["other.tmp-123-abc"]


def test_a_full_disk(config: Config) -> None:
    """The system refuses to let a file grow: an error with a hint, nothing left behind, and the next run works."""
    process = build(config, "2000")
    _, log = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "DataError: the cache folder" in log
    assert "cannot be written" in log
    assert "--training.cache_folder" in log
    assert leftovers(config) == []
    assert not prepare(config, 512)[0].reused


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_a_folder_that_cannot_be_written(config: Config, tmp_path: Path, tokenizer: str) -> None:
    (tmp_path / "file").write_text("x")
    for place in (tmp_path / "file", tmp_path / "file" / "tokens", Path("/proc/no/such")):
        broken = config.with_values(training={"cache_folder": str(place)}, model={"tokenizer_path": tokenizer})
        with pytest.raises(DataError, match="cannot be written") as caught:
            prepare(broken, 512)
        assert "--training.cache_folder" in str(caught.value)
    assert (tmp_path / "file").read_text() == "x"


class Wrapped:
    """The byte tokenizer, doing something else while it is asked."""

    def __init__(self, act: Callable[[], object], add: int = 0) -> None:
        inner = load_tokenizer("bytes", vocab_size=258, cache_folder=Path())
        self.name, self.vocab_size, self.identity = "wrapped", inner.vocab_size, "0" * 64
        self.bos_id, self.eos_id = inner.bos_id, inner.eos_id
        self._inner, self._act, self._add = inner, act, add

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        self._act()
        return [ids + self._add for ids in self._inner.encode_batch(texts)]

    def decode(self, ids: Iterable[int]) -> str:
        return self._inner.decode(ids)


def test_data_that_changes_while_it_is_read_is_not_cached(config: Config, corpus: Path) -> None:
    tokenizer: Tokenizer = Wrapped(lambda: (corpus / "07.txt").write_text("changed"))
    with pytest.raises(DataError, match="changed while it was tokenised"):
        prepare(config, 512, tokenizer=tokenizer)
    assert leftovers(config) == []
    assert not list(config.token_folder.glob("*/meta.json"))


def test_ids_beyond_the_vocabulary_never_reach_the_cache(config: Config) -> None:
    with pytest.raises(DataError, match="but it has 258 tokens"):
        prepare(config, 512, tokenizer=Wrapped(lambda: None, add=70_000))  # 70,000 does not fit 16 bits
    with pytest.raises(DataError, match="but it has 258 tokens"):
        prepare(config, 512, tokenizer=Wrapped(lambda: None, add=-200))
    assert not list(config.token_folder.glob("*/meta.json"))


def test_a_broken_document_far_inside_leaves_nothing_behind(config: Config, corpus: Path) -> None:
    (corpus / "40.txt").write_bytes(b"fine so far\xff")
    with pytest.raises(DataError, match=r"40\.txt is not UTF-8 at byte 11"):
        prepare(config, 512)
    assert leftovers(config) == []
    (corpus / "40.txt").write_bytes(b"fine")
    assert prepare(config, 512)[0].documents == 50
