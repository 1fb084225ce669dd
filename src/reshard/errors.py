"""What can go wrong, and how it is said.

    ReshardError
    ├── ConfigError           .key                     a knob is wrong
    ├── LayoutError                                    the degrees, the model and the ranks do not fit together
    ├── DataError             .path                    text, tokenizer or token cache is not usable
    ├── TrainingError         .step                    the run cannot go on (a loss that is not finite)
    ├── FormatError           .path                    somebody else's file is not what it says
    │   └── TensorMismatch    .missing .unexpected .wrong
    └── CheckpointError       .path                    our directory
        ├── NotACheckpoint                             nothing that we could load
        ├── TornCheckpoint                             files, but no manifest
        ├── IntegrityError    .files                   manifest and bytes disagree
        ├── FolderInUse                                another run owns the folder
        ├── RankFailed    .rank .traceback             an error of no class of ours, on one of the ranks
        └── StorageError                               the disk said no (full, unreadable, not shared)

A message is one sentence that says what, where, expected and got; `hint` is what to type next.
`assert` is for what a programmer broke, never for input.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

MOST_LISTED = 10


class ReshardError(Exception):
    """Base of everything that we raise on purpose; the command line prints it without a traceback.

    rank_local: the other ranks do not know of it, so the rank that has it must print it.
    """

    def __init__(self, message: str, *, hint: str | None = None, rank_local: bool = False) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.rank_local = rank_local

    def __reduce__(self) -> tuple[Any, ...]:
        # Errors travel between ranks; their keyword-only arguments would not survive Exception's own way.
        return _rebuilt, (type(self), self.message, self.__dict__)

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message}\n\nhint: {self.hint}"


def _rebuilt(cls: type[ReshardError], message: str, state: dict[str, Any]) -> ReshardError:
    error = cls.__new__(cls, message)
    error.args = (message,)
    error.__dict__.update(state)
    return error


class ConfigError(ReshardError):
    """A knob is unknown, has the wrong type, or contradicts another."""

    def __init__(self, message: str, *, key: str = "", hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.key = key


class LayoutError(ReshardError):
    """The degrees do not fit the world size, the model or the batch."""


class RankLost(ReshardError):
    """Another rank has ended, and this one waited for it: not the first failure."""


class DataError(ReshardError):
    """Text, a tokenizer or a token cache cannot be used as asked."""

    def __init__(self, message: str, *, path: Path | str = "", hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.path = str(path)


class TrainingError(ReshardError):
    """The run cannot go on, e.g. the loss is not finite."""

    def __init__(self, message: str, *, step: int, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.step = step


class FormatError(ReshardError):
    """A file of another program is not what its name or header says."""

    def __init__(self, message: str, *, path: Path | str = "", hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.path = str(path)


class TensorMismatch(FormatError):
    """Names, shapes or dtypes on the two sides are not the same.

    wrong: name -> (expected, got), already as text.
    """

    def __init__(
        self,
        message: str,
        *,
        path: Path | str = "",
        missing: Sequence[str] = (),
        unexpected: Sequence[str] = (),
        wrong: dict[str, tuple[str, str]] | None = None,
        hint: str | None = None,
    ) -> None:
        wrong = wrong or {}
        parts = [message]
        if missing:
            parts.append(f"missing: {listed(missing)}")
        if unexpected:
            parts.append(f"unexpected: {listed(unexpected)}")
        if wrong:
            parts.append(listed([f"{name} expected {want}, got {got}" for name, (want, got) in wrong.items()]))
        super().__init__("; ".join(parts), path=path, hint=hint)
        self.missing, self.unexpected, self.wrong = tuple(missing), tuple(unexpected), wrong


class CheckpointError(ReshardError):
    """Something about one of our checkpoint directories."""

    def __init__(
        self, message: str, *, path: Path | str = "", hint: str | None = None, rank_local: bool = False
    ) -> None:
        super().__init__(message, hint=hint, rank_local=rank_local)
        self.path = str(path)


class NotACheckpoint(CheckpointError):
    """There is nothing here that could be loaded."""


class TornCheckpoint(CheckpointError):
    """A save did not finish: files, but no manifest."""


class IntegrityError(CheckpointError):
    """The manifest and the bytes on disk disagree."""

    def __init__(
        self,
        message: str,
        *,
        path: Path | str = "",
        files: Iterable[str] = (),
        hint: str | None = None,
        rank_local: bool = False,
    ) -> None:
        super().__init__(message, path=path, hint=hint, rank_local=rank_local)
        self.files = tuple(files)


class FolderInUse(CheckpointError):
    """Another run owns this checkpoint folder."""


class RankFailed(CheckpointError):
    """A rank met an error of no class of ours in a step that all ranks take together; all of them raise this.

    rank: which one, of those that take the step. traceback: its, as text; the error itself is `__cause__` there.
    """

    def __init__(self, message: str, *, rank: int, traceback: str, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.rank, self.traceback = rank, traceback


class StorageError(CheckpointError):
    """The storage refused: full, unreadable, or not shared between the hosts."""


def listed(names: Iterable[str], most: int = MOST_LISTED) -> str:
    """How do we list many names in one sentence? The first `most`, then how many more."""
    names = list(names)
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def nearest(word: str, valid: Iterable[str]) -> str | None:
    """Which valid name did the user probably mean? None where nothing is close."""
    import difflib  # only on the way to an error

    by_lower = {name.lower(): name for name in valid}  # `8b` means `8B`
    close = difflib.get_close_matches(word.lower(), list(by_lower), n=1, cutoff=0.6)
    return by_lower[close[0]] if close else None
