"""Which numbers are in a tensor? Its statistics and a small histogram, of any size in bounded memory.

The numbers are read twice, a few million at a time: first for all but the histogram, whose bins need to know the ends.
Stored CRC32s are checked on the way. Imports torch only for dtypes that numpy does not have.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reshard.checkpoint.index import index_bytes, open_item, read_index
from reshard.checkpoint.layout import is_foreign
from reshard.checkpoint.manifest import MANIFEST, read_manifest
from reshard.errors import FormatError, IntegrityError, StorageError, nearest
from reshard.formats.cast import as_float32
from reshard.formats.protocol import ITEM_BYTES, READ_BYTES, Ledger, Region, Source, StoredTensor, slabs

BINS = 20
_BAR = 36  # characters of the longest bar
_NUMPY = {
    "float64": np.float64, "float32": np.float32, "float16": np.float16, "int64": np.int64, "int32": np.int32,
    "int16": np.int16, "int8": np.int8, "uint8": np.uint8, "uint16": np.uint16, "uint32": np.uint32, "uint64": np.uint64,
    "bool": np.bool_,
}  # fmt: skip

Parts = Callable[[Ledger | None], Iterator[NDArray[np.uint8]]]


@dataclass(frozen=True)
class Opened:
    """A tensor that can be read in parts: their order does not matter here. stored: where it lies, for people."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    stored: tuple[str, ...]
    parts: Parts


@dataclass
class Statistics:
    """Of the finite numbers, but for `count`, `zeros`, `nan` and `infinite`. Added to part by part."""

    count: int = 0
    zeros: int = 0
    nan: int = 0
    infinite: int = 0
    min: float = math.inf
    max: float = -math.inf
    mean: float = 0.0
    _squares: float = field(default=0.0, repr=False)  # sum of squared differences from the mean

    @property
    def finite(self) -> int:
        """Numbers that are neither infinite nor NaN."""
        return self.count - self.nan - self.infinite

    @property
    def std(self) -> float:
        """Of all of them, not of a sample."""
        return math.sqrt(self._squares / self.finite) if self.finite else math.nan

    def add(self, values: NDArray[np.float64]) -> None:
        """Take more numbers in. (Chan, Golub and LeVeque, 1979: two means and two sums of squares make one.)"""
        before = self.finite
        self.count += values.size
        self.zeros += int(values.size - np.count_nonzero(values))
        good = np.isfinite(values)
        if not good.all():
            nan = int(np.isnan(values).sum())
            self.nan += nan
            self.infinite += int(values.size - good.sum()) - nan
            values = values[good]
        if not values.size:
            return
        self.min, self.max = min(self.min, float(values.min())), max(self.max, float(values.max()))
        with np.errstate(over="ignore", invalid="ignore"):  # the squares of float64's largest
            mean = float(values.mean())
            squares = float(np.square(values - mean).sum())
        total, apart = before + values.size, mean - self.mean
        self.mean += apart * values.size / total
        self._squares += squares + apart * apart * before * values.size / total


def run(path: Path, name: str, source: Callable[[], Source]) -> dict[str, Any]:
    """The report of one tensor as plain JSON values. source: opens what is not ours.

    Raises FormatError for a name that is not there (with the nearest), and for damage; StorageError.
    """
    opened = _ours(path, name) if (path / MANIFEST).exists() and not is_foreign(path) else _foreign(source(), name)
    statistics, ledger = Statistics(), Ledger()
    for part in opened.parts(ledger):
        statistics.add(_numbers(part, opened.dtype))
    ledger.check()
    return {
        "kind": "tensor",
        "path": str(path),
        "name": opened.name,
        "shape": list(opened.shape),
        "dtype": opened.dtype,
        "bytes": prod(opened.shape) * ITEM_BYTES[opened.dtype],
        "stored": list(opened.stored),
        "count": statistics.count,
        "min": _plain(statistics.min),
        "max": _plain(statistics.max),
        "mean": _plain(statistics.mean) if statistics.finite else None,
        "std": _plain(statistics.std),
        "zeros": statistics.zeros / statistics.count if statistics.count else 0.0,
        "not_finite": statistics.nan + statistics.infinite,
        "nan": statistics.nan,
        "infinite": statistics.infinite,
        "histogram": _histogram(opened, statistics),
    }


def _ours(path: Path, name: str) -> Opened:
    """A tensor of one of our checkpoints: a weight, or any other that is stored."""
    manifest = read_manifest(path)
    index = read_index(index_bytes(path, manifest), path)
    stored = _named(name, list(index.tensors), path)
    tensor = index.tensors[stored]

    def parts(ledger: Ledger | None) -> Iterator[NDArray[np.uint8]]:
        for chunk in tensor.chunks:
            file = path / chunk.file
            try:
                fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            except FileNotFoundError:
                raise IntegrityError(
                    f"`{file}` is missing, which the index names", path=path, files=[chunk.file]
                ) from None
            except OSError as error:
                raise StorageError(f"`{file}` cannot be read: {error.strerror or error}", path=path) from None
            try:
                where = f"`{file}`: {stored} at {list(chunk.offsets)}"
                _, view, placed = open_item(fd, file, where, tensor.dtype, chunk)
            except OSError as error:
                raise StorageError(f"`{file}` cannot be read: {error.strerror or error}", path=path) from None
            finally:
                os.close(fd)
            if not view.contiguous:
                raise FormatError(
                    f"{where} is stored with strides {list(view.stride)}, expected rows in order", path=file
                )
            region = Region(file, placed.record.offset, placed.record.nbytes, placed.record.crc32)
            for start in range(0, placed.nbytes, READ_BYTES):
                buffer = np.empty(min(READ_BYTES, placed.nbytes - start), np.uint8)
                region.read_into(buffer, placed.first + start, ledger)
                yield buffer

    places = tuple(f"{c.file} at byte {c.offset:,}: {_box(c.offsets, c.sizes)}" for c in tensor.chunks)
    return Opened(stored, tensor.shape, tensor.dtype, places, parts)


def _foreign(source: Source, name: str) -> Opened:
    """A tensor of a source in any format, under its canonical name."""
    tensor = source.tensors[_named(name, list(source.tensors), source.path)]
    row_bytes = tensor.nbytes // tensor.shape[0] if tensor.shape and tensor.shape[0] else tensor.nbytes

    def parts(ledger: Ledger | None) -> Iterator[NDArray[np.uint8]]:
        for start, stop in slabs(tensor.shape, ITEM_BYTES[tensor.dtype], READ_BYTES, tensor.grain):
            buffer = np.empty((stop - start) * row_bytes, np.uint8)
            tensor.fill(buffer, start, stop, ledger)
            yield buffer

    inner = tensor
    while not isinstance(inner, StoredTensor) and hasattr(inner, "inner"):
        inner = inner.inner  # a cast or a permutation of a stored one
    blocks = inner.blocks if isinstance(inner, StoredTensor) else ()
    files = dict.fromkeys(f"{b.region.file.name} at byte {b.region.offset + b.offset:,}" for b in blocks)
    return Opened(tensor.name, tensor.shape, tensor.dtype, tuple(files), parts)


def _named(name: str, known: list[str], path: Path) -> str:
    """The full name that a name, or its end after a dot, means. Raises FormatError."""
    if name in known:
        return name
    if f"model.{name}" in known:  # a canonical name, in a full checkpoint
        return f"model.{name}"
    ends = [full for full in known if full.endswith(f".{name}")]
    if len(ends) == 1:
        return ends[0]
    close = nearest(name, known)
    hint = f"did you mean `{ends[0]}`?" if ends else f"did you mean `{close}`?" if close else None
    what = f"{len(ends)} tensors end in `{name}`" if ends else f"it has no tensor `{name}`"
    raise FormatError(f"`{path}`: {what}", path=path, hint=hint or f"`reshard inspect --tree {path}` shows all names")


def _numbers(part: NDArray[np.uint8], dtype: str) -> NDArray[np.float64]:
    if dtype in _NUMPY:
        return part.view(_NUMPY[dtype]).astype(np.float64)
    if dtype == "bfloat16":
        return as_float32(part, dtype).astype(np.float64)
    if dtype.startswith("complex"):
        raise FormatError(f"its numbers are {dtype}, which have no order", hint="statistics are of real numbers")
    import torch

    values: NDArray[np.float64] = torch.from_numpy(part).view(getattr(torch, dtype)).to(torch.float64).numpy()
    return values


def _histogram(opened: Opened, statistics: Statistics) -> list[dict[str, float]]:
    """BINS bins of equal width from the lowest to the highest number; one where all are the same."""
    low, high = statistics.min, statistics.max
    if not statistics.finite:
        return []
    if low == high or not math.isfinite(high - low):
        return [{"from": low, "to": high, "count": statistics.finite}]
    counts = np.zeros(BINS, np.int64)
    for part in opened.parts(None):
        values = _numbers(part, opened.dtype)
        counts += np.histogram(values[np.isfinite(values)], BINS, (low, high))[0]
    edges = np.linspace(low, high, BINS + 1)
    return [
        {"from": float(a), "to": float(b), "count": int(n)}
        for a, b, n in zip(edges[:-1], edges[1:], counts, strict=True)
    ]


def _plain(value: float) -> float | None:
    """JSON has no infinity."""
    return value if math.isfinite(value) else None


def _box(offsets: tuple[int, ...], sizes: tuple[int, ...]) -> str:
    if not offsets:
        return "all of it"
    return ", ".join(f"{o}:{o + s}" for o, s in zip(offsets, sizes, strict=True))


def text(report: Mapping[str, Any]) -> list[str]:
    """The report for people."""
    shape = " x ".join(map(str, report["shape"])) or "one number"
    lines = [
        f"{report['name']}: {shape}, {report['dtype']}, {report['count']:,} numbers, {report['bytes'] / 1e6:,.2f} MB"
    ]
    most = 8
    lines += [f"{'stored' if i == 0 else '':10} {place}" for i, place in enumerate(report["stored"][:most])]
    if len(report["stored"]) > most:
        lines.append(f"{'':10} and {len(report['stored']) - most} more chunks")
    for key in ("min", "max", "mean", "std"):
        lines.append(f"{key:10} {'-' if report[key] is None else format(report[key], '.7g')}")
    lines.append(f"{'zeros':10} {report['zeros']:.4%}")
    odd = f" ({report['nan']:,} NaN, {report['infinite']:,} infinite)" if report["not_finite"] else ""
    lines.append(f"{'not finite':10} {report['not_finite']:,}{odd}")
    lines.append("")
    highest = max((b["count"] for b in report["histogram"]), default=0)
    for b in report["histogram"]:
        width = round(_BAR * b["count"] / highest)
        bar = "█" * width or ("▏" if b["count"] else "")
        lines.append(f"{b['from']:>11.4g} .. {b['to']:>11.4g}  {bar:{_BAR}} {b['count']:>14,}")
    return lines
