"""What lies in a checkpoint folder? Names and their meaning; nothing is opened but manifests. Imports no torch.

    step-500                    a checkpoint, if its manifest agrees with its files
    step-500.tmp-<save id>      a save in progress, or one that died
    step-500.old-<save id>      the older step-500, between the two renames of an exchange
    step-500.damaged            set aside after damage was proven; never deleted by us
Everything else is not ours and is never touched.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from reshard.checkpoint.manifest import MANIFEST, Manifest, read_manifest
from reshard.errors import CheckpointError, NotACheckpoint, StorageError

METADATA = ".metadata"
_STEP = re.compile(r"^step-([0-9]+)\Z")  # not `$`, which also matches before a newline
_TEMPORARY = re.compile(r"^(?P<target>.+)\.tmp-[0-9a-f]{16}\Z")
_DAMAGED = re.compile(r"^step-[0-9]+\.damaged(-[0-9]+)?\Z")
_OLD = re.compile(r"^(?P<target>.+)\.old-[0-9a-f]{16}\Z")


@dataclass(frozen=True)
class Entry:
    """One step-N directory: committed, or why it is not. linked: it leads elsewhere, and was not looked at."""

    path: Path
    step: int
    manifest: Manifest | None
    problem: CheckpointError | None = None
    linked: bool = False

    @property
    def committed(self) -> bool:
        """Has a manifest that agrees with the files' names and sizes."""
        return self.manifest is not None

    @property
    def age(self) -> int:
        """Where it comes in the order of saves: the higher, the newer. Torn ones have -1.

        step-0 has 0, whenever it was made: it is what a run begins with, so no trained step is ever older.
        """
        if self.manifest is None:
            return -1
        return self.manifest.sequence if self.step > 0 else 0


def step_directory(folder: Path, step: int) -> Path:
    """Where does step N lie?"""
    return folder / f"step-{step}"


def step_of(path: Path) -> int | None:
    """The number of a step-N directory; None for any other name (`old-step-9`, `step-9-keep`, `step-9.damaged`)."""
    match = _STEP.match(path.name)
    return int(match[1]) if match else None


def entries(folder: Path, *, root: Path | None = None) -> list[Entry]:
    """All step-N directories of a folder, oldest save first. An absent folder has none.

    Torn ones come first, by step; then step-0, whenever it was made; then the others by their sequence numbers.
    root: no link out of this folder is followed; a step that is one, or has one in it, is `linked`.
    """
    found = []
    for path, step in named_steps(folder):
        if root is not None and (target := _leads_out_anywhere(path, root)):
            problem = NotACheckpoint(
                f"a link leads to `{target}`, out of `{root}`: not followed", path=path, hint="name the place itself"
            )
            found.append(Entry(path, step, None, problem, linked=True))
            continue
        if not path.is_dir():
            continue
        try:
            found.append(Entry(path, step, read_step(path)))
        except StorageError:
            raise
        except CheckpointError as error:
            found.append(Entry(path, step, None, error))
    return sorted(found, key=lambda e: (e.age, e.step))


def named_steps(folder: Path) -> list[tuple[Path, int]]:
    """Everything in a folder that has the name of a step, and its number, whatever it is. An absent folder has none."""
    try:
        paths = sorted(folder.iterdir())
    except FileNotFoundError:
        return []
    except NotADirectoryError:
        raise StorageError(f"checkpoint folder `{folder}` is a file, expected a directory", path=folder) from None
    except OSError as error:
        raise StorageError(f"checkpoint folder `{folder}` cannot be read: {error}", path=folder) from None
    return [(path, step) for path in paths if (step := step_of(path)) is not None]


def leads_out(path: Path, root: Path) -> str | None:
    """Where does a path below `root` end, if links lead it out of there? None where it stays inside.

    A folder that somebody handed over may hold links to anything; who asks about the folder did not ask about that.
    """
    there = os.path.realpath(path)  # not Path.resolve(), which raises where links go round in a circle
    return None if Path(there).is_relative_to(os.path.realpath(root)) else there


def _leads_out_anywhere(step: Path, root: Path) -> str | None:
    """As leads_out, of a step and of the files in it."""
    if (target := leads_out(step, root)) is not None or not step.is_dir():
        return target
    try:
        links = [step / entry.name for entry in os.scandir(step) if entry.is_symlink()]
    except OSError as error:
        raise StorageError(f"`{step}` cannot be read: {error.strerror or error}", path=step) from None
    return next((there for link in links if (there := leads_out(link, root)) is not None), None)


def read_step(directory: Path) -> Manifest:
    """The manifest of a step-N directory, which must be that of step N. Raises as read_manifest.

    step-0 may hold any step: a run begins with its weights.
    """
    manifest, step = read_manifest(directory), step_of(directory)
    if step and manifest.step != step:
        raise NotACheckpoint(
            f"`{directory}` holds step {manifest.step}: it was renamed or copied",
            path=directory,
            hint=f"give it its name back: mv {directory} {step_directory(directory.parent, manifest.step)}",
        )
    return manifest


def is_leftover(path: Path) -> bool:
    """Is this the name of a temporary or replaced directory?"""
    return (_TEMPORARY.match(path.name) or _OLD.match(path.name)) is not None


def leftovers(directory: Path) -> list[Path]:
    """Temporary and replaced directories that saves of `directory` have left beside it."""
    found = []
    for path in sorted(directory.parent.glob(f"{directory.name}.*")):
        match = _TEMPORARY.match(path.name) or _OLD.match(path.name)
        if match and match["target"] == directory.name and path.is_dir():
            found.append(path)
    return found


def all_leftovers(folder: Path) -> list[Path]:
    """Temporary and replaced directories of any step in a folder."""
    if not folder.is_dir():
        return []
    matches = [(path, _TEMPORARY.match(path.name) or _OLD.match(path.name)) for path in sorted(folder.iterdir())]
    return [path for path, match in matches if match and _STEP.match(match["target"]) and path.is_dir()]


def set_aside_before(folder: Path) -> list[Path]:
    """Steps that were set aside as damaged, by this run or an earlier one."""
    return sorted(path for path in folder.glob("step-*") if _DAMAGED.match(path.name))


def is_foreign(directory: Path) -> bool:
    """A DCP directory of somebody else: .metadata, but no manifest of ours."""
    return (directory / METADATA).is_file() and not (directory / MANIFEST).exists()
