"""How does a foreign checkpoint look from here? Tensors that are indexed, and read a few rows at a time.

A Source maps canonical names to LazyTensors. Opening one reads headers only; a read copies the rows that were asked for
and nothing else, so memory is the reader's choice, not a function of the model. Most tensors are StoredTensors: blocks
of bytes that lie in files (a Meta tensor in eight shards is eight blocks). No torch until a tensor is read.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from isal import isal_zlib
from numpy.typing import NDArray

from reshard.errors import FormatError
from reshard.model.spec import LlamaSpec
from reshard.torch_zip import ITEM_BYTES as ITEM_BYTES  # noqa: PLC0414  the formats take it from here

if TYPE_CHECKING:
    import torch

_STEP_BYTES = 1 << 20  # what is read and summed fits into a core's own cache
READ_BYTES = 16 * 2**20  # at a time, where bytes are only compared or summed

WEIGHT_DTYPES = ("float32", "bfloat16", "float16", "float64")  # what a weight of ours may be


class LazyTensor(Protocol):
    """One tensor of a foreign checkpoint that has not been read."""

    @property
    def name(self) -> str:
        """The canonical name."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole tensor."""
        ...

    @property
    def dtype(self) -> str:
        """The torch dtype's name, e.g. "bfloat16"."""
        ...

    @property
    def nbytes(self) -> int:
        """Of the whole tensor."""
        ...

    @property
    def grain(self) -> int:
        """Rows that are made from the same rows of the file: readers who go by multiples of it read nothing twice."""
        ...

    def fill(self, buffer: NDArray[np.uint8], start: int, stop: int, ledger: Ledger | None = None) -> None:
        """Write rows [start, stop) of dim 0 into a flat buffer of exactly their bytes, in the machine's byte order.

        A tensor of no dimensions has one row. The ledger, where given, learns what was read.
        """
        ...


@dataclass(frozen=True)
class Source:
    """A foreign checkpoint, opened.

    spec: None where the format does not say enough (a bare .pt names no heads and no RoPE).
    tensors: canonical name -> tensor. A tied model may have `output.weight` or not.
    provenance: for the manifest, plain JSON values.
    assets: tokenizer and other small files that belong to the model: name -> the file, or its content.
    about: what others want to be told beside the arithmetic, as far as it is known: context_length, bos_token_id,
        eos_token_id, pad_token_id, stop_token_ids (a list: all tokens that end a text).
    tokenizer_problem: why its tokenizer cannot be handed on, where it has one that is not in `assets`.
    """

    path: Path
    spec: LlamaSpec | None
    tensors: Mapping[str, LazyTensor]
    provenance: dict[str, Any]
    assets: Mapping[str, Path | bytes] = field(default_factory=dict)
    about: Mapping[str, Any] = field(default_factory=dict)
    tokenizer_problem: str = ""


@dataclass(frozen=True)
class Region:
    """A run of bytes in a file for which the file may hold a CRC32: a zip's record, a safetensors' tensor."""

    file: Path
    offset: int
    nbytes: int
    crc32: int | None = None

    def read_into(self, buffer: NDArray[np.uint8], start: int, ledger: Ledger | None = None) -> None:
        """Fill the buffer from byte `start` of the region. Raises FormatError where the file is gone or ends early.

        The ledger, where given, learns what was read: it is summed in steps, while it is in the core's cache.
        """
        view, crc = buffer.data, 0
        if start < 0 or start + len(view) > self.nbytes:
            raise IndexError(f"bytes {start} to {start + len(view)} of a region of {self.nbytes}")
        position = self.offset + start
        try:
            with self.file.open("rb", buffering=0) as stream:
                while view and (count := os.preadv(stream.fileno(), [view[:_STEP_BYTES]], position)):
                    if ledger is not None and self.crc32 is not None:
                        crc = isal_zlib.crc32(view[:count], crc)
                    view, position = view[count:], position + count
                if ledger is not None and ledger.drops:
                    os.posix_fadvise(stream.fileno(), position - len(buffer), len(buffer), os.POSIX_FADV_DONTNEED)
        except OSError as e:
            raise FormatError(
                f"{self.file} cannot be read at byte {position:,}: {e.strerror}", path=self.file
            ) from None
        if view:
            raise FormatError(
                f"{self.file} ends at byte {position:,}, expected {len(view):,} more: it was cut or replaced after it "
                "had been opened",
                path=self.file,
            )
        if ledger is not None:
            ledger.note(self, start, len(buffer), crc)

    def sum(self, start: int, stop: int, crc: int = 0) -> int:
        """The CRC32 of bytes [start, stop), going on from `crc`; reads READ_BYTES at a time."""
        buffer = np.empty(min(READ_BYTES, stop - start), np.uint8)
        for at in range(start, stop, READ_BYTES):
            part = buffer[: min(READ_BYTES, stop - at)]
            self.read_into(part, at)
            crc = isal_zlib.crc32(part, crc)
        return crc


def check_region(region: Region) -> None:
    """Does a region still have the bytes that were written? Reads it once.

    Without a stored CRC32 there is nothing to ask. Raises FormatError naming the file and the place.
    """
    _compare(region, region.sum(0, region.nbytes) if region.crc32 is not None else None)


def _compare(region: Region, crc: int | None) -> None:
    if crc != region.crc32:
        raise FormatError(
            f"{region.file} is damaged: the {region.nbytes:,} bytes from byte {region.offset:,} have CRC32 {crc:08x}, "
            f"the file says {region.crc32:08x}",
            path=region.file,
            hint="copy or download this file again; nothing was converted",
        )


class Ledger:
    """Which source bytes were read, and what was their CRC32? Checks sources on the way, without a second reading.

    Threads may share one. Ranges may come in any order and twice; `check` reads what nobody has asked for.
    drops: what was read is not to stay in the system's cache. bytes: read so far, by everybody.
    """

    def __init__(self, *, drops: bool = False) -> None:
        self.drops, self.bytes = drops, 0
        self._ranges: dict[Region, dict[tuple[int, int], int]] = {}
        self._lock = threading.Lock()

    def note(self, region: Region, start: int, nbytes: int, crc: int) -> None:
        """So many bytes were just read from byte `start` of the region; their CRC32, where the region has one."""
        with self._lock:
            self.bytes += nbytes
            if region.crc32 is not None:
                self._ranges.setdefault(region, {})[start, start + nbytes] = crc

    def check(self) -> None:
        """Is every region that was read as it was written? Raises FormatError naming the first that is not."""
        for region, ranges in self._ranges.items():
            crc, at = 0, 0
            for (start, stop), part in sorted(ranges.items()):
                if start < at:
                    continue  # what of it is new is read below, with the next gap
                crc = region.sum(at, start, crc)
                crc, at = isal_zlib.crc32_combine(crc, part, stop - start), stop
            _compare(region, region.sum(at, region.nbytes, crc))


@dataclass(frozen=True)
class Block:
    """A part of a tensor that lies in one piece: its rows follow each other in the region.

    The tensor is seen as a matrix of bytes, dim 0 by everything else.
    offset: where in the region; row, rows: where in dim 0; column, width: where in a row, in bytes.
    """

    region: Region
    offset: int
    row: int
    rows: int
    column: int
    width: int


@dataclass(frozen=True)
class StoredTensor:
    """A LazyTensor whose blocks lie in files, in the machine's byte order, uncompressed."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    blocks: tuple[Block, ...]
    row_bytes: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "row_bytes", prod(self.shape[1:]) * ITEM_BYTES[self.dtype])
        for block in self.blocks:
            assert block.row + block.rows <= self.rows, (self, block)
            assert block.column + block.width <= self.row_bytes, (self, block)
            assert block.offset + block.rows * block.width <= block.region.nbytes, (self, block)
        covered = sum(block.rows * block.width for block in self.blocks)
        assert covered == self.nbytes, f"{self.name}: blocks cover {covered} of {self.nbytes} bytes"

    @property
    def rows(self) -> int:
        """Extent of dim 0; a scalar has one row."""
        return self.shape[0] if self.shape else 1

    @property
    def nbytes(self) -> int:
        """Of the whole tensor."""
        return self.rows * self.row_bytes

    def same_place(self, other: StoredTensor) -> bool:
        """Are the two names of the same bytes in the same files?"""
        return (self.shape, self.dtype, self.blocks) == (other.shape, other.dtype, other.blocks)

    @property
    def grain(self) -> int:
        """Every row stands alone."""
        return 1

    def read(self, start_row: int = 0, stop_row: int | None = None, ledger: Ledger | None = None) -> torch.Tensor:
        """See `read_rows`. Raises FormatError where a file is shorter than it was, IndexError for rows out of range."""
        start, stop = self._range(start_row, stop_row)
        return read_rows(self, start, stop, ledger)

    def read_bytes(self, start_row: int = 0, stop_row: int | None = None) -> NDArray[np.uint8]:
        """The bytes of rows [start_row, stop_row), for those who only compare."""
        start, stop = self._range(start_row, stop_row)
        buffer = np.empty((stop - start) * self.row_bytes, np.uint8)
        self.fill(buffer, start, stop)
        return buffer

    def fill(self, buffer: NDArray[np.uint8], start: int, stop: int, ledger: Ledger | None = None) -> None:
        """Write rows [start, stop) into a buffer of exactly their bytes."""
        matrix = buffer.reshape(stop - start, self.row_bytes)
        for block in self.blocks:
            first, last = max(start, block.row), min(stop, block.row + block.rows)
            if first >= last or block.width == 0:
                continue
            whole_rows = block.width == self.row_bytes
            target = matrix[first - start : last - start, block.column : block.column + block.width]
            # Rows of a column block are not neighbours in the target: they are read aside, then spread.
            part = target.reshape(-1) if whole_rows else np.empty(target.size, np.uint8)
            at = block.offset + (first - block.row) * block.width
            block.region.read_into(part, at, ledger)
            if not whole_rows:
                target[:] = part.reshape(target.shape)

    def _range(self, start: int, stop: int | None) -> tuple[int, int]:
        stop = self.rows if stop is None else stop
        if not 0 <= start <= stop <= self.rows:
            raise IndexError(f"{self.name}: rows {start} to {stop} of {self.rows}")
        return start, stop


def read_rows(tensor: LazyTensor, start: int, stop: int, ledger: Ledger | None = None) -> torch.Tensor:
    """Rows [start, stop) of dim 0 as a torch tensor on the CPU, contiguous, owned by the caller.

    Read some at a time, so that what a cast or a permutation needs on the way is small beside it.
    """
    import torch

    dtype = getattr(torch, tensor.dtype)
    shape = (stop - start, *tensor.shape[1:]) if tensor.shape else ()
    flat = torch.empty(prod(shape) * ITEM_BYTES[tensor.dtype], dtype=torch.uint8)  # torch's own memory: aligned
    row_bytes = flat.numel() // (stop - start) if stop > start else 0
    for first, last in slabs((stop - start, row_bytes), 1, READ_BYTES // 2, tensor.grain) if row_bytes else ():
        part = flat[first * row_bytes : last * row_bytes]
        tensor.fill(part.numpy(), start + first, start + last, ledger)
    return flat.view(dtype).view(shape)


def slabs(shape: tuple[int, ...], item_bytes: int, most_bytes: int, grain: int = 1) -> Iterator[tuple[int, int]]:
    """How is a tensor cut into runs of rows of at most `most_bytes`? (start, stop) in dim 0.

    Each run has a multiple of `grain` rows, at least one, but for the last. A tensor of no dimensions, or with no
    elements, is one slab.
    """
    rows = shape[0] if shape else 1
    row_bytes = prod(shape[1:]) * item_bytes
    if rows * row_bytes <= most_bytes:
        yield 0, rows
        return
    step = max(grain, most_bytes // row_bytes // grain * grain)
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


def same_bytes(left: StoredTensor, right: StoredTensor) -> bool:
    """Do two stored tensors hold the same numbers, bit for bit? Reads both side by side, to the first difference."""
    if (left.shape, left.dtype) != (right.shape, right.dtype):
        return False
    if left.blocks == right.blocks:
        return True
    return all(
        np.array_equal(left.read_bytes(start, stop), right.read_bytes(start, stop))
        for start, stop in slabs(left.shape, ITEM_BYTES[left.dtype], READ_BYTES)
    )
