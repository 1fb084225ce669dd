"""Are these the same weights? `reshard diff`: any two formats, slab by slab; names, shapes, dtypes, numbers.

Both sides are seen under our names and in our order of rows, and a tied model's output is its embedding: so a Hugging
Face directory can be compared with Meta's files, and a difference is one of the model's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reshard.formats.cast import as_float32
from reshard.formats.protocol import ITEM_BYTES, LazyTensor, Ledger, Source, slabs

SLAB_BYTES = 8 << 20
_EMBEDDING, _OUTPUT = "tok_embeddings.weight", "output.weight"


@dataclass(frozen=True)
class Difference:
    """Where one tensor differs.

    max_abs, max_rel: the largest differences of its numbers, the relative one to the larger of the two; at: the place of
    the largest absolute one, there `left` and `right` are the numbers. count: how many differ. None where the shapes do.
    """

    name: str
    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    dtypes: tuple[str, str]
    count: int | None = None
    max_abs: float | None = None
    max_rel: float | None = None
    at: tuple[int, ...] | None = None
    left: float | None = None
    right: float | None = None


@dataclass(frozen=True)
class Report:
    """What two sources have in common. model: field -> (left, right) where the specs differ."""

    tensors: int
    only_left: tuple[str, ...]
    only_right: tuple[str, ...]
    model: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)
    differences: tuple[Difference, ...] = ()

    def same(self, *, any_dtype: bool = False, tolerance: float = 0.0) -> bool:
        """Is it one model? any_dtype: equal numbers are enough. tolerance: of the relative differences."""
        return not (
            self.only_left
            or self.only_right
            or self.model
            or any(_counts(difference, any_dtype, tolerance) for difference in self.differences)
        )


def _counts(difference: Difference, any_dtype: bool, tolerance: float) -> bool:
    if difference.max_rel is None or difference.max_rel > tolerance:
        return True
    return not any_dtype and difference.dtypes[0] != difference.dtypes[1]


def compare(left: Source, right: Source, advance: Callable[[int], object] = lambda done: None) -> Report:
    """Compare every tensor. Reads both sides once, a slab at a time; stored CRC32s are checked on the way.

    Raises FormatError where a source is damaged.
    """
    a, b = _with_output(left), _with_output(right)
    shared = [name for name in a if name in b]
    ledger = Ledger()
    found = []
    for name in shared:
        difference = _compare(name, a[name], b[name], ledger)
        if difference is not None:
            found.append(difference)
        advance(a[name].nbytes)
    ledger.check()
    return Report(
        len(shared),
        tuple(name for name in a if name not in b),
        tuple(name for name in b if name not in a),
        _models(left, right),
        tuple(found),
    )


def _with_output(source: Source) -> dict[str, LazyTensor]:
    tensors = dict(source.tensors)
    if _OUTPUT not in tensors and _EMBEDDING in tensors and source.spec is not None and source.spec.tied:
        tensors[_OUTPUT] = tensors[_EMBEDDING]
    return tensors


def _models(left: Source, right: Source) -> dict[str, tuple[Any, Any]]:
    if left.spec is None or right.spec is None:
        return {}
    a, b = left.spec.to_dict(), right.spec.to_dict()
    return {key: (a[key], b[key]) for key in a if a[key] != b[key] and key != "tied"}


def _compare(name: str, left: LazyTensor, right: LazyTensor, ledger: Ledger) -> Difference | None:
    shapes, dtypes = (left.shape, right.shape), (left.dtype, right.dtype)
    if left.shape != right.shape:
        return Difference(name, shapes, dtypes)
    columns = left.shape[1] if len(left.shape) > 1 else 1
    worst = _Worst()
    grain = max(left.grain, right.grain)
    for start, stop in slabs(left.shape, max(ITEM_BYTES[dtype] for dtype in dtypes), SLAB_BYTES, grain):
        a, b = (_bytes(tensor, start, stop, ledger) for tensor in (left, right))
        if left.dtype == right.dtype and np.array_equal(a, b):
            continue
        worst.see(_numbers(a, left.dtype), _numbers(b, right.dtype), start * columns)
    if not worst.count and left.dtype == right.dtype:
        return None
    at = None if worst.at is None else tuple(int(i) for i in np.unravel_index(worst.at, left.shape))
    return Difference(name, shapes, dtypes, worst.count, worst.max_abs, worst.max_rel, at, worst.left, worst.right)


def _bytes(tensor: LazyTensor, start: int, stop: int, ledger: Ledger) -> NDArray[np.uint8]:
    rows = tensor.shape[0] if tensor.shape else 1
    buffer = np.empty(tensor.nbytes // rows * (stop - start), np.uint8)
    tensor.fill(buffer, start, stop, ledger)
    return buffer


def _numbers(data: NDArray[np.uint8], dtype: str) -> NDArray[np.floating]:
    return data.view(np.float64) if dtype == "float64" else as_float32(data, dtype)


class _Worst:
    """The largest difference so far. A NaN on one side only is an infinite one."""

    def __init__(self) -> None:
        self.count = 0
        self.max_abs = self.max_rel = 0.0
        self.at: int | None = None
        self.left: float | None = None
        self.right: float | None = None

    def see(self, a: NDArray[np.floating], b: NDArray[np.floating], first: int) -> None:
        differ = (a != b) & ~(np.isnan(a) & np.isnan(b))
        places = np.flatnonzero(differ)
        if not len(places):
            return
        self.count += len(places)
        x, y = a[places].astype(np.float64), b[places].astype(np.float64)
        with np.errstate(invalid="ignore"):
            absolute = np.nan_to_num(np.abs(x - y), nan=np.inf)
            relative = np.nan_to_num(absolute / np.maximum(np.abs(x), np.abs(y)), nan=np.inf)
        self.max_rel = max(self.max_rel, float(relative.max()))
        i = int(absolute.argmax())
        if self.at is None or absolute[i] > self.max_abs:
            self.max_abs, self.at = float(absolute[i]), first + int(places[i])
            self.left, self.right = float(x[i]), float(y[i])


def lines(report: Report) -> list[str]:
    """The report for people."""
    out = [f"only left   {name}" for name in report.only_left]
    out += [f"only right  {name}" for name in report.only_right]
    out += [f"model       {key}: {left} and {right}" for key, (left, right) in report.model.items()]
    for d in report.differences:
        if d.shapes[0] != d.shapes[1]:
            out.append(f"shape       {d.name}: {list(d.shapes[0])} and {list(d.shapes[1])}")
            continue
        dtypes = f" ({d.dtypes[0]} and {d.dtypes[1]})" if d.dtypes[0] != d.dtypes[1] else ""
        if not d.count:
            out.append(f"dtype       {d.name}{dtypes}: equal numbers")
            continue
        out.append(
            f"numbers     {d.name}{dtypes}: {d.count:,} differ, by up to {d.max_abs:.4g} at {list(d.at or ())} "
            f"({d.left:.6g} and {d.right:.6g}), relative up to {d.max_rel:.3g}"
        )
    return out
