"""What does DCP's own index say? Reading and writing `.metadata`, without running what is in it.

`.metadata` is a pickle of torch.distributed.checkpoint.metadata.Metadata. Plain torch unpickles it, and with it
whatever an attacker put there; we know the names that a real one can contain and refuse all others.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo  # private: the on-disk record; torch 2.13.0
from torch.serialization import _get_layout  # private: how a pickle names a layout; torch 2.13.0

from reshard.checkpoint.blocks import write_durably
from reshard.checkpoint.index import MOST_BYTES, checked, index_bytes
from reshard.checkpoint.layout import METADATA
from reshard.checkpoint.manifest import Manifest, TensorEntry
from reshard.checkpoint.state import dtype_from_name
from reshard.checkpoint.writer import Stored
from reshard.errors import IntegrityError
from reshard.safe_pickle import loads


def _allowed() -> dict[tuple[str, str], Any]:
    names: dict[tuple[str, str], Any] = {
        ("torch", "Size"): torch.Size,
        ("torch.serialization", "_get_layout"): _get_layout,
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): _StorageInfo,
        ("collections", "OrderedDict"): dict,
        ("collections", "defaultdict"): dict,
        # Only kept as text: a path in a pickle must never be opened.
        ("pathlib", "PosixPath"): PurePosixPath,
        ("pathlib", "PurePosixPath"): PurePosixPath,
        ("pathlib._local", "PosixPath"): PurePosixPath,
    }
    for cls in (
        "Metadata", "TensorStorageMetadata", "ChunkStorageMetadata", "TensorProperties", "BytesStorageMetadata",
        "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING",
    ):  # fmt: skip
        names["torch.distributed.checkpoint.metadata", cls] = getattr(dcp, cls)
    for name in dir(torch):
        if isinstance(getattr(torch, name), torch.dtype):
            names["torch", name] = getattr(torch, name)
    return names


def read_metadata(directory: Path, manifest: Manifest | None) -> dcp.Metadata:
    """The DCP index of a checkpoint directory, checked for what we rely on.

    manifest: what its bytes must be; None for a foreign directory.

    Raises: NotACheckpoint, IntegrityError (it is not what was written, or cannot be true), StorageError; FormatError
    from the unpickler where the file names anything that an index has no use for.
    """
    content = index_bytes(directory, manifest)
    found = loads(content, allowed=_allowed(), path=directory / METADATA, most_bytes=MOST_BYTES)
    checked(found, directory)
    if not isinstance(found, dcp.Metadata) or not all(map(_is_real, found.state_dict_metadata.values())):
        raise IntegrityError(
            f"`{directory / METADATA}` is not a DCP index: it is made of other things", path=directory, files=[METADATA]
        )
    return found


def _is_real(entry: Any) -> bool:
    """A class can be given any attributes by a pickle: only a real tensor's entry may look like one."""
    if isinstance(entry, dcp.TensorStorageMetadata):
        return isinstance(entry.properties.dtype, torch.dtype)
    return not hasattr(entry, "chunks")


def write_metadata(
    directory: Path,
    tensors: Mapping[str, TensorEntry],
    paths: Mapping[str, tuple[str, ...]],
    stored: list[Stored],
) -> bytes:
    """Write the DCP index for what the writers left; flushed and fsynced. Returns its bytes.

    paths: name -> its path in the nested state, which dcp_to_torch rebuilds.
    """
    chunks: dict[str, list[dcp.ChunkStorageMetadata]] = {fqn: [] for fqn in tensors}
    storage: dict[dcp.MetadataIndex, Any] = {}
    for item in sorted(stored, key=lambda s: (s.fqn, s.box.offsets)):
        offsets = torch.Size(item.box.offsets)
        index = dcp.MetadataIndex(item.fqn, offsets, len(chunks[item.fqn]))
        chunks[item.fqn].append(dcp.ChunkStorageMetadata(offsets, torch.Size(item.box.sizes)))
        storage[index] = _StorageInfo(relative_path=item.file, offset=item.offset, length=item.length)
    described: dict[str, Any] = {
        fqn: dcp.TensorStorageMetadata(
            properties=dcp.TensorProperties(dtype=dtype_from_name(entry.dtype)),
            size=torch.Size(entry.shape),
            chunks=chunks[fqn],
        )
        for fqn, entry in tensors.items()
    }
    content = pickle.dumps(
        dcp.Metadata(state_dict_metadata=described, planner_data=dict(paths), storage_data=storage), protocol=4
    )
    write_durably(directory / METADATA, content)
    return content
