"""What happens each step? loop.py is the plot; read it from top to bottom."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from reshard.config import Config
    from reshard.train.loop import Outcome


class _Room(ModuleType):
    """`reshard.train` is this package as soon as something has imported a part of it: it can be called all the same."""

    def __call__(self, config: Config) -> Outcome:
        """See reshard.train.loop.train."""
        from reshard.train.loop import train

        return train(config)


sys.modules[__name__].__class__ = _Room
