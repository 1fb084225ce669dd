"""How do bytes become a rank's tensors? Only chunks that this rank's boxes touch, each checked before it is used.

Names, shapes and dtypes are compared before anything is touched; nothing is cast unless asked for.
"""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from reshard.checkpoint import archive
from reshard.checkpoint.blocks import SUFFIX, BlockSums, read_checked, read_full, read_sums
from reshard.checkpoint.index import Chunk, open_item
from reshard.checkpoint.manifest import Manifest, crc32
from reshard.checkpoint.state import Box, bytes_of, dtype_name, local_part
from reshard.errors import IntegrityError, StorageError, TensorMismatch
from reshard.torch_zip import crc_of

logger = logging.getLogger(__name__)


def check_names(directory: Path, metadata: Metadata, wanted: Mapping[str, Tensor], *, cast: bool) -> None:
    """Does the checkpoint hold these tensors, in these shapes (and dtypes, unless cast)? Raises TensorMismatch."""
    missing = [name for name in wanted if name not in metadata.state_dict_metadata]
    wrong: dict[str, tuple[str, str]] = {}
    for name, tensor in wanted.items():
        stored = metadata.state_dict_metadata.get(name)
        if stored is None:
            continue
        if not isinstance(stored, TensorStorageMetadata):
            wrong[name] = ("a tensor", "a pickled object")
        elif tuple(stored.size) != tuple(tensor.shape):
            wrong[name] = (f"shape {tuple(tensor.shape)}", f"{tuple(stored.size)}")
        elif not cast and stored.properties.dtype != tensor.dtype:
            wrong[name] = (dtype_name(tensor.dtype), dtype_name(stored.properties.dtype))
    if missing or wrong:
        raise TensorMismatch(
            f"checkpoint `{directory}` does not fit the model", path=directory, missing=missing, wrong=wrong
        )


def read_tensors(
    directory: Path, metadata: Metadata, wanted: Mapping[str, Tensor], *, manifest: Manifest | None
) -> int:
    """Fill this rank's part of each tensor in place, on its own. Returns the bytes read.

    wanted: stored name -> destination (a DTensor's local shard is filled); numbers are converted to its dtype, so call
    check_names first where that must not be.
    manifest: None for a foreign directory; then whole chunks are read, as only those have a CRC.
    Memory: none for rows of CPU tensors of the stored dtype, else one chunk.
    Raises: IntegrityError naming file and tensor where a stored CRC, size or shape disagrees; StorageError.
    """
    jobs = [job for name, tensor in wanted.items() for job in _jobs(directory, metadata, name, tensor)]
    jobs.sort(key=lambda job: (job.file, job.offset))
    with Files(directory, manifest) as files, torch.no_grad():
        return sum(files.read(job) for job in jobs)


def read_whole(directory: Path, metadata: Metadata, name: str, manifest: Manifest | None) -> Tensor:
    """One stored tensor, whole, on CPU."""
    stored = metadata.state_dict_metadata[name]
    assert isinstance(stored, TensorStorageMetadata)
    result = torch.empty(stored.size, dtype=stored.properties.dtype)
    read_tensors(directory, metadata, {name: result}, manifest=manifest)
    return result


_NOWHERE = torch.empty(0)


@dataclass(frozen=True)
class Job:
    """One stored chunk, the part of it that is wanted, and where that goes."""

    name: str
    file: str
    offset: int
    length: int
    dtype: torch.dtype
    chunk: Box
    common: Box  # the part of the chunk that is wanted
    target: Tensor = _NOWHERE  # of common's sizes, often a view of a rank's shard

    def part(self, common: Box, target: Tensor = _NOWHERE) -> Job:
        """The same chunk, another part of it."""
        return replace(self, common=common, target=target)


def stored_chunks(directory: Path, metadata: Metadata, name: str) -> list[Job]:
    """Where is each chunk of a tensor stored? Raises IntegrityError where the index does not say."""
    stored = metadata.state_dict_metadata[name]
    assert isinstance(stored, TensorStorageMetadata)
    found = []
    for piece in stored.chunks:
        box = Box(tuple(piece.offsets), tuple(piece.sizes))
        info = metadata.storage_data.get(MetadataIndex(name, piece.offsets))
        if info is None:
            raise IntegrityError(
                f"`{directory}` does not say where {name} at {box.offsets} is stored", path=directory, rank_local=True
            )
        found.append(Job(name, info.relative_path, info.offset, info.length, stored.properties.dtype, box, box))
    return found


def _jobs(directory: Path, metadata: Metadata, name: str, tensor: Tensor) -> Iterator[Job]:
    local, box = local_part(tensor)
    filled = 0
    for chunk in stored_chunks(directory, metadata, name):
        common = box.overlap(chunk.chunk)
        if common is None:
            continue
        filled += common.volume
        yield chunk.part(common, local[common.slices_in(box)] if common.sizes else local)
    if filled != box.volume:
        raise IntegrityError(
            f"`{directory}` stores {filled} of the {box.volume} numbers wanted of {name}",
            path=directory,
            rank_local=True,
        )


class Files:
    """The data files of one directory, opened once each, with their block sums."""

    def __init__(self, directory: Path, manifest: Manifest | None) -> None:
        self._directory, self._manifest = directory, manifest
        self._open: dict[str, tuple[int, int, BlockSums | None]] = {}
        self._unchecked: set[str] = set()  # foreign files whose archives store no CRC32

    def __enter__(self) -> Files:
        return self

    def __exit__(self, *_: object) -> None:
        for fd, _size, _sums in self._open.values():
            os.close(fd)

    def read(self, job: Job) -> int:
        """Read one job's part into its target. Returns the bytes read."""
        try:
            fd, size, sums = self._file(job)
            if job.offset < 0 or job.length <= 0 or job.offset + job.length > size:
                raise self._damaged(job, f"bytes {job.offset} to {job.offset + job.length} of a file of {size}")
            if sums is None:
                return self._read_archive(job, fd)
            return self._read_rows(job, fd, sums)
        except EOFError:
            raise self._damaged(job, "the file ends early") from None
        except OSError as error:
            raise StorageError(
                f"`{self._directory / job.file}` cannot be read: {error.strerror or error}",
                path=self._directory,
                rank_local=True,
            ) from None

    def _file(self, job: Job) -> tuple[int, int, BlockSums | None]:
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
                self._open[job.file] = (fd, size, self._sums(job, size))
        return self._open[job.file]

    def _sums(self, job: Job, size: int) -> BlockSums:
        assert self._manifest is not None
        entry = self._manifest.files.get(job.file)
        sidecar = self._manifest.files.get(job.file + SUFFIX)
        if entry is None or sidecar is None or entry.bytes != size:
            raise self._damaged(job, "the manifest does not know it in this form")
        return read_sums(self._directory, job.file + SUFFIX, sidecar, size)

    def _read_rows(self, job: Job, fd: int, sums: BlockSums) -> int:
        """Ours: only the rows that are wanted, each block checked, straight into the target where its memory allows."""

        def fail(block: int) -> IntegrityError:
            return self._damaged(job, f"block {block} ({sums.block_bytes * block} bytes in) does not have its CRC32")

        head = archive.head(job.dtype, job.chunk.sizes)
        nbytes = job.chunk.volume * job.dtype.itemsize
        if job.length != len(head) + nbytes + len(archive.tail(job.dtype, job.chunk.sizes, 0)):
            raise self._damaged(job, f"{job.length} bytes are no chunk of this dtype and shape")
        row_bytes = prod(job.chunk.sizes[1:]) * job.dtype.itemsize
        first = job.common.offsets[0] - job.chunk.offsets[0] if job.chunk.sizes else 0
        rows = job.common.sizes[0] if job.chunk.sizes else 1
        start = job.offset + len(head) + first * row_bytes
        target = job.target
        whole_rows = job.common.sizes[1:] == job.chunk.sizes[1:]
        direct = whole_rows and target.dtype == job.dtype and target.device.type == "cpu" and target.is_contiguous()
        values = target if direct else torch.empty((rows, *job.chunk.sizes[1:]), dtype=job.dtype)
        read = read_checked(fd, sums, start, bytes_of(values), fail)
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

    def _damaged(self, job: Job, reason: str) -> IntegrityError:
        return IntegrityError(
            f"`{self._directory / job.file}` is damaged: {job.name} at {job.chunk.offsets}: {reason}",
            path=self._directory,
            files=[job.file],
            rank_local=True,
        )
