"""What lies where in a file of torch.save? Indexes .pt and .pth without loading them, and without running their pickle.

Such a file is a zip whose records are stored as they are: `data.pkl` says which tensor is which part of which storage,
`data/<key>` are the storages. Each record has a CRC32, which torch itself never looks at.
Source: torch/serialization.py, caffe2/serialize/inline_container.cc, the zip application note (local header, zip64).
"""

from __future__ import annotations

import logging
import os
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

from reshard.errors import FormatError
from reshard.formats.protocol import ITEM_BYTES, Block, Region, StoredTensor, check_region
from reshard.safe_pickle import MOST_BYTES, loads

log = logging.getLogger(__name__)

_LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, lengths of name and extra field
_LEGACY_START = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # the magic number of torch.save before 1.6, pickled
_ENCRYPTED = 0x1
_MOST_DIMS = 64  # torch's own limit

_STORAGE_CLASSES = {
    "DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16", "BFloat16Storage": "bfloat16",
    "LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16", "CharStorage": "int8",
    "ByteStorage": "uint8", "BoolStorage": "bool", "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
}  # fmt: skip


@dataclass(frozen=True)
class PtFile:
    """The index of one file.

    tensors: name as written -> tensor; those that share a storage have blocks in the same Region.
    others: name -> type, of what else lies in the same dict; none of it was kept.
    """

    path: Path
    nbytes: int
    tensors: Mapping[str, StoredTensor]
    others: Mapping[str, str]


def open_pt(path: Path | str) -> PtFile:
    """Which tensors does a .pt or .pth file hold? Reads its directory and its pickle, a few hundred KB.

    The file may hold a flat dict of tensors, or one nested as {"model": {...}}, of which the model part is taken.
    Raises FormatError: missing, truncated, not a zip, the legacy format, compressed or big-endian records, a pickle
    that asks for anything but tensors, or a tensor that does not lie in its record as it says.
    """
    path = Path(path)
    try:
        with path.open("rb") as stream:
            nbytes = os.fstat(stream.fileno()).st_size
            records, root = _records(stream, path, nbytes)
            content = _unpickle(stream, path, records, root)
    except OSError as e:
        raise FormatError(f"{path} cannot be read: {e.strerror}", path=path) from None
    state_dict = _model_part(content, path)
    tensors, others = {}, {}
    for name, value in state_dict.items():
        if isinstance(value, _Tensor):
            tensors[name] = _placed(name, value, path, records, root)
        else:
            others[name] = type(value).__name__
    return PtFile(path, nbytes, tensors, others)


def check_records(file: PtFile) -> None:
    """Do the storages of a file still have the CRC32s stored with them? Reads each once. Raises FormatError."""
    for region in dict.fromkeys(block.region for tensor in file.tensors.values() for block in tensor.blocks):
        check_region(region)


# -- the zip


def _records(stream: BinaryIO, path: Path, nbytes: int) -> tuple[dict[str, Region], str]:
    """Record name -> where its bytes are; and the folder that all of them lie in, with its slash."""
    try:
        with zipfile.ZipFile(stream) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error, OverflowError) as e:
        raise _not_a_zip(stream, path, nbytes) from e
    pickles = [
        entry.filename for entry in entries if entry.filename.count("/") == 1 and entry.filename.endswith("/data.pkl")
    ]
    if len(pickles) != 1:
        raise FormatError(
            f"{path} is a zip, but not one of torch.save: expected one record <name>/data.pkl, got {len(pickles)}",
            path=path,
        )
    root = pickles[0].removesuffix("data.pkl")
    records: dict[str, Region] = {}
    for entry in entries:
        if entry.filename in records:
            raise FormatError(f"{path} has two records `{entry.filename}`", path=path)
        records[entry.filename] = _region(stream, path, nbytes, entry)
    if records[pickles[0]].crc32 == 0:  # torch.serialization.set_crc32_options(False) writes 0 everywhere
        records = {name: Region(r.file, r.offset, r.nbytes) for name, r in records.items()}
    return records, root


def _region(stream: BinaryIO, path: Path, nbytes: int, entry: zipfile.ZipInfo) -> Region:
    if (
        entry.compress_type != zipfile.ZIP_STORED
        or entry.compress_size != entry.file_size
        or entry.flag_bits & _ENCRYPTED
    ):
        raise FormatError(
            f"{path}: record `{entry.filename}` is compressed or encrypted, torch.save stores them as they are",
            path=path,
            hint="unpack the file and pack it again without compression: zip -0",
        )
    # The directory at the end has no padding, the header in front of the record has: only that one knows the place.
    header = b""
    if 0 <= entry.header_offset < nbytes:
        stream.seek(entry.header_offset)
        header = stream.read(_LOCAL_HEADER.size)
    signature, name_bytes, extra_bytes = (
        _LOCAL_HEADER.unpack(header) if len(header) == _LOCAL_HEADER.size else (b"", 0, 0)
    )
    offset = entry.header_offset + _LOCAL_HEADER.size + name_bytes + extra_bytes
    if signature != b"PK\x03\x04" or offset + entry.file_size > nbytes:
        raise FormatError(
            f"{path}: record `{entry.filename}` should be {entry.file_size:,} bytes from byte {offset:,}, "
            f"but the file has no such place ({nbytes:,} bytes)",
            path=path,
            hint="copy or download this file again",
        )
    return Region(path, offset, entry.file_size, entry.CRC)


def _not_a_zip(stream: BinaryIO, path: Path, nbytes: int) -> FormatError:
    stream.seek(0)
    start = stream.read(len(_LEGACY_START))
    if start == _LEGACY_START:
        return FormatError(
            f"{path} was written by torch.save's old format (before torch 1.6), expected a zip",
            path=path,
            hint=f"save it again: python -c \"import torch; torch.save(torch.load('{path.name}', weights_only=True, "
            f"map_location='cpu'), 'new.pth')\" and put new.pth in its place",
        )
    if start.startswith(b"PK\x03\x04"):
        return FormatError(
            f"{path} is truncated: it starts as a zip of torch.save, but its directory is not at the end "
            f"({nbytes:,} bytes)",
            path=path,
            hint="copy or download this file again",
        )
    return FormatError(
        f"{path} is not a file of torch.save: expected a zip, got {nbytes:,} bytes of something else", path=path
    )


# -- the pickle


@dataclass(frozen=True)
class _Storage:
    """dtype: None for an untyped one, of which `items` are bytes."""

    dtype: str | None
    key: str
    items: int


@dataclass(frozen=True)
class _Tensor:
    storage: _Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(frozen=True)
class _StorageClass:
    dtype: str | None


@dataclass(frozen=True)
class _Dtype:
    name: str


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, stride: Any, *rest: Any) -> _Tensor:
    """torch's _rebuild_tensor_v2 and _v3 in place of the real ones; rest: requires_grad, hooks, in v3 the dtype."""
    if not isinstance(storage, _Storage) or not _natural(offset):
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
    return _Tensor(storage, dtype, offset, tuple(shape), tuple(stride))


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


def _persistent_load(pid: Any) -> _Storage:
    tag, cls, key, _location, items = pid
    if tag != "storage" or not isinstance(cls, _StorageClass) or type(key) is not str or not _natural(items):
        raise ValueError("a reference that is not a storage")
    return _Storage(cls.dtype, key, items)


def _unpickle(stream: BinaryIO, path: Path, records: dict[str, Region], root: str) -> Any:
    byte_order = records.get(f"{root}byteorder")
    if byte_order is not None and (found := _bytes_of(stream, byte_order, 16)) != b"little":
        raise FormatError(f"{path} was written in byte order {found!r}, expected little-endian", path=path)
    pickle = records[f"{root}data.pkl"]
    if pickle.nbytes > MOST_BYTES:
        raise FormatError(f"{path}: data.pkl has {pickle.nbytes:,} bytes, no state dict needs that", path=path)
    check_region(pickle)
    return loads(_bytes_of(stream, pickle, pickle.nbytes), _ALLOWED, _persistent_load, path=path)


def _bytes_of(stream: BinaryIO, region: Region, most: int) -> bytes:
    stream.seek(region.offset)
    return stream.read(min(region.nbytes, most))


def _model_part(content: Any, path: Path) -> dict[str, Any]:
    nested = content.get("model") if isinstance(content, dict) else None
    if isinstance(nested, dict):
        left = sorted(str(key) for key in content if key != "model")
        if left:
            log.info("%s: taking its `model`, leaving %s", path, ", ".join(left))
        content = nested
    if not isinstance(content, dict) or not all(type(key) is str for key in content):
        got = "a tensor" if isinstance(content, _Tensor) else f"a {type(content).__name__}"
        raise FormatError(f"{path} holds {got}, expected a dict of named tensors", path=path)
    if not any(isinstance(value, _Tensor) for value in content.values()):
        raise FormatError(
            f"{path} holds a dict without tensors, with the keys {', '.join(sorted(content)[:5]) or '(none)'}",
            path=path,
        )
    return content


def _placed(name: str, tensor: _Tensor, path: Path, records: dict[str, Region], root: str) -> StoredTensor:
    """Where in the file is a tensor? Raises FormatError where it is not one run of bytes inside of its record."""
    region = records.get(f"{root}data/{tensor.storage.key}")
    if region is None:
        raise FormatError(f"{path}: {name} lies in record data/{tensor.storage.key}, which is not there", path=path)
    item = ITEM_BYTES[tensor.dtype]
    storage_bytes = tensor.storage.items * (1 if tensor.storage.dtype is None else item)
    count = prod(tensor.shape)
    first, size = tensor.offset * item, count * item
    if count and not _contiguous(tensor.shape, tensor.stride):
        raise FormatError(
            f"{path}: {name} {list(tensor.shape)} is stored with strides {list(tensor.stride)}, expected its rows one "
            "after the other",
            path=path,
            hint="save it again with .contiguous() on every tensor",
        )
    if storage_bytes > region.nbytes or first + size > storage_bytes:
        raise FormatError(
            f"{path}: {name} {list(tensor.shape)} {tensor.dtype} needs bytes {first:,} to {first + size:,} of a storage "
            f"of {storage_bytes:,}, in a record of {region.nbytes:,} bytes",
            path=path,
        )
    rows = tensor.shape[0] if tensor.shape else 1
    block = Block(region, first, row=0, rows=rows, column=0, width=size // rows if rows else 0)
    return StoredTensor(name, tensor.shape, tensor.dtype, (block,))


def _contiguous(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    expected = 1
    for extent, step in zip(reversed(shape), reversed(stride), strict=True):
        if extent != 1 and step != expected:
            return False
        expected *= extent
    return True
