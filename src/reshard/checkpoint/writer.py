"""How do pieces become bytes? One DCP data file for each rank, and its block sums beside it.

A data file is a run of small torch.save archives, one per chunk, which torch's own FileSystemReader reads. Where each
comes to lie follows from the order of the pieces alone. The CRCs of file, blocks and chunks are computed as the bytes
pass.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import NamedTuple

from reshard.checkpoint import archive
from reshard.checkpoint.blocks import BLOCK_BYTES, BlockWriter, Throttle
from reshard.checkpoint.manifest import FileEntry, crc32
from reshard.checkpoint.state import Box, Piece, bytes_of, dtype_from_name
from reshard.errors import CheckpointError

# The numbers of chunks from this size on begin with a block: who reads a part of one then seldom reads more than that.
ALIGNED_BYTES = 64 * BLOCK_BYTES  # so that the gaps in front of them are at most a 64th of the file


class Stored(NamedTuple):
    """Where a piece came to lie."""

    fqn: str
    box: Box
    file: str
    offset: int
    length: int


@dataclass(frozen=True)
class Written:
    """What one rank's writing left on disk. seal: of names and places; see Places."""

    seal: int
    files: dict[str, FileEntry]


class Places:
    """Where do pieces lie in a file, one after the other? The same for who writes them and for who indexes them.

    seal: a CRC32 of all that was placed: two ranks that mean the same pieces in the same order have the same.
    """

    def __init__(self, file_name: str) -> None:
        self._file, self.end, self.seal = file_name, 0, 0

    def place(self, fqn: str, dtype: str, box: Box) -> Stored:
        """The place of the next piece."""
        kind = dtype_from_name(dtype)
        nbytes = prod(box.sizes) * kind.itemsize
        before = len(archive.head(kind, box.sizes))
        alignment = BLOCK_BYTES if nbytes >= ALIGNED_BYTES else archive.ALIGNMENT
        start = self.end + -(self.end + before) % alignment
        length = archive.overhead(kind, box.sizes) + nbytes
        self.end = start + length
        self.seal = crc32(f"{fqn} {box.offsets} {box.sizes} {dtype} {start}\n".encode(), self.seal)
        return Stored(fqn, box, self._file, start, length)


def write_pieces(directory: Path, file_name: str, pieces: Iterable[Piece], throttle: Throttle | None = None) -> Written:
    """Write pieces, one after the other, into one new file and its sidecar. Raises OSError as the disk does.

    Memory: one piece at a time, and for a tensor on CPU not even that: its numbers go to the file from where they are.
    Both files are fsynced; the directory is not, that is the commit's.
    """
    places = Places(file_name)
    out: BlockWriter | None = None
    try:
        for piece in pieces:
            out = out or BlockWriter(directory / file_name, throttle)  # no pieces, no file
            append_piece(piece, places, out)
    except BaseException:
        if out is not None:
            out.abandon()
        raise
    return Written(places.seal, out.close() if out is not None else {})


def append_piece(piece: Piece, places: Places, out: BlockWriter) -> Stored:
    """Write one piece to where its place is. Raises OSError, CheckpointError where its numbers are not as planned."""
    stored = places.place(piece.fqn, piece.dtype, piece.box)
    out.append(bytes(stored.offset - out.bytes))
    tensor = piece.read()
    if (tuple(tensor.shape), tensor.dtype) != (piece.sizes, dtype_from_name(piece.dtype)):
        raise CheckpointError(
            f"`{piece.fqn}` has {list(tensor.shape)} {tensor.dtype} to be written, {list(piece.sizes)} {piece.dtype} were "
            "planned: it was changed while it was saved"
        )
    out.append(archive.head(tensor.dtype, piece.sizes))
    # Kept by reference until it is written; a strided slice has to be copied together first.
    crc = out.append(bytes_of(tensor.contiguous()))
    out.append(archive.tail(tensor.dtype, piece.sizes, crc))
    if piece.part is None and piece.nbytes >= ALIGNED_BYTES:
        out.flush()  # what waits to be written would keep all of this piece in memory while the next one is read
    if out.bytes != places.end:
        raise CheckpointError(f"`{piece.fqn}` ends at byte {out.bytes}, {places.end} was planned: this is our mistake")
    return stored
