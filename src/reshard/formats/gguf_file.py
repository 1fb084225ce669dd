"""What is in a GGUF file? Key-values and tensor infos, checked; and the same written.

"GGUF" u32 version, u64 tensors, u64 key-values; the key-values; per tensor its name, dims (fastest first), type, offset;
then, aligned, the numbers. Little-endian. It stores no checksums.
Source: ggml's docs/gguf.md.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

from reshard.errors import FormatError
from reshard.formats.output import OutFile

ALIGNMENT = 32
_KEY_ALIGNMENT = "general.alignment"
_MOST_COUNT = 1 << 24  # tensors, keys or items: the largest vocabulary has some 300,000
_MOST_DIMS = 4
_STRING, _ARRAY, _BOOL = 8, 9, 7
_FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_U32, _I32, _F32 = 4, 5, 6

PLAIN = {0: "float32", 1: "float16", 30: "bfloat16", 28: "float64"}  # ggml type -> torch dtype
_TYPES = {dtype: number for number, dtype in PLAIN.items()}
# ggml type -> numbers in a block, and its bytes. Source: ggml's ggml.c, type_traits; gguf's GGML_QUANT_SIZES.
BLOCKS = {
    0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34), 9: (32, 40), 10: (256, 84),
    11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210), 15: (256, 292), 16: (256, 66), 17: (256, 74),
    18: (256, 98), 19: (256, 50), 20: (32, 18), 21: (256, 110), 22: (256, 82), 23: (256, 136), 24: (1, 1), 25: (1, 2),
    26: (1, 4), 27: (1, 8), 28: (1, 8), 29: (256, 56), 30: (1, 2), 34: (256, 54), 35: (256, 66), 39: (32, 17),
    40: (64, 36), 41: (128, 18),
}  # fmt: skip


@dataclass(frozen=True)
class Info:
    """One tensor. shape: as torch has it, slowest dim first. offset: in the file."""

    name: str
    shape: tuple[int, ...]
    ggml_type: int
    offset: int

    @property
    def nbytes(self) -> int | None:
        """Of its numbers; None where its type is not known, or its rows are no whole number of blocks."""
        numbers, block_bytes = BLOCKS.get(self.ggml_type, (0, 0))
        row = self.shape[-1] if self.shape else 1
        return prod(self.shape) // numbers * block_bytes if numbers and row % numbers == 0 else None


@dataclass(frozen=True)
class GgufFile:
    """The header of a file."""

    path: Path
    nbytes: int
    values: Mapping[str, Any]
    tensors: Mapping[str, Info]


class _Reader:
    """A file that says where it ended too early."""

    def __init__(self, stream: BinaryIO, path: Path, nbytes: int) -> None:
        self._stream, self._path, self.left = stream, path, nbytes

    def take(self, size: int) -> bytes:
        if size > self.left:
            raise FormatError(
                f"{self._path} ends in its header: {size:,} bytes announced, {self.left:,} left", path=self._path
            )
        self.left -= size
        return self._stream.read(size)

    def number(self, form: str) -> Any:
        return struct.unpack("<" + form, self.take(struct.calcsize("<" + form)))[0]

    def count(self) -> int:
        value = int(self.number("Q"))
        if value > _MOST_COUNT:
            raise FormatError(f"{self._path} announces {value:,} of something, no model has so many", path=self._path)
        return value

    def text(self) -> str:
        return self.take(int(self.number("Q"))).decode("utf-8", "surrogateescape")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY:
            inner, count = self.number("I"), self.count()
            if inner == _STRING:
                return [self.text() for _ in range(count)]
            form = self._form(inner)
            return list(struct.unpack(f"<{count}{form}", self.take(count * struct.calcsize(form))))
        return self.number(self._form(kind))

    def _form(self, kind: int) -> str:
        if kind not in _FORMATS:
            raise FormatError(f"{self._path} has a value of type {kind}, which GGUF does not know", path=self._path)
        return _FORMATS[kind]


def read_gguf(path: Path) -> GgufFile:
    """The header of a GGUF file. Raises FormatError."""
    try:
        nbytes = path.stat().st_size
        with path.open("rb") as stream:
            return _read(_Reader(stream, path, nbytes), path, nbytes)
    except OSError as error:
        raise FormatError(f"{path} cannot be read: {error.strerror or error}", path=path) from None


def _read(reader: _Reader, path: Path, nbytes: int) -> GgufFile:
    magic = reader.take(min(4, nbytes))
    if magic != b"GGUF":
        raise FormatError(f"{path} is not a GGUF file: it begins with {magic!r}", path=path)
    version = reader.number("I")
    if version not in (2, 3):
        raise FormatError(f"{path} has GGUF version {version}, expected 2 or 3 in little-endian order", path=path)
    n_tensors, n_values = reader.count(), reader.count()
    values: dict[str, Any] = {}
    for _ in range(n_values):
        key = reader.text()
        values[key] = reader.value(reader.number("I"))
    described = []
    for _ in range(n_tensors):
        name, n_dims = reader.text(), reader.number("I")
        if n_dims > _MOST_DIMS:
            raise FormatError(f"{path}: {name} has {n_dims} dims, GGUF has at most {_MOST_DIMS}", path=path)
        dims = [int(reader.number("Q")) for _ in range(n_dims)]
        described.append((name, tuple(reversed(dims)), int(reader.number("I")), int(reader.number("Q"))))
    alignment = values.get(_KEY_ALIGNMENT, ALIGNMENT)
    if type(alignment) is not int or not 0 < alignment <= 1 << 20:
        raise FormatError(f"{path}: {_KEY_ALIGNMENT} is {alignment!r}", path=path)
    start = nbytes - reader.left
    start = -(-start // alignment) * alignment
    tensors: dict[str, Info] = {}
    for name, shape, kind, offset in described:
        if name in tensors:
            raise FormatError(f"{path} has two tensors {name}", path=path)
        tensors[name] = Info(name, shape, kind, start + offset)
    return GgufFile(path, nbytes, values, tensors)


def check_places(file: GgufFile) -> list[Info]:
    """Are the numbers of all tensors in the file, each in a place of its own? Those whose size is not known are returned.

    Raises FormatError where the file is cut short, or two tensors overlap.
    """
    unknown, end = [], 0
    for info in sorted(file.tensors.values(), key=lambda info: info.offset):
        if info.offset < end:
            raise FormatError(
                f"{file.path}: {info.name} begins at byte {info.offset:,}, within the one before it", path=file.path
            )
        if info.nbytes is None:
            unknown.append(info)
        end = info.offset + (1 if info.nbytes is None else info.nbytes)
        if end > file.nbytes:
            raise FormatError(
                f"{file.path} is cut short: {info.name} ends at byte {end:,}, the file has {file.nbytes:,}",
                path=file.path,
                hint="copy or download this file again",
            )
    return unknown


# -- writing


def _encoded(value: Any) -> bytes:
    """Type and bytes of a value: bool, int (uint32), float (float32), str, or a list of one of these (ints as int32)."""
    if isinstance(value, bool):
        return struct.pack("<I?", _BOOL, value)
    if isinstance(value, int):
        return struct.pack("<II", _U32, value)
    if isinstance(value, float):
        return struct.pack("<If", _F32, value)
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _string(value)
    if all(isinstance(item, str) for item in value):
        return struct.pack("<IIQ", _ARRAY, _STRING, len(value)) + b"".join(map(_string, value))
    return struct.pack(f"<IIQ{len(value)}i", _ARRAY, _I32, len(value), *value)


def _string(text: str) -> bytes:
    data = text.encode("utf-8", "surrogateescape")
    return struct.pack("<Q", len(data)) + data


def lay_out(
    file: str, values: Mapping[str, Any], tensors: Sequence[tuple[str, tuple[int, ...], str, int]]
) -> tuple[OutFile, list[int]]:
    """A GGUF file without its numbers, and where each tensor's go. tensors: (name, shape, dtype, bytes)."""
    head = bytearray(b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(values)))
    for key, value in values.items():
        head += _string(key) + _encoded(value)
    relative, at = [], 0
    for name, shape, dtype, nbytes in tensors:
        head += _string(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
        head += struct.pack("<IQ", _TYPES[dtype], at)
        relative.append(at)
        at += -(-nbytes // ALIGNMENT) * ALIGNMENT
    head += bytes(-len(head) % ALIGNMENT)
    known = [(0, bytes(head))]
    for offset, (*_, nbytes) in zip(relative, tensors, strict=True):
        if padding := -nbytes % ALIGNMENT:
            known.append((len(head) + offset + nbytes, bytes(padding)))
    return OutFile(file, len(head) + at, tuple(known)), [len(head) + offset for offset in relative]
