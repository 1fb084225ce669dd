"""Who builds it, when many processes want the same file at once? The first one; the others wait and read.

No process group exists yet when text is tokenised, so a lock file is all that ranks and jobs share.
"""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from reshard.errors import DataError

T = TypeVar("T")

logger = logging.getLogger(__name__)

CACHE_HINT = "name a folder that can be written and has room: --training.cache_folder PATH"


def once(target: Path, ready: Callable[[], T | None], build: Callable[[], T]) -> T:
    """Read `target` if it is there, else let exactly one process build it.

    ready: reads the target, None where it is absent or not whole; needs no right to write, so a cache on a
        read-only disk works. build: makes the target appear by a rename, and is called under the lock.
    The lock is the system's own (flock): it is free again when its holder dies, however it dies.
    Raises DataError where the folder of the target cannot be written.
    """
    value = ready()
    if value is not None:
        return value
    import filelock

    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(target.with_name(target.name + ".lock"))
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            logger.info("waiting for another process that is building %s", target)
            lock.acquire(poll_interval=0.1)
    except NotImplementedError:
        raise DataError(
            f"the folder {target.parent} does not support file locks, so two jobs could build one cache",
            path=target.parent,
            hint=CACHE_HINT,
        ) from None
    except OSError as error:
        raise cannot_write(target.parent, error) from error
    try:
        value = ready()  # somebody may have built it while we waited
        return build() if value is None else value
    except OSError as error:
        raise cannot_write(target.parent, error) from error
    finally:
        lock.release()


def cannot_write(folder: Path, error: OSError) -> DataError:
    """The error for a cache folder that refuses us (no right, no room, a file in its place)."""
    return DataError(f"the cache folder {folder} cannot be written: {error}", path=folder, hint=CACHE_HINT)


def write_whole(path: Path, data: bytes) -> None:
    """Write a file so that its name never stands for half of it: temporary name, fsync, rename, fsync the folder."""
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder survive a loss of power, where the system can."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
