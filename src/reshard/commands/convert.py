"""How do foreign weights become a checkpoint of ours? A stream of pieces, from the source's files into DCP's."""

from __future__ import annotations

import logging
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from reshard.errors import FormatError, StorageError
from reshard.formats.meta import open_meta
from reshard.formats.protocol import ITEM_BYTES, LazyTensor, Ledger, Source, slabs

if TYPE_CHECKING:
    import torch

    from reshard.checkpoint.manifest import Manifest
    from reshard.checkpoint.state import Piece

logger = logging.getLogger(__name__)

PIECE_BYTES = 64 * 2**20  # in memory at once, before a cast; also the size of the chunks that a reader finds
_EMBEDDING, _OUTPUT = "tok_embeddings.weight", "output.weight"


def run(source: Path, target: Path, *, dtype: str | None = None) -> Path:
    """Convert a Meta directory into a committed DCP checkpoint at `target`, which must not exist or be empty.

    Raises FormatError for the source, NotACheckpoint for a target in use, StorageError for the disk; nothing is then
    left behind.
    """
    manifest = to_dcp(open_meta(source), target, dtype=dtype)
    logger.info("%s: %d tensors, %.1f MB, from %s", target, len(manifest.tensors), manifest.bytes / 1e6, source)
    return target


def to_dcp(source: Source, out: Path, *, dtype: str | None = None) -> Manifest:
    """Write a source as a committed weights-only checkpoint under flat Meta names.

    dtype: a torch dtype name to cast to; None keeps each tensor's own. A tied model is written with both names, which
    torchtune needs. Memory: one piece of at most PIECE_BYTES. The source's stored CRC32s are checked on the way, before
    the commit. Raises FormatError, NotACheckpoint, StorageError.
    """
    from reshard.checkpoint.save import save_weights

    if source.spec is None:
        raise FormatError(f"{source.path} does not say which model it is: heads, RoPE and epsilon", path=source.path)
    tensors = dict(source.tensors)
    if source.spec.tied:
        tensors.setdefault(_OUTPUT, tensors[_EMBEDDING])
    total = sum(tensor.nbytes for tensor in tensors.values())
    _check_space(out, sum(t.nbytes // ITEM_BYTES[t.dtype] * ITEM_BYTES[dtype or t.dtype] for t in tensors.values()))
    own = sorted({tensor.dtype for tensor in tensors.values()})
    if dtype is not None and own != [dtype]:
        logger.info("casting the weights from %s to %s", "/".join(own), dtype)
    with _progress(f"converting {source.path.name}", total) as advance:
        pieces = _pieces(tensors, dtype, advance)
        return save_weights(out, pieces, step=0, source=source.provenance, config=None, spec=source.spec)


def _pieces(tensors: dict[str, LazyTensor], dtype: str | None, advance: Callable[[int], object]) -> Iterator[Piece]:
    """Every tensor, some rows at a time; ends only if the bytes that were read are those that had been written."""
    from reshard.checkpoint.state import Piece

    ledger = Ledger()
    for name, tensor in tensors.items():
        for start, stop in slabs(tensor.shape, ITEM_BYTES[tensor.dtype], PIECE_BYTES):
            scalar = not tensor.shape
            yield Piece(
                fqn=name,
                shape=tensor.shape,
                offsets=() if scalar else (start, *(0 for _ in tensor.shape[1:])),
                sizes=() if scalar else (stop - start, *tensor.shape[1:]),
                dtype=dtype or tensor.dtype,
                read=partial(_read, tensor, (start, stop), dtype=dtype, ledger=ledger, advance=advance),
            )
    ledger.check()


def _read(
    tensor: LazyTensor,
    rows_wanted: tuple[int, int],
    *,
    dtype: str | None,
    ledger: Ledger,
    advance: Callable[[int], object],
) -> torch.Tensor:
    import torch

    rows = tensor.read(*rows_wanted, ledger)
    advance(rows.nbytes)
    if dtype is None or dtype == tensor.dtype:
        return rows
    cast: torch.Tensor = rows.to(getattr(torch, dtype))
    if torch.isinf(cast).any() and not torch.isinf(rows).any():
        raise FormatError(
            f"{tensor.name} has numbers up to {rows.abs().max().item():.4g}, too large for {dtype}",
            hint="--dtype bfloat16 has float32's range",
        )
    return cast


def _check_space(out: Path, needed: int) -> None:
    """Is there room for so many bytes? Asked before the first one is written."""
    parent = out.absolute().parent
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise StorageError(
            f"{out} needs {needed / 1e9:.2f} GB, {parent} has {free / 1e9:.2f} GB free",
            path=out,
            hint="free some space, or name a directory on another disk",
        )


@contextmanager
def _progress(title: str, total: int) -> Iterator[Callable[[int], object]]:
    """Yields what to call with the number of bytes done. Silent where stderr is not a terminal."""
    if not sys.stderr.isatty():
        yield lambda done: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=total)
        yield lambda done: bar.advance(task, done)
