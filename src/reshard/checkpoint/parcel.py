"""How does an index get from the rank that has read it to all others? As a few long arrays, unpacked where it is asked.

Reading a large index takes half a minute and gigabytes, which one rank can afford and eight of a machine cannot. Most of
it repeats: tensors that are cut alike have the same boxes, which travel once; what is left are three numbers for each
chunk. A rank unpacks the tensors that it wants.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import overload

import numpy as np
from numpy.typing import NDArray

from reshard.checkpoint.index import Boxes, Chunk, Index, IndexedTensor


@dataclass(frozen=True)
class PackedTensors(Mapping[str, IndexedTensor]):
    """The tensors of an index. kinds: shape, dtype and boxes. numbers: name -> its kind and its first chunk.

    places: file (as a number), offset and length of each chunk, in the order of the names; (3, chunks), uint64.
    """

    kinds: list[tuple[tuple[int, ...], str, Boxes]]
    numbers: dict[str, tuple[int, int]]
    files: list[str]
    places: NDArray[np.uint64]

    def __getitem__(self, name: str) -> IndexedTensor:
        kind, first = self.numbers[name]
        shape, dtype, boxes = self.kinds[kind]
        return _PackedTensor(shape, dtype, _Chunks(self, boxes, first))

    def __iter__(self) -> Iterator[str]:
        return iter(self.numbers)

    def __len__(self) -> int:
        return len(self.numbers)


class _Chunks(Sequence[Chunk]):
    """The chunks of one tensor, unpacked when the first of them is asked for: names are compared without them."""

    def __init__(self, tensors: PackedTensors, boxes: Boxes, first: int) -> None:
        self._tensors, self.boxes, self._first = tensors, boxes, first

    @cached_property
    def _unpacked(self) -> list[Chunk]:
        names = self._tensors.files
        files, offsets, lengths = self._tensors.places[:, self._first : self._first + len(self.boxes)].tolist()
        return [
            Chunk(*box, names[file], offset, length)
            for box, file, offset, length in zip(self.boxes, files, offsets, lengths, strict=True)
        ]

    def __iter__(self) -> Iterator[Chunk]:
        return iter(self._unpacked)

    @overload
    def __getitem__(self, index: int) -> Chunk: ...
    @overload
    def __getitem__(self, index: slice) -> list[Chunk]: ...
    def __getitem__(self, index: int | slice) -> Chunk | list[Chunk]:
        return self._unpacked[index]

    def __len__(self) -> int:
        return len(self.boxes)


@dataclass(frozen=True)
class _PackedTensor(IndexedTensor):
    chunks: _Chunks

    @property
    def boxes(self) -> Boxes:
        return self.chunks.boxes


def packed(index: Index) -> Index:
    """The same index, with tensors that are small to send and are unpacked one by one; without paths, which no reader needs."""
    kinds: dict[tuple[tuple[int, ...], str, Boxes], int] = {}
    files: dict[str, int] = {}
    numbers: dict[str, tuple[int, int]] = {}
    places: list[tuple[int, int, int]] = []
    for name, tensor in index.tensors.items():
        numbers[name] = kinds.setdefault((tensor.shape, tensor.dtype, tensor.boxes), len(kinds)), len(places)
        places += [(files.setdefault(chunk.file, len(files)), chunk.offset, chunk.length) for chunk in tensor.chunks]
    columns = np.array(places, np.uint64).reshape(-1, 3).T
    return Index(PackedTensors(list(kinds), numbers, list(files), columns), index.objects, {})
