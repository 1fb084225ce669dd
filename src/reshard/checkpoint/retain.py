"""Which checkpoints may go? Retention by lineage: counts committed steps only, deletes only what is ours and old."""

from __future__ import annotations

import logging
import os
from functools import cache
from pathlib import Path

from reshard.checkpoint.commit import fsync_directory
from reshard.checkpoint.layout import entries
from reshard.checkpoint.lineage import by_worth
from reshard.checkpoint.ours import not_ours, remove

logger = logging.getLogger(__name__)


def retain(folder: Path, keep_latest_k: int, *, keep_every_n: int = 0, protected: Path | None = None) -> list[Path]:
    """Delete all but the latest k committed checkpoints; 0 keeps all. Returns what was deleted.

    Latest means saved last, not numbered highest: after a rollback the abandoned branch goes first. Never deleted:
    step-0, what holds weights only, steps that keep_every_n divides, `protected` (the checkpoint that this run was loaded
    from), the newest full one, links, and whatever is torn, damaged or not ours, or holds what is not ours. A checkpoint
    loses its name before its bytes, so a death midway leaves nothing half-deleted under a valid name.
    """
    if keep_latest_k <= 0:
        return []
    committed = by_worth([e for e in entries(folder) if e.manifest is not None])
    full = [e for e in committed if e.manifest is not None and e.manifest.kind == "full"]
    given = [
        e for e in committed if e.manifest is not None and e.manifest.kind == "model"
    ]  # to somebody, at a run's end
    permanent = [e for e in committed if e.step == 0 or (keep_every_n and e.step % keep_every_n == 0)]
    keep = {e.path for e in (*committed[-keep_latest_k:], *full[-1:], *permanent, *given)}
    deleted = []
    for entry in committed:
        if entry.path in keep or entry.path == protected or entry.path.is_symlink():
            continue
        assert entry.manifest is not None
        doomed = entry.path.with_name(f"{entry.path.name}.tmp-{entry.manifest.save_id}")
        try:
            others = not_ours(entry.path)
            if others is not None:
                _say_kept(entry.path, others)
                continue
            os.rename(entry.path, doomed)
            fsync_directory(folder)  # or a power failure might bring the name back, without its files
        except OSError as error:
            logger.warning("could not delete %s: %s", entry.path, error)  # the run matters more than a tidy disk
            continue
        if remove(doomed) is None:
            deleted.append(entry.path)
    return deleted


@cache
def _say_kept(directory: Path, others: str) -> None:
    """Once in a run: it is looked at after every save."""
    logger.warning("kept `%s`, which keep_latest_k would delete: it %s", directory, others)
