"""Is each block of a data file as it was written? A CRC32 per 64 KiB, in a small file beside it.

    __0_0.distcp.crc:  "RSHCRC1\\n"  u32 block bytes  u32 zero  u64 bytes of the data file  u32 CRC32 of each block ...
All little-endian. The manifest has the CRC32 of this file, so the chain is: manifest, this file, every byte that is read.
Blocks, so that a rank can check the few ranges that it reads without reading the rest.
"""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from isal import isal_zlib
from numpy.typing import NDArray

from reshard.checkpoint.manifest import FileEntry, crc32_hex, read_file
from reshard.errors import IntegrityError

BLOCK_BYTES = 1 << 16
LEAST_BLOCK_BYTES = 1 << 12  # that a reader accepts
SUFFIX = ".crc"
_HEADER = struct.Struct("<8sIIQ")
_MAGIC = b"RSHCRC1\n"
_BATCH_BYTES = 8 << 20  # small pieces are gathered up to this size, then written in one call
_BATCH_PARTS = 512  # a system call takes at most 1,024 of them


class Throttle:
    """Slows writing down to a rate, so that a background save leaves the disk and the cores to the training."""

    def __init__(self, bytes_per_s: float) -> None:
        self._rate, self._start, self._bytes = bytes_per_s, time.monotonic(), 0

    def wrote(self, nbytes: int) -> None:
        """Sleep until so many bytes more are due."""
        self._bytes += nbytes
        ahead = self._bytes / self._rate - (time.monotonic() - self._start)
        if ahead > 0:
            time.sleep(ahead)


class BlockWriter:
    """A new file that is only appended to, with a CRC32 of each block of what went in.

    Parts are kept by reference until they are written: whoever appends memory must not change it before `flush`.
    """

    def __init__(self, path: Path, throttle: Throttle | None = None) -> None:
        self.path, self.bytes = path, 0
        self._throttle = throttle
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        self._parts: list[memoryview] = []
        self._pending = 0
        self._crcs: list[int] = []
        self._open_crc, self._open_bytes = 0, 0  # of the last block, which is not full yet

    def append(self, data: bytes | memoryview) -> int:
        """Add bytes; returns their CRC32, computed from the blocks' so that each byte is seen once."""
        view = memoryview(data).cast("B")
        crc = at = 0
        while at < len(view):
            part = view[at : at + BLOCK_BYTES - self._open_bytes]
            part_crc = isal_zlib.crc32(part)
            crc = isal_zlib.crc32_combine(crc, part_crc, len(part)) if at else part_crc
            self._open_crc = (
                isal_zlib.crc32_combine(self._open_crc, part_crc, len(part)) if self._open_bytes else part_crc
            )
            self._open_bytes += len(part)
            at += len(part)
            if self._open_bytes == BLOCK_BYTES:
                self._crcs.append(self._open_crc)
                self._open_crc, self._open_bytes = 0, 0
        self.bytes += len(view)
        if len(view):
            self._parts.append(view)
            self._pending += len(view)
        if self._pending >= _BATCH_BYTES or len(self._parts) >= _BATCH_PARTS:
            self.flush()
        return crc

    def flush(self) -> None:
        """Hand all parts to the system. A short write is continued; an error is an OSError naming the file."""
        parts, self._parts, self._pending = self._parts, [], 0
        while parts:
            with naming(self.path):
                written = os.writev(self._fd, parts)
            if self._throttle is not None:
                self._throttle.wrote(written)
            while parts and written >= len(parts[0]):
                written -= len(parts.pop(0))
            if parts and written:
                parts[0] = parts[0][written:]

    def close(self) -> dict[str, FileEntry]:
        """Flush to the disk itself, write the sidecar likewise; both files' entries for the manifest."""
        try:
            self.flush()
            with naming(self.path):
                os.fsync(self._fd)
        finally:
            os.close(self._fd)
        crcs = [*self._crcs, self._open_crc] if self._open_bytes else self._crcs
        total = 0
        for i, crc in enumerate(crcs):
            length = min(BLOCK_BYTES, self.bytes - i * BLOCK_BYTES)
            total = isal_zlib.crc32_combine(total, crc, length)
        content = _HEADER.pack(_MAGIC, BLOCK_BYTES, 0, self.bytes) + np.array(crcs, dtype="<u4").tobytes()
        sidecar = self.path.with_name(self.path.name + SUFFIX)
        write_durably(sidecar, content)
        return {
            self.path.name: FileEntry(self.bytes, f"{total:08x}"),
            sidecar.name: FileEntry(len(content), crc32_hex(content)),
        }

    def abandon(self) -> None:
        """Close without a promise."""
        os.close(self._fd)


def write_durably(path: Path, content: bytes) -> None:
    """Write a small new file, flushed to the disk itself. Raises OSError."""
    with naming(path), open(path, "xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """System calls on a descriptor do not know the file's name: errors in this block get it."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


@dataclass(frozen=True)
class BlockSums:
    """The CRC32s of a data file's blocks."""

    bytes: int
    block_bytes: int
    crcs: NDArray[np.uint32]


def read_sums(directory: Path, name: str, entry: FileEntry, data_bytes: int) -> BlockSums:
    """Read a data file's sidecar and check it against the manifest's entry. Raises IntegrityError, OSError."""

    def damaged(reason: str) -> IntegrityError:
        return IntegrityError(
            f"`{directory / name}` is damaged: {reason}", path=directory, files=[name], rank_local=True
        )

    if entry.bytes > _HEADER.size + 4 * (data_bytes // LEAST_BLOCK_BYTES + 1):
        raise damaged(f"{entry.bytes:,} bytes are too many for a data file of {data_bytes:,}")
    try:
        content = read_file(directory / name, entry.bytes)
    except FileNotFoundError:
        raise damaged("the file is missing") from None
    except IsADirectoryError:
        raise damaged("it is not a file") from None
    if len(content) != entry.bytes or crc32_hex(content) != entry.crc32:
        raise damaged(f"CRC32 {crc32_hex(content)} of {len(content)} bytes, expected {entry.crc32} of {entry.bytes}")
    if len(content) < _HEADER.size or len(content) % 4:
        raise damaged("it does not describe its data file")
    magic, block_bytes, _, nbytes = _HEADER.unpack_from(content)
    crcs = np.frombuffer(content, dtype="<u4", offset=_HEADER.size)
    if (
        magic != _MAGIC
        or nbytes != data_bytes
        or block_bytes < LEAST_BLOCK_BYTES
        or len(crcs) != -(-nbytes // block_bytes)
    ):
        raise damaged("it does not describe its data file")
    return BlockSums(nbytes, block_bytes, crcs)


def read_checked(fd: int, sums: BlockSums, start: int, out: memoryview, fail: Callable[[int], IntegrityError]) -> int:
    """Fill `out` from byte `start` of a data file; every block that it touches is read and checked. Bytes read.

    Whole blocks go straight into `out`; of the first and the last, what is not wanted goes to a scratch.
    fail: makes the error for a block that does not have its CRC32, from the block's number.
    Raises OSError, and what `fail` makes.
    """
    stop = start + len(out)
    if not len(out):
        return 0
    first, last = start // sums.block_bytes, -(-stop // sums.block_bytes)
    begin, end = first * sums.block_bytes, min(last * sums.block_bytes, sums.bytes)
    before, after = bytearray(start - begin), bytearray(end - stop)
    views = [memoryview(v) for v in (before, out, after) if len(v)]
    read_full(fd, list(views), begin)
    _check(sums, first, views, fail)
    return end - begin


def read_full(fd: int, views: list[memoryview], offset: int) -> None:
    """Fill all views from one place in a file on. Raises OSError; a file that ends early is an EOFError."""
    while views:
        got = os.preadv(fd, views, offset)
        if got == 0:
            raise EOFError
        offset += got
        while views and got >= len(views[0]):
            got -= len(views.pop(0))
        if views and got:
            views[0] = views[0][got:]


def _check(sums: BlockSums, first: int, views: list[memoryview], fail: Callable[[int], IntegrityError]) -> None:
    block, crc, seen = first, 0, 0
    for view in views:
        at = 0
        while at < len(view):
            part = view[at : at + sums.block_bytes - seen]
            crc = isal_zlib.crc32(part, crc)
            seen += len(part)
            at += len(part)
            if seen == min(sums.block_bytes, sums.bytes - block * sums.block_bytes):
                if crc != sums.crcs[block]:
                    raise fail(block)
                block, crc, seen = block + 1, 0, 0
