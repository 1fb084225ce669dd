"""Who writes what? One plan that all ranks agree on, gathered again only when somebody's part has changed."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from reshard.checkpoint.manifest import TensorEntry
from reshard.checkpoint.ranks import Ranks
from reshard.checkpoint.state import Box, Piece

Key = tuple[str, Box]


@dataclass(frozen=True)
class Planned:
    """What the others must know of a piece: everything but its numbers."""

    fqn: str
    shape: tuple[int, ...]
    dtype: str
    box: Box
    nbytes: int


@dataclass(frozen=True)
class SavePlan:
    """The whole save as one rank sees it.

    mine: what this rank writes. keys: what all ranks write together. paths: name -> its place in the nested state.
    """

    mine: frozenset[Key]
    keys: frozenset[Key]
    tensors: Mapping[str, TensorEntry]
    paths: Mapping[str, tuple[str, ...]]


class Planner:
    """Makes plans, and keeps them: a run saves the same tensors in the same way each time."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._plans: dict[bytes, SavePlan] = {}

    def plan(self, pieces: Iterable[Piece], paths: Mapping[str, tuple[str, ...]]) -> SavePlan:
        """The plan for what all ranks offer. Collective: one number where nobody's offer is new, else one gathering.

        The key is a digest of everything that decides the plan: names, shapes, dtypes, boxes and paths. A rank whose
        own offer it knows still takes part in the gathering when another's has changed.
        """
        offer = [planned(piece) for piece in pieces]
        content = [(p.fqn, p.shape, p.dtype, p.box.offsets, p.box.sizes) for p in offer]
        key = hashlib.blake2b(pickle.dumps((content, dict(paths)), protocol=5), digest_size=16).digest()
        (news,) = self._ranks.maximum(int(key not in self._plans))
        if news:
            self._plans[key] = make_plan(self._ranks.everywhere(lambda: (dict(paths), offer)), self._ranks.rank)
        return self._plans[key]


def make_plan(offers: Sequence[tuple[Mapping[str, tuple[str, ...]], Sequence[Planned]]], rank: int) -> SavePlan:
    """The plan for what each rank offers, in rank order. A pure function, so that all ranks come to the same."""
    tensors = check_coverage(offer for _, offer in offers)
    chosen = assign([offer for _, offer in offers])
    return SavePlan(
        mine=frozenset(chosen[rank]),
        keys=frozenset(key for keys in chosen for key in keys),
        tensors=tensors,
        paths={fqn: path for paths, _ in offers for fqn, path in paths.items()},
    )


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
