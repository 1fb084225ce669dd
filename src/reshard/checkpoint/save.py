"""How is a checkpoint saved? Plan, write, commit: one collective round for each, and all ranks succeed or none."""

from __future__ import annotations

import errno
import secrets
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reshard.checkpoint.commit import commit, remove_temporary, temporary_directory
from reshard.checkpoint.layout import METADATA, entries, step_of
from reshard.checkpoint.manifest import FileEntry, Kind, Manifest, TensorEntry, crc32_hex
from reshard.checkpoint.metadata import write_metadata
from reshard.checkpoint.ranks import Ranks
from reshard.checkpoint.state import Piece, State, flatten, pieces_of
from reshard.checkpoint.writer import Planned, Stored, Written, assign, check_coverage, planned, write_pieces
from reshard.errors import NotACheckpoint, StorageError
from reshard.model.spec import LlamaSpec


@dataclass(frozen=True)
class About:
    """What a checkpoint says of itself beside its tensors; see Manifest for the fields."""

    step: int
    kind: Kind
    source: dict[str, Any]
    parent: str | None = None
    layout: dict[str, int] = field(default_factory=dict)
    config: dict[str, Any] | None = None
    model: dict[str, Any] | None = None
    data: dict[str, Any] | None = None
    train_state: dict[str, int] = field(default_factory=dict)


def save(directory: Path, state: State, about: About, ranks: Ranks, dtype: torch.dtype | None = None) -> Manifest:
    """Save a state that all ranks hold together as one committed directory. Collective.

    dtype: floating-point tensors are written in it; None keeps their own.
    Raises on every rank: StorageError where any rank's disk refused. Then the directory does not exist, or is the
    older one, and nothing of this save is left.
    """
    flat = flatten(state)
    pieces = [p for fqn, (_, t) in flat.items() for p in pieces_of(fqn, t, dtype if t.is_floating_point() else None)]
    paths = {fqn: path for fqn, (path, _) in flat.items()}
    offers = ranks.everywhere(lambda: (paths, [planned(p) for p in pieces]))
    entries_of = check_coverage(offer for _, offer in offers)
    mine = assign([offer for _, offer in offers])[ranks.rank]
    all_paths = {fqn: path for some, _ in offers for fqn, path in some.items()}
    save_id = secrets.token_hex(8)
    try:
        temporary = ranks.on_first(lambda: temporary_directory(directory, save_id))
        written = ranks.everywhere(
            lambda: write_pieces(temporary, f"__{ranks.rank}_0.distcp", (p for p in pieces if (p.fqn, p.box) in mine))
        )
        return ranks.on_first(lambda: _finish(temporary, directory, about, entries_of, all_paths, written, offers))
    except BaseException as error:
        if ranks.is_first:
            remove_temporary(directory)
        if isinstance(error, OSError):
            raise _said(error, directory) from None
        raise


def save_weights(
    directory: Path,
    pieces: Iterable[Piece],
    *,
    step: int,
    source: dict[str, Any],
    config: dict[str, Any] | None,
    spec: LlamaSpec,
) -> Manifest:
    """Save weights that come as a stream of pieces, from one process; nothing is held but the piece in hand.

    Names must be flat Meta names; the pieces of a tensor must tile it. An existing directory is refused, unless it
    is empty. Raises StorageError; then nothing is left.
    """
    refuse_existing(directory)
    offer: list[Planned] = []

    def counted() -> Iterator[Piece]:
        for piece in pieces:
            offer.append(planned(piece))
            yield piece

    about = About(step=step, kind="model", source=source, config=config, model=spec.to_dict())
    save_id = secrets.token_hex(8)
    try:
        temporary = temporary_directory(directory, save_id)
        written = [write_pieces(temporary, "__0_0.distcp", counted())]
        entries_of = check_coverage([offer])
        paths: dict[str, tuple[str, ...]] = {fqn: (fqn,) for fqn in entries_of}
        return _finish(temporary, directory, about, entries_of, paths, written, [(paths, offer)])
    except BaseException as error:
        remove_temporary(directory)
        if isinstance(error, OSError):
            raise _said(error, directory) from None
        raise


def refuse_existing(directory: Path) -> None:
    """Raise NotACheckpoint where something would be overwritten; an empty directory is fine, and removed."""
    if not directory.exists():
        return
    if not directory.is_dir() or any(directory.iterdir()):
        raise NotACheckpoint(
            f"`{directory}` exists already, nothing was written",
            path=directory,
            hint=f"choose another name, or remove it: rm -r {directory}",
        )
    directory.rmdir()


def _finish(
    temporary: Path,
    directory: Path,
    about: About,
    tensors: dict[str, TensorEntry],
    paths: dict[str, tuple[str, ...]],
    written: list[Written],
    offers: list[tuple[dict[str, tuple[str, ...]], list[Planned]]],
) -> Manifest:
    """Rank 0's part: check the results against plan and disk, write index and manifest, commit."""
    stored = [item for w in written for item in w.stored]
    files = {name: entry for w in written for name, entry in w.files.items()}
    _check_results(temporary, stored, files, {(p.fqn, p.box) for _, offer in offers for p in offer})
    content = write_metadata(temporary, tensors, paths, stored)
    files[METADATA] = FileEntry(len(content), crc32_hex(content))
    manifest = Manifest(
        step=about.step,
        kind=about.kind,
        sequence=_next_sequence(directory),
        save_id=temporary.name.rpartition("-")[2],
        parent=about.parent,
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        source=about.source,
        layout=about.layout,
        config=about.config,
        model=about.model,
        data=about.data,
        train_state=about.train_state,
        tensors=tensors,
        files=files,
        versions={"reshard": _own_version(), "torch": torch.__version__},
    )
    commit(temporary, directory, manifest)
    return manifest


def _check_results(directory: Path, stored: list[Stored], files: dict[str, FileEntry], plan: set[Any]) -> None:
    """Every planned box has exactly one result, and the disk has every byte of it."""
    results = [(item.fqn, item.box) for item in stored]
    assert len(results) == len(set(results)) and set(results) == plan, "the writers' results do not cover the plan"
    for name, entry in files.items():
        size = (directory / name).stat().st_size
        if size != entry.bytes:
            raise OSError(
                errno.EIO, f"{name} has {size} bytes on disk, {entry.bytes} were written", str(directory / name)
            )


def _next_sequence(directory: Path) -> int:
    if step_of(directory) is None:
        return 1
    return 1 + max((e.manifest.sequence for e in entries(directory.parent) if e.manifest), default=0)


def _own_version() -> str:
    try:
        return version("reshard")
    except PackageNotFoundError:
        return "unknown"


def _said(error: OSError, directory: Path) -> StorageError:
    reason = error.strerror or str(error)
    if error.errno == errno.ENOSPC:
        return StorageError(
            f"no space left to save `{directory}`: the save was given up, older checkpoints are whole",
            path=directory,
            hint="free some space (or set checkpoint.keep_latest_k) and start again: the run resumes from the newest step",
        )
    return StorageError(f"`{directory}` could not be saved: {reason} ({error.filename})", path=directory)


def tensor_state(values: dict[str, int]) -> dict[str, Tensor]:
    """Whole numbers as 0-d int64 tensors, the only form in which we store them."""
    return {name: torch.tensor(value, dtype=torch.int64) for name, value in values.items()}
