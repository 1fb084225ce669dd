"""What in a step's directory is ours? The rest is never deleted, and a directory that holds any of it is never renamed.

Ours is what a manifest names, and the manifest itself. Where there is no whole manifest, ours is what bears the names that a
save gives to its files: a save that did not finish, or damage. People keep notes, tokenizers and other programs' files beside
a checkpoint, and make directories before they save into them.
"""

from __future__ import annotations

import json
import logging
import os
import re
from pathlib import Path

from reshard.checkpoint.blocks import SUFFIX
from reshard.checkpoint.layout import METADATA, is_leftover, step_of
from reshard.checkpoint.manifest import MANIFEST, MOST_BYTES, Manifest, UnfitFile, parse_manifest, read_file
from reshard.errors import CheckpointError, IntegrityError, NotACheckpoint, StorageError, listed

logger = logging.getLogger(__name__)

_DATA = re.compile(rf"__[0-9]+_[0-9]+\.distcp(?P<sums>{re.escape(SUFFIX)})?\Z")


def not_ours(directory: Path) -> str | None:
    """What is there that no save of ours has put there, to be said after the directory's name: "holds notes.txt ...".

    None where there is nothing, where an empty directory is, and where all is ours. Raises OSError.
    """
    if directory.is_symlink():
        return f"is a link to `{directory.readlink()}`"
    try:
        names = {path.name for path in directory.iterdir()}
    except FileNotFoundError:
        return None
    except NotADirectoryError:
        return "is a file" if os.path.lexists(directory) else None  # or what should be its folder is one
    try:
        manifest = _manifest_of(directory) if MANIFEST in names else None
    except NotACheckpoint as error:
        return f"cannot be judged: {error.message}"
    if manifest is None:
        return _by_names(directory, names)
    step = step_of(directory)
    if step and manifest.step != step:
        return f"holds the checkpoint of step {manifest.step}: it was renamed or copied"
    return _holds(names - {MANIFEST, *manifest.files})


def _manifest_of(directory: Path) -> Manifest | None:
    """What it says, whether or not the files agree; None where it is damaged. Raises NotACheckpoint, OSError."""
    try:
        return parse_manifest(read_file(directory / MANIFEST, MOST_BYTES), directory)
    except (UnfitFile, IntegrityError):
        return None


def _by_names(directory: Path, names: set[str]) -> str | None:
    found = {name: match for name in names if (match := _DATA.match(name))}
    sums = [name for name, match in found.items() if match["sums"]]
    # Ours have their sums beside them. What is half deleted may have lost them, but that has another name by then.
    if METADATA in names and MANIFEST not in names and found and not sums and not is_leftover(directory):
        return "is a DCP checkpoint of another program"
    others = names - {MANIFEST, METADATA, *found}
    if MANIFEST in names and _is_of_another_program(directory / MANIFEST):
        others.add(MANIFEST)
    return _holds(others)


def _is_of_another_program(manifest: Path) -> bool:
    """Is it JSON, and nothing like what we write? Ours may be cut or full of zeros, but it is not other JSON."""
    try:
        body = json.loads(read_file(manifest, MOST_BYTES))
    except (UnfitFile, ValueError, RecursionError):
        return False
    return not (isinstance(body, dict) and ("digest" in body or "save_id" in body))


def _holds(others: set[str]) -> str | None:
    return f"holds {listed(sorted(others))}, not part of a checkpoint of ours" if others else None


def refuse_others(directory: Path, *, hint: str = "save under another name") -> None:
    """Raise CheckpointError where a save of this name would have to delete or rename what is not ours; StorageError.

    hint: what else can be done than moving it.
    """
    try:
        others = not_ours(directory)
    except OSError as error:
        raise StorageError(
            f"`{directory}` cannot be looked at: {error.strerror or error} ({error.filename})", path=directory
        ) from None
    if others is not None:
        raise CheckpointError(
            f"`{directory}` {others}: nothing was written, renamed or deleted",
            path=directory,
            hint=f"{hint}, or keep what is there under another one: mv {directory} {directory}.kept",
        )


def remove(directory: Path) -> str | None:
    """Delete a directory of ours that nobody needs any more, file by file. Returns why it is still there, or None.

    Whatever else is in it, or comes into it meanwhile, stays. The manifest goes last: it says what is ours.
    """
    try:
        found = sorted(directory.iterdir(), key=lambda path: path.name == MANIFEST)
        reason = not_ours(directory)
        if reason is None:
            for path in found:
                path.unlink()
            directory.rmdir()
    except OSError as error:
        reason = f"could not be deleted: {error.strerror or error} ({error.filename})"
    if reason is not None:
        logger.warning("left `%s` where it is: it %s", directory, reason)
    return reason
