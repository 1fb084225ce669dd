"""What of a checkpoint does a state dict leave out, and may it? So that nothing stays behind unnoticed.

A section is what lies under one key of a state dict's top level, at any depth: `model`, `optimizer`. Of one that the state
dict names, all that is stored has to be taken; one that it does not name is left alone. A tensor or value at the top level is
a section of its own, so any part of a flat state dict can be asked for by name.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import NamedTuple

from reshard.errors import TensorMismatch, listed

logger = logging.getLogger(__name__)


class Held(NamedTuple):
    """What a checkpoint holds, tensors first.

    paths: name -> its place in the state that was saved, where that is known. pickled: what cannot be loaded.
    """

    names: list[str]
    paths: Mapping[str, tuple[str | int, ...]]
    pickled: Set[str]


class Wanted(NamedTuple):
    """What one rank's state dict names."""

    sections: list[str]
    names: list[str]


def left_out(directory: Path, held: Held, of_ranks: Sequence[Wanted], *, strict: bool) -> list[str]:
    """The names that no rank's state dict takes, sorted: a stage of a pipeline has only its own part of a section.

    Raises TensorMismatch, if strict, where one of them belongs to a section that some rank names.
    """
    taken = {name for wanted in of_ranks for name in wanted.names}
    left = [name for name in held.names if name not in taken]  # tensors first: those are to be seen in an error
    if not strict or not left:
        return sorted(left)
    sections = {section for wanted in of_ranks for section in wanted.sections}
    keys = {str(path[0]) for path in held.paths.values() if path}
    lacking: dict[str, list[str]] = {}
    for name in left:
        section, key = _section_of(name, sections), _section_of(name, keys)
        if section is not None and len(section) >= len(key or ""):  # `model.ema.a` may be of `model`, or of `model.ema`
            lacking.setdefault(section, []).append(name)
    if lacking:
        names = [name for of_section in lacking.values() for name in of_section]
        raise TensorMismatch(
            f"the state dict names {listed(f'`{section}`' for section in lacking)}, but lacks {len(names):,} of the names "
            f"that checkpoint `{directory}` has there: {listed(names)}",
            path=directory,
            missing=sorted(taken.difference(held.names)),
            hint=_hint(lacking, held),
        )
    top = {name for name, path in held.paths.items() if len(path) == 1}
    more = [name for name in left if name in top]
    if more and not top.isdisjoint(taken):  # the same trap, in a flat state dict; or meant, which we cannot know
        logger.warning("`%s` also holds tensors that were not asked for: %s", directory, listed(more))
    return sorted(left)


def _section_of(name: str, sections: set[str]) -> str | None:
    """The section that a stored name belongs to, of those given, whose keys may have dots in them."""
    end = len(name)
    while end > 0:
        if name[:end] in sections:
            return name[:end]
        end = name.rfind(".", 0, end)
    return None


def _hint(lacking: Mapping[str, list[str]], held: Held) -> str:
    """What makes a state dict that has all of a section, if it is followed to the letter."""
    any_part = "load(..., strict=False) takes what is there, and returns what was left out"
    for section, names in lacking.items():
        moments = [name for name in names if name.startswith(f"{section}.state.")]
        if moments:
            return f"{_moments_made(section, held.paths.get(moments[0], ()))}; or {any_part}"
    pickled = [name for names in lacking.values() for name in names if name in held.pickled]
    if pickled:
        return f"{listed(pickled)}: pickled, which is not loaded; {any_part}"
    return f"give it these names, too; or {any_part}"


def _moments_made(section: str, path: tuple[str | int, ...]) -> str:
    """How does an optimizer that has not taken a step come to its moments? path: of one of them, as it was saved.

    torch's function makes them, and names them by parameter; `optimizer.state_dict()` numbers the parameters.
    """
    call = "get_optimizer_state_dict(model, optimizer)"
    if len(path) == 2:  # one flat dict
        call = f"{call[:-1]}, options=StateDictOptions(flatten_optimizer_state_dict=True))"
    call = f"{call} of torch.distributed.checkpoint.state_dict"
    numbered = len(path) == 4 and str(path[2]).isdecimal()
    what = f"call {call} before optimizer.state_dict()" if numbered else f"make `{section}` with {call}"
    return f"{what}, while there are no gradients: it makes the moments"
