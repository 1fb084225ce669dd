"""How do foreign weights become a checkpoint of ours? Laid out beforehand, written by slabs like every other format.

The chunks, their archives and their sums are those of the engine (checkpoint/writer.py, blocks.py), and so is the commit;
only the way of the bytes is the conversion's: several workers, each slab read once and sent to all of its places.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from reshard.errors import FormatError
from reshard.formats.cast import cast
from reshard.formats.output import (
    DEFAULT_MEMORY,
    Copy,
    DiskFile,
    OpenFile,
    OutFile,
    Output,
    Place,
    Sums,
    alive,
    check_layout,
    check_space,
    floods,
    remove_dead,
    slab_bytes,
    write_files,
)
from reshard.formats.protocol import ITEM_BYTES, LazyTensor, Ledger, Source, StoredTensor, slabs
from reshard.progress import progress_bar

if TYPE_CHECKING:
    from reshard.checkpoint.manifest import FileEntry, Manifest, TensorEntry
    from reshard.checkpoint.save import WrittenWeights
    from reshard.checkpoint.state import Box
    from reshard.checkpoint.writer import Places, Stored

logger = logging.getLogger(__name__)

FLOOR_WITH_TORCH_BYTES = 205 << 20  # what the interpreter and torch take before a byte is read
FILES = ("__0_0.distcp", "__0_1.distcp")  # two, because a file system lets one thread at a time write into a file
_EMBEDDING, _OUTPUT = "tok_embeddings.weight", "output.weight"


def to_dcp(
    source: Source,
    out: Path,
    *,
    dtype: str | None = None,
    memory: int = DEFAULT_MEMORY,
    workers: int = 2,
    verify: bool = False,
) -> Manifest:
    """Write a source as a committed weights-only checkpoint under flat Meta names.

    dtype: a torch dtype name to cast to; None keeps each tensor's own. A tied model is written with both names, which
    torchtune needs, and read once. Memory: that of torch, and the workers' slabs. The source's stored CRC32s are checked
    on the way, before the commit. Raises ConfigError (too little memory), FormatError, NotACheckpoint, StorageError.
    """
    if source.spec is None:
        raise FormatError(f"{source.path} does not say which model it is: heads, RoPE and epsilon", path=source.path)
    tensors = dcp_tensors(source, dtype)
    total = sum(tensor.nbytes for tensor in tensors.values())
    check_space(out, total)
    slab = slab_bytes(memory, workers, FLOOR_WITH_TORCH_BYTES)
    from reshard.checkpoint.layout import entries, step_of
    from reshard.checkpoint.ours import not_ours
    from reshard.checkpoint.save import About, commit_weights

    ledger = Ledger(drops=floods(2 * total))
    about = About(step=0, kind="model", source=source.provenance, model=source.spec.to_dict())

    with ExitStack() as until_committed:

        def write(temporary: Path) -> WrittenWeights:
            until_committed.enter_context(alive(temporary))
            if step_of(out) is None:  # what has a step's name may be a living run's, and is for `recover` to judge
                remove_dead(out, lambda folder: not_ours(folder) is None)
            return _write(tensors, temporary, ledger, slab, workers, source.path.name)

        manifest = commit_weights(out, write, about)
    if verify:
        _verify(out)
    newest = entries(out.parent)[-1] if step_of(out) == 0 else None
    if newest is not None and newest.age > 0:
        logger.warning(
            "a run in `%s` goes on from %s, not from these weights: they begin a run in another folder",
            out.parent, newest.path.name,
        )  # fmt: skip
    return manifest


def dcp_tensors(source: Source, dtype: str | None) -> dict[str, LazyTensor]:
    """What is written, by name; a tied embedding is the same object under both."""
    assert source.spec is not None
    tensors = {name: cast(tensor, dtype) for name, tensor in source.tensors.items()}
    if source.spec.tied and _same_bytes(source.tensors.get(_OUTPUT), source.tensors[_EMBEDDING]):
        tensors[_OUTPUT] = tensors[_EMBEDDING]
    return tensors


def _same_bytes(copy: LazyTensor | None, tensor: LazyTensor) -> bool:
    """Does a copy come from the very bytes of the tensor, as in Meta's files, or from nowhere?"""
    if copy is None:
        return True
    return isinstance(copy, StoredTensor) and isinstance(tensor, StoredTensor) and copy.blocks == tensor.blocks


def _write(
    tensors: Mapping[str, LazyTensor], folder: Path, ledger: Ledger, slab: int, workers: int, name: str
) -> WrittenWeights:
    from reshard.checkpoint.save import WrittenWeights

    output, parts, stored = _plan(tensors)
    check_layout(output)
    opened: list[_SummedFile] = []

    def open_file(path: Path, nbytes: int) -> OpenFile:
        opened.append(_SummedFile(path, nbytes, drops=ledger.drops))
        return opened[-1]

    with progress_bar(f"{name} to dcp", output.tensor_bytes) as advance:
        write_files(output, folder, ledger, open_file, slab, workers, advance, sums=True)
    ledger.check()
    entries = {name: entry for file in opened for name, entry in file.write_sidecar().items()}
    return WrittenWeights(parts, stored, entries)


def _plan(
    tensors: Mapping[str, LazyTensor],
) -> tuple[Output, list[tuple[str, TensorEntry, Box]], list[Stored]]:
    """Where every chunk goes: to the file that has less so far, as an archive of its own."""
    from reshard.checkpoint import archive
    from reshard.checkpoint.manifest import TensorEntry
    from reshard.checkpoint.state import PIECE_BYTES, Box, dtype_from_name
    from reshard.checkpoint.writer import Places

    files = [_Laid(Places(name)) for name in FILES]
    parts: list[tuple[str, TensorEntry, Box]] = []
    stored: list[Stored] = []
    places: dict[int, list[Place]] = {}
    for name, tensor in tensors.items():
        kind, entry = dtype_from_name(tensor.dtype), TensorEntry(tensor.shape, tensor.dtype)
        for start, stop in slabs(tensor.shape, ITEM_BYTES[tensor.dtype], PIECE_BYTES, tensor.grain):
            sizes = (stop - start, *tensor.shape[1:]) if tensor.shape else ()
            box = Box((start, *(0 for _ in sizes[1:])) if sizes else (), sizes)
            file = min(files, key=lambda f: f.places.end)
            gap = file.places.end
            where = file.places.place(name, tensor.dtype, box)
            head = archive.head(kind, sizes)
            width = tensor.nbytes // tensor.shape[0] if tensor.shape and tensor.shape[0] else tensor.nbytes
            place = Place(where.file, where.offset + len(head), start, stop - start, 0, width)
            file.known.append((gap, bytes(where.offset - gap) + head))
            file.chunks.append((place, tensor.dtype, sizes))
            places.setdefault(id(tensor), []).append(place)
            parts.append((name, entry, box))
            stored.append(where)
    copies = {id(tensor): tensor for tensor in tensors.values()}
    output = Output(
        "dcp",
        tuple(file.out_file() for file in files if file.chunks),
        tuple(Copy(tensor, tuple(places[key])) for key, tensor in copies.items()),
    )
    return output, parts, stored


class _Laid:
    """A data file that is being laid out."""

    def __init__(self, places: Places) -> None:
        self.places = places
        self.known: list[tuple[int, bytes]] = []
        self.chunks: list[tuple[Place, str, tuple[int, ...]]] = []

    def out_file(self) -> OutFile:
        from reshard.checkpoint import archive
        from reshard.checkpoint.state import dtype_from_name

        def later(sums: Sums) -> list[tuple[int, bytes]]:
            return [
                (place.offset + place.nbytes, archive.tail(dtype_from_name(dtype), sizes, sums[place]))
                for place, dtype, sizes in self.chunks
            ]

        return OutFile(self.chunks[0][0].file, self.places.end, tuple(self.known), later)


class _SummedFile(DiskFile):
    """A data file that keeps the sums of its blocks, and writes them beside it when it is closed."""

    def __init__(self, path: Path, nbytes: int, *, drops: bool) -> None:
        from reshard.checkpoint.blocks import BlockSummer

        super().__init__(path, nbytes, drops=drops)
        self._sums = BlockSummer(nbytes)

    def write(self, offset: int, data: NDArray[np.uint8] | bytes) -> int:
        """See OpenFile."""
        crc = self._sums.add(offset, memoryview(data) if isinstance(data, bytes) else data.data)
        super().write(offset, data)
        return crc

    def write_sidecar(self) -> dict[str, FileEntry]:
        """Once all is written. Both files' entries for the manifest. Raises OSError."""
        return self._sums.write_sidecar(self._path)


def _verify(out: Path) -> None:
    from reshard.checkpoint.ours import remove
    from reshard.checkpoint.verify import verify_checkpoint

    verdict = verify_checkpoint(out, "bytes", lambda done: None)
    if not verdict.whole:
        remove(out)
        raise FormatError(f"{out} was not written right: {verdict.problem or verdict.findings}", path=out)
