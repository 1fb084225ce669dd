"""How do many ranks load without reading the same bytes many times? Each stored row is read by one rank and handed on.

All ranks say which boxes they want, one collective. Rows of a chunk that one rank wants alone it reads straight into
place. Rows that several want (replicas), or of which several want a few columns each (dim-1 shards), are cut into slabs;
one of those ranks reads a slab and sends the others their part of it.

Every rank works out its own part of the schedule, and goes through its slabs in the order in which they are stored, with
a bounded number of bytes under way. As that order is the same for all, nobody waits in a circle, and nothing is asked or
announced. A rank that cannot read sends what it has, and says at the end that it was nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from reshard.checkpoint.index import Boxes, Index
from reshard.checkpoint.manifest import Manifest, TensorEntry
from reshard.checkpoint.offers import Offer, Spread, spreads
from reshard.checkpoint.ranks import Messages, Ranks
from reshard.checkpoint.reader import Files, Job, Parts, read_jobs
from reshard.checkpoint.state import Box, dtype_from_name, has_own_bytes
from reshard.errors import IntegrityError

SLAB_BYTES = 4 << 20  # one reading and one message; small tensors are gathered up to it
UNDER_WAY_BYTES = 16 << 20  # of slabs that a rank has sent or waits for: what it holds beside its tensors, about
_ALIGNMENT = 16  # of each tensor's numbers in a message with several


@dataclass(frozen=True)
class Cut:
    """Rows of one stored chunk, over its full width, and which part of them each rank wants, by rank."""

    chunk: Job  # where it is stored; its common and target are not meant
    rows: Box
    wants: tuple[tuple[int, Box], ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the rows."""
        return self.rows.volume * self.chunk.dtype.itemsize


@dataclass(frozen=True)
class Slab:
    """Cuts that the same ranks want, and who of them reads."""

    reader: int
    takers: tuple[int, ...]
    cuts: tuple[Cut, ...]

    @property
    def nbytes(self) -> int:
        """Bytes to read."""
        return sum(cut.nbytes for cut in self.cuts)


def read_exchanging(
    directory: Path,
    index: Index,
    parts: Parts,
    wants: Sequence[Offer],
    ranks: Ranks,
    *,
    manifest: Manifest | None,
) -> int:
    """Fill this rank's part of each tensor, reading each stored byte once among all ranks. Returns this rank's bytes read.

    wants: what each rank wants (`want`), by rank; they may differ. Collective: all ranks succeed or all raise.
    Raises: as reader.read_tensors.
    """
    plans: list[tuple[list[Job], list[Slab]]] = []
    ranks.everywhere(lambda: plans.append(plan(directory, index, wants, ranks.rank, whole_chunks=manifest is None)))
    ((own, shared),) = plans
    with Files(directory, manifest) as files, torch.inference_mode():  # whatever they were made in
        flow = _Flow(parts, files, ranks)
        flow.do(lambda: read_jobs(directory, manifest, [_aimed(job, parts) for job in own]))
        flow.exchange(shared)
        ranks.everywhere(flow.outcome)
    return flow.bytes_read


def want(index: Index, boxes: Mapping[str, Box]) -> Offer:
    """What a rank wants, told to the others. boxes: stored name -> its part of the tensor, which may be empty."""
    stored = index.tensors
    return Offer.of(
        (name, TensorEntry(tensor.shape, tensor.dtype), box)
        for name, box in boxes.items()
        if box.volume and (tensor := stored[name])
    )


def plan(
    directory: Path, index: Index, wants: Sequence[Offer], rank: int, *, whole_chunks: bool
) -> tuple[list[Job], list[Slab]]:
    """What does this rank read for itself, and in which slabs does it take part, in the order of the files?

    Time: that of this rank's own boxes and of the kinds of tensors; it does not go through the other ranks' tensors.
    whole_chunks: a chunk can only be checked whole (foreign directories), so it is one cut.
    Raises IntegrityError where stored chunks do not cover what is wanted.
    """
    tensors = spreads(wants)
    known: dict[tuple[int, Boxes], list[tuple[int, Box, tuple[tuple[int, Box], ...]]]] = {}
    own: list[Job] = []
    shared: list[Cut] = []
    for name, _, box in wants[rank]:
        spread, stored = tensors[name], index.tensors[name]
        boxes = stored.boxes
        kind = id(spread), boxes
        if kind not in known:
            known[kind] = list(_cuts(spread, [Box(*b) for b in boxes], box, rank, whole_chunks=whole_chunks))
        filled = 0
        for number, rows, takers in known[kind]:
            at, chunk = stored.chunks[number], Box(*boxes[number])
            job = Job(name, at.file, at.offset, at.length, dtype_from_name(stored.dtype), chunk, chunk)
            filled += next(part.volume for taker, part in takers if taker == rank)
            if len(takers) == 1:
                own.append(job.part(takers[0][1]))
            else:
                shared.append(Cut(job, rows, takers))
        if filled != box.volume:
            raise IntegrityError(
                f"`{directory}` stores {filled} of the {box.volume} numbers wanted of {name}",
                path=directory,
                rank_local=True,
            )
    return own, _slabs(shared)


def _cuts(
    spread: Spread, chunks: Iterable[Box], mine: Box, rank: int, *, whole_chunks: bool
) -> Iterator[tuple[int, Box, tuple[tuple[int, Box], ...]]]:
    """Number of the chunk, rows and rank -> part, for all rows of a tensor that this rank wants something of."""
    for number, chunk in enumerate(chunks):
        here = mine.overlap(chunk)
        if here is None:
            continue
        # Who wants nothing of our rows has no edge between them, and can be left out.
        rows_here = chunk if whole_chunks or not chunk.sizes else _rows_of(chunk, here)
        takers = [
            (holder, common)
            for box, holders in spread.holders.items()
            if box.overlap(rows_here) is not None and (common := box.overlap(chunk)) is not None
            for holder in holders
        ]
        takers.sort()
        for rows, parts in _intervals(chunk, spread.item_bytes, takers, whole=whole_chunks):
            if any(taker == rank for taker, _ in parts):
                yield number, rows, tuple(parts)


def _intervals(
    chunk: Box, item_bytes: int, takers: list[tuple[int, Box]], *, whole: bool
) -> Iterator[tuple[Box, list[tuple[int, Box]]]]:
    """Cut a chunk's rows where the set of takers changes, and shared runs into slabs; (rows, rank -> part) of each."""
    if whole or not chunk.sizes:
        yield chunk, takers
        return
    row_bytes = max(1, prod(chunk.sizes[1:]) * item_bytes)
    edges = sorted({e for _, c in takers for e in (c.offsets[0], c.offsets[0] + c.sizes[0])})
    for start, stop in pairwise(edges):
        here = [(r, c) for r, c in takers if c.offsets[0] <= start and stop <= c.offsets[0] + c.sizes[0]]
        step = stop - start if len(here) == 1 else max(1, SLAB_BYTES // row_bytes)
        for first in range(start, stop, step) if here else ():
            rows = Box((first, *chunk.offsets[1:]), (min(step, stop - first), *chunk.sizes[1:]))
            yield rows, [(r, _rows_of(c, rows)) for r, c in here]


def _rows_of(part: Box, rows: Box) -> Box:
    return Box((rows.offsets[0], *part.offsets[1:]), (rows.sizes[0], *part.sizes[1:]))


def _slabs(cuts: list[Cut]) -> list[Slab]:
    """Gather small cuts of the same ranks, and let those take turns in reading, by bytes.

    Ranks that share a slab come to the same, as each looks only at what the very same ranks want, in the same order.
    """
    cuts.sort(key=_place)
    of_same: dict[tuple[int, ...], list[Cut]] = {}
    for cut in cuts:
        of_same.setdefault(tuple(taker for taker, _ in cut.wants), []).append(cut)
    slabs = []
    for takers, theirs in of_same.items():
        load = dict.fromkeys(takers, 0)
        for bundle in _bundles(theirs):
            slab = Slab(min(takers, key=load.__getitem__), takers, tuple(bundle))
            load[slab.reader] += slab.nbytes
            slabs.append(slab)
    return sorted(slabs, key=lambda slab: _place(slab.cuts[0]))


def _bundles(cuts: Iterable[Cut]) -> Iterator[list[Cut]]:
    """Runs of cuts of together at most SLAB_BYTES, or a single one that is larger."""
    bundle: list[Cut] = []
    nbytes = 0
    for cut in cuts:
        if bundle and nbytes + cut.nbytes > SLAB_BYTES:
            yield bundle
            bundle, nbytes = [], 0
        bundle.append(cut)
        nbytes += cut.nbytes
    yield bundle


def _place(cut: Cut) -> tuple[str, int, tuple[int, ...]]:
    return cut.chunk.file, cut.chunk.offset, cut.rows.offsets


class _Flow:
    """One rank's reading and exchanging. The first error is kept: the other ranks wait for our messages all the same."""

    def __init__(self, parts: Parts, files: Files, ranks: Ranks) -> None:
        self._parts, self._files, self._ranks = parts, files, ranks
        self._failure: BaseException | None = None
        self.bytes_read = 0

    def outcome(self) -> None:
        """Raise what went wrong on this rank."""
        if self._failure is not None:
            raise self._failure

    def do(self, read: Callable[[], int]) -> None:
        """Read something, which says how many bytes it was; nothing any more once something went wrong."""
        if self._failure is None:
            try:
                self.bytes_read += read()
            except BaseException as error:  # raised by `outcome`, on all ranks
                self._failure = error

    def _put(self, target: Tensor, values: Tensor) -> None:
        """Copy into a place of this rank's."""
        try:
            target.copy_(values)
        except BaseException as error:  # the same
            self._failure = self._failure or error

    def exchange(self, slabs: Iterable[Slab]) -> None:
        """Read, send and receive this rank's slabs, with some bytes under way at any time."""
        under_way: deque[tuple[int, ExitStack]] = deque()
        nbytes = 0
        for slab in slabs:
            under_way.append((slab.nbytes, self._begin(slab)))
            nbytes += slab.nbytes
            while nbytes > UNDER_WAY_BYTES:
                done, stack = under_way.popleft()
                stack.close()
                nbytes -= done
        for _, stack in under_way:
            stack.close()

    def _begin(self, slab: Slab) -> ExitStack:
        """Set a slab's messages going. Closing what is returned waits for them, and puts in place what they brought."""
        stack = ExitStack()
        single = len(slab.cuts) == 1
        if slab.reader == self._ranks.rank:
            messages = stack.enter_context(self._ranks.messages())
            if single:
                self._send_rows(slab.cuts[0], messages)
            else:
                self._send_bundle(slab, messages)
            return stack
        parts = [(cut, part) for cut in slab.cuts for taker, part in cut.wants if taker == self._ranks.rank]
        if single:
            cut, part = parts[0]
            target = self._target(cut.chunk.name, part)
            buffer = (
                target if has_own_bytes(target, cut.chunk.dtype) else torch.empty(part.sizes, dtype=cut.chunk.dtype)
            )
            if buffer is not target:
                stack.callback(self._put, target, buffer)
        else:
            buffer = torch.empty(_bundle_bytes(parts), dtype=torch.uint8)
            stack.callback(partial(self._unpack, buffer, parts))
        stack.enter_context(self._ranks.messages()).receive(buffer, slab.reader)
        return stack

    def _send_rows(self, cut: Cut, messages: Messages) -> None:
        """Read rows, into their own place if this rank wants all of them, and send each taker its part."""
        dtype, rank = cut.chunk.dtype, self._ranks.rank
        mine = next(part for taker, part in cut.wants if taker == rank)
        target = self._target(cut.chunk.name, mine)
        in_place = mine == cut.rows and has_own_bytes(target, dtype)
        values = target if in_place else torch.empty(cut.rows.sizes, dtype=dtype)
        self.do(lambda: self._files.read(cut.chunk.part(cut.rows, values)))
        for taker, part in cut.wants:
            if taker != rank:
                messages.send(_part_of(values, part, cut.rows).contiguous(), taker)
        if not in_place:
            self._put(target, _part_of(values, mine, cut.rows))

    def _send_bundle(self, slab: Slab, messages: Messages) -> None:
        """Read small cuts, and send each taker its parts of all of them in one message."""
        values = [torch.empty(cut.rows.sizes, dtype=cut.chunk.dtype) for cut in slab.cuts]
        jobs = [cut.chunk.part(cut.rows, v) for cut, v in zip(slab.cuts, values, strict=True)]
        self.do(lambda: sum(map(self._files.read, jobs)))
        sent: dict[tuple[Box, ...], Tensor] = {}  # replicas all get the same
        for number, taker in enumerate(slab.takers):
            boxes = tuple(cut.wants[number][1] for cut in slab.cuts)
            if taker == self._ranks.rank:
                for cut, box, v in zip(slab.cuts, boxes, values, strict=True):
                    self._put(self._target(cut.chunk.name, box), _part_of(v, box, cut.rows))
                continue
            if boxes not in sent:
                parts = list(zip(slab.cuts, boxes, strict=True))
                sent[boxes] = torch.empty(_bundle_bytes(parts), dtype=torch.uint8)
                for (cut, box), v, room in zip(parts, values, _rooms(sent[boxes], parts), strict=True):
                    room.copy_(_part_of(v, box, cut.rows))
            messages.send(sent[boxes], taker)

    def _unpack(self, buffer: Tensor, parts: list[tuple[Cut, Box]]) -> None:
        for (cut, box), room in zip(parts, _rooms(buffer, parts), strict=True):
            self._put(self._target(cut.chunk.name, box), room)

    def _target(self, name: str, part: Box) -> Tensor:
        local, box = self._parts[name]
        return local if part == box else local[part.slices_in(box)]


def _part_of(values: Tensor, part: Box, rows: Box) -> Tensor:
    return values if part == rows else values[part.slices_in(rows)]


def _bundle_bytes(parts: list[tuple[Cut, Box]]) -> int:
    return sum(_padded(box.volume * cut.chunk.dtype.itemsize) for cut, box in parts)


def _padded(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT


def _rooms(buffer: Tensor, parts: list[tuple[Cut, Box]]) -> Iterator[Tensor]:
    """Where each part lies in a message."""
    at = 0
    for cut, box in parts:
        nbytes = box.volume * cut.chunk.dtype.itemsize
        yield buffer[at : at + nbytes].view(cut.chunk.dtype).view(box.sizes)
        at += _padded(nbytes)


def _aimed(job: Job, parts: Parts) -> Job:
    local, box = parts[job.name]
    return job.part(job.common, local if job.common == box else local[job.common.slices_in(box)])
