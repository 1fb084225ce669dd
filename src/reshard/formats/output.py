"""How do tensors flow into files that are laid out before a byte is read? Slabs of rows, each to its final offset.

A format's sink lays out an Output: which files, what is known of them beforehand (headers), and where in them each
tensor's bytes go. Writing it is the same for all formats: workers take slabs of rows, read each once, and write it to
all of its places; what depends on checksums is added last; then everything is flushed, and renamed into place. Memory
is the workers' slabs, whatever the tensors' sizes.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import re
import secrets
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
from isal import isal_zlib
from numpy.typing import NDArray

from reshard.errors import ConfigError, FormatError, StorageError
from reshard.formats.protocol import ITEM_BYTES, LazyTensor, Ledger, Region, slabs

logger = logging.getLogger(__name__)

DEFAULT_MEMORY = 512 << 20  # of a conversion, the interpreter included
MOST_SLAB_BYTES = 8 << 20  # more does not get faster
LEAST_SLAB_BYTES = 256 << 10
COPIES = 4  # of a slab that a worker may hold: as stored, merged, permuted, cast
_FLUSH_BYTES = 128 << 20  # of a file that may wait for the disk
_TEMPORARY = re.compile(r"\.tmp-[0-9a-f]{16}\Z")
_MARK = ".reshard-conversion"  # lies in a directory that a conversion writes in: what has the like of its name only is not ours


@dataclass(frozen=True)
class Place:
    """Where a box of a tensor goes: its rows, one after the other, from byte `offset` of a file.

    row, rows: in dim 0; column, width: in a row, in bytes.
    """

    file: str
    offset: int
    row: int
    rows: int
    column: int
    width: int

    @property
    def nbytes(self) -> int:
        """Of the box."""
        return self.rows * self.width


def whole(file: str, offset: int, tensor: LazyTensor) -> Place:
    """The place of a tensor that is not cut."""
    rows = tensor.shape[0] if tensor.shape else 1
    return Place(file, offset, 0, rows, 0, tensor.nbytes // rows if rows else 0)


@dataclass(frozen=True)
class Copy:
    """A tensor as it is to be written (in the right order of rows, in the right dtype), and everywhere it goes."""

    tensor: LazyTensor
    places: tuple[Place, ...]


Sums = Mapping[Place, int]


@dataclass(frozen=True)
class OutFile:
    """known: (offset, bytes) that do not depend on the tensors. later: the same from the places' CRC32s."""

    name: str
    nbytes: int
    known: tuple[tuple[int, bytes], ...]
    later: Callable[[Sums], Sequence[tuple[int, bytes]]] | None = None


@dataclass(frozen=True)
class Output:
    """A whole export. beside: small files; name -> the file to copy, or its content. alone: one file, no directory."""

    format: str
    files: tuple[OutFile, ...]
    copies: tuple[Copy, ...]
    beside: Mapping[str, Path | bytes] = field(default_factory=dict)
    alone: bool = False

    @property
    def nbytes(self) -> int:
        """Of all files that hold tensors."""
        return sum(file.nbytes for file in self.files)

    @property
    def tensor_bytes(self) -> int:
        """Bytes that are made from the source, each once."""
        return sum(copy.tensor.nbytes for copy in self.copies)


class OpenFile(Protocol):
    """Something that can be written to at any offset, by several threads at once."""

    def write(self, offset: int, data: NDArray[np.uint8] | bytes) -> int | None:
        """All of the data. Raises OSError. Returns its CRC32 if the file sums what it gets, so that nobody else need."""
        ...

    def close(self) -> None:
        """Durable from here on. Raises OSError."""
        ...


class DiskFile:
    """A new file of a size that is known and reserved. drops: its pages need not stay in the system's cache."""

    def __init__(self, path: Path, nbytes: int, *, drops: bool) -> None:
        self._path, self._drops = path, drops
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        self._waiting, self._lock = 0, threading.Lock()
        try:
            if nbytes:
                os.posix_fallocate(self._fd, 0, nbytes)
        except OSError as error:
            os.close(self._fd)
            raise OSError(error.errno, os.strerror(error.errno or 0), str(path)) from None

    def write(self, offset: int, data: NDArray[np.uint8] | bytes) -> int | None:
        """See OpenFile. Whoever fills the last of _FLUSH_BYTES waits for the disk: it works while the others read."""
        view = memoryview(data) if isinstance(data, bytes) else data.data
        with self._lock:  # the file system lets one write at a time anyway, and keeps the other thread spinning
            while view:
                written = os.pwrite(self._fd, view, offset)
                view, offset = view[written:], offset + written
            self._waiting += len(data)
            flushes = self._waiting >= _FLUSH_BYTES
            if flushes:
                self._waiting = 0
        if flushes:
            self._flush()
        return None

    def _flush(self) -> None:
        os.fdatasync(self._fd)
        if self._drops:
            os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        """See OpenFile."""
        try:
            os.fsync(self._fd)
            if self._drops:
                os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(self._fd)


Opener = Callable[[Path, int], OpenFile]


def check_layout(output: Output) -> None:
    """Is every byte of every file written once, and every byte of every tensor used? A programmer's mistake if not."""
    spans: dict[str, list[tuple[int, int]]] = {file.name: [] for file in output.files}
    for copy in output.copies:
        for place in copy.places:
            spans[place.file].append((place.offset, place.offset + place.nbytes))
    for file in output.files:
        parts = [*file.known, *(file.later(_Zero()) if file.later else ())]
        spans[file.name] += [(offset, offset + len(data)) for offset, data in parts]
        at = 0
        for start, stop in sorted(spans[file.name]):
            assert start in (at, stop), f"{file.name}: byte {min(at, start)} is written twice or never"
            at = max(at, stop)
        assert at == file.nbytes, f"{file.name}: {at} bytes laid out of {file.nbytes}"
    for copy in output.copies:
        assert sum(place.nbytes for place in copy.places) >= copy.tensor.nbytes, f"{copy.tensor.name} is not all used"


class _Zero(dict[Place, int]):
    def __missing__(self, key: Place) -> int:
        return 0


def slab_bytes(memory: int, workers: int, floor: int = 0) -> int:
    """How large may a slab be, for all workers together to stay below so much memory? Raises ConfigError.

    floor: of the memory, what is taken before a byte is read.
    """
    size = min(MOST_SLAB_BYTES, (memory - floor) // (workers * COPIES))
    if size < LEAST_SLAB_BYTES:
        least = (floor + workers * COPIES * LEAST_SLAB_BYTES) / 2**20
        raise ConfigError(
            f"--max-memory of {memory / 2**20:.0f} MiB is too little for {workers} workers: {least:.0f} MiB or more",
            hint="give more memory, or fewer --workers",
        )
    return size


def copy_all(
    copies: Sequence[Copy],
    files: Mapping[str, OpenFile],
    ledger: Ledger,
    *,
    slab: int,
    workers: int,
    sums: bool,
    advance: Callable[[int], object] = lambda done: None,
) -> dict[Place, int]:
    """Write every copy to its places. Returns the CRC32 of each place's bytes, where `sums` asks for them.

    The first error of any worker stops all, and is raised. Memory: workers x COPIES x slab.
    """
    tasks = _tasks(copies, slab)
    taking = threading.Lock()
    parts: dict[Place, dict[int, tuple[int, int]]] = {}
    failed: list[BaseException] = []

    def work() -> None:
        buffer = np.empty(0, np.uint8)
        try:
            while not failed:
                with taking:
                    task = next(tasks, None)
                if task is None:
                    return
                copy, start, stop = task
                need = (stop - start) * _row_bytes(copy.tensor)
                if need > len(buffer):
                    buffer = np.empty(need, np.uint8)
                rows = buffer[:need]
                if need:
                    copy.tensor.fill(rows, start, stop, ledger)
                for place in copy.places:
                    found = _put(place, rows, start, stop, files[place.file], sums=sums)
                    if found is not None:
                        with taking:
                            parts.setdefault(place, {})[found[0]] = found[1:]
                with taking:
                    advance(need)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, name=f"convert-{i}") for i in range(workers - 1)]
    for thread in threads:
        thread.start()
    work()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]
    return {place: _joined(found) for place, found in parts.items()}


def _tasks(copies: Sequence[Copy], slab: int) -> Iterator[tuple[Copy, int, int]]:
    for copy in copies:
        tensor = copy.tensor
        for start, stop in slabs(tensor.shape, ITEM_BYTES[tensor.dtype], slab, tensor.grain):
            yield copy, start, stop


def _row_bytes(tensor: LazyTensor) -> int:
    rows = tensor.shape[0] if tensor.shape else 1
    return tensor.nbytes // rows if rows else 0


def _put(
    place: Place, rows: NDArray[np.uint8], start: int, stop: int, file: OpenFile, *, sums: bool
) -> tuple[int, int, int] | None:
    """Write the part of a slab that belongs to a place: its (first row, CRC32, bytes), or None where there is none."""
    first, last = max(start, place.row), min(stop, place.row + place.rows)
    if first >= last or not place.width:
        return None
    matrix = rows.reshape(stop - start, -1)[first - start : last - start]
    cut = matrix[:, place.column : place.column + place.width]
    data = np.ascontiguousarray(cut).reshape(-1)  # no copy where the columns are all of them
    crc = file.write(place.offset + (first - place.row) * place.width, data)
    return (first, isal_zlib.crc32(data) if crc is None else crc, len(data)) if sums else None


def _joined(parts: Mapping[int, tuple[int, int]]) -> int:
    crc = 0
    for _, (part, nbytes) in sorted(parts.items()):
        crc = isal_zlib.crc32_combine(crc, part, nbytes)
    return int(crc)


# -- the disk


def write_output(
    output: Output,
    target: Path,
    ledger: Ledger,
    *,
    memory: int,
    floor: int = 0,
    workers: int = 2,
    verify: bool = False,
    advance: Callable[[int], object] = lambda done: None,
    open_file: Opener | None = None,
) -> None:
    """Write an export; it appears under its name whole and durable, or not at all.

    memory: bytes that may be taken, `floor` of which are already; the slabs of all workers stay within the rest.
    verify: read everything back and compare.
    open_file: where the bytes go instead of new files on disk.
    Raises FormatError (a source that is damaged or ends early; a target in use), StorageError (the disk),
    ConfigError (too little memory).
    """
    check_layout(output)
    slab = slab_bytes(memory, workers, floor)
    refuse_existing(target)
    if open_file is None:
        check_space(target, output.nbytes)
    opener = open_file or (lambda path, nbytes: DiskFile(path, nbytes, drops=ledger.drops))
    with temporary(target) as folder:
        try:
            sums = write_files(output, folder, ledger, opener, slab, workers, advance, sums=verify)
            ledger.check()
            for name, content in output.beside.items():
                _write_small(folder / name, content)
            if verify:
                read_back(folder, sums)
            (folder / _MARK).unlink()
            _sync_directory(folder)
            finished = folder / output.files[0].name if output.alone else folder
            if output.alone:
                refuse_existing(target)
                os.rename(finished, target)
            else:
                finished.replace(target)  # an empty directory in its place is replaced
            _sync_directory(target.absolute().parent)
        except OSError as error:
            raise said(error, target) from None


def write_files(
    output: Output,
    folder: Path,
    ledger: Ledger,
    opener: Opener,
    slab: int,
    workers: int,
    advance: Callable[[int], object],
    *,
    sums: bool,
) -> dict[Place, int]:
    """Write the files of an export into a folder, each durable at the end. Returns what `copy_all` does. Raises OSError."""
    open_files: dict[str, OpenFile] = {}
    try:
        for file in output.files:
            open_files[file.name] = opener(folder / file.name, file.nbytes)
            for offset, data in file.known:
                open_files[file.name].write(offset, data)
        sums = sums or any(file.later for file in output.files)
        found = copy_all(output.copies, open_files, ledger, slab=slab, workers=workers, sums=sums, advance=advance)
        for file in output.files:
            for offset, data in file.later(_Zero(found)) if file.later else ():
                open_files[file.name].write(offset, data)
    except BaseException:
        for opened in open_files.values():
            with suppress(OSError):  # the first error is the one to tell
                opened.close()
        raise
    for opened in open_files.values():
        opened.close()
    return found


def read_back(folder: Path, sums: Sums) -> None:
    """Does the disk hold what was sent to it? Raises FormatError naming the file and the place."""
    for place, crc in sums.items():
        region = Region(folder / place.file, place.offset, place.nbytes, crc)
        if region.sum(0, place.nbytes) != crc:
            raise FormatError(
                f"{place.file} was not written right: {place.nbytes:,} bytes from byte {place.offset:,} do not read back",
                path=place.file,
                hint="the disk or its cable is failing; nothing was kept",
            )


def refuse_existing(target: Path) -> None:
    """Raise FormatError where something would be overwritten; an empty directory is fine."""
    if target.is_symlink() or (target.exists() and (not target.is_dir() or any(target.iterdir()))):
        raise FormatError(
            f"`{target}` exists already, nothing was written",
            path=target,
            hint=f"choose another name, or remove it: rm -r {target}",
        )


def check_space(target: Path, needed: int) -> None:
    """Is there room for so many bytes? Asked before the first one is written. Raises StorageError."""
    parent = target.absolute().parent
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise StorageError(
            f"{target} needs {needed / 1e9:.2f} GB, {parent} has {free / 1e9:.2f} GB free",
            path=target,
            hint="free some space, or name a directory on another disk",
        )


def floods(nbytes: int) -> bool:
    """Would so many bytes push everybody else's out of the system's cache?"""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            available = next(int(line.split()[1]) << 10 for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):
        available = 8 << 30
    return nbytes > available // 4


@contextmanager
def temporary(target: Path) -> Iterator[Path]:
    """A directory beside the target to write in; gone at the end, unless it was renamed.

    It is locked as long as we live: what a killed conversion left of the same target is found by that, and removed.
    """
    try:
        made = _made_parents(target.absolute().parent)
        remove_dead(target)
        folder = target.with_name(f"{target.name}.tmp-{secrets.token_hex(8)}")
        folder.mkdir()
        (folder / _MARK).touch()
    except OSError as error:
        raise said(error, target) from None
    with alive(folder):
        try:
            yield folder
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            for path in reversed(made):
                try:
                    path.rmdir()
                except OSError:
                    break  # somebody has put something there
            raise
    shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def alive(folder: Path) -> Iterator[None]:
    """Nobody takes this temporary directory for one whose writer is dead. Raises OSError."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def is_marked(folder: Path) -> bool:
    """Has a conversion made this directory to write in? One that was killed at once has not come to anything."""
    return (folder / _MARK).is_file() or not any(folder.iterdir())


def remove_dead(target: Path, ours: Callable[[Path], bool] = is_marked) -> None:
    """Remove what killed conversions have left of the same target; not what only has such a name. Raises OSError."""
    for path in sorted(target.absolute().parent.glob(f"{glob_escape(target.name)}.tmp-*")):
        if not _TEMPORARY.search(path.name) or not path.is_dir():
            continue
        if path.is_symlink() or not ours(path):
            logger.warning(
                "left `%s`: it has the name of a conversion that did not finish, but it is none of ours", path
            )
        else:
            _remove_if_dead(path)


def glob_escape(name: str) -> str:
    """A name as a pattern that matches nothing else."""
    return re.sub(r"([*?\[])", r"[\1]", name)


def _made_parents(parent: Path) -> list[Path]:
    """Make the directories that are missing; returns them, outermost first."""
    missing = []
    while not parent.exists():
        missing.append(parent)
        parent = parent.parent
    for path in reversed(missing):
        path.mkdir()
    return missing[::-1]


def _remove_if_dead(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)
    except BlockingIOError:
        pass  # another conversion is at work on it
    finally:
        os.close(fd)


def _write_small(path: Path, content: Path | bytes) -> None:
    with path.open("xb") as out:
        if isinstance(content, bytes):
            out.write(content)
        else:
            with content.open("rb") as file:
                shutil.copyfileobj(file, out)
        out.flush()
        os.fsync(out.fileno())


def _sync_directory(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def said(error: OSError, target: Path) -> StorageError | FormatError:
    """The disk's refusal in a sentence."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StorageError(
            f"no space left to write `{target}`: it was given up, nothing is left of it",
            path=target,
            hint="free some space, or name a directory on another disk",
        )
    if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
        return FormatError(f"`{target}` cannot be made: {error.strerror} ({error.filename})", path=target)
    return StorageError(f"`{target}` could not be written: {error.strerror} ({error.filename})", path=target)
