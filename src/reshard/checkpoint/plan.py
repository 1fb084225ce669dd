"""Who writes what? One plan that all ranks agree on, gathered again only when somebody's part has changed.

Whether what they hold under one name is the same is asked at every save; see replicas.py.
"""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from reshard.checkpoint.manifest import TensorEntry
from reshard.checkpoint.offers import Offer, Spread, spreads
from reshard.checkpoint.ranks import Ranks
from reshard.checkpoint.replicas import (
    Differ,
    Key,
    Undeclared,
    differing,
    log_first,
    log_sampled,
    refusal,
    undeclared,
)
from reshard.checkpoint.state import Box, Piece
from reshard.errors import CheckpointError, listed


@dataclass(frozen=True)
class SavePlan:
    """The whole save, as rank `rank` sees it. paths: name -> its place in the nested state. compared: before each save."""

    rank: int
    tensors: Mapping[str, TensorEntry]
    paths: Mapping[str, tuple[str, ...]]
    offers: Sequence[Offer]
    writers: Mapping[Key, int]  # of what several ranks hold; the rest is written by its only holder
    compared: Sequence[Undeclared] = ()

    @cached_property
    def mine(self) -> frozenset[Key]:
        """What this rank writes."""
        return frozenset((name, box) for name, _, box in self.written_by(self.rank))

    def written_by(self, rank: int) -> Iterator[tuple[str, TensorEntry, Box]]:
        """What a rank writes, in the order in which it does."""
        for name, entry, box in self.offers[rank]:
            if self.writers.get((name, box), rank) == rank:
                yield name, entry, box


@dataclass(frozen=True)
class Offered:
    """What one rank holds of a state. paths: name -> its place in the nested state. meshes: of the names that have one."""

    pieces: list[Piece]
    paths: Mapping[str, tuple[str, ...]]
    meshes: Mapping[str, str]


class Planner:
    """Makes plans, and keeps them: a run saves the same tensors in the same way each time. For the ranks of one group.

    differ: what becomes of a save for which ranks hold other numbers under one name; see replicas.py.
    """

    def __init__(self, ranks: Ranks, differ: Differ = "refuse") -> None:
        self._ranks, self._differ = ranks, differ
        self._plans: dict[object, tuple[int, SavePlan]] = {}  # with its number, the same on all ranks
        self._made = 0
        # Plan, what the lowest rank writes, both together.
        self._firsts: dict[object, tuple[SavePlan, frozenset[Key], SavePlan]] = {}

    def begin(self, directory: Path, offered: Callable[[], Offered]) -> tuple[list[Piece], Planning]:
        """Ask whether all ranks have the same plan for what they offer, without waiting for the answer. Collective, as is
        the planning's `plan`: a few numbers where they have, else one gathering, which also brings what `offered` has
        raised; and what nobody has declared to be replicas is compared.

        Plans are found by everything that decides them: names, shapes, dtypes, boxes, meshes and paths; and are taken only
        where those of all ranks are of one gathering. directory: for what is said of it. Returns the pieces, none where
        `offered` failed.
        """
        own = Offered([], {}, {})
        key: object = None
        failure: BaseException | None = None
        try:
            own = offered()
            key = (
                tuple((p.fqn, p.shape, p.dtype, p.box) for p in own.pieces),
                tuple(own.paths.items()),
                tuple(own.meshes.items()),
            )
        except BaseException as error:  # told to all ranks by `plan`
            failure = error
        number, known = self._plans.get(key, (0, None))
        guess = self._firsts[key][2] if key in self._firsts else known
        told = self._ranks.begin_maximum(number, -number, secrets.randbelow(1 << 31))

        def say() -> Offer:
            if failure is not None:
                raise failure
            return offer_of(own)

        def answer() -> SavePlan:
            highest, lowest, salt = told()
            plan = known
            if plan is None or highest != -lowest:
                offers = self._ranks.everywhere(say)
                self._made += 1
                plan = make_plan(offers, self._ranks.rank)
                self._plans[key] = self._made, plan
            return self._compared(directory, plan, key, own.pieces, salt)

        return own.pieces, Planning(guess, answer)

    def _compared(self, directory: Path, plan: SavePlan, key: object, pieces: Sequence[Piece], salt: int) -> SavePlan:
        """The plan, if the ranks hold the same; or one by which the lowest rank writes what differs, or may differ."""
        different = differing(plan.compared, pieces, self._ranks, salt)
        if different and self._differ == "refuse":
            raise refusal(directory, different)
        sampled = [key for parts in plan.compared if parts.sampled for key in parts.keys]
        if self._ranks.is_first:
            log_sampled(directory, len(sampled))
            log_first(directory, different)
        firsts = frozenset([*sampled, *different]) if self._differ == "first" else frozenset()
        if not firsts:
            self._firsts.pop(key, None)
            return plan
        of, before, both = self._firsts.get(key, (None, None, plan))
        if of is not plan or before != firsts:
            lowest = {key: parts.ranks[0] for parts in plan.compared for key in parts.keys if key in firsts}
            both = replace(plan, writers={**plan.writers, **lowest})
            self._firsts[key] = plan, firsts, both
        return both


@dataclass(frozen=True)
class Planning:
    """A plan that the ranks are agreeing on. guess: what it will be if all have the same; None: this rank has none."""

    guess: SavePlan | None
    plan: Callable[[], SavePlan]


def offer_of(own: Offered) -> Offer:
    """What the others must know of what this rank holds: everything but the numbers."""
    return Offer.of(((p.fqn, TensorEntry(p.shape, p.dtype), p.box) for p in own.pieces), own.paths, own.meshes)


def make_plan(offers: Sequence[Offer], rank: int) -> SavePlan:
    """The plan for what each rank offers, in rank order. A pure function, so that all ranks come to the same.

    Raises CheckpointError where the ranks' parts do not make up the tensors.
    Time and memory: a few numbers for each kind of tensor and rank, and for each box that several ranks hold.
    """
    tensors = spreads(offers)
    for name, spread in {id(spread): (name, spread) for name, spread in tensors.items()}.values():
        check_coverage(name, spread)
    writers = assign(tensors, len(offers))
    different = {offer.packed: offer.names for offer in offers}.values()
    paths = {name: path for names in different for name, path in names.paths.items()}
    entries = {name: spread.entry for name, spread in tensors.items()}
    return SavePlan(rank, entries, paths, offers, writers, undeclared(tensors))


def assign(tensors: Mapping[str, Spread], ranks: int) -> dict[Key, int]:
    """Which rank writes what several hold? Each such box is written once, by the one of its ranks that has least so far.

    A pure function, so that every rank comes to the same answer without a second round. What only one rank can write
    counts first, then large boxes are placed before small ones, which level the ranks.
    """
    load = [0] * ranks
    counts = Counter(id(spread) for spread in tensors.values())
    for spread in {id(spread): spread for spread in tensors.values()}.values():
        for box, holders in spread.holders.items():
            if len(holders) == 1:
                load[holders[0]] += box.volume * spread.item_bytes * counts[id(spread)]
    shared = [
        (-box.volume * spread.item_bytes, name, box, holders)
        for name, spread in tensors.items()
        for box, holders in spread.shared
    ]
    writers = {}
    for negative_bytes, name, box, holders in sorted(shared, key=lambda s: s[:3]):
        writer = min(holders, key=load.__getitem__)  # of equal ones the lowest: they ascend
        writers[name, box] = writer
        load[writer] -= negative_bytes
    return writers


def check_coverage(name: str, spread: Spread) -> None:
    """Do the ranks' boxes tile this tensor, each number once? Raises CheckpointError, before a byte is written."""
    shape, boxes = spread.entry.shape, list(spread.holders)

    def wrong(problem: str) -> CheckpointError:
        held = [f"rank {ranks[0]}: {list(box.sizes)} at {list(box.offsets)}" for box, ranks in spread.holders.items()]
        return CheckpointError(
            f"`{name}` {list(shape)} cannot be saved: {problem}; {listed(held)}",
            hint="every rank has to hand over its own part of each tensor, and none may leave its part out",
        )

    for box in boxes:
        if not box.within(shape):
            raise wrong(f"{box} lies outside of it")
    volume, whole = sum(box.volume for box in boxes), Box((0,) * len(shape), shape).volume
    if volume != whole:
        raise wrong(f"the ranks hold {volume:,} numbers of {whole:,}")
    # Along the dim with most cuts, only boxes that follow each other closely can meet.
    dim = max(range(len(shape)), key=lambda d: len({box.offsets[d] for box in boxes}), default=None)
    if dim is None:
        return
    boxes.sort(key=lambda box: box.offsets[dim])
    for i, box in enumerate(boxes):
        end = box.offsets[dim] + box.sizes[dim]
        for j in range(i + 1, len(boxes)):
            if boxes[j].offsets[dim] >= end:
                break
            if box.overlap(boxes[j]) is not None:
                raise wrong(f"{box} and {boxes[j]} overlap")
