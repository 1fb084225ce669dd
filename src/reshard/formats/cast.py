"""How does a number change its dtype on the way? To the nearest, ties to even, as torch does; never silently to infinity.

In numpy, a few rows at a time: no torch. bfloat16 is the upper half of a float32, so it is done on the bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import numpy as np
from numpy.typing import NDArray

from reshard.errors import FormatError
from reshard.formats.protocol import ITEM_BYTES, WEIGHT_DTYPES, LazyTensor, Ledger

_CHUNK = 1 << 16  # numbers at a time: what is made on the way stays in the processor's cache
_NAN_BF16 = 0x7FC0
_INFINITY = 0x7F800000
_NUMPY = {"float32": np.float32, "float16": np.float16, "float64": np.float64}


def as_float32(data: NDArray[np.uint8], dtype: str) -> NDArray[np.float32]:
    """Bytes of numbers of a weight dtype, as float32 (float64 is rounded)."""
    if dtype == "bfloat16":
        return (data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        result: NDArray[np.float32] = data.view(_NUMPY[dtype]).astype(np.float32)
    return result


def cast_into(out: NDArray[np.uint8], data: NDArray[np.uint8], source: str, target: str) -> bool:
    """Write the numbers of `data` into `out` in another dtype. False where a finite number became infinite."""
    finite = True
    n, size, out_size = len(data) // ITEM_BYTES[source], ITEM_BYTES[source], ITEM_BYTES[target]
    for start in range(0, n, _CHUNK):
        stop = min(n, start + _CHUNK)
        part, result = data[start * size : stop * size], out[start * out_size : stop * out_size]
        wide = as_float32(part, source)  # also float64 on its way to float16: torch rounds it twice as well
        if target == "bfloat16":
            narrow = _to_bfloat16(wide.view(np.uint32))
            result.view(np.uint16)[:] = narrow
            became = (narrow & 0x7FFF) == _INFINITY >> 16
        else:
            with np.errstate(over="ignore", invalid="ignore"):
                result.view(_NUMPY[target])[:] = wide
            became = np.isinf(result.view(_NUMPY[target])) if _narrows(source, target) else np.zeros(0, bool)
        if became.any():
            original = part.view(np.float64) if source == "float64" else wide
            finite = finite and bool(np.isinf(original[became]).all())
    return finite


def _narrows(source: str, target: str) -> bool:
    return target == "float16" or (source == "float64" and target != "float64")


def _to_bfloat16(bits: NDArray[np.uint32]) -> NDArray[np.uint16]:
    rounded = ((bits + (((bits >> 16) & 1) + 0x7FFF)) >> 16).astype(np.uint16)
    nan = (bits & 0x7FFFFFFF) > _INFINITY
    if nan.any():
        rounded[nan] = _NAN_BF16
    return rounded


@dataclass(frozen=True)
class Cast:
    """A LazyTensor in another dtype."""

    inner: LazyTensor
    dtype: str

    @property
    def name(self) -> str:
        """See LazyTensor."""
        return self.inner.name

    @property
    def shape(self) -> tuple[int, ...]:
        """See LazyTensor."""
        return self.inner.shape

    @property
    def nbytes(self) -> int:
        """See LazyTensor."""
        return prod(self.shape) * ITEM_BYTES[self.dtype]

    @property
    def grain(self) -> int:
        """See LazyTensor."""
        return self.inner.grain

    def fill(self, buffer: NDArray[np.uint8], start: int, stop: int, ledger: Ledger | None = None) -> None:
        """See LazyTensor. Raises FormatError where a number is too large for the dtype."""
        count = len(buffer) // ITEM_BYTES[self.dtype]
        data = np.empty(count * ITEM_BYTES[self.inner.dtype], np.uint8)
        self.inner.fill(data, start, stop, ledger)
        if not cast_into(buffer, data, self.inner.dtype, self.dtype):
            numbers = np.abs(as_float32(data, self.inner.dtype))
            largest = float(numbers[np.isfinite(numbers)].max(initial=0))
            raise FormatError(
                f"{self.name} has numbers up to {largest:.4g}, too large for {self.dtype}",
                hint="--dtype bfloat16 has float32's range",
            )


def cast(tensor: LazyTensor, dtype: str | None) -> LazyTensor:
    """The tensor in `dtype`; None leaves it as it is. Raises FormatError where it holds no weights."""
    if dtype is None or dtype == tensor.dtype:
        return tensor
    if tensor.dtype not in WEIGHT_DTYPES:
        raise FormatError(f"{tensor.name} is {tensor.dtype}, which cannot be cast to {dtype}")
    return Cast(tensor, dtype)


def restored(tensor: LazyTensor, dtype: str) -> LazyTensor:
    """The tensor in a narrower dtype if that changes no number, else as it is. Reads it whole: for small ones."""
    if tensor.dtype == dtype or tensor.dtype != "float32" or dtype not in ("bfloat16", "float16"):
        return tensor
    wide = np.empty(tensor.nbytes, np.uint8)
    tensor.fill(wide, 0, tensor.shape[0] if tensor.shape else 1)
    narrow, again = np.empty(len(wide) // 2, np.uint8), np.empty_like(wide)
    cast_into(narrow, wide, "float32", dtype)
    cast_into(again, narrow, dtype, "float32")
    return Cast(tensor, dtype) if np.array_equal(wide, again) else tensor
