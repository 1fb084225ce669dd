"""What does each rank hold, or want? Told briefly, for a thousand ranks with thousands of tensors each.

Tensors that lie alike on a rank (weights and their moments, the same matrix of every layer) are one kind, so a rank of
a large run has some ten of them. An offer says which name is of which kind, which is the same on most ranks, and apart
from it where this rank's boxes of each kind lie, which is not. What is worked out for a kind holds for all its tensors.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType

from reshard.checkpoint.manifest import TensorEntry
from reshard.checkpoint.state import Box, dtype_from_name
from reshard.errors import CheckpointError

Path = tuple[str, ...]


@dataclass(frozen=True)
class Names:
    """The part of an offer that many ranks have in common.

    kinds: name -> number of its kind, in the order of the rank's state. entries: of each kind. meshes: of each kind, the
    mesh that declares which ranks hold replicas of each other; None: nobody does. paths: name -> its place in the nested
    state, also of tensors of which this rank has nothing.
    """

    kinds: dict[str, int]
    entries: list[TensorEntry]
    meshes: list[str | None]
    paths: dict[str, Path]


class Offer:
    """One rank's part of the tensors. boxes: of each kind, those that this rank has."""

    def __init__(self, packed: bytes, boxes: list[tuple[Box, ...]]) -> None:
        self.packed, self.boxes = (
            packed,
            boxes,
        )  # `packed` travels and is compared, it is unpacked once for all equal ones

    @staticmethod
    def of(
        parts: Iterable[tuple[str, TensorEntry, Box]],
        paths: Mapping[str, Path] | None = None,
        meshes: Mapping[str, str] = MappingProxyType({}),
    ) -> Offer:
        """parts: name, whole tensor and box, each once. meshes: of the names that have one.

        Raises CheckpointError where parts contradict each other.
        """
        by_name: dict[str, tuple[TensorEntry, list[Box]]] = {}
        for name, entry, box in parts:
            known, boxes = by_name.setdefault(name, (entry, []))
            if known != entry or box in boxes:
                raise CheckpointError(f"`{name}` is offered twice: {entry} {box} after {known} {boxes}")
            boxes.append(box)
        numbers: dict[tuple[TensorEntry, tuple[Box, ...], str | None], int] = {}
        kinds = {
            name: numbers.setdefault((entry, tuple(boxes), meshes.get(name)), len(numbers))
            for name, (entry, boxes) in by_name.items()
        }
        text = json.dumps((kinds, [(entry.shape, entry.dtype, mesh) for entry, _, mesh in numbers], dict(paths or {})))
        return Offer(zlib.compress(text.encode(), 1), [boxes for _, boxes, _ in numbers])

    @cached_property
    def names(self) -> Names:
        """What `packed` says."""
        kinds, entries, paths = json.loads(zlib.decompress(self.packed))
        return Names(
            kinds,
            [TensorEntry(tuple(shape), dtype) for shape, dtype, _ in entries],
            [mesh for _, _, mesh in entries],
            {name: tuple(path) for name, path in paths.items()},
        )

    def __iter__(self) -> Iterator[tuple[str, TensorEntry, Box]]:
        """Name, tensor and box of each part, in the order of the state."""
        names = self.names
        for name, kind in names.kinds.items():
            for box in self.boxes[kind]:
                yield name, names.entries[kind], box

    def __reduce__(self) -> tuple[type[Offer], tuple[bytes, list[tuple[Box, ...]]]]:
        return Offer, (self.packed, self.boxes)


@dataclass
class Spread:
    """How tensors of one kind lie on all ranks. holders: box -> the ranks that have it, ascending.

    meshes: ranks that have something of it, and the mesh that says so.
    """

    entry: TensorEntry
    holders: dict[Box, list[int]] = field(default_factory=dict)
    meshes: list[tuple[list[int], str | None]] = field(default_factory=list)

    @cached_property
    def item_bytes(self) -> int:
        """Bytes of one number."""
        return dtype_from_name(self.entry.dtype).itemsize

    @cached_property
    def shared(self) -> list[tuple[Box, list[int]]]:
        """The boxes that several ranks have."""
        return [(box, ranks) for box, ranks in self.holders.items() if len(ranks) > 1]

    @cached_property
    def undeclared(self) -> list[tuple[Box, int, tuple[int, ...]]]:
        """The shared boxes whose ranks no one mesh declares to be replicas; their bytes and their ranks."""
        meshes = {mesh for _, mesh in self.meshes}
        if len(meshes) == 1 and None not in meshes:
            return []
        mesh_of = {rank: mesh for ranks, mesh in self.meshes for rank in ranks}
        return [
            (box, box.volume * self.item_bytes, tuple(ranks))
            for box, ranks in self.shared
            if mesh_of[ranks[0]] is None or len({mesh_of[rank] for rank in ranks}) > 1
        ]


def spreads(offers: Sequence[Offer]) -> dict[str, Spread]:
    """How does each tensor lie on the ranks? Tensors that lie alike share one answer. offers: in rank order.

    Raises CheckpointError where ranks mean different tensors by one name.
    """
    ranks_by_names: dict[bytes, list[int]] = {}
    for rank, offer in enumerate(offers):
        ranks_by_names.setdefault(offer.packed, []).append(rank)
    groups = [(ranks, offers[ranks[0]].names) for ranks in ranks_by_names.values()]
    memberships: dict[str, tuple[tuple[int, int], ...]] = {}
    for number, (_, names) in enumerate(groups):
        for name, kind in names.kinds.items():
            memberships[name] = (*memberships.get(name, ()), (number, kind))
    known: dict[tuple[tuple[int, int], ...], Spread] = {}
    result = {}
    for name, membership in memberships.items():
        spread = known.get(membership)
        if spread is None:
            spread = known[membership] = _spread(name, membership, groups, offers)
        result[name] = spread
    return result


def _spread(
    name: str, membership: tuple[tuple[int, int], ...], groups: list[tuple[list[int], Names]], offers: Sequence[Offer]
) -> Spread:
    entries = [groups[number][1].entries[kind] for number, kind in membership]
    if len(set(entries)) > 1:
        said = {entry: groups[number][0][0] for entry, (number, _) in zip(entries, membership, strict=True)}
        each = ", ".join(f"{list(entry.shape)} {entry.dtype} on rank {rank}" for entry, rank in said.items())
        raise CheckpointError(
            f"`{name}` is not the same tensor on all ranks: {each}",
            hint="give each rank's tensor a name of its own, or make it a DTensor with a part on each rank",
        )
    meshes = [(groups[number][0], groups[number][1].meshes[kind]) for number, kind in membership]
    spread = Spread(entries[0], meshes=meshes)
    of_rank = {rank: kind for number, kind in membership for rank in groups[number][0]}
    for rank in sorted(of_rank):
        for box in offers[rank].boxes[of_rank[rank]]:
            spread.holders.setdefault(box, []).append(rank)
    return spread
