"""Is an index that has travelled the one that was read, and is it small?"""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from reshard.checkpoint.index import Chunk, Index, IndexedTensor
from reshard.checkpoint.parcel import packed


def an_index(tensors: int, chunks: int) -> Index:
    """Tensors cut by rows over files, every third of another shape; one is a scalar."""
    found = {"step": IndexedTensor((), "int64", (Chunk((), (), "__0_0.distcp", 7, 900),))}
    for number in range(tensors):
        width = 16 if number % 3 else 24
        found[f"layers.{number}.weight"] = IndexedTensor(
            (4 * chunks, width),
            "float32",
            tuple(
                Chunk((4 * i, 0), (4, width), f"__{i}_0.distcp", 2**40 + 1000 * number, 900 + number)
                for i in range(chunks)
            ),
        )
    return Index(found, {"loader": ("__0_0.distcp", 1, 2)}, {"step": ("step",)})


@pytest.mark.parametrize("chunks", [1, 5])
def test_every_tensor_is_what_it_was(chunks: int) -> None:
    index = an_index(40, chunks)
    found = pickle.loads(pickle.dumps(packed(index)))
    assert list(found.tensors) == list(index.tensors)
    for name, tensor in index.tensors.items():
        other = found.tensors[name]
        assert (other.shape, other.dtype, tuple(other.chunks)) == (tensor.shape, tensor.dtype, tensor.chunks)
        assert all(type(chunk) is Chunk and type(chunk.offset) is int for chunk in other.chunks)
    assert found.objects == index.objects
    assert "absent" not in found.tensors
    with pytest.raises(KeyError):
        found.tensors["absent"]


def test_it_takes_few_bytes_for_each_chunk() -> None:
    index = an_index(300, 64)
    assert len(pickle.dumps(packed(index))) < 27 * 300 * 64


def test_an_index_of_nothing(tmp_path: Path) -> None:
    assert dict(packed(Index({}, {}, {})).tensors) == {}
