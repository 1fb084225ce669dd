"""How do many ranks load without reading the same bytes many times? Each stored row is read by one rank and handed on.

All ranks say which boxes they want, one collective. Rows of a chunk that one rank wants alone it reads straight into
place. Rows that several want (replicas), or of which several want a few columns each (dim-1 shards), are cut into slabs;
one of those ranks reads a slab and sends the others their part of it, in rounds of bounded size. Every rank knows the
whole schedule, so nothing is asked or announced on the way but whether all reads of a round went well.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata

from reshard.checkpoint.manifest import Manifest
from reshard.checkpoint.ranks import Ranks
from reshard.checkpoint.reader import Files, Job, stored_chunks
from reshard.checkpoint.state import Box, local_part
from reshard.errors import IntegrityError

SLAB_BYTES = 4 << 20  # one reading and one message
ROUND_BYTES = 16 << 20  # of slabs between two agreements; a rank holds at most about this much beside its tensors


@dataclass(frozen=True)
class Slab:
    """Rows of one stored chunk that several ranks want: who reads them, and which part goes to whom."""

    chunk: Job  # where it is stored; its common and target are not meant
    rows: Box  # the rows, over the chunk's full width
    reader: int
    wants: tuple[tuple[int, Box], ...]  # rank -> its part, by rank


def read_exchanging(
    directory: Path, metadata: Metadata, wanted: Mapping[str, Tensor], ranks: Ranks, *, manifest: Manifest | None
) -> int:
    """Fill this rank's part of each tensor, reading each stored byte once among all ranks. Returns this rank's bytes read.

    wanted: stored name -> destination; ranks may want different names. Collective: all ranks succeed or all raise.
    Raises: as reader.read_tensors.
    """
    parts = {name: local_part(tensor) for name, tensor in wanted.items()}
    boxes = ranks.everywhere(lambda: {name: box for name, (_, box) in parts.items()})
    own, shared = plan(directory, metadata, boxes, ranks.rank, whole_chunks=manifest is None)
    with Files(directory, manifest) as files, torch.no_grad():

        def read_own() -> int:
            jobs = sorted(own, key=lambda job: (job.file, job.offset))
            return sum(files.read(_aimed(job, parts)) for job in jobs)

        read = ranks.everywhere(read_own)[ranks.rank]
        for batch in _rounds(shared):
            read += _round(batch, parts, files, ranks)
    return read


def plan(
    directory: Path, metadata: Metadata, boxes: Sequence[Mapping[str, Box]], rank: int, *, whole_chunks: bool
) -> tuple[list[Job], list[Slab]]:
    """What does this rank read for itself, and what is read once for several? A pure function, the same on every rank.

    whole_chunks: a chunk can only be checked whole (foreign directories), so it is one slab.
    Raises IntegrityError where stored chunks do not cover what is wanted.
    """
    own: list[Job] = []
    shared: list[Slab] = []
    load = [0] * len(boxes)
    for name in sorted({name for wants in boxes for name in wants}):
        takers = [(r, wants[name]) for r, wants in enumerate(boxes) if name in wants and wants[name].volume]
        filled = dict.fromkeys((r for r, _ in takers), 0)
        for chunk in stored_chunks(directory, metadata, name):
            commons = [(r, common) for r, box in takers if (common := box.overlap(chunk.chunk)) is not None]
            for r, common in commons:
                filled[r] += common.volume
            for rows, wants in _intervals(chunk, commons, whole=whole_chunks):
                nbytes = rows.volume * chunk.dtype.itemsize
                if len(wants) == 1:
                    load[wants[0][0]] += nbytes
                    if wants[0][0] == rank:
                        own.append(chunk.part(wants[0][1]))
                    continue
                reader = min((r for r, _ in wants), key=lambda r: (load[r], r))
                load[reader] += nbytes
                shared.append(Slab(chunk, rows, reader, tuple(wants)))
        for r, box in takers:
            if filled[r] != box.volume:
                raise IntegrityError(
                    f"`{directory}` stores {filled[r]} of the {box.volume} numbers wanted of {name}", path=directory
                )
    return own, shared


def _intervals(
    chunk: Job, commons: list[tuple[int, Box]], *, whole: bool
) -> Iterator[tuple[Box, list[tuple[int, Box]]]]:
    """Cut a chunk's rows where the set of takers changes, and shared runs into slabs; (rows, rank -> part) of each."""
    if not commons:
        return
    box = chunk.chunk
    if whole or not box.sizes:
        yield box, commons
        return
    row_bytes = max(1, prod(box.sizes[1:]) * chunk.dtype.itemsize)
    edges = sorted({e for _, c in commons for e in (c.offsets[0], c.offsets[0] + c.sizes[0])})
    for start, stop in pairwise(edges):
        takers = [(r, c) for r, c in commons if c.offsets[0] <= start and stop <= c.offsets[0] + c.sizes[0]]
        step = stop - start if len(takers) == 1 else max(1, SLAB_BYTES // row_bytes)
        for first in range(start, stop, step) if takers else ():
            rows = Box((first, *box.offsets[1:]), (min(step, stop - first), *box.sizes[1:]))
            yield rows, [(r, _rows_of(c, rows)) for r, c in takers]


def _rows_of(part: Box, rows: Box) -> Box:
    return Box((rows.offsets[0], *part.offsets[1:]), (rows.sizes[0], *part.sizes[1:]))


def _rounds(slabs: Sequence[Slab]) -> Iterator[list[Slab]]:
    batch: list[Slab] = []
    nbytes = 0
    for slab in slabs:
        size = slab.rows.volume * slab.chunk.dtype.itemsize
        if batch and nbytes + size > ROUND_BYTES:
            yield batch
            batch, nbytes = [], 0
        batch.append(slab)
        nbytes += size
    if batch:
        yield batch


def _round(batch: list[Slab], parts: Mapping[str, tuple[Tensor, Box]], files: Files, ranks: Ranks) -> int:
    """Read this rank's slabs of a round, agree that all went well, then send and receive. Returns the bytes read."""
    held: dict[int, Tensor] = {}

    def read() -> int:
        count = 0
        for i, slab in enumerate(batch):
            if slab.reader == ranks.rank:
                held[i] = torch.empty(slab.rows.sizes, dtype=slab.chunk.dtype)
                count += files.read(slab.chunk.part(slab.rows, held[i]))
        return count

    counted = ranks.everywhere(read)[ranks.rank]
    incoming: list[tuple[Slab, Box, Tensor]] = []
    with ranks.messages() as messages:
        for i, slab in enumerate(batch):
            for taker, part in slab.wants:
                if slab.reader == ranks.rank:
                    values = held[i][part.slices_in(slab.rows)] if part.sizes else held[i]
                    if taker == ranks.rank:
                        _place(values, slab, part, parts)
                    else:
                        messages.send(values.contiguous(), taker)
                elif taker == ranks.rank:
                    buffer = torch.empty(part.sizes, dtype=slab.chunk.dtype)
                    messages.receive(buffer, slab.reader)
                    incoming.append((slab, part, buffer))
    for slab, part, buffer in incoming:
        _place(buffer, slab, part, parts)
    return counted


def _place(values: Tensor, slab: Slab, part: Box, parts: Mapping[str, tuple[Tensor, Box]]) -> None:
    local, box = parts[slab.chunk.name]
    (local[part.slices_in(box)] if part.sizes else local).copy_(values)


def _aimed(job: Job, parts: Mapping[str, tuple[Tensor, Box]]) -> Job:
    local, box = parts[job.name]
    return job.part(job.common, local[job.common.slices_in(box)] if job.common.sizes else local)
