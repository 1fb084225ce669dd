"""How do pieces become bytes? A plan that all ranks agree on, then one DCP data file per rank.

A data file is a run of small torch.save archives, one per chunk, exactly as torch's own FileSystemWriter lays them
out. The CRC of the file is computed as the bytes pass.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from isal import isal_zlib

from reshard.checkpoint.manifest import FileEntry, TensorEntry
from reshard.checkpoint.state import Box, Piece


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


class _Tally:
    """A file that is only appended to, with the length and CRC32 of what went in."""

    def __init__(self, path: Path) -> None:
        self._file = open(path, "xb")  # noqa: SIM115  closed by the owner; never opens what is already there
        self.bytes, self.crc = 0, 0

    def write(self, data: bytes) -> int:
        self._file.write(data)
        self.crc = isal_zlib.crc32(data, self.crc)
        self.bytes += len(data)
        return len(data)

    def flush(self) -> None:
        """torch.save calls it after each archive; the disk is only waited for once, at the end."""

    def close(self) -> None:
        """Flush to the disk itself, then close."""
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
        finally:
            self._file.close()

    def abandon(self) -> None:
        """Close without a promise."""
        self._file.close()


def write_pieces(directory: Path, file_name: str, pieces: Iterable[Piece]) -> Written:
    """Write pieces, one after the other, into one new file. Raises OSError as the disk does.

    Memory: one piece at a time. The file is fsynced; the directory is not, that is the commit's.
    """
    stored: list[Stored] = []
    tally: _Tally | None = None
    try:
        for piece in pieces:
            tally = tally or _Tally(directory / file_name)  # a rank with nothing to write leaves no empty file
            start = tally.bytes
            _save_tensor(piece, tally)
            stored.append(Stored(piece.fqn, piece.box, file_name, start, tally.bytes - start))
    except BaseException:
        if tally is not None:
            tally.abandon()
        raise
    if tally is None:
        return Written([], {})
    tally.close()
    return Written(stored, {file_name: FileEntry(tally.bytes, f"{tally.crc:08x}")})


def _save_tensor(piece: Piece, out: _Tally) -> None:
    tensor = piece.read()
    assert tuple(tensor.shape) == piece.sizes, f"{piece.fqn}: read {tuple(tensor.shape)}, planned {piece.sizes}"
    # torch.save stores the whole storage behind a view: a slice must be copied out first.
    if not tensor.is_contiguous() or tensor.untyped_storage().nbytes() != tensor.numel() * tensor.itemsize:
        tensor = tensor.contiguous().clone()
    torch.save(tensor, out)
