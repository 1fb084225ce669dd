"""How is DCP's own index, `.metadata`, written? So that plain torch reads it, and we in a fraction of its time.

It is a pickle of torch.distributed.checkpoint.metadata.Metadata. Who reads it here is index.py.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterable, Mapping
from enum import Enum
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo  # private: the on-disk record; torch 2.13.0

from reshard.checkpoint.blocks import write_durably
from reshard.checkpoint.layout import METADATA
from reshard.checkpoint.manifest import TensorEntry
from reshard.checkpoint.state import dtype_from_name
from reshard.checkpoint.writer import Stored


def write_metadata(
    directory: Path,
    tensors: Mapping[str, TensorEntry],
    paths: Mapping[str, tuple[str | int, ...]],
    stored: Iterable[Stored],
    objects: Mapping[str, tuple[str, int, int]],
) -> bytes:
    """Write the DCP index for what the writers left; flushed and fsynced. Returns its bytes.

    paths: name -> its path in the nested state, which dcp_to_torch rebuilds. objects: what somebody else's planner has
    pickled, name -> (file, offset, length).
    """
    by_name: dict[str, list[Stored]] = {fqn: [] for fqn in tensors}
    for item in stored:
        by_name[item.fqn].append(item)
    entries: dict[str, Any] = {}
    storage: dict[dcp.MetadataIndex, Any] = {}
    for fqn, entry in tensors.items():
        items = sorted(by_name[fqn], key=lambda s: s.box.offsets)
        entries[fqn] = described(entry, [item.box for item in items])
        for number, item in enumerate(items):
            index = dcp.MetadataIndex(fqn, _size(item.box.offsets), number)
            storage[index] = _StorageInfo(item.file, item.offset, item.length)
    for name, place in objects.items():
        entries[name] = dcp.BytesStorageMetadata()
        storage[dcp.MetadataIndex(name)] = _StorageInfo(*place)
    metadata = dcp.Metadata(state_dict_metadata=entries, planner_data=dict(paths), storage_data=storage)
    content = _pickled(metadata, _Brief)
    write_durably(directory / METADATA, content)
    return content


def pickled(metadata: dcp.Metadata) -> bytes:
    """An index in torch's own form, every attribute by its name."""
    return _pickled(metadata, _ByValue)


def _pickled(metadata: dcp.Metadata, pickler: type[_ByValue]) -> bytes:
    out = io.BytesIO()
    pickler(out, protocol=4).dump(metadata)
    return out.getvalue()


class _ByValue(pickle.Pickler):
    """Writes the members of enums as calls of their class, on every Python.

    By itself Python 3.11.0 to 3.11.3 writes `getattr(class, name)`, which no reader of pickles from anybody can allow.
    """

    def reducer_override(self, obj: Any) -> Any:
        """The call that makes the object again."""
        return (type(obj), (obj.value,)) if isinstance(obj, Enum) else NotImplemented


class _Brief(_ByValue):
    """Writes the many small objects as calls of their classes: half the bytes, and a third of the time to read them.

    By itself a pickle of a dataclass names every one of its attributes.
    """

    def reducer_override(self, obj: Any) -> Any:
        """The call that makes the object again."""
        kind = type(obj)
        if kind is dcp.MetadataIndex:
            return kind, (obj.fqn, obj.offset, obj.index)
        if kind is _StorageInfo:
            return kind, (obj.relative_path, obj.offset, obj.length)
        if kind is dcp.TensorStorageMetadata:
            return kind, (obj.properties, obj.size, obj.chunks)
        if kind is dcp.ChunkStorageMetadata:
            return kind, (obj.offsets, obj.sizes)
        return super().reducer_override(obj)


def described(
    entry: TensorEntry, boxes: Iterable[tuple[tuple[int, ...], tuple[int, ...]]]
) -> dcp.TensorStorageMetadata:
    """What DCP says of one tensor. boxes: offsets and sizes of its chunks.

    Equal sizes, boxes and properties are one object, which a pickle stores once: most tensors are cut alike.
    """
    chunks = [_chunk(offsets, sizes) for offsets, sizes in boxes]
    return dcp.TensorStorageMetadata(_properties(entry.dtype), _size(entry.shape), chunks)


_size = lru_cache(maxsize=1 << 16)(torch.Size)


@lru_cache(maxsize=1 << 16)
def _chunk(offsets: tuple[int, ...], sizes: tuple[int, ...]) -> dcp.ChunkStorageMetadata:
    return dcp.ChunkStorageMetadata(_size(offsets), _size(sizes))


@cache
def _properties(dtype: str) -> dcp.TensorProperties:
    return dcp.TensorProperties(dtype=dtype_from_name(dtype))
