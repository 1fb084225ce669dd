"""What does DCP's index say, and can it be true? Checked before a byte is read by it. Imports no torch.

`.metadata` may come from anybody and has no checksum of its own: a flipped bit, or an author, can make it describe a
checkpoint that is not there. What we rely on is checked here: every tensor is tiled by its chunks, each number once;
every chunk lies somewhere; no two items share bytes; nothing lies outside of the directory.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from math import prod
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from reshard.checkpoint.collector import collector_at_rest
from reshard.checkpoint.layout import METADATA
from reshard.checkpoint.manifest import Manifest, UnfitFile, crc32_hex, read_file
from reshard.errors import FormatError, IntegrityError, NotACheckpoint, StorageError
from reshard.safe_pickle import Members, loads
from reshard.torch_zip import ITEM_BYTES, Archive, Placed, TensorView, open_archive, place

MOST_BYTES = 2 << 30  # of an index: some 200 bytes for each stored chunk


Boxes = tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]  # offsets and sizes of several chunks


class Chunk(NamedTuple):
    """A box of a tensor, and the bytes of the file that it is stored in."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    offset: int
    length: int


@dataclass(frozen=True)
class IndexedTensor:
    """dtype: the name of a torch dtype."""

    shape: tuple[int, ...]
    dtype: str
    chunks: Sequence[Chunk]

    @property
    def boxes(self) -> Boxes:
        """Of the chunks, in their order."""
        return tuple((chunk.offsets, chunk.sizes) for chunk in self.chunks)


@dataclass(frozen=True)
class Index:
    """tensors: by stored name. objects: what is stored beside tensors, pickled; name -> (file, offset, length).

    paths: name -> its place in the nested state that was saved.
    """

    tensors: Mapping[str, IndexedTensor]
    objects: Mapping[str, tuple[str, int, int]]
    paths: Mapping[str, tuple[str | int, ...]]


def index_bytes(directory: Path, manifest: Manifest | None) -> bytes:
    """The bytes of a directory's `.metadata`. manifest: what they must be; None for a foreign directory.

    Raises NotACheckpoint (there is none), IntegrityError (the manifest says otherwise), StorageError.
    """
    path = directory / METADATA
    try:
        content = read_file(path, MOST_BYTES)
    except UnfitFile as error:
        raise IntegrityError(f"`{path}` is damaged: it {error}", path=directory, files=[METADATA]) from None
    except (FileNotFoundError, NotADirectoryError):
        raise NotACheckpoint(f"`{directory}` has no {METADATA}, expected a DCP checkpoint", path=directory) from None
    except OSError as error:
        raise StorageError(f"`{path}` cannot be read: {error.strerror or error}", path=directory) from None
    if manifest is not None:
        entry = manifest.files.get(METADATA)
        if entry is None or len(content) != entry.bytes or crc32_hex(content) != entry.crc32:
            raise IntegrityError(
                f"`{path}` is damaged: its CRC32 is {crc32_hex(content)}, the manifest says {entry and entry.crc32}",
                path=directory,
                files=[METADATA],
            )
    return content


@collector_at_rest()
def read_index(content: bytes, directory: Path) -> Index:
    """The index from the bytes of a `.metadata`, without torch.

    Raises FormatError where its pickle names what no index needs, IntegrityError where it contradicts itself.
    """
    path = directory / METADATA
    found = loads(content, _ALLOWED, path=path, most_bytes=MOST_BYTES)

    def damaged(reason: str) -> IntegrityError:
        return IntegrityError(f"`{path}` is not a DCP index: {reason}", path=directory, files=[METADATA])

    try:
        storage = {_key(index): _place(info) for index, info in found.storage_data.items()}
        described = dict(found.state_dict_metadata)
        tensors = {}
        for name, entry in described.items():
            if type(name) is not str:
                raise TypeError("a name that is not text")
            if hasattr(entry, "chunks") or isinstance(entry, _TensorEntry):
                tensors[name] = _tensor(name, entry, storage)
    except (TypeError, ValueError, AttributeError, LookupError) as error:
        raise damaged(str(error) or type(error).__name__) from None
    for name, _ in storage:
        if name not in described:
            raise damaged(f"it stores {name}, which it does not describe")
    _check_places(storage, damaged)
    objects = {name: storage[name, ()] for name in described if name not in tensors and (name, ()) in storage}
    return Index(tensors, objects, _paths(found.planner_data))


def open_item(fd: int, path: Path, where: str, dtype: str, chunk: Chunk) -> tuple[Archive, TensorView, Placed]:
    """The archive of one chunk of a tensor, whose pickle must say what the index says.

    where: how errors call it. Raises FormatError, OSError.
    """
    archive = open_archive(fd, path, start=chunk.offset, nbytes=chunk.length, where=where)
    tensor = archive.content
    if not isinstance(tensor, TensorView):
        raise FormatError(f"{where} holds a {type(tensor).__name__}, the index says a tensor", path=path)
    if (tensor.dtype, tensor.shape) != (dtype, chunk.sizes):
        raise FormatError(
            f"{where} holds {tensor.dtype} {list(tensor.shape)}, the index says {dtype} {list(chunk.sizes)}", path=path
        )
    return archive, tensor, place("it", tensor, archive)


def _key(index: Any) -> tuple[str, tuple[int, ...]]:
    if type(index.fqn) is not str:
        raise TypeError("an item without a name")
    return index.fqn, () if index.offset is None else _dims(index.offset)


def _place(info: Any) -> tuple[str, int, int]:
    """File, offset and length, each a plain value."""
    if type(info.relative_path) is not str:
        raise TypeError("a file name that is not text")
    _check_inside(info.relative_path)
    offset, length = _naturals((info.offset, info.length))
    return info.relative_path, offset, length


@lru_cache(maxsize=4096)
def _check_inside(file: str) -> None:
    name = PurePosixPath(file)
    if name.is_absolute() or ".." in name.parts or not name.parts or "\0" in str(name):
        raise ValueError(f"an item lies in `{str(name)[:80]}`, outside of the directory")


def _tensor(
    name: str, entry: Any, storage: Mapping[tuple[str, tuple[int, ...]], tuple[str, int, int]]
) -> IndexedTensor:
    shape = _dims(entry.size)
    if not isinstance(entry.properties.dtype, _Dtype):
        raise TypeError(f"{name} has no dtype")
    dtype = entry.properties.dtype.name
    boxes = [(_dims(chunk.offsets), _dims(chunk.sizes)) for chunk in entry.chunks]
    for offsets, sizes in boxes:
        if not len(shape) == len(offsets) == len(sizes) or any(
            o + s > n for o, s, n in zip(offsets, sizes, shape, strict=True)
        ):
            raise ValueError(f"{name} {list(shape)} has a chunk of {list(sizes)} at {list(offsets)}")
    full = sorted((box for box in boxes if prod(box[1])), key=lambda box: box[0])
    volume = sum(prod(sizes) for _, sizes in full)
    if volume != prod(shape):
        raise ValueError(f"the chunks of {name} {list(shape)} hold {volume:,} numbers of {prod(shape):,}")
    for i, (offsets, sizes) in enumerate(full):
        for others, their_sizes in full[i + 1 :]:
            if others and others[0] >= offsets[0] + sizes[0]:
                break  # sorted by the first dim: none of the later ones can meet this box
            if all(o < p + t and p < o + s for o, s, p, t in zip(offsets, sizes, others, their_sizes, strict=True)):
                raise ValueError(f"two chunks of {name} overlap, at {list(offsets)} and {list(others)}")
    missing = [offsets for offsets, _ in full if (name, offsets) not in storage]
    if missing:
        raise ValueError(f"it does not say where {name} at {list(missing[0])} is stored")
    return IndexedTensor(shape, dtype, tuple(Chunk(o, s, *storage[name, o]) for o, s in full))


def _paths(planner_data: Any) -> dict[str, tuple[str | int, ...]]:
    """What is of the expected form; nothing here relies on it."""
    if type(planner_data) is not dict:
        return {}
    return {
        name: path
        for name, path in planner_data.items()
        if type(name) is str and type(path) is tuple and all(type(key) in (str, int) for key in path)
    }


def _check_places(storage: Mapping[Any, tuple[str, int, int]], damaged: Any) -> None:
    """A flipped bit in an offset can only point to the bytes of another item: no two may have the same."""
    for (file, offset, length), (next_file, next_offset, _) in pairwise(sorted(storage.values())):
        if file == next_file and offset + length > next_offset:
            raise damaged(f"two items share byte {next_offset:,} of {file}")


@lru_cache(maxsize=65536)
def _dims(values: Any) -> tuple[int, ...]:
    """The same numbers as a plain tuple. Most chunks of an index have the same few."""
    return _naturals(values)


def _naturals(values: Iterable[Any]) -> tuple[int, ...]:
    dims = tuple(values)
    for value in dims:
        if type(value) is not int or not 0 <= value < 2**63:
            raise ValueError("a number that is no size")
    return dims


# -- stand-ins for torch's classes, which a pickle names


class _Entry:
    """Any of the index's dataclasses: has the attributes that the pickle gives it.

    torch's pickles set them by name; ours, which are made to be read fast, call the class with the first few `fields`.
    """

    fields: tuple[str, ...] = ()

    def __init__(self, *values: Any) -> None:
        self.__dict__.update(zip(self.fields, values, strict=False))


class _Properties(_Entry):
    """torch's TensorProperties: its state is a tuple that begins with the dtype."""

    def __setstate__(self, state: Any) -> None:
        self.dtype = state["dtype"] if isinstance(state, dict) else state[0]


class _MetadataEntry(_Entry):
    """The whole index; older ones lack some of its fields."""

    storage_data: Any = None
    planner_data: Any = None


@dataclass(frozen=True)
class _Dtype:
    name: str


class _IndexEntry(_Entry):
    fields = ("fqn", "offset", "index")
    offset: Any = None


class _ChunkEntry(_Entry):
    fields = ("offsets", "sizes")


class _TensorEntry(_Entry):
    fields = ("properties", "size", "chunks")


class _PlaceEntry(_Entry):
    fields = ("relative_path", "offset", "length")


def _same(value: Any = None, *_: Any) -> Any:
    return value


def _size(values: Any = ()) -> tuple[Any, ...]:
    return tuple(values)


_DTYPES = (*ITEM_BYTES, "complex32", "qint8", "quint8", "qint32", "quint4x2", "quint2x4", "bits8", "float4_e2m1fn_x2")

_ALLOWED: dict[tuple[str, str], object] = {
    ("torch", "Size"): _size,
    ("torch.serialization", "_get_layout"): _same,
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): _PlaceEntry,
    ("collections", "OrderedDict"): dict,
    ("collections", "defaultdict"): dict,
    ("pathlib", "PosixPath"): PurePosixPath,
    ("pathlib", "PurePosixPath"): PurePosixPath,
    ("pathlib._local", "PosixPath"): PurePosixPath,
    **{
        ("torch.distributed.checkpoint.metadata", name): stand_in
        for name, stand_in in {
            "Metadata": _MetadataEntry,
            "TensorStorageMetadata": _TensorEntry,
            "ChunkStorageMetadata": _ChunkEntry,
            "BytesStorageMetadata": type("BytesStorageMetadata", (_Entry,), {}),
            "StorageMeta": type("StorageMeta", (_Entry,), {}),
            "TensorProperties": _Properties,
            "MetadataIndex": _IndexEntry,
            "_MEM_FORMAT_ENCODING": Members(TORCH_CONTIGUOUS_FORMAT=0, TORCH_CHANNELS_LAST=1, TORCH_PRESERVE_FORMAT=2),
        }.items()
    },
    **{("torch", name): _Dtype(name) for name in _DTYPES},
}
