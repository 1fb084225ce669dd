"""Is it whole? `reshard verify`: checkpoints, folders of them, foreign DCP, and weights in the files of other programs."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from reshard.checkpoint.layout import is_foreign, step_of
from reshard.checkpoint.manifest import MANIFEST
from reshard.checkpoint.verify import Advance, Finding, Level, Verdict, verify_checkpoint, verify_foreign


def run(path: Path, level: Level = "bytes", advance: Advance = lambda n: None) -> list[Verdict]:
    """Verify what lies at a path; a folder of steps gives a verdict for each. Raises nothing of ours.

    A disk that fails, or too little memory, says nothing of the checkpoint: then `whole` is None.
    """
    try:
        return _run(path, level, advance)
    except MemoryError:
        return [Verdict(str(path), "unknown", None, problem=f"there is too little memory to look at `{path}`")]
    except OSError as error:
        return [Verdict(str(path), "unknown", None, problem=f"`{path}` cannot be read: {error.strerror or error}")]


def _run(path: Path, level: Level, advance: Advance) -> list[Verdict]:
    if path.is_dir():
        if (path / MANIFEST).exists():
            return [verify_checkpoint(path, level, advance)]
        if is_foreign(path):
            return [verify_foreign(path, level, advance)]
        steps = sorted(
            (p for p in _listed(path) if step_of(p) is not None and p.is_dir()), key=lambda p: step_of(p) or 0
        )
        if steps:
            return [verdict for step in steps for verdict in run(step, level, advance)]
    # Only here, where too little memory to import them is an answer, too: checkpoints do not need them.
    from reshard.commands.verify_folder import verify_folder, verify_parts
    from reshard.commands.verify_weights import kind_of, unfinished

    if path.is_dir():
        return verify_folder(path, level, advance) or [verify_checkpoint(path, level, advance)]
    if kind_of(path) is not None:
        return verify_parts(path, level, advance)
    if (target := unfinished(path.name)) is not None and path.is_file():
        return [Verdict(str(path), "file", False, (Finding(path.name, f"is an unfinished download of {target}"),))]
    return [verify_checkpoint(path, level, advance)]


def exit_code(verdicts: list[Verdict]) -> int:
    """0: all are whole. 1: one is not. 2: none is damaged, but of one it could not be told."""
    if any(v.whole is False for v in verdicts):
        return 1
    return 2 if any(v.whole is None for v in verdicts) else 0


def size_of(path: Path) -> int:
    """Bytes below a path, for a progress bar; of what cannot be looked at, none."""
    total = 0
    for file in [path] if path.is_file() else path.rglob("*"):
        with suppress(OSError):
            total += file.stat().st_size if file.is_file() else 0
    return total


def _listed(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())
