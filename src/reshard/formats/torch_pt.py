"""What lies where in a file of torch.save? Indexes .pt and .pth without loading them, and without running their pickle.

The zip and its pickle are read by `torch_zip`; here is what a file of weights must be beyond that: a dict of named
tensors, each one run of bytes.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reshard.errors import FormatError
from reshard.formats.protocol import Block, Region, StoredTensor, check_region
from reshard.torch_zip import Archive, TensorView, open_archive, place

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PtFile:
    """The index of one file.

    tensors: name as written -> tensor; those that share a storage have blocks in the same Region.
    others: name -> type, of what else lies in the same dict; none of it was kept.
    beside: keys that lie beside a nested {"model": {...}}; none of them was kept.
    """

    path: Path
    nbytes: int
    tensors: Mapping[str, StoredTensor]
    others: Mapping[str, str]
    beside: tuple[str, ...] = ()


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
            archive = open_archive(stream.fileno(), path)
    except OSError as e:
        raise FormatError(f"{path} cannot be read: {e.strerror}", path=path) from None
    state_dict, beside = _model_part(archive.content, path)
    tensors, others = {}, {}
    for name, value in state_dict.items():
        if isinstance(value, TensorView):
            tensors[name] = _placed(name, value, archive)
        else:
            others[name] = type(value).__name__
    return PtFile(path, nbytes, tensors, others, beside)


def check_records(file: PtFile) -> None:
    """Do the storages of a file still have the CRC32s stored with them? Reads each once. Raises FormatError."""
    for region in dict.fromkeys(block.region for tensor in file.tensors.values() for block in tensor.blocks):
        check_region(region)


def _model_part(content: Any, path: Path) -> tuple[dict[str, Any], tuple[str, ...]]:
    nested = content.get("model") if isinstance(content, dict) else None
    left: list[str] = []
    if isinstance(nested, dict):
        left = sorted(str(key) for key in content if key != "model")
        if left:
            log.info("%s: taking its `model`, leaving %s", path, ", ".join(left))
        content = nested
    if not isinstance(content, dict) or not all(type(key) is str for key in content):
        got = "a tensor" if isinstance(content, TensorView) else f"a {type(content).__name__}"
        raise FormatError(f"{path} holds {got}, expected a dict of named tensors", path=path)
    if not any(isinstance(value, TensorView) for value in content.values()):
        raise FormatError(
            f"{path} holds a dict without tensors, with the keys {', '.join(sorted(content)[:5]) or '(none)'}",
            path=path,
        )
    return content, tuple(left)


def _placed(name: str, tensor: TensorView, archive: Archive) -> StoredTensor:
    """Where in the file is a tensor? Raises FormatError where it is not one run of bytes inside of its record."""
    if 0 not in tensor.shape and not tensor.contiguous:
        raise FormatError(
            f"{archive.path}: {name} {list(tensor.shape)} is stored with strides {list(tensor.stride)}, expected its rows "
            "one after the other",
            path=archive.path,
            hint="save it again with .contiguous() on every tensor",
        )
    placed = place(name, tensor, archive)
    rows = tensor.shape[0] if tensor.shape else 1
    width = placed.nbytes // rows if rows else 0
    region = Region(archive.path, placed.record.offset, placed.record.nbytes, placed.record.crc32)
    block = Block(region, placed.first, row=0, rows=rows, column=0, width=width)
    return StoredTensor(name, tensor.shape, tensor.dtype, (block,))
