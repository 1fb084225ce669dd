"""Is it whole? Every file of a checkpoint against its manifest, or of a foreign DCP directory against its stored CRCs.

Ours needs no torch, unless damage is found and the tensors that it hit are to be named.
"""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from reshard.checkpoint.blocks import SUFFIX, BlockSums, read_sums
from reshard.checkpoint.layout import METADATA
from reshard.checkpoint.manifest import MANIFEST, Manifest, crc32, read_manifest
from reshard.errors import CheckpointError, FormatError, IntegrityError, NotACheckpoint, StorageError, TornCheckpoint

Level = Literal["files", "bytes"]
Advance = Callable[[int], object]

_READ_BYTES = 4 << 20  # a multiple of every block size that we write


@dataclass(frozen=True)
class Finding:
    """One thing that is not as it should be. rank: which rank wrote the file, where its name says so."""

    file: str
    problem: str
    tensors: tuple[str, ...] = ()
    rank: int | None = None


@dataclass(frozen=True)
class Verdict:
    """What a verification found. whole None: it could not be told, see `problem`."""

    path: str
    what: str
    whole: bool | None
    findings: tuple[Finding, ...] = ()
    bytes_checked: int = 0
    problem: str = ""
    step: int | None = None
    notes: tuple[str, ...] = field(default=())


def verify_checkpoint(directory: Path, level: Level = "bytes", advance: Advance = lambda n: None) -> Verdict:
    """Check one of our checkpoints. advance: called with the number of bytes done, for a progress bar.

    files: the manifest against itself and against names and sizes. bytes: every byte of every file, too.
    Damage is a finding. A disk that fails says nothing of the checkpoint: whole is None. Raises nothing of ours.
    """
    try:
        manifest = read_manifest(directory)
    except StorageError as error:
        return Verdict(str(directory), "checkpoint", None, problem=error.message)
    except NotACheckpoint as error:
        return Verdict(str(directory), "nothing", None, problem=error.message)
    except TornCheckpoint as error:
        return Verdict(str(directory), "torn checkpoint", False, (Finding("", error.message),))
    except IntegrityError as error:
        return Verdict(str(directory), "checkpoint", False, (Finding("", error.message),))
    what = f"checkpoint ({manifest.kind}, step {manifest.step})"
    findings: list[Finding] = []
    checked = 0
    if level == "bytes":
        for name, entry in sorted(manifest.files.items()):
            try:
                bad = _check_file(directory, name, manifest, advance)
            except FileNotFoundError:
                bad = Finding(name, "is missing", rank=_rank_of(name))
            except OSError as error:
                problem = f"`{directory / name}` cannot be read: {error.strerror or error}"
                return Verdict(str(directory), what, None, problem=problem, step=manifest.step)
            checked += entry.bytes
            if bad is not None:
                findings.append(bad)
    extra = sorted({path.name for path in directory.iterdir()} - set(manifest.files) - {MANIFEST})
    notes = tuple(f"{name} is not in the manifest, it is ignored" for name in extra)
    return Verdict(str(directory), what, not findings, tuple(findings), checked, step=manifest.step, notes=notes)


def _check_file(directory: Path, name: str, manifest: Manifest, advance: Advance) -> Finding | None:
    """Read a file once; None if it has its CRC32, else what is damaged in it."""
    entry = manifest.files[name]
    crc = nbytes = 0
    blocks: list[int] = []
    sums = _sums_of(directory, name, manifest)
    with open(directory / name, "rb", buffering=0) as file:
        while data := file.read(_READ_BYTES):
            crc = crc32(data, crc)
            if sums is not None:
                blocks.extend(crc32(data[i : i + sums.block_bytes]) for i in range(0, len(data), sums.block_bytes))
            nbytes += len(data)
            advance(len(data))
    if nbytes == entry.bytes and f"{crc:08x}" == entry.crc32:
        return None
    if nbytes != entry.bytes:
        return Finding(name, f"has {nbytes} bytes, expected {entry.bytes}", rank=_rank_of(name))
    bad = (
        [] if sums is None else [i for i, (got, want) in enumerate(zip(blocks, sums.crcs, strict=True)) if got != want]
    )
    problem = f"has CRC32 {crc:08x}, expected {entry.crc32}"
    tensors: tuple[str, ...] = ()
    if bad and sums is not None:
        problem += f"; {len(bad)} of {len(blocks)} blocks are damaged, the first at byte {bad[0] * sums.block_bytes}"
        tensors = _tensors_at(directory, manifest, name, bad, sums.block_bytes)
    return Finding(name, problem, tensors, _rank_of(name))


def _sums_of(directory: Path, name: str, manifest: Manifest) -> BlockSums | None:
    sidecar = manifest.files.get(name + SUFFIX)
    if sidecar is None:
        return None
    try:
        return read_sums(directory, name + SUFFIX, sidecar, manifest.files[name].bytes)
    except (IntegrityError, OSError):
        return None  # the sidecar has its own turn; without it we can only say that the file is damaged, not where


def _tensors_at(directory: Path, manifest: Manifest, name: str, bad: list[int], block_bytes: int) -> tuple[str, ...]:
    """Which tensors have bytes in damaged blocks of a file? Empty where the index itself cannot be read."""
    from reshard.checkpoint.metadata import read_metadata

    try:
        metadata = read_metadata(directory, manifest)
    except (CheckpointError, FormatError):
        return ()
    hit = set()
    for index, info in metadata.storage_data.items():
        first, last = info.offset // block_bytes, (info.offset + info.length - 1) // block_bytes
        if info.relative_path == name and any(first <= block <= last for block in bad):
            hit.add(index.fqn)
    return tuple(sorted(hit))


def _rank_of(name: str) -> int | None:
    """`__3_0.distcp` was written by rank 3, in torch's naming and ours."""
    parts = name.split("_")
    return int(parts[2]) if name.startswith("__") and len(parts) > 3 and parts[2].isdigit() else None


def verify_foreign(directory: Path, level: Level = "bytes", advance: Advance = lambda n: None) -> Verdict:
    """Check a DCP directory of another program: its index, its files' sizes, and the CRC32 stored with each record.

    DCP stores no checksum of the index, and none of the files as a whole: what can be shown is said, no more.
    """
    from reshard.checkpoint.metadata import read_metadata

    what = "foreign DCP checkpoint"
    try:
        metadata = read_metadata(directory, None)
    except StorageError as error:
        return Verdict(str(directory), what, None, problem=error.message)
    except (CheckpointError, FormatError) as error:
        return Verdict(str(directory), what, False, (Finding(METADATA, error.message),))
    by_file: dict[str, list[tuple[int, int, str]]] = {}
    for index, info in metadata.storage_data.items():
        by_file.setdefault(info.relative_path, []).append((info.offset, info.length, index.fqn))
    findings: list[Finding] = []
    checked = 0
    for name, items in sorted(by_file.items()):
        rank = _rank_of(name)
        try:
            with open(directory / name, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                for offset, length, fqn in sorted(items):
                    if offset < 0 or length <= 0 or offset + length > size:
                        problem = f"bytes {offset} to {offset + length} are wanted, it has {size}"
                        findings.append(Finding(name, problem, (fqn,), rank))
                    elif level == "bytes":
                        file.seek(offset)
                        findings += [Finding(name, p, (fqn,), rank) for p in _archive_problems(file.read(length))]
                        checked += length
                        advance(length)
        except FileNotFoundError:
            findings.append(Finding(name, "is missing", tuple(sorted({fqn for _, _, fqn in items})), rank))
        except OSError as error:
            problem = f"`{directory / name}` cannot be read: {error.strerror or error}"
            return Verdict(str(directory), what, None, problem=problem)
    notes = ("no manifest: the index and what lies between the records have no checksum",)
    return Verdict(str(directory), what, not findings, tuple(findings), checked, notes=notes)


def _archive_problems(content: bytes) -> Iterator[str]:
    """What is wrong with one stored chunk? Nothing is unpickled and nothing decompressed."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            squeezed = [i.filename for i in archive.infolist() if i.compress_type != zipfile.ZIP_STORED]
            if squeezed:
                yield f"record {squeezed[0]} is compressed, which torch never writes"
                return
            broken = archive.testzip()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, EOFError, OSError) as error:
        yield f"is not a torch.save archive: {error}"
        return
    if broken is not None:
        yield f"record {broken} does not have its stored CRC32"
