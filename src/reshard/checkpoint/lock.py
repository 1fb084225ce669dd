"""Whose folder is it? One run at a time, and a folder that all ranks see."""

from __future__ import annotations

import json
import os
import secrets
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock, Timeout

from reshard.checkpoint.commit import make_folder
from reshard.checkpoint.ranks import Ranks
from reshard.errors import FolderInUse, StorageError

LOCK, OWNER = ".lock", ".owner.json"


@contextmanager
def own_folder(folder: Path, ranks: Ranks) -> Iterator[None]:
    """Rank 0 holds the folder's lock for the whole run; the kernel lets go of it when the process dies. Collective.

    Raises on every rank: FolderInUse naming host, process and time; StorageError where the folder cannot be made.
    """
    lock = FileLock(folder / LOCK)

    def take() -> None:
        try:
            make_folder(folder)
            lock.acquire(timeout=0)
            owner = {
                "host": socket.gethostname(),
                "pid": os.getpid(),
                "since": datetime.now(UTC).isoformat(timespec="seconds"),
            }
            (folder / OWNER).write_text(json.dumps(owner))
        except Timeout:
            raise FolderInUse(
                f"checkpoint folder `{folder}` is in use by another run ({_owner(folder)})",
                path=folder,
                hint="wait for it to end, or choose another --job.dump_folder or --checkpoint.folder",
            ) from None
        except OSError as error:
            raise StorageError(
                f"checkpoint folder `{folder}` cannot be used: {error.strerror or error}",
                path=folder,
                hint="choose another --job.dump_folder, or free some space",
            ) from None

    ranks.on_first(take)
    try:
        yield
    finally:
        if ranks.is_first:
            lock.release()


def _owner(folder: Path) -> str:
    try:
        owner = json.loads((folder / OWNER).read_text())
        return f"host {owner['host']}, process {owner['pid']}, since {owner['since']}"
    except (OSError, ValueError, KeyError):
        return "owner unknown"


def check_shared(folder: Path, ranks: Ranks) -> None:
    """Do all ranks see the same folder? Raises StorageError naming the hosts that do not. Collective."""
    if ranks.size == 1:
        return
    token = ranks.on_first(lambda: f".seen-{secrets.token_hex(8)}")
    ranks.on_first((folder / token).touch)
    sights = ranks.everywhere(lambda: (socket.gethostname(), (folder / token).exists()))
    ranks.on_first(lambda: (folder / token).unlink(missing_ok=True))
    blind = sorted({host for host, seen in sights if not seen})
    if blind:
        raise StorageError(
            f"checkpoint folder `{folder}` is not shared: {', '.join(blind)} cannot see what {sights[0][0]} writes there",
            path=folder,
            hint="put --job.dump_folder on a file system that all hosts mount",
        )
