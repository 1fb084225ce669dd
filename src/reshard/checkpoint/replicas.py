"""Do the ranks that hold one name hold the same numbers? Asked at every save, of all that nobody has declared replicas.

A mesh declares its ranks' parts by their placements. Plain tensors say nothing, and of DTensors of two meshes that claim
one box (stages of a pipeline that use one name) neither mesh knows of the other: one rank's numbers would be stored, and
what the other ranks have would be lost without a word.

Bytes are compared, so that each NaN and the sign of a zero counts, by CRC32: it takes bytes as fast as memory gives them,
it always sees a difference that lies within four neighbouring bytes, and misses another once in four billion.
"""

from __future__ import annotations

import logging
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from reshard.checkpoint.manifest import crc32
from reshard.checkpoint.offers import Spread
from reshard.checkpoint.ranks import Ranks
from reshard.checkpoint.state import Box, Piece, bytes_of
from reshard.errors import CheckpointError, ConfigError, listed

logger = logging.getLogger(__name__)

Key = tuple[str, Box]
Differ = Literal[
    "refuse", "first"
]  # what becomes of a save whose ranks differ: refused, or the lowest rank's is stored

FULL_BYTES = 64 << 20  # up to so many bytes of a rank are compared in full at each save
SAMPLES = 64  # beyond that, so many numbers of each part ...
SMALL_BYTES = 64 << 10  # ... that is larger than this: of a smaller one, taking samples takes longer than taking all
_BATCH_BYTES, _BATCHED_BYTES = 1 << 20, 1 << 14  # parts up to the second are summed together, up to the first at a time

HINT = (
    "give each rank's a name of its own, or make it a DTensor with a part on each rank; "
    'differ="first" stores what the lowest rank has'
)


@dataclass(frozen=True)
class Undeclared:
    """Parts of one shape and dtype that the same ranks hold, and that nobody has declared replicas.

    box: that each of them fills in its tensor. sampled: only samples of them are compared.
    """

    ranks: tuple[int, ...]
    names: Sequence[str]
    box: Box
    sampled: bool

    @property
    def keys(self) -> Iterator[Key]:
        """Each of the parts."""
        return ((name, self.box) for name in self.names)


def undeclared(tensors: Mapping[str, Spread]) -> list[Undeclared]:
    """What of these must be compared, and how? A pure function, so that all ranks come to the same, in the same order."""
    names: dict[int, list[str]] = {}
    for name, spread in tensors.items():
        names.setdefault(id(spread), []).append(name)
    alike = [
        (nbytes, Undeclared(ranks, names[id(spread)], box, sampled=False))
        for spread in {id(spread): spread for spread in tensors.values()}.values()
        for box, nbytes, ranks in spread.undeclared
    ]
    much = ranks_with_much((nbytes * len(parts.names), parts.ranks) for nbytes, parts in alike)
    return [replace(parts, sampled=only_sampled(nbytes, parts.ranks, much)) for nbytes, parts in alike]


def ranks_with_much(parts: Iterable[tuple[int, Sequence[int]]]) -> set[int]:
    """Which ranks hold more than can be compared in full? parts: bytes, and the ranks that hold them."""
    held: Counter[int] = Counter()
    for nbytes, ranks in parts:
        held.update(dict.fromkeys(ranks, nbytes))
    return {rank for rank, nbytes in held.items() if nbytes > FULL_BYTES}


def only_sampled(nbytes: int, ranks: Sequence[int], with_much: set[int]) -> bool:
    """Is a part of so many bytes, held by these ranks, compared by samples?"""
    return nbytes > SMALL_BYTES and not with_much.isdisjoint(ranks)


def differing(compared: Sequence[Undeclared], pieces: Iterable[Piece], ranks: Ranks, salt: int) -> dict[Key, list[int]]:
    """The parts that are not the same on all their ranks -> the ranks, the lowest first, then those that differ from it.

    pieces: this rank's. salt: the same on all ranks; chooses the samples. Collective: one small round, and a second one
    where something differs.
    """
    if not compared:
        return {}
    mine = {(p.fqn, p.offsets): p.part for p in pieces}
    places = sample_places(salt)

    def held(parts: Undeclared) -> list[Tensor]:
        found = [mine[name, parts.box.offsets] for name in parts.names]
        tensors = [part for part in found if part is not None]
        assert len(tensors) == len(found), "what is planned is in memory"
        return samples(tensors, places) if parts.sampled else tensors

    def sums() -> dict[int, int]:
        return {n: checksum(held(parts)) for n, parts in enumerate(compared) if ranks.rank in parts.ranks}

    told = ranks.everywhere(sums)
    suspects = [parts for n, parts in enumerate(compared) if len({told[rank][n] for rank in parts.ranks}) > 1]
    if not suspects:
        return {}

    def each() -> dict[Key, int]:
        own = [parts for parts in suspects if ranks.rank in parts.ranks]
        return {key: checksum([part]) for parts in own for key, part in zip(parts.keys, held(parts), strict=True)}

    found = ranks.everywhere(each)
    result = {}
    for parts in suspects:
        lowest = parts.ranks[0]
        for key in parts.keys:
            unlike = [rank for rank in parts.ranks if found[rank][key] != found[lowest][key]]
            if unlike:
                result[key] = [lowest, *unlike]
    return result


def sample_places(salt: int) -> Tensor:
    """Where in a part do the samples lie, from 0 to 1? One in each 64th, at other places for each salt."""
    chance = random.Random(salt)  # noqa: S311  (nothing secret; the same numbers on every rank)
    return torch.tensor([(i + chance.random()) / SAMPLES for i in range(SAMPLES)], dtype=torch.float64)


def samples(parts: Sequence[Tensor], places: Tensor) -> list[Tensor]:
    """Some numbers of parts of one shape, on their devices."""
    at = (places * parts[0].numel()).long()
    scattered = torch.unravel_index(at, parts[0].shape)
    return [part.view(-1)[at] if part.is_contiguous() else part[scattered] for part in parts]


def checksum(parts: Sequence[Tensor]) -> int:
    """The CRC32 of the numbers of tensors of one shape and dtype, on any device."""
    crc = 0
    with torch.no_grad():
        for data in _bytes(parts):
            crc = crc32(data, crc)
    return crc


def _bytes(parts: Sequence[Tensor]) -> Iterator[memoryview]:
    """Many small tensors are put together first: one by one, they would take ten times as long."""
    together = len(parts) > 1 and parts[0].nbytes <= _BATCHED_BYTES
    if not together or len({part.device for part in parts}) > 1 or not all(type(part) is Tensor for part in parts):
        for part in parts:
            yield bytes_of(_resolved(part.detach().cpu()).contiguous())
        return
    count = max(1, _BATCH_BYTES // max(1, parts[0].nbytes))
    for start in range(0, len(parts), count):
        yield bytes_of(_resolved(torch.stack(tuple(parts[start : start + count])).cpu()))


def _resolved(part: Tensor) -> Tensor:
    """Its numbers as they are, where it is a view that torch conjugates or negates on reading."""
    return part.resolve_conj().resolve_neg() if part.is_conj() or part.is_neg() else part


def refusal(directory: Path, different: Mapping[Key, Sequence[int]]) -> CheckpointError:
    """The error for a save whose ranks differ."""
    return CheckpointError(
        f"ranks hold other numbers under one name, so `{directory}` was not saved: {listed(differences(different))}",
        path=directory,
        hint=HINT,
    )


def log_sampled(directory: Path, parts: int) -> None:
    """Say that not all was compared, where of so many parts not all was."""
    if parts:
        logger.warning(
            "%s: not all was compared: ranks hold more than %d MiB each that no mesh declares replicas, "
            "so of %d parts %d numbers each were",
            directory, FULL_BYTES >> 20, parts, SAMPLES,
        )  # fmt: skip


def log_first(directory: Path, different: Mapping[Key, Sequence[int]]) -> None:
    """Say whose numbers are stored, where ranks differ."""
    if different:
        logger.warning("%s: the lowest rank's numbers are stored of %s", directory, ", ".join(differences(different)))


def differences(different: Mapping[Key, Sequence[int]]) -> list[str]:
    """Each name, with the ranks on which it differs."""
    by_name: dict[str, tuple[int, set[int]]] = {}
    for (name, _), (lowest, *others) in different.items():
        by_name.setdefault(name, (lowest, set()))[1].update(others)
    return [f"`{name}` {against(lowest, sorted(others))}" for name, (lowest, others) in by_name.items()]


def against(lowest: int, others: Sequence[int]) -> str:
    """In words, who differs from whom."""
    return f"(rank{'s' * (len(others) > 1)} {listed(map(str, others))} not as rank {lowest})"


def check_differ(differ: str) -> None:
    """Raise ConfigError where this is no answer to what becomes of a save whose ranks differ."""
    if differ not in ("refuse", "first"):
        raise ConfigError(f'differ is `{differ}`, expected "refuse" or "first"', key="differ", hint='differ="first"')
