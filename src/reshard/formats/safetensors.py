"""What does a safetensors file hold, and where? Its header, checked: no holes, no overlaps, nothing beyond the end.

u64 header bytes (little-endian), that many bytes of JSON {name: {dtype, shape, data_offsets}}, then the numbers.
Source: the format's README. It stores no checksums.
"""

from __future__ import annotations

import json
import struct
from math import prod
from pathlib import Path
from typing import Any

from reshard.errors import FormatError
from reshard.formats.protocol import ITEM_BYTES, Block, Region, StoredTensor

_MOST_HEADER_BYTES = 100_000_000  # the reference implementation's own limit

# safetensors' name of a dtype -> torch's
DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
}  # fmt: skip


def open_safetensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one file, by name as written. Reads the header only. Raises FormatError."""
    base, entries = read_header(path)
    tensors = {}
    for name, kind, shape, begin, end in entries:
        if kind not in DTYPES:
            raise FormatError(f"`{path}`: {name} is of dtype {kind!r}, which is not known", path=path)
        dtype = DTYPES[kind]
        rows, width = (shape[0], prod(shape[1:]) * ITEM_BYTES[dtype]) if shape else (1, ITEM_BYTES[dtype])
        region = Region(path, base + begin, end - begin)
        tensors[name] = StoredTensor(name, shape, dtype, (Block(region, 0, 0, rows, 0, width),))
    return tensors


Entry = tuple[str, str, tuple[int, ...], int, int]  # name, dtype as written, shape, first byte of the data, byte behind


def read_header(path: Path) -> tuple[int, list[Entry]]:
    """Where the data begins, and the tensors in their order there: all of it, and nothing else. Raises FormatError."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            start = file.read(8)
            if len(start) < 8:
                raise FormatError(f"`{path}` has {size} bytes, too few for a safetensors header", path=path)
            (length,) = struct.unpack("<Q", start)
            if length > min(size - 8, _MOST_HEADER_BYTES):
                raise FormatError(
                    f"`{path}` says its header has {length} bytes, but the file has {size}",
                    path=path,
                    hint="it was cut short, or it is not a safetensors file",
                )
            header = json.loads(file.read(length))
    except OSError as error:
        raise FormatError(f"`{path}` cannot be read: {error.strerror or error}", path=path) from None
    except (ValueError, RecursionError) as error:
        raise FormatError(f"`{path}` does not have a JSON header: {error}", path=path) from None
    if not isinstance(header, dict):
        raise FormatError(f"`{path}` does not have a JSON object as its header", path=path)
    header.pop("__metadata__", None)
    base, at = 8 + length, 0
    entries = sorted((_entry(path, name, entry) for name, entry in header.items()), key=lambda e: (e[3], e[4]))
    for name, kind, shape, begin, end in entries:
        if begin != at:
            what = "a hole" if begin > at else "an overlap"
            raise FormatError(f"`{path}` has {what} before {name}: it begins at {begin}, expected {at}", path=path)
        expected = prod(shape) * ITEM_BYTES[DTYPES[kind]] if kind in DTYPES else max(0, end - begin)
        if end - begin != expected:
            raise FormatError(
                f"`{path}`: {name} {shape} {kind} takes {expected} bytes, the header gives it {end - begin}", path=path
            )
        at = end
    if base + at != size:
        raise FormatError(
            f"`{path}` has {size} bytes, its header describes {base + at}",
            path=path,
            hint="it was cut short: copy or download it again" if size < base + at else None,
        )
    return base, entries


def _entry(path: Path, name: str, entry: Any) -> Entry:
    try:
        dtype, shape = entry["dtype"], tuple(entry["shape"])
        begin, end = entry["data_offsets"]
        numbers = (*shape, begin, end)
        if type(dtype) is not str or not all(type(n) is int and 0 <= n < 1 << 63 for n in numbers):
            raise ValueError(numbers)
    except (KeyError, TypeError, ValueError) as error:
        raise FormatError(f"`{path}`: the header's entry for {name} is not understood ({error})", path=path) from None
    return name, dtype, shape, begin, end
