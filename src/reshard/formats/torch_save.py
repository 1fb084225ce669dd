"""How does a file of torch.save lie on disk, before its numbers are there? A zip whose every offset is known.

    <root>/data.pkl   <root>/byteorder   <root>/data/0, data/1, ...   <root>/version   directory
All records are stored as they are, their bytes 64-aligned by padding in the header's extra field. The pickle says which
tensor is which part of which record; it is put together here opcode by opcode, so no torch is needed. The CRC32s come
last: headers have their place and size without them.
Sources: what torch 2.13's torch.save writes; CPython's pickletools; PKWARE's APPNOTE 6.3, sections 4.3.7 to 4.3.16, 4.5.3.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

from isal import isal_zlib

from reshard.formats.output import OutFile, Sums

ALIGNMENT = 64
_LOCAL = struct.Struct("<4s5H3I2H")
_CENTRAL = struct.Struct("<4s6H3I5H2I")
_END = struct.Struct("<4s4H2IH")
_END64 = struct.Struct("<4sQ2H2I4Q")
_LOCATOR = struct.Struct("<4sIQI")
_UTF8, _VERSION_64 = 0x800, 45
_MOST32, _MOST16 = 0xFFFFFFFF, 0xFFFF
_PADDING, _ZIP64 = 0x4246, 1  # ids of extra fields; torch.save calls its padding "FB"

_STORAGE = {
    "float64": "DoubleStorage", "float32": "FloatStorage", "float16": "HalfStorage", "bfloat16": "BFloat16Storage",
    "int64": "LongStorage", "int32": "IntStorage", "int16": "ShortStorage", "int8": "CharStorage",
    "uint8": "ByteStorage", "bool": "BoolStorage", "complex64": "ComplexFloatStorage",
}  # fmt: skip


@dataclass(frozen=True)
class Saved:
    """A tensor to be saved. storage: tensors of the same one share their numbers."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    storage: str


@dataclass(frozen=True)
class _Record:
    name: str
    header: int  # where its local header begins
    data: int
    nbytes: int
    content: bytes | None  # None for a tensor's


def lay_out(
    file: str, tensors: Sequence[Saved], root: str = "archive", *, base: int = 0, bare: bool = False
) -> tuple[OutFile, dict[str, int]]:
    """The file without its numbers, and where they go: storage -> offset.

    base: the archive begins at this byte of the file, as the items of a DCP data file do. bare: it holds the only tensor
    itself, not a dict of them. The OutFile's offsets are the file's, its nbytes the archive's.
    """
    storages: dict[str, Saved] = {}
    for tensor in tensors:
        storages.setdefault(tensor.storage, tensor)
    keys = {storage: str(i) for i, storage in enumerate(storages)}
    contents: list[tuple[str, int, bytes | None]] = []
    for name, small in (("data.pkl", _pickle(tensors, keys, bare=bare)), ("byteorder", b"little")):
        contents.append((name, len(small), small))
    contents += [(f"data/{keys[storage]}", tensor.nbytes, None) for storage, tensor in storages.items()]
    contents.append(("version", 2, b"3\n"))
    records, at = [], 0
    for name, nbytes, content in contents:
        full = f"{root}/{name}"
        start = at + _LOCAL.size + len(full.encode()) + len(_extra64(nbytes)) + 4
        data = -(-start // ALIGNMENT) * ALIGNMENT
        records.append(_Record(full, at, data, nbytes, content))
        at = data + nbytes
    directory = at
    tail = _directory(records, directory, dict.fromkeys((r.name for r in records), 0))
    by_data = {base + record.data: record.name for record in records}

    def later(sums: Sums) -> list[tuple[int, bytes]]:
        crcs = {r.name: isal_zlib.crc32(r.content) if r.content is not None else 0 for r in records}
        crcs |= {
            by_data[place.offset]: crc for place, crc in sums.items() if place.file == file and place.offset in by_data
        }
        headers = [(base + r.header, _local_header(r, crcs[r.name])) for r in records]
        return [*headers, (base + directory, _directory(records, directory, crcs))]

    known = tuple((base + r.data, r.content) for r in records if r.content is not None)
    begins = {record.name: base + record.data for record in records}
    offsets = {storage: begins[f"{root}/data/{key}"] for storage, key in keys.items()}
    return OutFile(file, directory + len(tail), known, later), offsets


def _extra64(nbytes: int) -> bytes:
    return struct.pack("<HHQQ", _ZIP64, 16, nbytes, nbytes) if nbytes >= _MOST32 else b""


def _local_header(record: _Record, crc: int) -> bytes:
    name, extra = record.name.encode(), _extra64(record.nbytes)
    padding = record.data - record.header - _LOCAL.size - len(name) - len(extra) - 4
    extra += struct.pack("<HH", _PADDING, padding) + b"Z" * padding
    size = min(record.nbytes, _MOST32)
    version = _VERSION_64 if record.nbytes >= _MOST32 else 0
    fixed = _LOCAL.pack(b"PK\x03\x04", version, _UTF8, 0, 0, 0, crc, size, size, len(name), len(extra))
    return fixed + name + extra


def _directory(records: Sequence[_Record], start: int, crcs: Mapping[str, int]) -> bytes:
    """The zip's own list of its records, and its end."""
    out = bytearray()
    for record in records:
        name = record.name.encode()
        large = record.nbytes >= _MOST32
        wide = [record.nbytes, record.nbytes] if large else []
        wide += [record.header] if record.header >= _MOST32 else []
        extra = struct.pack(f"<HH{len(wide)}Q", _ZIP64, 8 * len(wide), *wide) if wide else b""
        size, version = min(record.nbytes, _MOST32), _VERSION_64 if wide else 0
        out += _CENTRAL.pack(
            b"PK\x01\x02", version, version, _UTF8, 0, 0, 0, crcs[record.name], size, size, len(name), len(extra),
            0, 0, 0, 0, min(record.header, _MOST32),
        )  # fmt: skip
        out += name + extra
    nbytes, count = len(out), len(records)
    if start >= _MOST32 or nbytes >= _MOST32 or count >= _MOST16:
        end = start + nbytes
        out += _END64.pack(b"PK\x06\x06", 44, _VERSION_64, _VERSION_64, 0, 0, count, count, nbytes, start)
        out += _LOCATOR.pack(b"PK\x06\x07", 0, end, 1)
    few = min(count, _MOST16)
    out += _END.pack(b"PK\x05\x06", 0, 0, few, few, min(nbytes, _MOST32), min(start, _MOST32), 0)
    return bytes(out)


# -- the pickle, protocol 2


def _pickle(tensors: Sequence[Saved], keys: Mapping[str, str], *, bare: bool) -> bytes:
    """A dict of name -> torch._utils._rebuild_tensor_v2(storage, 0, shape, stride, False, OrderedDict())."""
    sizes = {tensor.storage: prod(tensor.shape) for tensor in tensors}
    memo: dict[str, int] = {}
    out = bytearray(b"\x80\x02" if bare else b"\x80\x02}(")
    for tensor in tensors:
        stride = tuple(prod(tensor.shape[i + 1 :]) for i in range(len(tensor.shape)))
        out += (b"" if bare else _text(tensor.name)) + _name("torch._utils\n_rebuild_tensor_v2", memo)
        out += b"(("
        out += _text("storage") + _name(f"torch\n{_STORAGE[tensor.dtype]}", memo)
        out += _text(keys[tensor.storage]) + _text("cpu") + _int(sizes[tensor.storage]) + b"tQ"
        out += _int(0) + _ints(tensor.shape) + _ints(stride) + b"\x89"
        out += _name("collections\nOrderedDict", memo) + b")R" + b"tR"
    return bytes(out + (b"." if bare else b"u."))


def _text(text: str) -> bytes:
    data = text.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def _int(value: int) -> bytes:
    if value < 1 << 31:
        return b"J" + struct.pack("<i", value)
    data = value.to_bytes(value.bit_length() // 8 + 1, "little")
    return b"\x8a" + bytes((len(data),)) + data


def _ints(values: tuple[int, ...]) -> bytes:
    return b"(" + b"".join(map(_int, values)) + b"t"


def _name(lines: str, memo: dict[str, int]) -> bytes:
    """A global: spelled once, then remembered."""
    if lines in memo:
        return b"h" + bytes((memo[lines],))
    memo[lines] = len(memo)
    return b"c" + lines.encode() + b"\n" + b"q" + bytes((memo[lines],))
