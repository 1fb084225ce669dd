"""What does a checkpoint say of itself? manifest.json: written last, read first, small at any number of ranks.

A directory is a checkpoint if and only if this file is in it and agrees with the files. Imports no torch.
"""

from __future__ import annotations

import errno
import json
import os
import re
import stat
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from isal import isal_zlib

from reshard.errors import IntegrityError, NotACheckpoint, StorageError, TornCheckpoint, listed
from reshard.torch_zip import ITEM_BYTES

MANIFEST = "manifest.json"
FORMAT_VERSION = 1
MOST_BYTES = 256 << 20  # 1,000 ranks of the largest model need a thousandth of it
Kind = Literal["full", "model"]


@dataclass(frozen=True)
class TensorEntry:
    """One stored tensor: its whole shape and the name of its torch dtype."""

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class FileEntry:
    """One file of the directory: its length and the CRC32 of all its bytes, eight hex digits."""

    bytes: int
    crc32: str


@dataclass(frozen=True)
class Manifest:
    """See docs/checkpoint-format.md; every field is explained there."""

    step: int
    kind: Kind
    sequence: int  # counts the saves of a folder upwards: a higher one was written later, whatever its step
    save_id: str
    parent: str | None  # save id of the checkpoint that this one's run started from or saved before
    created_at: str  # UTC, ISO 8601
    source: dict[str, Any]  # {"kind": "seed" | "import" | "train", ...}
    layout: dict[str, int]  # the five degrees at save
    config: dict[str, Any] | None  # the resolved config, where there was one
    model: dict[str, Any] | None  # LlamaSpec.to_dict()
    data: dict[str, Any] | None  # fingerprint of data and tokenizer
    train_state: dict[str, int]  # step, tokens_seen, next_sequence ...; empty for kind `model`
    tensors: dict[str, TensorEntry]
    files: dict[str, FileEntry]
    versions: dict[str, str] = field(default_factory=dict)  # of reshard and torch
    format_version: int = FORMAT_VERSION

    @property
    def bytes(self) -> int:
        """Size of all files that the manifest names."""
        return sum(entry.bytes for entry in self.files.values())


def crc32(data: bytes | memoryview, crc: int = 0) -> int:
    """The digest we use everywhere: zlib's CRC32, going on from `crc`."""
    return int(isal_zlib.crc32(data, crc))


def crc32_hex(data: bytes) -> str:
    """The same, as the eight hex digits that a manifest has."""
    return f"{crc32(data):08x}"


def manifest_bytes(manifest: Manifest) -> bytes:
    """The manifest as it lies on disk: sorted, a line for each field, tensor and file, and a digest of all of it."""
    body = {f.name: getattr(manifest, f.name) for f in fields(manifest)}
    body["tensors"] = {name: {"dtype": t.dtype, "shape": t.shape} for name, t in manifest.tensors.items()}
    body["files"] = {name: {"bytes": f.bytes, "crc32": f.crc32} for name, f in manifest.files.items()}
    body["digest"] = _digest(body)
    lines = ",\n".join(f" {json.dumps(name)}: {_indented(value)}" for name, value in sorted(body.items()))
    return f"{{\n{lines}\n}}\n".encode()


def _indented(value: Any) -> str:
    """A dict with a line for each of its keys, anything else in one line. (json's own indent is slow Python.)"""
    if not isinstance(value, dict) or not value:
        return json.dumps(value)
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(value[name], sort_keys=True)}" for name in sorted(value))
    return f"{{\n{lines}\n }}"


def _digest(body: dict[str, Any]) -> str:
    """CRC32 of the content without the digest itself, in the one form that JSON allows for it."""
    return crc32_hex(json.dumps(body, sort_keys=True, separators=(",", ":")).encode())


class UnfitFile(OSError):
    """What lies there is no file, or far larger than any that we write: damage, not a failing disk."""


def read_file(path: Path, most_bytes: int) -> bytes:
    """The bytes of a file. Raises OSError; UnfitFile where there are more than most_bytes, or a pipe, or a directory."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe would make us wait
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise UnfitFile("is not a file")
        if status.st_size > most_bytes:
            raise UnfitFile(f"has {status.st_size:,} bytes, expected at most {most_bytes:,}")
        with open(fd, "rb", closefd=False) as file:
            return file.read(status.st_size)
    finally:
        os.close(fd)


def read_manifest(directory: Path) -> Manifest:
    """Read and check a directory's manifest against itself and against the files' names and sizes.

    Raises: NotACheckpoint (nothing of ours), TornCheckpoint (files, no manifest), IntegrityError (they disagree),
    StorageError (the disk failed: says nothing about the checkpoint).
    """
    path = directory / MANIFEST
    try:
        content = read_file(path, MOST_BYTES)
    except FileNotFoundError:
        raise _without_manifest(directory) from None
    except UnfitFile as error:
        raise IntegrityError(f"`{path}` is damaged: it {error}", path=directory, files=[MANIFEST]) from None
    except NotADirectoryError:
        raise NotACheckpoint(f"`{directory}` is a file, expected a checkpoint directory", path=directory) from None
    except OSError as error:
        raise StorageError(f"`{path}` cannot be read: {error.strerror or error}", path=directory) from None
    manifest = parse_manifest(content, directory)
    damaged: dict[str, str] = {}
    for name, entry in manifest.files.items():
        try:
            status = os.stat(directory / name)
        except FileNotFoundError:
            damaged[name] = f"{name} is missing"
            continue
        except OSError as error:
            if error.errno in (errno.ENOTDIR, errno.ELOOP):
                damaged[name] = f"{name} is not a file"
                continue
            raise StorageError(
                f"`{directory / name}` cannot be read: {error.strerror or error}", path=directory
            ) from None
        if not stat.S_ISREG(status.st_mode):
            damaged[name] = f"{name} is not a file"
        elif status.st_size != entry.bytes:
            damaged[name] = f"{name} has {status.st_size} bytes, expected {entry.bytes}"
    if damaged:
        raise IntegrityError(
            f"checkpoint `{directory}` is damaged: {listed(damaged.values())}", path=directory, files=damaged
        )
    return manifest


def _without_manifest(directory: Path) -> NotACheckpoint | TornCheckpoint:
    if not directory.exists():
        return NotACheckpoint(f"checkpoint `{directory}` does not exist", path=directory)
    files = [path.name for path in directory.iterdir()] if directory.is_dir() else []
    if ".metadata" in files:
        return TornCheckpoint(
            f"`{directory}` has DCP files but no {MANIFEST}: another program's checkpoint, or a save that did not finish",
            path=directory,
        )
    if files:
        return TornCheckpoint(
            f"checkpoint `{directory}` is torn: {len(files)} files but no {MANIFEST}",
            path=directory,
            hint="the save did not finish; resume from an older step",
        )
    return NotACheckpoint(f"`{directory}` is empty, expected a checkpoint", path=directory)


def parse_manifest(content: bytes, directory: Path) -> Manifest:
    """A manifest from its bytes, whatever lies beside it. Raises IntegrityError, NotACheckpoint (a later format)."""

    def damaged(reason: str) -> IntegrityError:
        return IntegrityError(f"`{directory / MANIFEST}` is damaged: {reason}", path=directory, files=[MANIFEST])

    try:
        body = json.loads(content)
        digest = body.pop("digest")
        own = _digest(body)
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise damaged(f"not the JSON that was written ({error})") from None
    if own != digest:
        raise damaged(f"its digest is {own}, expected {digest}")
    version = body.get("format_version")
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise NotACheckpoint(
            f"`{directory}` has format version {version}, this reshard reads up to {FORMAT_VERSION}",
            path=directory,
            hint="a newer reshard wrote it: pip install --upgrade reshard",
        )
    # From here on the digest is right, so only an author can have written what does not fit.
    wrong = [name for name, fits in _FIELDS.items() if name not in body or not fits(body[name])]
    if wrong or len(body) != len(_FIELDS):
        unknown = sorted(str(name) for name in body if name not in _FIELDS)
        raise damaged(f"not what a manifest says in {listed(wrong)}" if wrong else f"unknown {listed(unknown)}")
    outside = [name for name in body["files"] if not _FILE.match(name) or set(name) == {"."}]
    if outside:
        raise damaged(f"file `{outside[0][:80]}` lies outside of the directory")
    body["tensors"] = {n: TensorEntry(tuple(t["shape"]), t["dtype"]) for n, t in body["tensors"].items()}
    body["files"] = {n: FileEntry(**f) for n, f in body["files"].items()}
    return Manifest(**body)


_FILE = re.compile(r"[\w.+-]{1,255}\Z", re.ASCII)
_SAVE_ID = re.compile(r"[\w-]{1,64}\Z", re.ASCII)  # becomes a part of directory names
_CRC = re.compile(r"[0-9a-f]{8}\Z")


def _natural(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _is(*kinds: type | None) -> Callable[[Any], bool]:
    return lambda value: type(value) in kinds or (value is None and None in kinds)


def _numbers(value: Any) -> bool:
    return type(value) is dict and all(map(_natural, value.values()))


def _tensor(value: Any) -> bool:
    if type(value) is not dict or value.keys() != {"shape", "dtype"} or type(value["shape"]) is not list:
        return False
    return type(value["dtype"]) is str and value["dtype"] in ITEM_BYTES and all(map(_natural, value["shape"]))


def _file(value: Any) -> bool:
    if type(value) is not dict or value.keys() != {"bytes", "crc32"} or type(value["crc32"]) is not str:
        return False
    return _natural(value["bytes"]) and _CRC.match(value["crc32"]) is not None


# What a reader relies on, field by field. JSON has no other types than these.
_FIELDS: dict[str, Callable[[Any], bool]] = {
    "format_version": lambda v: _natural(v) and v > 0,
    "step": _natural,
    "kind": lambda v: v in ("full", "model"),
    "sequence": _natural,
    "save_id": lambda v: type(v) is str and _SAVE_ID.match(v) is not None,
    "parent": _is(str, None),
    "created_at": _is(str),
    "source": _is(dict),
    "layout": _numbers,
    "config": _is(dict, None),
    "model": _is(dict, None),
    "data": _is(dict, None),
    "train_state": _numbers,
    "tensors": lambda v: type(v) is dict and all(map(_tensor, v.values())),
    "files": lambda v: type(v) is dict and all(map(_file, v.values())),
    "versions": _is(dict),
}
