"""How do pieces become bytes? A plan that all ranks agree on, then one DCP data file per rank.

A data file is a run of small torch.save archives, one per chunk, which torch's own FileSystemReader reads. The CRCs of
file, blocks and chunks are computed as the bytes pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from reshard.checkpoint import archive
from reshard.checkpoint.blocks import BlockWriter
from reshard.checkpoint.manifest import FileEntry, TensorEntry
from reshard.checkpoint.state import Box, Piece, bytes_of, dtype_from_name


@dataclass(frozen=True)
class Planned:
    """What the others must know of a piece: everything but its numbers."""

    fqn: str
    shape: tuple[int, ...]
    dtype: str
    box: Box
    nbytes: int


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


def planned(piece: Piece) -> Planned:
    """The piece without its numbers."""
    return Planned(piece.fqn, piece.shape, piece.dtype, piece.box, piece.nbytes)


def assign(offers: Sequence[Sequence[Planned]]) -> list[set[tuple[str, Box]]]:
    """Which rank writes which piece? Each box is written once, by the offering rank that has least so far.

    offers: what each rank holds, in rank order. A pure function, so that every rank comes to the same answer without
    a second round. Large pieces are placed first: the small ones then level the ranks.
    """
    holders: dict[tuple[str, Box], list[int]] = {}
    nbytes: dict[tuple[str, Box], int] = {}
    for rank, offer in enumerate(offers):
        for p in offer:
            holders.setdefault((p.fqn, p.box), []).append(rank)
            nbytes[p.fqn, p.box] = p.nbytes
    load = [0] * len(offers)
    chosen: list[set[tuple[str, Box]]] = [set() for _ in offers]
    # Those that only one rank can write first: the others are free to balance around them.
    for key in sorted(holders, key=lambda k: (len(holders[k]) > 1, -nbytes[k], k[0], k[1].offsets)):
        rank = min(holders[key], key=lambda r: (load[r], r))
        chosen[rank].add(key)
        load[rank] += nbytes[key]
    return chosen


def check_coverage(offers: Iterable[Iterable[Planned]]) -> dict[str, TensorEntry]:
    """Do the ranks' boxes tile every tensor, each number once? Returns the tensors that will be stored.

    A gap or an overlap is a bug in whoever made the state, so it is an AssertionError, before a byte is written.
    """
    boxes: dict[str, set[Box]] = {}
    entries: dict[str, TensorEntry] = {}
    for offer in offers:
        for p in offer:
            entry = entries.setdefault(p.fqn, TensorEntry(p.shape, p.dtype))
            assert entry == TensorEntry(p.shape, p.dtype), f"ranks disagree on {p.fqn}: {entry}, {p.shape} {p.dtype}"
            assert p.box.within(p.shape), f"{p.fqn}: {p.box} lies outside of {p.shape}"
            boxes.setdefault(p.fqn, set()).add(p.box)
    for fqn, parts in boxes.items():
        whole = Box((0,) * len(entries[fqn].shape), entries[fqn].shape)
        volume = sum(box.volume for box in parts)
        assert volume == whole.volume, f"{fqn}: the ranks hold {volume} numbers of {whole.volume}"
        ordered = sorted(parts, key=lambda b: b.offsets)
        for i, box in enumerate(ordered):
            for other in ordered[i + 1 :]:
                if other.offsets and other.offsets[0] >= box.offsets[0] + box.sizes[0]:
                    break  # sorted by the first dim: none of the later ones can meet this box
                assert box.overlap(other) is None, f"{fqn}: {box} and {other} overlap"
    return entries


def write_pieces(directory: Path, file_name: str, pieces: Iterable[Piece]) -> Written:
    """Write pieces, one after the other, into one new file and its sidecar. Raises OSError as the disk does.

    Memory: one piece at a time, and for a tensor on CPU not even that: its numbers go to the file from where they are.
    Both files are fsynced; the directory is not, that is the commit's.
    """
    stored: list[Stored] = []
    out: BlockWriter | None = None
    try:
        for piece in pieces:
            out = out or BlockWriter(directory / file_name)  # a rank with nothing to write leaves no empty file
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
