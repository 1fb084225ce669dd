"""What happens to a checkpoint that is damaged? It is looked at a second time, set aside under another name, never deleted.

Only proven damage moves anything: a digest, a size or a missing file that is wrong twice. A disk that fails, or a
checkpoint that does not fit the config, says nothing about the bytes, and renames nothing.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path

from reshard.checkpoint.commit import free_name, fsync_directory
from reshard.checkpoint.layout import entries
from reshard.checkpoint.ours import not_ours
from reshard.checkpoint.verify import verify_checkpoint
from reshard.errors import CheckpointError, IntegrityError, StorageError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SetAside:
    """A checkpoint that was moved: where it was, where it is, why."""

    directory: Path
    now: Path
    reason: str

    def to_dict(self) -> dict[str, str]:
        """For the run's events."""
        return {"set_aside": str(self.directory), "now": str(self.now), "reason": self.reason}


def set_aside(directory: Path) -> SetAside:
    """Verify every byte once more; where it is damaged indeed, rename it to step-N.damaged. Call it on rank 0 only.

    Raises StorageError where the damage does not show again, or the disk fails: then the disk is to blame; CheckpointError
    where it holds what is not ours to rename.
    """
    verdict = verify_checkpoint(directory)
    if verdict.whole is None:
        raise StorageError(f"{verdict.problem}", path=directory, hint="nothing was renamed; look at the disk")
    if verdict.whole:
        raise StorageError(
            f"`{directory}` was damaged when it was loaded, but is whole when it is read again",
            path=directory,
            hint="nothing was renamed; memory, disk or network returned wrong bytes: look at the host before you go on",
        )
    reason = "; ".join(f"{f.file} {f.problem}".strip() for f in verdict.findings[:3])
    now = free_name(directory, "damaged")
    try:
        others = not_ours(directory)
        if others is not None:
            raise CheckpointError(
                f"`{directory}` is damaged ({reason}), and {others}: it was not set aside, nothing was renamed",
                path=directory,
                hint=f"set it aside yourself, then start again: mv {directory} {directory}.kept",
            )
        os.rename(directory, now)
        fsync_directory(directory.parent)
    except OSError as error:
        raise StorageError(
            f"`{directory}` is damaged ({reason}) and cannot be set aside: {error.strerror or error}", path=directory
        ) from None
    logger.warning("set %s aside as %s: %s", directory, now.name, reason)
    return SetAside(directory, now, reason)


def set_damaged_aside(folder: Path) -> list[SetAside]:
    """Set aside every step of a folder whose manifest disagrees with itself or with its files' names and sizes."""
    damaged = [e.path for e in entries(folder) if isinstance(e.problem, IntegrityError)]
    return [set_aside(path) for path in damaged]
