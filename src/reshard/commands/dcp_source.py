"""How does a DCP directory look as a source of weights? Ours, or torchtitan's of any year; of a full one the model only.

Each stored chunk is a small archive somewhere in a data file; its numbers are one more block of its tensor. Imports no
torch: the index and the archives are read by readers of our own.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from reshard.checkpoint.index import IndexedTensor, index_bytes, open_item, read_index
from reshard.checkpoint.manifest import MANIFEST, Manifest, read_manifest
from reshard.errors import FormatError, IntegrityError, StorageError
from reshard.formats.dialects import Told, canonical_tensors, check_scaling_is_said, told
from reshard.formats.gguf import rope_frequencies
from reshard.formats.protocol import ITEM_BYTES, Block, Region, Source, StoredTensor
from reshard.model.names import TORCHTITAN
from reshard.model.spec import LlamaSpec, RopeScaling

# What else a full checkpoint holds, ours or torchtitan's: these are not weights.
_OTHER_PARTS = ("optimizer.", "train_state.", "lr_scheduler.", "dataloader.")
_OTHER_NAMES = ("optimizer", "train_state", "lr_scheduler", "dataloader")


def open_dcp(directory: Path, model: Told | None = None) -> Source:
    """The weights of a DCP directory. model: what it is said to be, where no manifest says it.

    Of what torchtitan trained, the table of rotations says how RoPE was scaled, where there is one (until August 2025).
    Raises NotACheckpoint, IntegrityError, StorageError, FormatError, TensorMismatch.
    """
    manifest = read_manifest(directory) if (directory / MANIFEST).exists() else None
    index = read_index(index_bytes(directory, manifest), directory)
    said = LlamaSpec.from_dict(manifest.model) if manifest is not None and manifest.model else None
    told_model = Told(said) if said is not None else told(directory, model)
    names = [name for name in index.tensors if not _is_other(name)]
    strange = [name for name in index.objects if not _is_other(name)]
    if strange or not names:
        what = f"holds {strange[0]}, which is no tensor" if strange else "holds no weights"
        raise FormatError(f"{directory} {what}", path=directory)
    with _Files(directory) as files:
        found = {name: _stored(name, index.tensors[name], files) for name in names}
    tensors, spec = canonical_tensors(found, directory, told_model, TORCHTITAN)
    if said is None:
        trained = len(names) < len(index.tensors) or any(_is_other(name) for name in index.objects)
        told_model = replace(told_model, spec=spec)
        told_model = _with_trained_rope(directory, told_model, found) if trained else told_model
        check_scaling_is_said(directory, told_model, trained=trained)
        spec = told_model.spec
    return Source(directory, spec, tensors, _provenance(directory, manifest))


def _with_trained_rope(directory: Path, model: Told, found: Mapping[str, StoredTensor]) -> Told:
    """What the model is told to be, against the table of rotations that it was trained with.

    The second row of freqs_cis is each pair's rotation from one position to the next. A checkpoint that was only converted
    has torchtitan's table of that time, whatever the weights were trained with: it is not asked.
    """
    table = next((found[name] for name in ("freqs_cis", "model.freqs_cis") if name in found), None)
    if table is None or table.dtype != "complex64" or table.shape[1:] != (model.spec.head_dim // 2,) or table.rows < 2:
        return model
    start, frequencies = np.angle(table.read_bytes(0, 2).view(np.complex64).reshape(2, -1))
    if start.any() or not np.isclose(frequencies[0], 1.0) or not (np.diff(frequencies) < 0).all():
        return (
            model  # nothing turned at position 0, then the first pair by a radian and each other one by less: no table
        )
    scalings = [model.spec.rope_scaling]
    if model.scaling_from != "file":
        scalings += [None, RopeScaling(factor=8.0), RopeScaling(factor=32.0)]
    for scaling in scalings:
        spec = replace(model.spec, rope_scaling=scaling)
        if np.allclose(frequencies, rope_frequencies(spec), rtol=1e-3, atol=1e-9):
            return replace(model, spec=spec, scaling_from="file")
    raise FormatError(
        f"{directory} was trained with another RoPE than it is told to have: its freqs_cis are not those of rope_theta "
        f"{model.spec.rope_theta:g} and {model.spec.rope_scaling or 'no scaling'}",
        path=directory,
        hint="--model with a config.json that says its rope_theta and rope_scaling",
    )


def _is_other(name: str) -> bool:
    return name.startswith(_OTHER_PARTS) or name in _OTHER_NAMES


def _provenance(directory: Path, manifest: Manifest | None) -> dict[str, Any]:
    about: dict[str, Any] = {"kind": "import", "format": "dcp", "path": directory.resolve().name}
    if manifest is not None:
        about |= {"step": manifest.step, "save_id": manifest.save_id, "holds": manifest.kind}
    return about


class _Files:
    """The data files of a directory, opened once each."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._open: dict[str, int] = {}

    def __enter__(self) -> _Files:
        return self

    def __exit__(self, *_: object) -> None:
        for fd in self._open.values():
            os.close(fd)

    def fd(self, name: str) -> int:
        if name not in self._open:
            path = self.directory / name
            try:
                self._open[name] = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            except FileNotFoundError:
                raise IntegrityError(
                    f"`{path}` is missing, which the index names", path=self.directory, files=[name]
                ) from None
            except OSError as error:
                raise StorageError(f"`{path}` cannot be read: {error.strerror}", path=self.directory) from None
        return self._open[name]


def _stored(name: str, tensor: IndexedTensor, files: _Files) -> StoredTensor:
    """The tensor as blocks, one for each chunk."""
    if tensor.dtype not in ITEM_BYTES or len(tensor.shape) > 2:
        raise FormatError(
            f"{files.directory}: {name} is {list(tensor.shape)} {tensor.dtype}, which no weight of a Llama is",
            path=files.directory,
        )
    item = ITEM_BYTES[tensor.dtype]
    blocks = []
    for chunk in tensor.chunks:
        path = files.directory / chunk.file
        where = f"`{path}`: {name} at {list(chunk.offsets)}"
        try:
            _, view, placed = open_item(files.fd(chunk.file), path, where, tensor.dtype, chunk)
        except OSError as error:
            raise StorageError(f"`{path}` cannot be read: {error.strerror or error}", path=files.directory) from None
        if not view.contiguous:
            raise FormatError(f"{where} is stored with strides {list(view.stride)}, expected rows in order", path=path)
        region = Region(path, placed.record.offset, placed.record.nbytes, placed.record.crc32)
        row, rows = (chunk.offsets[0], chunk.sizes[0]) if chunk.sizes else (0, 1)
        column = chunk.offsets[1] * item if len(chunk.offsets) > 1 else 0
        width = placed.nbytes // rows if rows else 0
        blocks.append(Block(region, placed.first, row, rows, column, width))
    return StoredTensor(name, tensor.shape, tensor.dtype, tuple(blocks))
