"""What does a checkpoint hold, bit for bit? Three readers: reshard's own, reshard's on foreign files, and plain torch."""

from __future__ import annotations

import hashlib
import logging
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from reshard.checkpoint.layout import step_of
from reshard.checkpoint.load import choose, load
from reshard.checkpoint.ranks import Ranks

_POISON = 0xA5  # what a destination holds before a load: no number may stay as it was


class Destination:
    """All tensors of a checkpoint, side by side in one piece of memory, so that two of them are compared at once."""

    def __init__(self, shapes: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> None:
        starts, total = {}, 0
        for name, (shape, dtype) in shapes.items():
            starts[name] = total
            total += -(-torch.Size(shape).numel() * dtype.itemsize // 16) * 16
        self.memory = torch.empty(total, dtype=torch.uint8)
        self.tensors: dict[str, Tensor] = {}
        for name, (shape, dtype) in shapes.items():
            nbytes = torch.Size(shape).numel() * dtype.itemsize
            self.tensors[name] = self.memory[starts[name] : starts[name] + nbytes].view(dtype).view(shape)
        self.poison()

    @classmethod
    def of(cls, directory: Path) -> Destination:
        """For everything that an undamaged directory holds, as plain torch reads its index."""
        described = dcp.FileSystemReader(str(directory)).read_metadata().state_dict_metadata
        return cls(
            {
                n: (tuple(t.size), t.properties.dtype)
                for n, t in described.items()
                if isinstance(t, TensorStorageMetadata)
            }
        )

    def poison(self) -> None:
        self.memory.fill_(_POISON)

    def bits(self) -> Tensor:
        """A copy of all of it; between the tensors lies the poison, always the same."""
        return self.memory.clone()

    def digest(self) -> str:
        return hashlib.blake2b(self.memory.numpy().tobytes(), digest_size=16).hexdigest()


def load_ours(directory: Path, into: Destination) -> None:
    """By reshard: a checkpoint of ours through its manifest, any other DCP directory through its stored CRCs."""
    into.poison()
    load(directory, into.tensors, Ranks())


def start_ours(directory: Path, into: Destination) -> None:
    """The same for a step of a run: it is looked for as a start looks for it."""
    into.poison()
    step = step_of(directory)
    assert step is not None
    start = choose(directory.parent, load_step=step, steps=step + 1, initial_load_path=None)
    assert start.directory == directory
    load(directory, into.tensors, Ranks())


def load_plain(directory: Path, into: Destination) -> None:
    """By torch.distributed.checkpoint alone: none of our code is in it."""
    into.poison()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(dict(into.tensors), storage_reader=dcp.FileSystemReader(str(directory)), no_dist=True)


def plain_bits(directory: Path) -> Tensor:
    """The truth about an undamaged directory."""
    destination = Destination.of(directory)
    load_plain(directory, destination)
    return destination.bits()


def plain_digest(directory: Path) -> str:
    destination = Destination.of(directory)
    load_plain(directory, destination)
    return destination.digest()


def our_digest(directory: Path) -> str:
    destination = Destination.of(directory)
    load_ours(directory, destination)
    return destination.digest()


def quiet() -> None:
    """Thousands of expected warnings and tracebacks are of no use."""
    logging.disable(logging.CRITICAL)
