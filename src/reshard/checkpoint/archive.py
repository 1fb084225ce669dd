"""How does one chunk lie in a data file? As the archive that torch.save would make of it, so that torch.load reads it.

A zip of stored records: data.pkl (how to rebuild the tensor), byteorder, data/0 (its numbers), version. What stands
before the numbers depends on dtype and shape alone, what follows also on their CRC32, so the numbers themselves go from
the tensor's memory to the file without a copy.
Source: the bytes that torch 2.13's torch.save writes; the zip format is PKWARE's APPNOTE 6.3, sections 4.3.7 to 4.3.16.
"""

from __future__ import annotations

import pickle
import struct
import sys
from collections import OrderedDict
from functools import lru_cache
from io import BytesIO
from math import prod
from typing import Any

import torch
from torch._utils import _rebuild_tensor_v2, _rebuild_tensor_v3  # private: torch.save's pickles name them; torch 2.13.0

from reshard.checkpoint.manifest import crc32
from reshard.torch_zip import ITEM_BYTES

ALIGNMENT = 64  # of the numbers within the archive, as torch.save does
MOST_BYTES = 0xFFFFFFFF  # of a zip without zip64; a chunk is far smaller

_LOCAL = struct.Struct("<4s5H3I2H")
_CENTRAL = struct.Struct("<4s6H3I5H2I")
_END = struct.Struct("<4s4H2IH")
_DESCRIPTOR = struct.Struct("<4s3I")
_CRC = struct.Struct("<I")
_CRC_IN_DESCRIPTOR, _CRC_IN_CENTRAL = 4, 16  # where they have it
_UTF8, _DESCRIBED = 0x800, 0x8  # names are UTF-8; CRC and sizes follow the data instead of preceding it
_FOLDER = "archive/"

_STORAGE: dict[torch.dtype, Any] = {
    torch.float64: torch.DoubleStorage,
    torch.float32: torch.FloatStorage,
    torch.float16: torch.HalfStorage,
    torch.bfloat16: torch.BFloat16Storage,
    torch.int64: torch.LongStorage,
    torch.int32: torch.IntStorage,
    torch.int16: torch.ShortStorage,
    torch.int8: torch.CharStorage,
    torch.uint8: torch.ByteStorage,
    torch.bool: torch.BoolStorage,
    torch.complex64: torch.ComplexFloatStorage,
    torch.complex128: torch.ComplexDoubleStorage,
}  # the others have no storage class of their own: theirs is untyped, and the tensor says what it is


def supported(dtype: torch.dtype) -> bool:
    """Can a tensor of this dtype be stored?"""
    return str(dtype).removeprefix("torch.") in ITEM_BYTES


@lru_cache(maxsize=4096)
def head(dtype: torch.dtype, sizes: tuple[int, ...]) -> bytes:
    """All bytes before the numbers of a chunk."""
    return _head(dtype, sizes)[0]


def tail(dtype: torch.dtype, sizes: tuple[int, ...], crc: int) -> bytes:
    """All bytes after the numbers. crc: their CRC32."""
    template, *places = _tail(dtype, sizes)
    filled = bytearray(template)
    for place in places:
        _CRC.pack_into(filled, place, crc)
    return bytes(filled)


@lru_cache(maxsize=4096)
def overhead(dtype: torch.dtype, sizes: tuple[int, ...]) -> int:
    """Bytes of a chunk beside its numbers."""
    return len(_head(dtype, sizes)[0]) + len(_tail(dtype, sizes)[0])


@lru_cache(maxsize=4096)
def _tail(dtype: torch.dtype, sizes: tuple[int, ...]) -> tuple[bytes, int, int]:
    """The bytes after the numbers but for their CRC32, and the two places where that belongs."""
    start, entries = _head(dtype, sizes)
    nbytes = prod(sizes) * dtype.itemsize
    out = BytesIO()
    out.write(_DESCRIPTOR.pack(b"PK\x07\x08", 0, nbytes, nbytes))
    at = len(start) + nbytes + out.tell()
    version = b"3\n"
    out.write(_local_header("version", version))
    out.write(version)
    directory = len(start) + nbytes + out.tell()
    for name, where, data in entries[:-1]:
        out.write(_central_header(name, where, len(data), crc32(data), 0))
    numbers = out.tell()
    out.write(_central_header("data/0", entries[-1][1], nbytes, 0, _DESCRIBED))
    out.write(_central_header("version", at, len(version), crc32(version), 0))
    length = out.tell() - (directory - len(start) - nbytes)
    count = len(entries) + 1
    out.write(_END.pack(b"PK\x05\x06", 0, 0, count, count, length, directory, 0))
    return out.getvalue(), _CRC_IN_DESCRIPTOR, numbers + _CRC_IN_CENTRAL


@lru_cache(maxsize=4096)
def _head(dtype: torch.dtype, sizes: tuple[int, ...]) -> tuple[bytes, list[tuple[str, int, bytes]]]:
    """The bytes before the numbers, and (name, offset, content) of each record that begins there."""
    assert prod(sizes) * dtype.itemsize <= MOST_BYTES, f"a chunk of {sizes} {dtype} is larger than a zip can hold"
    out = BytesIO()
    entries = []
    for name, content in (("data.pkl", _pickle(dtype, sizes)), ("byteorder", sys.byteorder.encode())):
        entries.append((name, out.tell(), content))
        out.write(_local_header(name, content))
        out.write(content)
    entries.append(("data/0", out.tell(), b""))
    # The extra field pads the header so that the numbers begin aligned; "FB" is the id that torch.save uses for it.
    bare = out.tell() + _LOCAL.size + len(_FOLDER + "data/0") + 4
    padding = b"Z" * (-bare % ALIGNMENT)
    extra = b"FB" + struct.pack("<H", len(padding)) + padding
    out.write(_local_header("data/0", b"", extra=extra, flags=_DESCRIBED))
    return out.getvalue(), entries


def _local_header(name: str, content: bytes, *, extra: bytes = b"", flags: int = 0) -> bytes:
    full = (_FOLDER + name).encode()
    crc, nbytes = (0, 0) if flags else (crc32(content), len(content))
    fixed = _LOCAL.pack(b"PK\x03\x04", 0, _UTF8 | flags, 0, 0, 0, crc, nbytes, nbytes, len(full), len(extra))
    return fixed + full + extra


def _central_header(name: str, where: int, nbytes: int, crc: int, flags: int) -> bytes:
    full = (_FOLDER + name).encode()
    return _CENTRAL.pack(
        b"PK\x01\x02", 0, 0, _UTF8 | flags, 0, 0, 0, crc, nbytes, nbytes, len(full), 0, 0, 0, 0, 0, where
    ) + full  # fmt: skip


class _Shell:
    """Pickles as the tensor that torch.load will rebuild around the record data/0."""

    def __init__(self, dtype: torch.dtype, sizes: tuple[int, ...]) -> None:
        self.dtype, self.sizes = dtype, sizes

    def __reduce__(self) -> tuple[Any, ...]:
        strides = tuple(prod(self.sizes[i + 1 :]) for i in range(len(self.sizes)))
        arguments: tuple[Any, ...] = (_Record(self), 0, self.sizes, strides, False, OrderedDict())
        if self.dtype in _STORAGE:
            return _rebuild_tensor_v2, arguments
        return _rebuild_tensor_v3, (*arguments, self.dtype)


class _Record:
    """Stands for the storage; never pickled itself."""

    def __init__(self, shell: _Shell) -> None:
        self.shell = shell


class _Pickler(pickle.Pickler):
    """Writes a _Record as torch's persistent id of a storage."""

    def persistent_id(self, obj: Any) -> Any:
        """What torch.save would say of the storage."""
        if isinstance(obj, _Record):
            count, dtype = prod(obj.shell.sizes), obj.shell.dtype
            if dtype in _STORAGE:
                return ("storage", _STORAGE[dtype], "0", "cpu", count)
            return ("storage", torch.UntypedStorage, "0", "cpu", count * dtype.itemsize)
        return None


def _pickle(dtype: torch.dtype, sizes: tuple[int, ...]) -> bytes:
    out = BytesIO()
    _Pickler(out, protocol=2).dump(_Shell(dtype, sizes))
    return out.getvalue()
