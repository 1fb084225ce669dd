"""How do bytes become a rank's tensors? Only chunks that this rank's boxes touch, each checked before it is used.

Names, shapes and dtypes are compared before anything is touched; nothing is cast unless asked for.
"""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from reshard.checkpoint.state import Box, dtype_name, local_part
from reshard.errors import IntegrityError, StorageError, TensorMismatch


def check_names(directory: Path, metadata: Metadata, wanted: Mapping[str, Tensor], *, cast: bool) -> None:
    """Does the checkpoint hold these tensors, in these shapes (and dtypes, unless cast)? Raises TensorMismatch."""
    missing = [name for name in wanted if name not in metadata.state_dict_metadata]
    wrong: dict[str, tuple[str, str]] = {}
    for name, tensor in wanted.items():
        stored = metadata.state_dict_metadata.get(name)
        if stored is None:
            continue
        if not isinstance(stored, TensorStorageMetadata):
            wrong[name] = ("a tensor", "a pickled object")
        elif tuple(stored.size) != tuple(tensor.shape):
            wrong[name] = (f"shape {tuple(tensor.shape)}", f"{tuple(stored.size)}")
        elif not cast and stored.properties.dtype != tensor.dtype:
            wrong[name] = (dtype_name(tensor.dtype), dtype_name(stored.properties.dtype))
    if missing or wrong:
        raise TensorMismatch(
            f"checkpoint `{directory}` does not fit the model", path=directory, missing=missing, wrong=wrong
        )


def read_tensors(directory: Path, metadata: Metadata, wanted: Mapping[str, Tensor], *, cast: bool = False) -> int:
    """Fill this rank's part of each tensor in place. Returns the bytes read.

    wanted: stored name -> destination (a DTensor's local shard is filled). Call check_names first.
    cast: convert where dtypes differ. Memory: one stored chunk at a time.
    Raises: IntegrityError naming file and tensor where a stored CRC, size or shape disagrees; StorageError.
    """
    jobs = []
    for name, tensor in wanted.items():
        local, box = local_part(tensor)
        stored = metadata.state_dict_metadata[name]
        assert isinstance(stored, TensorStorageMetadata)
        filled = 0
        for chunk in stored.chunks:
            source = Box(tuple(chunk.offsets), tuple(chunk.sizes))
            common = box.overlap(source)
            if common is None:
                continue
            filled += common.volume
            info = metadata.storage_data.get(MetadataIndex(name, chunk.offsets))
            if info is None:
                raise IntegrityError(
                    f"`{directory}` does not say where {name} at {source.offsets} is stored", path=directory, rank_local=True
                )
            jobs.append((info, name, stored.properties.dtype, source, common, box, local))
        if filled != box.volume:
            raise IntegrityError(
                f"`{directory}` stores {filled} of the {box.volume} numbers wanted of {name}", path=directory, rank_local=True
            )
    jobs.sort(key=lambda job: (job[0].relative_path, job[0].offset))
    read = 0
    for info, name, dtype, source, common, box, local in jobs:
        values = _read_item(directory, info, name, dtype, source)
        read += info.length
        with torch.no_grad():
            local[common.slices_in(box)].copy_(values[common.slices_in(source)])
    return read


def read_whole(directory: Path, metadata: Metadata, name: str) -> Tensor:
    """One stored tensor, whole, on CPU."""
    stored = metadata.state_dict_metadata[name]
    assert isinstance(stored, TensorStorageMetadata)
    result = torch.empty(stored.size, dtype=stored.properties.dtype)
    read_tensors(directory, metadata, {name: result})
    return result


def _read_item(directory: Path, info: Any, name: str, dtype: torch.dtype, box: Box) -> Tensor:
    """One stored chunk: a torch.save archive whose every record's CRC32 is checked."""
    path = directory / info.relative_path

    def damaged(reason: str) -> IntegrityError:
        return IntegrityError(
            f"`{path}` is damaged: {name} at {box.offsets}: {reason}",
            path=directory,
            files=[info.relative_path],
            rank_local=True,
        )

    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if info.offset < 0 or info.length <= 0 or info.offset + info.length > size:
                raise damaged(f"bytes {info.offset} to {info.offset + info.length} of a file of {size}")
            file.seek(info.offset)
            content = file.read(info.length)
    except FileNotFoundError:
        raise damaged("the file is missing") from None
    except OSError as error:
        raise StorageError(f"`{path}` cannot be read: {error}", path=directory, rank_local=True) from None
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            broken = archive.testzip()  # reads every record and compares its CRC, which torch.load does not
        if broken is not None:
            raise damaged(f"record {broken} does not have its stored CRC32")
        values = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except IntegrityError:
        raise
    except Exception as error:  # what a broken archive raises has no common type: zip, pickle and torch each have theirs
        raise damaged(f"not a torch.save archive ({error})") from None
    if not isinstance(values, Tensor) or tuple(values.shape) != box.sizes or values.dtype != dtype:
        raise damaged("it holds something else than the index says")
    return values
