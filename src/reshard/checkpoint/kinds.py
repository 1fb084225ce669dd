"""Which tensors can be stored and filled? Those whose numbers lie in memory as torch says that they do.

A subclass may mean by its numbers what it likes: one that dequantises gives other numbers than it holds, and a copy into
it goes into a temporary. So a subclass is taken only where nothing of what we call is its own.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed._functional_collectives import (
    AsyncCollectiveTensor,
)  # private: an unfinished result; torch 2.13.0
from torch.distributed._shard.sharded_tensor.api import ShardedTensor  # private: what FSDP1 leaves; torch 2.13.0
from torch.distributed.tensor import DTensor

from reshard.checkpoint import archive

_KNOWN: set[type] = {Tensor, nn.Parameter, DTensor, AsyncCollectiveTensor}  # a Buffer's class is Tensor
_OF_TENSOR = frozenset(dir(Tensor))
# What a subclass may define of its own: how it is made, shown and pickled, none of which we do.
_HARMLESS = {
    "__annotations__", "__class__", "__deepcopy__", "__delattr__", "__dict__", "__dir__", "__doc__", "__format__",
    "__getstate__", "__hash__", "__init__", "__init_subclass__", "__module__", "__new__", "__reduce__", "__reduce_ex__",
    "__repr__", "__setattr__", "__setstate__", "__sizeof__", "__str__", "__subclasshook__", "__weakref__",
}  # fmt: skip


def problem_of(tensor: Tensor) -> str | None:
    """What it is, where that cannot be stored or filled, in words that follow `it is`; None where it can."""
    kind = type(tensor)
    if kind is not DTensor and (protocol := _part_by(tensor)):
        return (
            f"a part of a tensor, as its {protocol} says, which is not read yet; expected a DTensor, which says it, too"
        )
    if kind not in _KNOWN:
        if isinstance(tensor, ShardedTensor):
            return "a ShardedTensor, expected DTensors (FSDP2)"
        if not _is_plain_class(kind):
            return (
                f"a {kind.__module__}.{kind.__qualname__}, a tensor subclass of which it is not known that a copy of its "
                "numbers is all there is to it, expected torch.Tensor, Parameter or DTensor"
            )
    if tensor.layout != torch.strided or tensor.is_meta or tensor.is_nested:
        layout = "nested" if tensor.is_nested else tensor.layout
        return f"a tensor without numbers of its own ({layout}, {tensor.device})"
    if not archive.supported(tensor.dtype):
        return f"of dtype {tensor.dtype}, which cannot be stored"
    if kind is not DTensor and tensor.numel() and not tensor.untyped_storage().nbytes():
        return "a tensor whose memory was given back (FSDP1 does so between steps), expected one that has its numbers"
    return None


def _part_by(tensor: Tensor) -> str | None:
    """What says of a tensor that it is only a part? None where nothing does."""
    if hasattr(tensor, "__create_chunk_list__") and not isinstance(tensor, ShardedTensor):
        return "__create_chunk_list__"  # DCP's protocol, by which DTensors tell their part, too
    return "global_shape" if hasattr(tensor, "global_shape") and hasattr(tensor, "local_offsets") else None


def _is_plain_class(kind: type) -> bool:
    """A subclass that leaves to torch all that we do with a tensor. Worked out anew each time: classes can be changed."""
    for base in kind.__mro__:
        if base in _KNOWN:
            return base is not AsyncCollectiveTensor
        own = vars(base)
        passed_on = own.get("__torch_function__") is torch._C._disabled_torch_function_impl  # as nn.Parameter has it
        changed = (_OF_TENSOR.intersection(own) - _HARMLESS) - ({"__torch_function__"} if passed_on else set())
        if changed or {"__getattribute__", "__getattr__", "__tensor_flatten__", "__create_chunk_list__"}.intersection(
            own
        ):
            return False
    return False


def shares_memory(tensor: Tensor) -> bool:
    """Do several of its numbers lie in one place, so that it cannot be filled? E.g. what `expand` gives."""
    if tensor.is_contiguous() or not tensor.numel():
        return False
    extents = sorted((step, n) for step, n in zip(tensor.stride(), tensor.shape, strict=True) if n > 1)
    reach = 0
    for step, n in extents:
        if step <= reach:
            break
        reach += step * (n - 1)
    else:
        return False
    if extents[0][0] == 0:
        return True
    places = torch.zeros(1, dtype=torch.int64)  # rare: dims that are interleaved, which may still never meet
    for step, n in extents:
        places = (places[:, None] + step * torch.arange(n)).reshape(-1)
    return len(set(places.tolist())) < len(places)
