"""What does a checkpoint say of itself? manifest.json: written last, read first, small at any number of ranks.

A directory is a checkpoint if and only if this file is in it and agrees with the files. Imports no torch.
"""

from __future__ import annotations

import errno
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from isal import isal_zlib

from reshard.errors import IntegrityError, NotACheckpoint, StorageError, TornCheckpoint, listed

MANIFEST = "manifest.json"
FORMAT_VERSION = 1
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


def crc32(data: bytes, crc: int = 0) -> int:
    """The digest we use everywhere: zlib's CRC32, going on from `crc`."""
    return int(isal_zlib.crc32(data, crc))


def crc32_hex(data: bytes) -> str:
    """The same, as the eight hex digits that a manifest has."""
    return f"{crc32(data):08x}"


def manifest_bytes(manifest: Manifest) -> bytes:
    """The manifest as it lies on disk: sorted, one key a line, ending in a digest of all before it."""
    body = asdict(manifest)
    body["tensors"] = {name: {"shape": list(t.shape), "dtype": t.dtype} for name, t in manifest.tensors.items()}
    return json.dumps(body | {"digest": _digest(body)}, indent=1, sort_keys=True).encode() + b"\n"


def _digest(body: dict[str, Any]) -> str:
    """CRC32 of the content without the digest itself, in the one form that JSON allows for it."""
    return crc32_hex(json.dumps(body, sort_keys=True, separators=(",", ":")).encode())


def read_manifest(directory: Path) -> Manifest:
    """Read and check a directory's manifest against itself and against the files' names and sizes.

    Raises: NotACheckpoint (nothing of ours), TornCheckpoint (files, no manifest), IntegrityError (they disagree),
    StorageError (the disk failed: says nothing about the checkpoint).
    """
    path = directory / MANIFEST
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise _without_manifest(directory) from None
    except NotADirectoryError:
        raise NotACheckpoint(f"`{directory}` is a file, expected a checkpoint directory", path=directory) from None
    except OSError as error:
        raise StorageError(f"`{path}` cannot be read: {error}", path=directory) from None
    manifest = _parse(content, directory)
    damaged: dict[str, str] = {}
    for name, entry in manifest.files.items():
        try:
            size = os.stat(directory / name).st_size
        except FileNotFoundError:
            damaged[name] = f"{name} is missing"
            continue
        except OSError as error:
            if error.errno in (errno.ENOTDIR, errno.ELOOP):
                damaged[name] = f"{name} is not a file"
                continue
            raise StorageError(f"`{directory / name}` cannot be read: {error}", path=directory) from None
        if size != entry.bytes:
            damaged[name] = f"{name} has {size} bytes, expected {entry.bytes}"
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


def _parse(content: bytes, directory: Path) -> Manifest:
    def damaged(reason: str) -> IntegrityError:
        return IntegrityError(f"`{directory / MANIFEST}` is damaged: {reason}", path=directory, files=[MANIFEST])

    try:
        body = json.loads(content)
        digest = body.pop("digest")
    except (ValueError, KeyError, AttributeError, RecursionError) as error:
        raise damaged(f"not the JSON that was written ({error})") from None
    version = body.get("format_version")
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise NotACheckpoint(
            f"`{directory}` has format version {version}, this reshard reads up to {FORMAT_VERSION}",
            path=directory,
            hint="a newer reshard wrote it: pip install --upgrade reshard",
        )
    if _digest(body) != digest:
        raise damaged(f"its digest is {_digest(body)}, expected {digest}")
    try:
        body["tensors"] = {n: TensorEntry(tuple(t["shape"]), t["dtype"]) for n, t in body["tensors"].items()}
        body["files"] = {n: FileEntry(**f) for n, f in body["files"].items()}
        manifest = Manifest(**body)
    except (TypeError, KeyError, AttributeError) as error:
        raise damaged(f"a field is missing or unknown ({error})") from None
    for name in manifest.files:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise damaged(f"file `{name}` lies outside of the directory")
    return manifest
