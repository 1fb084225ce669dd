"""How did torchtitan want a seed checkpoint until July 2025? Names under `model.`, and the table of rotations as a tensor.

That model kept `freqs_cis` as a persistent buffer, and plain DCP refuses a checkpoint without it or with another number
of rows. It knew no RoPE scaling. The result is a DCP directory of torchtitan's kind: it has no manifest of ours.
Source: torchtitan's scripts/convert_llama_to_dcp.py and models/llama/model.py of early 2025.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reshard.checkpoint.layout import METADATA
from reshard.errors import ConfigError, FormatError
from reshard.formats.output import Copy, OutFile, Output, Place, Sums, write_output
from reshard.formats.protocol import LazyTensor, Ledger, Source, slabs
from reshard.formats.torch_save import ALIGNMENT, Saved, lay_out
from reshard.model.spec import LlamaSpec
from reshard.progress import progress_bar

logger = logging.getLogger(__name__)

_DATA, _FREQS = "__0_0.distcp", "freqs_cis"
_CHUNK_BYTES = 256 << 20  # of a stored item: a zip without large-file records holds up to 4 GiB


def to_early_titan(source: Source, target: Path, rows: int, *, memory: int = 128 << 20, workers: int = 2) -> None:
    """Write {"model": {names, freqs_cis}} as a DCP directory. rows: positions of freqs_cis.

    Raises FormatError, StorageError; nothing is then left behind.
    """
    spec = source.spec
    if spec is None:
        raise FormatError(f"{source.path} does not say which model it is", path=source.path)
    if not 0 < rows <= 1 << 24:
        raise ConfigError(f"freqs_cis of {rows} rows cannot be, expected as many as the training has positions")
    if spec.rope_scaling is not None:
        logger.warning("torchtitan of early 2025 knew no RoPE scaling: freqs_cis is written unscaled, as it was then")
    tensors: dict[str, LazyTensor] = dict(source.tensors)
    if spec.tied:
        tensors.setdefault("output.weight", tensors["tok_embeddings.weight"])
    tensors[_FREQS] = FreqsCis(spec, rows)
    output = _plan(tensors)
    with progress_bar(f"{source.path.name} to dcp", output.tensor_bytes) as advance:
        write_output(output, target, Ledger(), memory=memory, workers=workers, advance=advance)


@dataclass(frozen=True)
class FreqsCis:
    """A LazyTensor: the rotation of each pair at each position, complex64 (rows, head_dim / 2)."""

    spec: LlamaSpec
    rows: int
    name: str = _FREQS
    dtype: str = "complex64"
    grain: int = 1

    @property
    def shape(self) -> tuple[int, ...]:
        """See LazyTensor."""
        return self.rows, self.spec.head_dim // 2

    @property
    def nbytes(self) -> int:
        """See LazyTensor."""
        return 8 * self.rows * (self.spec.head_dim // 2)

    def fill(self, buffer: NDArray[np.uint8], start: int, stop: int, ledger: Ledger | None = None) -> None:
        """See LazyTensor. In torch's own arithmetic, so that the bits are those of the table that was saved then."""
        import torch

        exponent = torch.arange(0, self.spec.head_dim, 2)[: self.spec.head_dim // 2].float() / self.spec.head_dim
        angles = torch.outer(torch.arange(start, stop), 1.0 / (self.spec.rope_theta**exponent)).float()
        table = torch.polar(torch.ones_like(angles), angles)
        buffer[:] = table.numpy().view(np.uint8).reshape(-1)


def _plan(tensors: dict[str, LazyTensor]) -> Output:
    """One data file of items, each a row range of a tensor in an archive of its own; and the index."""
    copies, parts, items, at = [], [], [], 0
    for name, tensor in tensors.items():
        places = []
        rows = tensor.shape[0]
        width = tensor.nbytes // rows
        for start, stop in slabs(tensor.shape, tensor.nbytes // max(1, _count(tensor)), _CHUNK_BYTES, tensor.grain):
            shape = (stop - start, *tensor.shape[1:])
            saved = Saved(name, shape, tensor.dtype, (stop - start) * width, name)
            part, offsets = lay_out(_DATA, [saved], base=at, bare=True)
            places.append(Place(_DATA, offsets[name], start, stop - start, 0, width))
            items.append((name, start, shape, at, part.nbytes))
            parts.append(part)
            at += part.nbytes
            padding = -at % ALIGNMENT
            parts.append(OutFile(_DATA, padding, ((at, bytes(padding)),)))
            at += padding
        copies.append(Copy(tensor, tuple(places)))

    def later(sums: Sums) -> list[tuple[int, bytes]]:
        return [written for part in parts if part.later for written in part.later(sums)]

    known = tuple(written for part in parts for written in part.known)
    data = OutFile(_DATA, at, known, later)
    return Output("dcp", (data,), tuple(copies), {METADATA: _metadata(tensors, items)})


def _count(tensor: LazyTensor) -> int:
    return int(np.prod(tensor.shape, dtype=np.int64))


def _metadata(tensors: dict[str, LazyTensor], items: list[tuple[str, int, tuple[int, ...], int, int]]) -> bytes:
    """The DCP index, as torch itself would pickle it."""
    import torch
    from torch.distributed.checkpoint import metadata as dcp
    from torch.distributed.checkpoint.filesystem import _StorageInfo  # private: the on-disk record; torch 2.13.0

    from reshard.checkpoint.metadata import pickled

    chunks: dict[str, list[Any]] = {name: [] for name in tensors}
    storage: dict[Any, Any] = {}
    for name, start, shape, offset, length in items:
        offsets = torch.Size((start, *(0 for _ in shape[1:])))
        index = dcp.MetadataIndex(f"model.{name}", offsets, len(chunks[name]))
        chunks[name].append(dcp.ChunkStorageMetadata(offsets, torch.Size(shape)))
        storage[index] = _StorageInfo(relative_path=_DATA, offset=offset, length=length)
    described: dict[str, Any] = {
        f"model.{name}": dcp.TensorStorageMetadata(
            properties=dcp.TensorProperties(dtype=getattr(torch, tensor.dtype)),
            size=torch.Size(tensor.shape),
            chunks=chunks[name],
        )
        for name, tensor in tensors.items()
    }
    paths: dict[str, Any] = {f"model.{name}": ("model", name) for name in tensors}
    return pickled(dcp.Metadata(state_dict_metadata=described, planner_data=paths, storage_data=storage))
