"""What lies where in an archive of torch.save? Its records and tensors, found without running its pickle.

Such an archive is a zip whose records are stored as they are: `data.pkl` says which tensor is which part of which
storage, `data/<key>` are the storages. Each record has a CRC32, which torch itself never looks at. It may be a file of
its own (.pt, .pth) or a part of one: every item of a DCP data file is such an archive. Imports no torch.
Source: torch/serialization.py, caffe2/serialize/inline_container.cc, the zip application note (local header, zip64).
"""

from __future__ import annotations

import errno
import io
import os
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from isal import isal_zlib

from reshard.errors import FormatError
from reshard.safe_pickle import MOST_BYTES, loads

# torch dtype name -> bytes of one element
ITEM_BYTES: dict[str, int] = {
    "float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "complex64": 8, "complex128": 16,
    "int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint8": 1, "bool": 1,
    "float8_e4m3fn": 1, "float8_e5m2": 1, "float8_e4m3fnuz": 1, "float8_e5m2fnuz": 1, "float8_e8m0fnu": 1,
    "uint16": 2, "uint32": 4, "uint64": 8,
}  # fmt: skip

_LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, lengths of name and extra field
_LEGACY_START = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # the magic number of torch.save before 1.6, pickled
_ENCRYPTED = 0x1
_MOST_DIMS = 64  # torch's own limit
_READ_BYTES = 4 << 20

_STORAGE_CLASSES = {
    "DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16", "BFloat16Storage": "bfloat16",
    "LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16", "CharStorage": "int8",
    "ByteStorage": "uint8", "BoolStorage": "bool", "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
}  # fmt: skip


class OtherArchive(FormatError):
    """An archive that is not read: nothing is known to be wrong with it."""


@dataclass(frozen=True)
class Record:
    """A run of bytes in the file. crc32: as stored with it; None where the writer stored none."""

    offset: int
    nbytes: int
    crc32: int | None


@dataclass(frozen=True)
class Storage:
    """The numbers that tensors are views of. dtype: None for an untyped one, of which `items` are bytes."""

    dtype: str | None
    key: str
    items: int


@dataclass(frozen=True)
class TensorView:
    """What stands for a tensor in the content of an archive; nothing of it has been checked against the records."""

    storage: Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def contiguous(self) -> bool:
        """Do its rows follow each other?"""
        expected = 1
        for extent, step in zip(reversed(self.shape), reversed(self.stride), strict=True):
            if extent != 1 and step != expected:
                return False
            expected *= extent
        return True


@dataclass(frozen=True)
class Archive:
    """The index of one archive. where: how errors call it. root: the folder of all records, with its slash."""

    where: str
    path: Path
    records: Mapping[str, Record]
    root: str
    content: Any


@dataclass(frozen=True)
class Placed:
    """Where a tensor's numbers lie: `nbytes` bytes from byte `first` of a record, checked to be inside of it."""

    record: Record
    first: int
    nbytes: int


def open_archive(
    fd: int, path: Path, *, start: int = 0, nbytes: int | None = None, where: str = "", opened: bool = True
) -> Archive:
    """Index the archive that lies in `nbytes` bytes of an open file from byte `start` on; None: to the file's end.

    Reads the zip's directory and the pickle. where: how errors call it, by default the path. opened False: its pickle
    is left alone, and `content` is None.
    Raises FormatError: not a zip, truncated, the legacy format, compressed or big-endian records, a pickle without its
    CRC32, or one that asks for anything but tensors and plain values. OSError as the disk does.
    """
    where = where or str(path)
    nbytes = os.fstat(fd).st_size - start if nbytes is None else nbytes
    window = _Window(fd, start, nbytes)
    records, root = _records(window, where, path)
    content = _unpickle(window, where, path, records, root) if opened else None
    return Archive(where, path, records, root, content)


def place(name: str, tensor: TensorView, archive: Archive) -> Placed:
    """Where are a tensor's numbers? Raises FormatError where they are not all inside of its storage and record."""
    where, path = archive.where, archive.path
    record = archive.records.get(f"{archive.root}data/{tensor.storage.key}")
    if record is None:
        raise FormatError(f"{where}: {name} lies in record data/{tensor.storage.key}, which is not there", path=path)
    item = ITEM_BYTES[tensor.dtype]
    storage_bytes = tensor.storage.items * (1 if tensor.storage.dtype is None else item)
    extents = zip(tensor.shape, tensor.stride, strict=True)
    count = 1 + sum((extent - 1) * step for extent, step in extents) if prod(tensor.shape) else 0
    first, size = tensor.offset * item, count * item
    if storage_bytes > record.nbytes or first + size > storage_bytes:
        raise FormatError(
            f"{where}: {name} {list(tensor.shape)} {tensor.dtype} needs bytes {first:,} to {first + size:,} of a storage "
            f"of {storage_bytes:,}, in a record of {record.nbytes:,} bytes",
            path=path,
        )
    return Placed(record, first, size)


def crc_of(fd: int, record: Record) -> int:
    """The CRC32 that a record has now. Raises EOFError where the file ends early, OSError."""
    crc, at, end = 0, record.offset, record.offset + record.nbytes
    while at < end:
        data = os.pread(fd, min(_READ_BYTES, end - at), at)
        if not data:
            raise EOFError
        crc = isal_zlib.crc32(data, crc)
        at += len(data)
    return crc


# -- the zip


class _Window(io.RawIOBase):
    """A part of an open file, as a file. failed: the first error of the disk, which zipfile takes for a bad zip."""

    def __init__(self, fd: int, start: int, nbytes: int) -> None:
        self.fd, self.start, self.nbytes = fd, start, nbytes
        self.at = 0
        self.failed: OSError | None = None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.at, os.SEEK_END: self.nbytes}[whence]
        if at < 0:
            if whence == os.SEEK_END:
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))  # zipfile asks whether it is long enough
            raise ValueError(f"byte {at}")
        self.at = at
        return at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)[: max(0, self.nbytes - self.at)]
        try:
            got = os.preadv(self.fd, [view], self.start + self.at) if len(view) else 0
        except OSError as error:
            self.failed = self.failed or error
            raise
        self.at += got
        return got

    def bytes_at(self, at: int, size: int) -> bytes:
        """Up to `size` bytes from byte `at`; fewer where it ends."""
        self.seek(at)
        return self.read(min(size, max(0, self.nbytes - at))) or b""


def _records(window: _Window, where: str, path: Path) -> tuple[dict[str, Record], str]:
    """Record name -> where its bytes are in the file; and the folder that all of them lie in, with its slash."""
    try:
        with zipfile.ZipFile(window) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error, OverflowError) as e:
        if window.failed is not None:
            raise window.failed from None
        raise _not_a_zip(window, where, path) from e
    pickles = [
        entry.filename for entry in entries if entry.filename.count("/") == 1 and entry.filename.endswith("/data.pkl")
    ]
    if len(pickles) != 1:
        raise OtherArchive(
            f"{where} is a zip, but not one of torch.save: expected one record <name>/data.pkl, got {len(pickles)}",
            path=path,
        )
    records: dict[str, Record] = {}
    for entry in entries:
        if entry.filename in records:
            raise FormatError(f"{where} has two records `{entry.filename}`", path=path)
        records[entry.filename] = _record(window, where, path, entry)
    if records[pickles[0]].crc32 == 0:  # torch.serialization.set_crc32_options(False) writes 0 everywhere
        records = {name: Record(r.offset, r.nbytes, None) for name, r in records.items()}
    return records, pickles[0].removesuffix("data.pkl")


def _record(window: _Window, where: str, path: Path, entry: zipfile.ZipInfo) -> Record:
    if (
        entry.compress_type != zipfile.ZIP_STORED
        or entry.compress_size != entry.file_size
        or entry.flag_bits & _ENCRYPTED
    ):
        raise OtherArchive(
            f"{where}: record `{entry.filename}` is compressed or encrypted, torch.save stores them as they are",
            path=path,
            hint="unpack the file and pack it again without compression: zip -0",
        )
    # The directory at the end has no padding, the header in front of the record has: only that one knows the place.
    header = window.bytes_at(entry.header_offset, _LOCAL_HEADER.size) if entry.header_offset >= 0 else b""
    signature, name_bytes, extra_bytes = (
        _LOCAL_HEADER.unpack(header) if len(header) == _LOCAL_HEADER.size else (b"", 0, 0)
    )
    offset = entry.header_offset + _LOCAL_HEADER.size + name_bytes + extra_bytes
    if signature != b"PK\x03\x04" or offset + entry.file_size > window.nbytes:
        raise FormatError(
            f"{where}: record `{entry.filename}` should be {entry.file_size:,} bytes from byte {offset:,}, "
            f"but the file has no such place ({window.nbytes:,} bytes)",
            path=path,
            hint="copy or download this file again",
        )
    return Record(window.start + offset, entry.file_size, entry.CRC)


def _not_a_zip(window: _Window, where: str, path: Path) -> FormatError:
    start = window.bytes_at(0, len(_LEGACY_START))
    if start == _LEGACY_START:
        return OtherArchive(
            f"{where} was written by torch.save's old format (before torch 1.6), expected a zip",
            path=path,
            hint=f"save it again: python -c \"import torch; torch.save(torch.load('{path.name}', weights_only=True, "
            f"map_location='cpu'), 'new.pth')\" and put new.pth in its place",
        )
    if start.startswith(b"PK\x03\x04"):
        return FormatError(
            f"{where} is truncated: it starts as a zip of torch.save, but its directory is not at the end "
            f"({window.nbytes:,} bytes)",
            path=path,
            hint="copy or download this file again",
        )
    return FormatError(
        f"{where} is not a file of torch.save: expected a zip, got {window.nbytes:,} bytes of something else", path=path
    )


# -- the pickle


@dataclass(frozen=True)
class _StorageClass:
    dtype: str | None


@dataclass(frozen=True)
class _Dtype:
    name: str


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, stride: Any, *rest: Any) -> TensorView:
    """torch's _rebuild_tensor_v2 and _v3 in place of the real ones; rest: requires_grad, hooks, in v3 the dtype."""
    if not isinstance(storage, Storage) or not _natural(offset):
        raise ValueError("a tensor without a storage")
    if not all(
        isinstance(dims, tuple) and len(dims) <= _MOST_DIMS and all(map(_natural, dims)) for dims in (shape, stride)
    ):
        raise ValueError("a tensor without a shape")
    if len(shape) != len(stride):
        raise ValueError("a tensor with strides for another shape")
    dtype = storage.dtype
    if dtype is None:
        if len(rest) < 3 or not isinstance(rest[2], _Dtype):
            raise ValueError("a tensor without a dtype")
        dtype = rest[2].name
    return TensorView(storage, dtype, offset, tuple(shape), tuple(stride))


def _rebuild_parameter(tensor: Any, *_: Any) -> Any:
    return tensor


def _size(items: Any = ()) -> tuple[Any, ...]:
    return tuple(items)


def _natural(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


_ALLOWED: dict[tuple[str, str], object] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("torch", "Size"): _size,
    ("torch.storage", "UntypedStorage"): _StorageClass(None),
    **{("torch", name): _StorageClass(dtype) for name, dtype in _STORAGE_CLASSES.items()},
    **{("torch", name): _Dtype(name) for name in ITEM_BYTES},
}


def _persistent_load(pid: Any) -> Storage:
    tag, cls, key, _location, items = pid
    if tag != "storage" or not isinstance(cls, _StorageClass) or type(key) is not str or not _natural(items):
        raise ValueError("a reference that is not a storage")
    return Storage(cls.dtype, key, items)


def _unpickle(window: _Window, where: str, path: Path, records: Mapping[str, Record], root: str) -> Any:
    byte_order = records.get(f"{root}byteorder")
    if byte_order is not None:
        found = window.bytes_at(byte_order.offset - window.start, min(byte_order.nbytes, 16))
        if found != b"little":
            raise OtherArchive(f"{where} was written in byte order {found!r}, expected little-endian", path=path)
    pickle = records[f"{root}data.pkl"]
    if pickle.nbytes > MOST_BYTES:
        raise FormatError(f"{where}: data.pkl has {pickle.nbytes:,} bytes, no state dict needs that", path=path)
    content = window.bytes_at(pickle.offset - window.start, pickle.nbytes)
    crc = isal_zlib.crc32(content)
    if pickle.crc32 is not None and crc != pickle.crc32:
        raise FormatError(
            f"{where} is damaged: its pickle, {pickle.nbytes:,} bytes from byte {pickle.offset:,}, has CRC32 {crc:08x}, "
            f"the file says {pickle.crc32:08x}",
            path=path,
            hint="copy or download this file again",
        )
    try:
        return loads(content, _ALLOWED, _persistent_load, path=where)
    except FormatError as error:
        error.path = str(path)
        raise
