"""reshard: the life of a training checkpoint. The public API, imported on first use; docs/python.md shows it.

train(config)             train on this process's share of the ranks
seed(config)              write step-0 on one CPU
load_config(...)          a TOML file and --section.key values, validated
convert(source, target)   weights from any format to any other
inspect(path)             what is in it?
verify(path)              is it whole?
diff(left, right)         are these the same weights?

For a training loop of your own, any state dict, on any ranks:
save(path, state)         one committed checkpoint directory
load(path, state)         fill a state dict in place, on whatever layout it has now
newest(folder)            the checkpoint that was saved last
AsyncSaver()              save while training goes on
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from reshard.checkpoint.api import AsyncSaver, load, newest, save
    from reshard.commands.api import convert, diff, inspect, verify
    from reshard.commands.seed import seed
    from reshard.config import Config, load_config
    from reshard.errors import ReshardError
    from reshard.train.loop import train

__all__ = [
    "AsyncSaver",
    "Config",
    "ReshardError",
    "convert",
    "diff",
    "inspect",
    "load",
    "load_config",
    "newest",
    "save",
    "seed",
    "train",
    "verify",
]

_HOMES = {
    "AsyncSaver": "reshard.checkpoint.api",
    "Config": "reshard.config",
    "ReshardError": "reshard.errors",
    "convert": "reshard.commands.api",
    "diff": "reshard.commands.api",
    "inspect": "reshard.commands.api",
    "load": "reshard.checkpoint.api",
    "load_config": "reshard.config",
    "newest": "reshard.checkpoint.api",
    "save": "reshard.checkpoint.api",
    "seed": "reshard.commands.seed",
    "verify": "reshard.commands.api",
}


def __getattr__(name: str) -> Any:
    if name == "train":  # the room of this name, which can be called
        return import_module("reshard.train")
    if name not in _HOMES:
        raise AttributeError(f"module 'reshard' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
