"""Is it whole? Every file of a checkpoint against its manifest, or of a foreign DCP directory against its stored CRCs.

What a load would refuse is found here, too. Nothing is unpickled on the way, and no torch is needed.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Literal

from reshard.checkpoint.blocks import SUFFIX, BlockSums, read_sums
from reshard.checkpoint.index import Chunk, Index, index_bytes, open_item, read_index
from reshard.checkpoint.layout import METADATA, read_step
from reshard.checkpoint.manifest import MANIFEST, Manifest, TensorEntry, crc32
from reshard.errors import CheckpointError, FormatError, IntegrityError, NotACheckpoint, StorageError, TornCheckpoint
from reshard.torch_zip import crc_of, open_archive

Level = Literal["files", "bytes"]
Advance = Callable[[int], object]

_READ_BYTES = 4 << 20


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

    files: the manifest against itself and against names and sizes. bytes: every byte of every file, too; and where all
    of them are as written, the index and what each item says of itself.
    Damage is a finding. A disk that fails says nothing of the checkpoint: whole is None. Raises nothing of ours.
    """
    try:
        manifest = read_step(directory)
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
        if not findings:
            try:
                findings = _contradictions(directory, manifest)
            except OSError as error:
                problem = f"`{directory}` cannot be read: {error.strerror or error}"
                return Verdict(str(directory), what, None, problem=problem, step=manifest.step)
    extra = sorted({path.name for path in directory.iterdir()} - set(manifest.files) - {MANIFEST})
    notes = tuple(f"{name} is not in the manifest, it is ignored" for name in extra)
    return Verdict(str(directory), what, not findings, tuple(findings), checked, step=manifest.step, notes=notes)


def _check_file(directory: Path, name: str, manifest: Manifest, advance: Advance) -> Finding | None:
    """Read a file once; None if it has its CRC32, else what is damaged in it."""
    entry = manifest.files[name]
    crc = nbytes = 0
    sums = _sums_of(directory, name, manifest)
    blocks = _Blocks(sums.block_bytes if sums is not None else _READ_BYTES)
    with open(directory / name, "rb", buffering=0) as file:
        while data := file.read(_READ_BYTES):
            crc = crc32(data, crc)
            if sums is not None:
                blocks.add(data)
            nbytes += len(data)
            advance(len(data))
    if nbytes == entry.bytes and f"{crc:08x}" == entry.crc32:
        return None
    if nbytes != entry.bytes:
        return Finding(name, f"has {nbytes} bytes, expected {entry.bytes}", rank=_rank_of(name))
    problem = f"has CRC32 {crc:08x}, expected {entry.crc32}"
    tensors: tuple[str, ...] = ()
    found = blocks.end()
    bad = [i for i, (got, want) in enumerate(zip(found, sums.crcs, strict=True)) if got != want] if sums else []
    if bad and sums is not None:
        problem += f"; {len(bad)} of {len(found)} blocks are damaged, the first at byte {bad[0] * sums.block_bytes}"
        tensors = _tensors_at(directory, manifest, name, set(bad), sums.block_bytes)
    return Finding(name, problem, tensors, _rank_of(name))


class _Blocks:
    """The CRC32 of each block of what passes, in pieces of any length."""

    def __init__(self, block_bytes: int) -> None:
        self._block_bytes, self._crcs = block_bytes, [0]
        self._room = block_bytes  # in the last block

    def add(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            if not self._room:
                self._crcs.append(0)
                self._room = self._block_bytes
            part, view = view[: self._room], view[self._room :]
            self._crcs[-1] = crc32(part, self._crcs[-1])
            self._room -= len(part)

    def end(self) -> list[int]:
        """All of them; none of an empty file."""
        return self._crcs if self._room < self._block_bytes else self._crcs[:-1]


def _contradictions(directory: Path, manifest: Manifest) -> list[Finding]:
    """What is wrong in a checkpoint whose bytes are those that were written? Only an author can have done that."""
    try:
        index = read_index(index_bytes(directory, manifest), directory)
    except (CheckpointError, FormatError) as error:
        return [Finding(METADATA, error.message)]
    said = {name: TensorEntry(tensor.shape, tensor.dtype) for name, tensor in index.tensors.items()}
    if said != manifest.tensors:
        names = tuple(sorted({n for n in (*said, *manifest.tensors) if said.get(n) != manifest.tensors.get(n)}))
        return [Finding(METADATA, "describes other tensors than the manifest", names)]
    findings = []
    for name, items in _by_file(index).items():
        entry = manifest.files.get(name)
        if entry is None or name + SUFFIX not in manifest.files:
            tensors = tuple(sorted({fqn for _, fqn, _ in items}))
            findings.append(Finding(METADATA, f"needs {name}, which the manifest does not know in this form", tensors))
            continue
        with open(directory / name, "rb") as file:
            findings += _item_findings(file, directory / name, items, opened=True, summed=False)
    return findings


def _sums_of(directory: Path, name: str, manifest: Manifest) -> BlockSums | None:
    sidecar = manifest.files.get(name + SUFFIX)
    if sidecar is None:
        return None
    try:
        return read_sums(directory, name + SUFFIX, sidecar, manifest.files[name].bytes)
    except (IntegrityError, OSError):
        return None  # the sidecar has its own turn; without it we can only say that the file is damaged, not where


def _tensors_at(directory: Path, manifest: Manifest, name: str, bad: set[int], block_bytes: int) -> tuple[str, ...]:
    """Which tensors have bytes in damaged blocks of a file? Empty where the index itself cannot be read."""
    try:
        index = read_index(index_bytes(directory, manifest), directory)
    except (CheckpointError, FormatError):
        return ()
    hit = set()
    for chunk, fqn, _ in _by_file(index).get(name, ()):
        first, last = chunk.offset // block_bytes, (chunk.offset + chunk.length - 1) // block_bytes
        if not bad.isdisjoint(range(first, last + 1)):
            hit.add(fqn)
    return tuple(sorted(hit))


_Items = list[tuple[Chunk, str, str | None]]


def _by_file(index: Index) -> dict[str, _Items]:
    """File -> its items in order: where each lies, of which name, in which dtype; None for a pickled object."""
    files: dict[str, _Items] = {}
    for fqn, tensor in index.tensors.items():
        for chunk in tensor.chunks:
            files.setdefault(chunk.file, []).append((chunk, fqn, tensor.dtype))
    for fqn, (file, offset, length) in index.objects.items():
        files.setdefault(file, []).append((Chunk((), (), file, offset, length), fqn, None))
    return {file: sorted(items, key=lambda item: item[0].offset) for file, items in sorted(files.items())}


def _rank_of(name: str) -> int | None:
    """`__3_0.distcp` was written by rank 3, in torch's naming and ours."""
    parts = name.split("_")
    return int(parts[2]) if name.startswith("__") and len(parts) > 3 and parts[2].isdigit() else None


def verify_foreign(directory: Path, level: Level = "bytes", advance: Advance = lambda n: None) -> Verdict:
    """Check a DCP directory of another program: its index, its files' sizes, and the CRC32 stored with each record.

    DCP stores no checksum of the index, and none of the files as a whole: what can be shown is said, no more.
    """
    what = "foreign DCP checkpoint"
    try:
        index = read_index(index_bytes(directory, None), directory)
    except StorageError as error:
        return Verdict(str(directory), what, None, problem=error.message)
    except (CheckpointError, FormatError) as error:
        return Verdict(str(directory), what, False, (Finding(METADATA, error.message),))
    findings: list[Finding] = []
    checked = 0
    for name, items in _by_file(index).items():
        tensors = tuple(sorted({fqn for _, fqn, _ in items}))
        try:
            fd = os.open(directory / name, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            with open(fd, "rb") as file:
                if not stat.S_ISREG(os.fstat(fd).st_mode):
                    raise IsADirectoryError
                deep = level == "bytes"
                findings += _item_findings(file, directory / name, items, opened=deep, summed=deep, advance=advance)
        except FileNotFoundError:
            findings.append(Finding(name, "is missing", tensors, _rank_of(name)))
        except IsADirectoryError:
            findings.append(Finding(name, "is not a file", tensors, _rank_of(name)))
        except OSError as error:
            problem = f"`{directory / name}` cannot be read: {error.strerror or error}"
            return Verdict(str(directory), what, None, problem=problem)
        checked += sum(chunk.length for chunk, _, _ in items) if level == "bytes" else 0
    notes = ["no manifest: the index and what lies between the records have no checksum"]
    if index.objects:
        notes.append(f"{len(index.objects)} pickled objects were not opened")
    return Verdict(str(directory), what, not findings, tuple(findings), checked, notes=tuple(notes))


def _item_findings(
    file: BinaryIO, path: Path, items: _Items, *, opened: bool, summed: bool, advance: Advance = lambda n: None
) -> list[Finding]:
    """What is wrong with the items of one data file? Always where they lie. Raises OSError.

    opened: also what they say of themselves; no pickle is run, and those of objects are not even looked at.
    summed: also the CRC32 of every record.
    """
    findings, fd, size = [], file.fileno(), os.fstat(file.fileno()).st_size
    for chunk, fqn, dtype in items:
        where = f"{fqn} at {list(chunk.offsets)}" if dtype is not None else fqn
        problem = None
        if chunk.length == 0 or chunk.offset + chunk.length > size:
            problem = f"bytes {chunk.offset} to {chunk.offset + chunk.length} are wanted, it has {size}"
        elif opened:
            problem = _item_problem(fd, path, where, chunk, dtype, summed)
        if problem is not None:
            findings.append(Finding(path.name, problem, (fqn,), _rank_of(path.name)))
        advance(chunk.length)
    return findings


def _item_problem(fd: int, path: Path, where: str, chunk: Chunk, dtype: str | None, summed: bool) -> str | None:
    try:
        if dtype is None:
            archive = open_archive(fd, path, start=chunk.offset, nbytes=chunk.length, where=where, opened=False)
        else:
            archive, _, _ = open_item(fd, path, where, dtype, chunk)
        for name, record in archive.records.items():
            if summed and record.crc32 is not None and crc_of(fd, record) != record.crc32:
                return f"record {name} of {where} does not have its stored CRC32"
    except FormatError as error:
        return error.message
    except EOFError:
        return f"it ends within {where}"
    return None
