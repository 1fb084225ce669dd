"""Is docs/checkpoint-format.md enough to read a checkpoint? A reader by that page, of the standard library alone."""

from __future__ import annotations

import io
import json
import pickle
import struct
import zipfile
import zlib
from math import prod
from pathlib import Path
from typing import Any

ITEM_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "int64": 8, "int32": 4, "int16": 2, "int8": 1,
              "uint8": 1, "bool": 1}  # fmt: skip


class DamagedError(Exception):
    """The bytes are not those that were written."""


def demand(fits: bool, what: str) -> None:
    if not fits:
        raise DamagedError(what)


# -- section 2


def read_manifest(directory: Path) -> dict[str, Any]:
    manifest = json.loads((directory / "manifest.json").read_bytes())
    digest = manifest.pop("digest")
    text = json.dumps(manifest, sort_keys=True, separators=(",", ":"))
    demand(f"{zlib.crc32(text.encode()):08x}" == digest, "manifest.json: digest")
    demand(manifest["format_version"] == 1, "manifest.json: version")
    for name, entry in manifest["files"].items():
        demand("/" not in name and name not in (".", ".."), f"{name}: outside")
        demand((directory / name).is_file(), f"{name}: missing")
        demand((directory / name).stat().st_size == entry["bytes"], f"{name}: size")
    return manifest


def read_whole(directory: Path, name: str, manifest: dict[str, Any]) -> bytes:
    content = (directory / name).read_bytes()
    demand(f"{zlib.crc32(content):08x}" == manifest["files"][name]["crc32"], f"{name}: CRC32")
    return content


# -- section 3


FIELDS = {
    "Metadata": (),
    "TensorStorageMetadata": ("properties", "size", "chunks"),
    "ChunkStorageMetadata": ("offsets", "sizes"),
    "MetadataIndex": ("fqn", "offset", "index"),
    "_StorageInfo": ("relative_path", "offset", "length"),
    "TensorProperties": (),
}
MEMORY_FORMATS = ("TORCH_CONTIGUOUS_FORMAT", "TORCH_CHANNELS_LAST", "TORCH_PRESERVE_FORMAT")


class Plain:
    """Any of the index's classes: called with its fields, or made empty and given its attributes."""

    fields: tuple[str, ...] = ()

    def __init__(self, *values: Any) -> None:
        self.__dict__.update(zip(self.fields, values, strict=False))

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)
        else:
            self.state = state


def memory_format(value: Any) -> Any:
    return value


def member(of: Any, name: Any) -> Any:
    """`getattr` in an index: for this one class and the names of its members, and nothing else."""
    demand(of is memory_format and name in MEMORY_FORMATS, f"an index has no use for getattr of {name}")
    return name


class Index(pickle.Unpickler):
    """Knows the names that an index needs, and no other."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in ITEM_BYTES:
            return name
        if (module, name) == ("torch", "Size"):
            return tuple
        if name == "_get_layout":
            return lambda value: value
        if name == "_MEM_FORMAT_ENCODING":
            return memory_format
        if (module, name) == ("builtins", "getattr"):
            return member
        if module.startswith("torch.distributed.checkpoint.") and name in FIELDS:
            return type(name, (Plain,), {"fields": FIELDS[name]})
        raise DamagedError(f"an index has no use for {module}.{name}")


# -- sections 4 and 5


def read_data(directory: Path, name: str, manifest: dict[str, Any]) -> bytes:
    """A data file, every block of it checked against its sidecar."""
    content, sidecar = (directory / name).read_bytes(), read_whole(directory, name + ".crc", manifest)
    magic, block_bytes, _, nbytes = struct.unpack_from("<8sIIQ", sidecar)
    demand(magic == b"RSHCRC1\n" and nbytes == len(content), f"{name}.crc: head")
    crcs = struct.unpack(f"<{-(-nbytes // block_bytes)}I", sidecar[24:])
    for i, crc in enumerate(crcs):
        demand(zlib.crc32(content[i * block_bytes : (i + 1) * block_bytes]) == crc, f"{name}: block {i}")
    return content


def numbers_of(archive: bytes) -> bytes:
    with zipfile.ZipFile(io.BytesIO(archive)) as records:
        return records.read("archive/data/0")


# -- section 8


def read(directory: Path) -> dict[str, tuple[tuple[int, ...], str, bytes]]:
    """Stored name -> shape, dtype, numbers (row-major, little-endian)."""
    manifest = read_manifest(directory)
    index = Index(io.BytesIO(read_whole(directory, ".metadata", manifest))).load()
    places = {(key.fqn, tuple(key.offset)): info for key, info in index.storage_data.items()}
    data = {name: read_data(directory, name, manifest) for name in manifest["files"] if name.endswith(".distcp")}
    found = {}
    for name, entry in index.state_dict_metadata.items():
        shape, dtype = tuple(entry.size), entry.properties.state[0]
        demand(manifest["tensors"][name] == {"shape": list(shape), "dtype": dtype}, f"{name}: manifest and index")
        item, whole, filled = ITEM_BYTES[dtype], bytearray(prod(shape) * ITEM_BYTES[dtype]), 0
        for chunk in entry.chunks:
            info = places[name, tuple(chunk.offsets)]
            part = numbers_of(data[info.relative_path][info.offset : info.offset + info.length])
            demand(len(part) == prod(chunk.sizes) * item, f"{name}: numbers of a chunk")
            put(whole, shape, part, tuple(chunk.offsets), tuple(chunk.sizes), item)
            filled += prod(chunk.sizes)
        demand(filled == prod(shape), f"{name}: chunks")
        found[name] = (shape, dtype, bytes(whole))
    return found


def put(
    whole: bytearray, shape: tuple[int, ...], part: bytes, offsets: tuple[int, ...], sizes: tuple[int, ...], item: int
) -> None:
    """Copy a box into its tensor, run by run along the last dim."""
    if not shape:
        whole[:] = part
        return
    run = sizes[-1]
    for number in range(prod(sizes[:-1])):
        at, rest = 0, number
        stride = shape[-1]
        for extent, offset, size in zip(
            reversed(shape[:-1]), reversed(offsets[:-1]), reversed(sizes[:-1]), strict=True
        ):
            at += (offset + rest % size) * stride
            rest //= size
            stride *= extent
        at = (at + offsets[-1]) * item
        whole[at : at + run * item] = part[number * run * item : (number + 1) * run * item]
