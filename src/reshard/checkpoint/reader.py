"""How do bytes become a rank's tensors? Only chunks that this rank's boxes touch, each checked before it is used.

Names, shapes and dtypes are compared before anything is touched; nothing is cast unless asked for.
"""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from reshard.checkpoint import archive
from reshard.checkpoint.blocks import SUFFIX, CheckedFile, read_full, read_sums
from reshard.checkpoint.index import Chunk, Index, open_item
from reshard.checkpoint.kinds import shares_memory
from reshard.checkpoint.manifest import Manifest, crc32
from reshard.checkpoint.state import Box, Known, bytes_of, dtype_from_name, dtype_name, has_own_bytes, local_part
from reshard.errors import CheckpointError, FormatError, IntegrityError, StorageError, TensorMismatch
from reshard.torch_zip import crc_of, open_archive

logger = logging.getLogger(__name__)

# Threads that read for one rank. Reading, checking and copying all let the others run meanwhile.
READERS = min(4, os.cpu_count() or 1)
BYTES_PER_READER = 8 << 20  # for less, a thread is not worth its start


def check_names(directory: Path, index: Index, wanted: Mapping[str, Tensor], *, cast: bool) -> None:
    """Does the checkpoint hold these tensors, in these shapes (and dtypes, unless cast)? Raises TensorMismatch."""
    missing = []
    wrong: dict[str, tuple[str, str]] = {}
    for name, tensor in wanted.items():
        stored = index.tensors.get(name)
        if stored is None:
            if name in index.objects:
                wrong[name] = ("a tensor", "a pickled object")
            else:
                missing.append(name)
        elif stored.shape != tuple(tensor.shape):
            wrong[name] = (f"shape {tuple(tensor.shape)}", f"{stored.shape}")
        elif stored.dtype != dtype_name(tensor.dtype) and not cast:
            wrong[name] = (dtype_name(tensor.dtype), stored.dtype)
    if missing or wrong:
        raise TensorMismatch(
            f"checkpoint `{directory}` does not fit the model", path=directory, missing=missing, wrong=wrong
        )


Parts = Mapping[str, tuple[Tensor, Box]]  # name -> this rank's numbers, and where in the tensor they lie


def parts_to_fill(wanted: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Box]]:
    """This rank's part of each tensor, to be read into (of a DTensor, its local shard).

    Raises CheckpointError, naming the tensor, where its box is not that of its numbers, or it cannot be filled.
    """
    known = Known()
    parts = {name: local_part(tensor, name, known) for name, tensor in wanted.items()}
    for name, (local, _) in parts.items():
        check_fillable(name, local)
    return parts


def check_fillable(name: str, local: Tensor) -> None:
    """Has each number a place of its own? Raises CheckpointError."""
    if shares_memory(local):
        raise CheckpointError(
            f"`{name}` cannot be loaded: several of its numbers lie in one place (strides {local.stride()}, shape "
            f"{list(local.shape)})",
            hint="load into `tensor.contiguous()` of it",
        )


def read_tensors(directory: Path, index: Index, wanted: Parts, *, manifest: Manifest | None) -> int:
    """Fill this rank's part of each tensor in place, on its own. Returns the bytes read.

    wanted: by stored name, as `parts_to_fill` gives it; numbers are converted to a destination's dtype, so call
    check_names first where that must not be.
    manifest: None for a foreign directory; then whole chunks are read, as only those have a CRC.
    Memory: none for rows of CPU tensors of the stored dtype, else one chunk.
    Raises: IntegrityError naming file and tensor where a stored CRC, size or shape disagrees; StorageError.
    """
    return read_jobs(
        directory, manifest, [j for name, part in wanted.items() for j in _jobs(directory, index, name, *part)]
    )


def read_jobs(directory: Path, manifest: Manifest | None, jobs: list[Job]) -> int:
    """Read many jobs in the order of the files, on several threads where that pays. Returns the bytes read.

    Raises as read_tensors; of several errors that of the first thread.
    """
    jobs.sort(key=lambda job: (job.file, job.offset))
    total = sum(job.nbytes for job in jobs)
    count = min(READERS, total // BYTES_PER_READER + 1)
    runs: list[list[Job]] = [[] for _ in range(count)]
    before = 0
    for job in jobs:
        runs[before * count // max(1, total)].append(job)
        before += job.nbytes

    def read(run: list[Job]) -> int:
        with Files(directory, manifest) as files, torch.inference_mode():  # whatever they were made in
            return sum(files.read(job) for job in run)

    if count == 1:
        return read(jobs)
    with ThreadPoolExecutor(count, "reshard read") as pool:
        return sum(pool.map(read, runs))


_NOWHERE = torch.empty(0)


class Job(NamedTuple):
    """One stored chunk, the part of it that is wanted, and where that goes."""

    name: str
    file: str
    offset: int
    length: int
    dtype: torch.dtype
    chunk: Box
    common: Box  # the part of the chunk that is wanted
    target: Tensor = _NOWHERE  # of common's sizes, often a view of a rank's shard

    @property
    def nbytes(self) -> int:
        """Bytes of the part that is wanted."""
        return self.common.volume * self.dtype.itemsize

    def part(self, common: Box, target: Tensor = _NOWHERE) -> Job:
        """The same chunk, another part of it."""
        return self._replace(common=common, target=target)


def _chunks(index: Index, name: str) -> list[Job]:
    """All chunks of a tensor, each wanted whole; nowhere yet."""
    stored = index.tensors[name]
    dtype = dtype_from_name(stored.dtype)
    boxes = [Box(chunk.offsets, chunk.sizes) for chunk in stored.chunks]
    return [
        Job(name, chunk.file, chunk.offset, chunk.length, dtype, box, box)
        for chunk, box in zip(stored.chunks, boxes, strict=True)
    ]


def _jobs(directory: Path, index: Index, name: str, local: Tensor, box: Box) -> Iterator[Job]:
    if not box.volume:
        return
    filled = 0
    for job in _chunks(index, name):
        common = box.overlap(job.chunk)
        if common is None:
            continue
        filled += common.volume
        yield job.part(common, local if common == box else local[common.slices_in(box)])
    if filled != box.volume:
        raise IntegrityError(
            f"`{directory}` stores {filled} of the {box.volume} numbers wanted of {name}",
            path=directory,
            rank_local=True,
        )


def read_objects(directory: Path, index: Index) -> dict[str, Any]:
    """What a foreign directory stores beside tensors: numbers, strings, lists and dicts.

    The pickles are read without running them; those that are damaged, or name anything else, are left out.
    Raises StorageError.
    """
    found = {}
    for name, (file, offset, length) in index.objects.items():
        path = directory / file
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            try:
                content = open_archive(fd, path, start=offset, nbytes=length, where=f"`{path}`: {name}").content
            finally:
                os.close(fd)
        except FormatError:
            continue
        except OSError as error:
            raise StorageError(f"`{path}` cannot be read: {error.strerror or error}", path=directory) from None
        found[name] = content
    return found


class Files:
    """The data files of one directory, opened once each, with their block sums."""

    def __init__(self, directory: Path, manifest: Manifest | None) -> None:
        self._directory, self._manifest = directory, manifest
        self._open: dict[str, tuple[int, int, CheckedFile | None]] = {}
        self._unchecked: set[str] = set()  # foreign files whose archives store no CRC32

    def __enter__(self) -> Files:
        return self

    def __exit__(self, *_: object) -> None:
        for fd, _size, _checked in self._open.values():
            os.close(fd)

    def read(self, job: Job) -> int:
        """Read one job's part into its target. Returns the bytes read."""
        with self._saying(job):
            fd, checked = self._file(job)
            return self._read_archive(job, fd) if checked is None else self._read_rows(job, checked)

    def read_object(self, job: Job) -> int:
        """Read what is no tensor, as its bytes are, into the job's target. Returns the bytes read."""
        with self._saying(job):
            fd, checked = self._file(job)
            if checked is not None:
                return checked.read(job.offset, bytes_of(job.target), partial(self._bad_block, job, checked))
            path = self._directory / job.file
            archive = open_archive(fd, path, start=job.offset, nbytes=job.length, where=f"`{path}`", opened=False)
            for name, record in archive.records.items():
                if record.crc32 is not None and crc_of(fd, record) != record.crc32:
                    raise self._damaged(job, f"record {name} does not have its stored CRC32")
            read_full(fd, [bytes_of(job.target)], job.offset)
            return job.length

    @contextmanager
    def _saying(self, job: Job) -> Iterator[None]:
        """What goes wrong in this block is said with file and tensor."""
        try:
            yield
        except EOFError:
            raise self._damaged(job, "the file ends early") from None
        except OSError as error:
            raise StorageError(
                f"`{self._directory / job.file}` cannot be read: {error.strerror or error}",
                path=self._directory,
                rank_local=True,
            ) from None

    def _file(self, job: Job) -> tuple[int, CheckedFile | None]:
        if job.file not in self._open:
            try:
                fd = os.open(
                    self._directory / job.file, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK
                )  # a pipe is refused
            except FileNotFoundError:
                raise self._damaged(job, "the file is missing") from None
            status = os.fstat(fd)
            size = status.st_size
            self._open[job.file] = (fd, size, None)
            if not stat.S_ISREG(status.st_mode):
                raise self._damaged(job, "it is not a file")
            if self._manifest is not None:
                self._open[job.file] = (fd, size, self._checked(job, fd, size))
        fd, size, checked = self._open[job.file]
        if job.offset < 0 or job.length <= 0 or job.offset + job.length > size:
            raise self._damaged(job, f"bytes {job.offset} to {job.offset + job.length} of a file of {size}")
        return fd, checked

    def _checked(self, job: Job, fd: int, size: int) -> CheckedFile:
        assert self._manifest is not None
        entry = self._manifest.files.get(job.file)
        sidecar = self._manifest.files.get(job.file + SUFFIX)
        if entry is None or sidecar is None or entry.bytes != size:
            raise self._damaged(job, "the manifest does not know it in this form")
        return CheckedFile(fd, read_sums(self._directory, job.file + SUFFIX, sidecar, size))

    def _read_rows(self, job: Job, file: CheckedFile) -> int:
        """Ours: only the rows that are wanted, each block checked, straight into the target where its memory allows."""
        nbytes = job.chunk.volume * job.dtype.itemsize
        if job.length != nbytes + archive.overhead(job.dtype, job.chunk.sizes):
            raise self._damaged(job, f"{job.length} bytes are no chunk of this dtype and shape")
        row_bytes = prod(job.chunk.sizes[1:]) * job.dtype.itemsize
        first = job.common.offsets[0] - job.chunk.offsets[0] if job.chunk.sizes else 0
        rows = job.common.sizes[0] if job.chunk.sizes else 1
        start = job.offset + len(archive.head(job.dtype, job.chunk.sizes)) + first * row_bytes
        target = job.target
        whole_rows = job.common.sizes[1:] == job.chunk.sizes[1:]
        direct = whole_rows and has_own_bytes(target, job.dtype)
        values = target if direct else torch.empty((rows, *job.chunk.sizes[1:]), dtype=job.dtype)
        read = file.read(start, bytes_of(values), partial(self._bad_block, job, file))
        if not direct:
            columns = tuple(
                slice(o - base, o - base + s)
                for o, base, s in zip(job.common.offsets[1:], job.chunk.offsets[1:], job.common.sizes[1:], strict=True)
            )
            target.copy_(values[(slice(None), *columns)] if job.chunk.sizes else values[0])
        return read

    def _read_archive(self, job: Job, fd: int) -> int:
        """Foreign: the whole chunk, a torch.save archive whose every record's CRC32 is checked; no pickle is run."""
        path = self._directory / job.file
        chunk = Chunk(job.chunk.offsets, job.chunk.sizes, job.file, job.offset, job.length)
        where = f"`{path}`: {job.name} at {job.chunk.offsets}"
        archive, tensor, placed = open_item(fd, path, where, dtype_name(job.dtype), chunk)
        content = torch.empty(placed.record.nbytes, dtype=torch.uint8)
        read_full(fd, [bytes_of(content)], placed.record.offset)
        for name, record in archive.records.items():
            crc = crc32(bytes_of(content)) if record is placed.record else crc_of(fd, record)
            if record.crc32 is not None and crc != record.crc32:
                raise self._damaged(job, f"record {name} does not have its stored CRC32")
        if placed.record.crc32 is None and job.file not in self._unchecked:
            self._unchecked.add(job.file)
            logger.warning("`%s` was saved without checksums: its numbers are taken as they are", path)
        numbers = content[placed.first : placed.first + placed.nbytes].view(job.dtype)
        values = numbers.as_strided(tensor.shape, tensor.stride)
        job.target.copy_(values[job.common.slices_in(job.chunk)] if job.chunk.sizes else values)
        return job.length

    def _bad_block(self, job: Job, file: CheckedFile, block: int) -> IntegrityError:
        return self._damaged(job, f"block {block} ({file.block_bytes * block} bytes in) does not have its CRC32")

    def _damaged(self, job: Job, reason: str) -> IntegrityError:
        return IntegrityError(
            f"`{self._directory / job.file}` is damaged: {job.name} at {job.chunk.offsets}: {reason}",
            path=self._directory,
            files=[job.file],
            rank_local=True,
        )
