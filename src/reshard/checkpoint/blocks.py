"""Is each block of a data file as it was written? A CRC32 per 64 KiB, in a small file beside it.

    __0_0.distcp.crc:  "RSHCRC1\\n"  u32 block bytes  u32 zero  u64 bytes of the data file  u32 CRC32 of each block ...
All little-endian. The manifest has the CRC32 of this file, so the chain is: manifest, this file, every byte that is read.
Blocks, so that a rank can check the few ranges that it reads without reading the rest.
"""

from __future__ import annotations

import ctypes
import os
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import cast

import numpy as np
from isal import isal_zlib
from numpy.typing import NDArray

from reshard.checkpoint.manifest import FileEntry, UnfitFile, crc32_hex, read_file
from reshard.errors import IntegrityError

BLOCK_BYTES = 1 << 16
LEAST_BLOCK_BYTES = 1 << 12  # that a reader accepts
SUFFIX = ".crc"
_HEADER = struct.Struct("<8sIIQ")
_MAGIC = b"RSHCRC1\n"
_SYNC_FILE_RANGE_WRITE = 2
# Bytes are summed and written, or read and summed, in steps that fit into a core's own cache: so memory is passed over
# once, not twice, and the sums are nearly free.
_WRITE_BYTES, _READ_BYTES = 1 << 20, 1 << 20
_WRITE_PARTS = 512  # a system call takes at most 1,024 of them
_FLUSH_BYTES = 16 << 20  # the disk begins with these while we go on, where fsync would let it begin only at the end


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
        self._written = self._started = 0  # bytes that the system has, and that the disk was told of

    def append(self, data: bytes | memoryview) -> int:
        """Add bytes; returns their CRC32, computed from the blocks' so that each byte is seen once."""
        view = memoryview(data).cast("B")
        crc = at = 0
        while at < len(view):
            part = view[at : at + BLOCK_BYTES - self._open_bytes]
            size = len(part)
            part_crc = isal_zlib.crc32(part)
            crc = isal_zlib.crc32_combine(crc, part_crc, size) if at else part_crc
            self._open_crc = isal_zlib.crc32_combine(self._open_crc, part_crc, size) if self._open_bytes else part_crc
            self._open_bytes += size
            at += size
            if self._open_bytes == BLOCK_BYTES:
                self._crcs.append(self._open_crc)
                self._open_crc, self._open_bytes = 0, 0
            self._parts.append(part)
            self._pending += size
            if self._pending >= _WRITE_BYTES or len(self._parts) >= _WRITE_PARTS:
                self.flush()
        self.bytes += len(view)
        return crc

    def flush(self) -> None:
        """Hand all parts to the system. A short write is continued; an error is an OSError naming the file."""
        parts, self._parts, self._pending = self._parts, [], 0
        while parts:
            with naming(self.path):
                written = os.writev(self._fd, parts)
            self._written += written
            if self._throttle is not None:
                self._throttle.wrote(written)
            while parts and written >= len(parts[0]):
                written -= len(parts.pop(0))
            if parts and written:
                parts[0] = parts[0][written:]
        if self._written - self._started >= _FLUSH_BYTES:
            start_writeback(self._fd, self._started, self._written - self._started)
            self._started = self._written

    def close(self) -> dict[str, FileEntry]:
        """Flush to the disk itself, write the sidecar likewise; both files' entries for the manifest."""
        try:
            self.flush()
            with naming(self.path):
                os.fsync(self._fd)
        finally:
            os.close(self._fd)
        return _write_sidecar(self.path, self.bytes, [*self._crcs, self._open_crc] if self._open_bytes else self._crcs)

    def abandon(self) -> None:
        """Close without a promise."""
        os.close(self._fd)


class BlockSummer:
    """The same sums of a file whose bytes come in any order, from several threads."""

    def __init__(self, nbytes: int) -> None:
        self._bytes = nbytes
        self._crcs: list[int | None] = [None] * -(-nbytes // BLOCK_BYTES)
        self._parts: dict[int, dict[int, tuple[int, int]]] = {}  # of blocks that come in parts: begin -> (end, CRC32)
        self._lock = threading.Lock()

    def add(self, offset: int, data: memoryview) -> int:
        """These bytes go to this place, once. Returns their CRC32."""
        crc = at = 0
        while at < len(data):
            block, begin = divmod(offset + at, BLOCK_BYTES)
            part = data[at : at + BLOCK_BYTES - begin]
            end = begin + len(part)
            part_crc = isal_zlib.crc32(part)
            crc = isal_zlib.crc32_combine(crc, part_crc, len(part)) if at else part_crc
            if len(part) == BLOCK_BYTES:
                self._crcs[block] = part_crc
            else:
                with self._lock:
                    self._parts.setdefault(block, {})[begin] = end, part_crc
            at += len(part)
        return crc

    def write_sidecar(self, path: Path) -> dict[str, FileEntry]:
        """Write the sums of the data file at `path` beside it; both files' entries for the manifest. Raises OSError."""
        for block, parts in self._parts.items():
            crc = at = 0
            for begin, (end, part_crc) in sorted(parts.items()):
                assert begin == at, f"{path.name}: block {block} has a hole or an overlap at byte {at}"
                crc, at = isal_zlib.crc32_combine(crc, part_crc, end - begin), end
            assert at == min(BLOCK_BYTES, self._bytes - block * BLOCK_BYTES), f"{path.name}: block {block} ends at {at}"
            self._crcs[block] = crc
        crcs = [crc for crc in self._crcs if crc is not None]
        assert len(crcs) == len(self._crcs), f"{path.name} has blocks that nobody wrote"
        return _write_sidecar(path, self._bytes, crcs)


def _write_sidecar(path: Path, nbytes: int, crcs: list[int]) -> dict[str, FileEntry]:
    total = 0
    for i, crc in enumerate(crcs):
        total = isal_zlib.crc32_combine(total, crc, min(BLOCK_BYTES, nbytes - i * BLOCK_BYTES))
    content = _HEADER.pack(_MAGIC, BLOCK_BYTES, 0, nbytes) + np.array(crcs, dtype="<u4").tobytes()
    sidecar = path.with_name(path.name + SUFFIX)
    write_durably(sidecar, content)
    return {
        path.name: FileEntry(nbytes, f"{total:08x}"),
        sidecar.name: FileEntry(len(content), crc32_hex(content)),
    }


@cache
def _sync_file_range() -> Callable[..., int] | None:
    """Linux's call to begin writing dirty pages, which Python does not have; None where the system has none."""
    try:
        call = ctypes.CDLL(None).sync_file_range
    except (OSError, AttributeError):
        return None
    call.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    return cast(Callable[..., int], call)


def start_writeback(fd: int, offset: int, nbytes: int) -> None:
    """Let the disk begin with a range of a file. Only a hint: errors are fsync's to tell."""
    call = _sync_file_range()
    if call is not None:
        call(fd, offset, nbytes, _SYNC_FILE_RANGE_WRITE)


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
    except UnfitFile as error:
        raise damaged(f"it {error}") from None
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


class CheckedFile:
    """An open data file of which no byte is taken before the block that it lies in has been checked.

    Whole blocks go straight to where they are wanted. Of a block that is wanted in parts the last one is kept, so reads
    in the file's order read each block once, however small they are.
    """

    def __init__(self, fd: int, sums: BlockSums) -> None:
        self._fd, self._bytes, self.block_bytes = fd, sums.bytes, sums.block_bytes
        self._crcs: list[int] = sums.crcs.tolist()
        self._kept: tuple[int, memoryview] = (-1, memoryview(b""))

    def read(self, start: int, out: memoryview, fail: Callable[[int], IntegrityError]) -> int:
        """Fill `out` from byte `start` on. Returns the bytes read from the file.

        fail: makes the error for a block that does not have its CRC32, from the block's number.
        Raises OSError, EOFError, and what `fail` makes.
        """
        size, stop, count = self.block_bytes, start + len(out), 0
        whole_until = stop if stop == self._bytes else stop - stop % size
        at = start
        while at < stop:
            block, within = divmod(at, size)
            if within or at >= whole_until:
                if self._kept[0] != block:
                    content = memoryview(bytearray(min(size, self._bytes - block * size)))
                    self._fill(content, block, fail)
                    self._kept = block, content
                    count += len(content)
                part = self._kept[1][within : within + stop - at]
                out[at - start : at - start + len(part)] = part
            else:
                part = out[at - start : at - start + min(whole_until - at, max(size, _READ_BYTES // size * size))]
                self._fill(part, block, fail)
                count += len(part)
            at += len(part)
        return count

    def _fill(self, view: memoryview, first: int, fail: Callable[[int], IntegrityError]) -> None:
        """Read whole blocks from block `first` on, and check them while they are in the core's cache."""
        size = self.block_bytes
        read_full(self._fd, [view], first * size)
        for block, at in enumerate(range(0, len(view), size), first):
            if isal_zlib.crc32(view[at : at + size]) != self._crcs[block]:
                raise fail(block)


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
