"""How do pieces become bytes? One DCP data file for each rank, and its block sums beside it.

A data file is a run of small torch.save archives, one per chunk, which torch's own FileSystemReader reads. The CRCs of
file, blocks and chunks are computed as the bytes pass.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from reshard.checkpoint import archive
from reshard.checkpoint.blocks import BlockWriter, Throttle
from reshard.checkpoint.manifest import FileEntry
from reshard.checkpoint.state import Box, Piece, bytes_of, dtype_from_name


@dataclass(frozen=True)
class Stored:
    """Where a piece came to lie."""

    fqn: str
    box: Box
    file: str
    offset: int
    length: int


@dataclass(frozen=True)
class Written:
    """What one rank's writing left on disk."""

    stored: list[Stored]
    files: dict[str, FileEntry]


def write_pieces(directory: Path, file_name: str, pieces: Iterable[Piece], throttle: Throttle | None = None) -> Written:
    """Write pieces, one after the other, into one new file and its sidecar. Raises OSError as the disk does.

    Memory: one piece at a time, and for a tensor on CPU not even that: its numbers go to the file from where they are.
    Both files are fsynced; the directory is not, that is the commit's.
    """
    stored: list[Stored] = []
    out: BlockWriter | None = None
    try:
        for piece in pieces:
            out = out or BlockWriter(
                directory / file_name, throttle
            )  # a rank with nothing to write leaves no empty file
            out.append(bytes(-out.bytes % archive.ALIGNMENT))  # so that the numbers are aligned in the file, too
            start = out.bytes
            _append_tensor(piece, out)
            stored.append(Stored(piece.fqn, piece.box, file_name, start, out.bytes - start))
    except BaseException:
        if out is not None:
            out.abandon()
        raise
    if out is None:
        return Written([], {})
    return Written(stored, out.close())


def _append_tensor(piece: Piece, out: BlockWriter) -> None:
    tensor = piece.read()
    assert tuple(tensor.shape) == piece.sizes, f"{piece.fqn}: read {tuple(tensor.shape)}, planned {piece.sizes}"
    assert tensor.dtype == dtype_from_name(piece.dtype), f"{piece.fqn}: read {tensor.dtype}, planned {piece.dtype}"
    out.append(archive.head(tensor.dtype, piece.sizes))
    # Kept by reference until it is written; a strided slice has to be copied together first.
    crc = out.append(bytes_of(tensor.contiguous()))
    out.append(archive.tail(tensor.dtype, piece.sizes, crc))
