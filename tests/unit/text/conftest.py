"""What the tests of this room share: configs in a temporary folder, and a small tokenizer.model."""

from __future__ import annotations

import base64
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from reshard.config import Config

MERGES = [b"th", b"he", b"the", b" the", b"in", b"ing", b"  ", b"    ", b"\n\n", b"re", b"return", b"12", b"123"]
MERGES += [b"\xc3\xa9", b"  \n"]


def ranks_of(merges: list[bytes]) -> dict[bytes, int]:
    """All single bytes, last first (so that no rank is by chance its byte), then the merges."""
    return {token: rank for rank, token in enumerate([*(bytes((i,)) for i in reversed(range(256))), *merges])}


@pytest.fixture
def ranks() -> dict[bytes, int]:
    return ranks_of(MERGES)


@pytest.fixture
def tokenizer_model(tmp_path: Path, ranks: dict[bytes, int]) -> Path:
    """A file in the format of Llama 3's tokenizer.model."""
    file = tmp_path / "tokenizer.model"
    lines = (base64.b64encode(token).decode() + f" {rank}\n" for token, rank in ranks.items())
    file.write_text("".join(lines))
    return file


@pytest.fixture
def make_config(tmp_path: Path) -> Callable[..., Config]:
    """A config whose outputs lie in the test's folder: make_config(training={...}, model={...})."""

    def make(**sections: dict[str, Any]) -> Config:
        training = {"seq_len": 16} | sections.pop("training", {})
        job = {"dump_folder": str(tmp_path / "outputs")} | sections.pop("job", {})
        return Config().with_values(job=job, training=training, **sections)

    return make


@pytest.fixture
def many_texts(tmp_path: Path) -> Path:
    """A folder of 100 small text files, each of another length."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(100):
        (folder / f"{i:03}.txt").write_text(
            f"document {i}: " + "the thing is in there. " * (i % 7 + 1), encoding="utf-8"
        )
    return folder
