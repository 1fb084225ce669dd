"""How is a checkpoint saved? Plan, write, commit: one collective round for each, and all ranks succeed or none."""

from __future__ import annotations

import errno
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from reshard.checkpoint.blocks import Throttle
from reshard.checkpoint.collector import collector_at_rest
from reshard.checkpoint.commit import commit, remove_temporary, temporary_directory
from reshard.checkpoint.layout import METADATA, entries, step_of
from reshard.checkpoint.manifest import FileEntry, Kind, Manifest, TensorEntry, crc32_hex
from reshard.checkpoint.metadata import write_metadata
from reshard.checkpoint.offers import Offer
from reshard.checkpoint.plan import Offered, Planner, Planning, SavePlan, make_plan
from reshard.checkpoint.ranks import Ranks
from reshard.checkpoint.state import Box, Known, Piece, State, flatten, mesh_names, pieces_of
from reshard.checkpoint.writer import Places, Stored, Written, write_pieces
from reshard.errors import CheckpointError, NotACheckpoint, StorageError
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


def save(
    directory: Path,
    state: State,
    about: About,
    ranks: Ranks,
    dtype: torch.dtype | None = None,
    planner: Planner | None = None,
) -> Manifest:
    """Save a state that all ranks hold together as one committed directory. Collective.

    dtype: floating-point tensors are written in it; None keeps their own. planner: of these ranks, for repeated saves.
    Raises on every rank: CheckpointError where ranks hold other numbers under one name; StorageError where any rank's
    disk refused. Then the directory does not exist, or is the older one, and nothing of this save is left.
    """
    pieces, plan = plan_save(directory, state, dtype, planner or Planner(ranks))
    return write_and_commit(directory, pieces, plan, about, ranks)


@collector_at_rest()
def plan_save(
    directory: Path, state: State, dtype: torch.dtype | None, planner: Planner
) -> tuple[list[Piece], SavePlan]:
    """The pieces that this rank will write, and the plan for all. Collective. Raises as `save`."""
    offered, planning = begin_plan(directory, state, dtype, planner)
    plan = planning.plan()
    return mine(offered, plan), plan


@collector_at_rest()
def begin_plan(
    directory: Path, state: State, dtype: torch.dtype | None, planner: Planner
) -> tuple[list[Piece], Planning]:
    """All pieces that this rank holds, and the plan that the ranks are agreeing on. Collective.

    The planning raises on all ranks what making the pieces has raised on one.
    """

    def offered() -> Offered:
        flat, known = flatten(state), Known()
        pieces = [
            piece
            for fqn, (_, tensor) in flat.items()
            for piece in pieces_of(fqn, tensor, dtype if tensor.is_floating_point() else None, known)
        ]
        paths = {fqn: path for fqn, (path, _) in flat.items()}
        return Offered(pieces, paths, mesh_names({fqn: tensor for fqn, (_, tensor) in flat.items()}))

    return planner.begin(directory, offered)


def mine(offered: Iterable[Piece], plan: SavePlan) -> list[Piece]:
    """Those that this rank is to write."""
    return [p for p in offered if (p.fqn, p.box) in plan.mine]


@collector_at_rest()
def write_and_commit(
    directory: Path,
    pieces: Iterable[Piece],
    plan: SavePlan,
    about: About,
    ranks: Ranks,
    throttle: Throttle | None = None,
) -> Manifest:
    """Write this rank's pieces; when all ranks have written theirs, rank 0 commits. Collective. Raises as `save`."""
    save_id = secrets.token_hex(8)
    try:
        temporary = ranks.on_first(lambda: temporary_directory(directory, save_id))
        written = ranks.everywhere(lambda: write_pieces(temporary, _file_of(ranks.rank), pieces, throttle))

        def finish() -> Manifest:
            stored = [s for r, w in enumerate(written) for s in _stored(_file_of(r), plan.written_by(r), w)]
            files = {name: entry for w in written for name, entry in w.files.items()}
            return finish_save(temporary, directory, about, plan.tensors, plan.paths, stored, files)

        return ranks.on_first(finish)
    except BaseException as error:
        if ranks.is_first:
            remove_temporary(directory, save_id)
        if isinstance(error, OSError):
            raise _said(error, directory) from None
        raise


@dataclass(frozen=True)
class WrittenWeights:
    """What lies in a temporary directory. parts: in the order in which each file has them; stored: where."""

    parts: list[tuple[str, TensorEntry, Box]]
    stored: list[Stored]
    files: dict[str, FileEntry]


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

    def write(temporary: Path) -> WrittenWeights:
        parts: list[tuple[str, TensorEntry, Box]] = []

        def counted() -> Iterator[Piece]:
            for piece in pieces:
                parts.append((piece.fqn, TensorEntry(piece.shape, piece.dtype), piece.box))
                yield piece

        written = write_pieces(temporary, _file_of(0), counted())
        return WrittenWeights(parts, _stored(_file_of(0), parts, written), written.files)

    about = About(step=step, kind="model", source=source, config=config, model=spec.to_dict())
    return commit_weights(directory, write, about)


def commit_weights(directory: Path, write: Callable[[Path], WrittenWeights], about: About) -> Manifest:
    """Let `write` fill a temporary directory with weights, durably, and commit that. Raises as `save_weights`."""
    refuse_existing(directory)
    save_id = secrets.token_hex(8)
    try:
        temporary = temporary_directory(directory, save_id)
        written = write(temporary)
        refuse_existing(directory)  # somebody may have saved there meanwhile
        plan = make_plan([Offer.of(written.parts, {name: (name,) for name, _, _ in written.parts})], 0)
        return finish_save(temporary, directory, about, plan.tensors, plan.paths, written.stored, written.files)
    except BaseException as error:
        remove_temporary(directory, save_id)
        if isinstance(error, OSError):
            raise _said(error, directory) from None
        raise


def refuse_existing(directory: Path) -> None:
    """Raise NotACheckpoint where something would be overwritten; an empty directory is fine."""
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise NotACheckpoint(
            f"`{directory}` exists already, nothing was written",
            path=directory,
            hint=f"choose another name, or remove it: rm -r {directory}",
        )


def _file_of(rank: int) -> str:
    return f"__{rank}_0.distcp"


def _stored(file_name: str, parts: Iterable[tuple[str, TensorEntry, Box]], written: Written) -> list[Stored]:
    """Where a rank's pieces lie, worked out from what it was to write; it must have meant the same, to the last byte."""
    places = Places(file_name)
    stored = [places.place(fqn, entry.dtype, box) for fqn, entry, box in parts]
    nbytes = written.files[file_name].bytes if file_name in written.files else 0
    if (places.seal, places.end) != (written.seal, nbytes):
        raise CheckpointError(f"{file_name} does not hold what was planned: the save was given up, this is our mistake")
    return stored


def finish_save(
    temporary: Path,
    directory: Path,
    about: About,
    tensors: Mapping[str, TensorEntry],
    paths: Mapping[str, tuple[str | int, ...]],
    stored: Iterable[Stored],
    files: Mapping[str, FileEntry],
    objects: Mapping[str, tuple[str, int, int]] = MappingProxyType({}),
) -> Manifest:
    """Rank 0's part: check that the disk has every byte, write index and manifest, commit. Raises OSError.

    objects: what somebody else's planner has pickled; name -> (file, offset, length).
    """
    for name, entry in files.items():
        size = (temporary / name).stat().st_size
        if size != entry.bytes:
            raise OSError(
                errno.EIO, f"{name} has {size} bytes on disk, {entry.bytes} were written", str(temporary / name)
            )
    content = write_metadata(temporary, tensors, paths, stored, objects)
    files = {**files, METADATA: FileEntry(len(content), crc32_hex(content))}
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
        tensors=dict(tensors),
        files=files,
        versions={"reshard": _own_version(), "torch": torch.__version__},
    )
    commit(temporary, directory, manifest)
    return manifest


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
