"""When does a directory become a checkpoint? Temporary name, everything on disk, one rename.

    write into step-500.tmp-<save id>/ ... manifest last ... fsync the directory ... rename to step-500 ... fsync the parent
At every instant the old step-500, if there was one, is whole under its name or can be put back by `recover`.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import os
from pathlib import Path

from reshard.checkpoint.blocks import naming, write_durably
from reshard.checkpoint.layout import all_leftovers, leftovers, read_step
from reshard.checkpoint.manifest import MANIFEST, Manifest, manifest_bytes, read_manifest
from reshard.checkpoint.ours import not_ours, refuse_others, remove
from reshard.errors import CheckpointError, StorageError

logger = logging.getLogger(__name__)

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def temporary_directory(directory: Path, save_id: str) -> Path:
    """Make the place that a save of `directory` writes into. Raises OSError, CheckpointError where others use the name."""
    refuse_others(directory)
    if not directory.parent.exists():
        make_folder(directory.parent)
    temporary = directory.with_name(f"{directory.name}.tmp-{save_id}")
    temporary.mkdir()
    return temporary


def make_folder(folder: Path) -> None:
    """Make a folder whose own name, and its parents', outlive a power failure. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    for parent in folder.absolute().parents:
        try:
            fsync_directory(parent)  # also where it was there before: nobody may have cared yet
        except OSError:
            break  # not ours to open, and then not made by us


def commit(temporary: Path, directory: Path, manifest: Manifest) -> None:
    """Write the manifest and move the directory to its name. What stood there before is replaced only now.

    Every other file must be on disk already. Raises OSError; CheckpointError where by now there is something that is not ours.
    """
    write_durably(temporary / MANIFEST, manifest_bytes(manifest))
    fsync_directory(temporary)
    refuse_others(directory)
    if not _is_free(directory):
        _set_aside_if_torn(directory)
    if _is_free(directory):
        os.rename(temporary, directory)  # replaces an empty directory, but no other
        fsync_directory(directory.parent)
    elif _exchange(temporary, directory):
        fsync_directory(directory.parent)
        remove(temporary)  # now the older one
    else:
        old = directory.with_name(f"{directory.name}.old-{manifest.save_id}")
        os.rename(directory, old)
        os.rename(temporary, directory)
        fsync_directory(directory.parent)
        remove(old)


def _is_free(directory: Path) -> bool:
    """Is there nothing of this name, or an empty directory?"""
    return not directory.exists() or not any(directory.iterdir())


def _set_aside_if_torn(directory: Path) -> None:
    """A save that did not finish, or damage, all of it ours: it is moved aside, somebody may want to look at it."""
    try:
        read_step(directory)
    except StorageError:
        raise  # it may be a good one: a disk that fails says nothing about it
    except CheckpointError as error:
        aside = free_name(directory, "damaged")
        os.rename(directory, aside)
        logger.warning("moved %s to %s to make room: %s", directory, aside.name, error.message)


def free_name(directory: Path, suffix: str) -> Path:
    """`step-5.damaged`, or `step-5.damaged-2` where that is taken."""
    name, count = directory.with_name(f"{directory.name}.{suffix}"), 1
    while name.exists():
        count += 1
        name = directory.with_name(f"{directory.name}.{suffix}-{count}")
    return name


def fsync_directory(directory: Path) -> None:
    """Make the names in a directory durable."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with naming(directory):
            os.fsync(fd)
    finally:
        os.close(fd)


def _exchange(a: Path, b: Path) -> bool:
    """Swap two names in one step, where kernel, libc and file system can (Linux renameat2). False: they cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    if renameat2(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EXDEV):
        return False
    raise OSError(code, os.strerror(code), str(b))


def recover(folder: Path) -> list[str]:
    """Finish or undo what died in a folder; call it only while owning the folder. Returns what was done, for the log.

    A temporary directory was never a checkpoint and goes, unless it is the new half of an interrupted exchange. Of an
    exchange in two renames the old half is kept or put back until the new one is whole. What holds anything that is not
    ours stays where it is.
    Raises StorageError, and then has deleted nothing that may be needed; CheckpointError where a step can only be put back
    in the place of what is not ours.
    """
    found = all_leftovers(folder)
    if not found:
        return []
    done = []
    try:
        # A rename that the dead run did not live to make durable may still be undone by a power failure; deleting the
        # files that it moved would not be.
        fsync_directory(folder)
        for path in found:
            if ".old-" in path.name:
                done.append(_finish_exchange(path))
        done += [_removed(path, "a save that did not finish") for path in all_leftovers(folder)]
    except OSError as error:
        raise StorageError(
            f"checkpoint folder `{folder}` cannot be put in order: {error.strerror or error} ({error.filename})",
            path=folder,
        ) from None
    return done


def _removed(path: Path, what: str) -> str:
    """Remove it, or not; either in words."""
    reason = remove(path)
    return f"removed {path.name}, {what}" if reason is None else f"left {path.name}: it {reason}"


def _finish_exchange(old: Path) -> str:
    name, _, save_id = old.name.rpartition(".old-")
    directory = old.with_name(name)
    temporary = directory.with_name(f"{name}.tmp-{save_id}")
    if _is_whole(directory):
        return _removed(old, "replaced by a newer save of the same step")
    if _is_free(directory) and _is_whole(temporary):
        os.rename(temporary, directory)
        fsync_directory(directory.parent)
        remove(old)
        return f"finished the save of {name}, which was interrupted while it replaced an older one"
    others = not_ours(old)
    if others is not None and (old.is_symlink() or not (old / MANIFEST).is_file()):
        return f"left {old.name}: it {others}"  # no step of ours
    if not _is_free(directory):
        refuse_others(directory)
        os.rename(directory, free_name(directory, "damaged"))
    os.rename(old, directory)
    fsync_directory(directory.parent)
    return f"put {name} back, its replacement did not finish"


def _is_whole(directory: Path) -> bool:
    """Does its manifest agree with its files? Raises StorageError where the disk does not say."""
    try:
        read_manifest(directory)
    except StorageError:
        raise
    except CheckpointError:
        return False
    return True


def remove_temporary(directory: Path, save_id: str | None = None) -> None:
    """Remove what a failed save of `directory` has left, None: what any has; never what is committed."""
    for path in leftovers(directory):
        if path.name.endswith(f".tmp-{save_id}") or (save_id is None and ".tmp-" in path.name):
            remove(path)
