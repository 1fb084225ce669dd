"""Which checkpoint does a run start from, and how does it get into the ranks' tensors?

Rank 0 decides and the others follow; the rules are in `choose`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from reshard.checkpoint.collector import collector_at_rest
from reshard.checkpoint.exchange import read_exchanging, want
from reshard.checkpoint.index import Index, index_bytes, read_index
from reshard.checkpoint.layout import Entry, entries, is_foreign, set_aside_before, step_directory
from reshard.checkpoint.manifest import Manifest, read_manifest
from reshard.checkpoint.mistaken import mistaken
from reshard.checkpoint.offers import Offer
from reshard.checkpoint.parcel import packed
from reshard.checkpoint.ranks import Ranks
from reshard.checkpoint.reader import check_names, parts_to_fill, read_tensors
from reshard.checkpoint.state import Box
from reshard.errors import NotACheckpoint, TornCheckpoint, listed

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Start:
    """Where a run begins.

    directory None: from nothing. `resume`: model, optimizer and position; otherwise the weights only, at step 0.
    finished: the run has already reached its last step. handed_over: steps of the folder that hold weights only, as the
    end of a run leaves them: no later save may replace them unasked.
    """

    directory: Path | None = None
    manifest: Manifest | None = None
    resume: bool = False
    finished: bool = False
    notes: tuple[str, ...] = ()
    handed_over: tuple[int, ...] = ()


def choose(folder: Path, *, load_step: int, steps: int, initial_load_path: str | None) -> Start:
    """Decide what to load. Only looks; raises CheckpointErrors with a hint, and never falls back to a fresh start.

    * an empty folder: `initial_load_path`, or nothing
    * load_step -1: the newest save. A weights-only last step is not resumable: then the newest full one, and it is said
    * load_step N: that step, which must be there and whole. It applies once: where a run that was started from it has
      saved later steps, the newest of those
    * step-0: the weights only, and only where there is no later step, whenever step-0 was made
    """
    seed = step_directory(folder, 0)
    found = [e if e.committed else replace(e, problem=mistaken(e.path, seed) or e.problem) for e in entries(folder)]
    given = tuple(e.step for e in found if e.manifest is not None and e.manifest.kind == "model" and e.step > 0)
    notes = tuple(f"ignored {e.path.name}: {e.problem.message}" for e in found if e.problem is not None)
    if load_step >= 0:
        return replace(_named(folder, found, load_step, steps, notes), handed_over=given)
    return replace(_newest(folder, found, steps, notes, initial_load_path), handed_over=given)


def _newest(
    folder: Path, found: list[Entry], steps: int, notes: tuple[str, ...], initial_load_path: str | None
) -> Start:
    committed = [e for e in found if e.committed]
    if not committed:
        seed = step_directory(folder, 0)
        if is_foreign(seed):
            return Start(seed, None, notes=(f"{seed} is a DCP checkpoint of another program: taking its weights",))
        aside = set_aside_before(folder)
        if aside:
            raise NotACheckpoint(
                f"no whole checkpoint is left in `{folder}`: {listed(p.name for p in aside)} set aside as damaged",
                path=folder,
                hint="start afresh in another --checkpoint.folder, or restore a checkpoint from a copy",
            )
        torn = [e.path.name for e in found if any(e.path.iterdir())]
        if torn and initial_load_path is None:
            wrong = mistaken(seed, seed)
            if wrong is not None:
                raise wrong
            raise TornCheckpoint(
                f"checkpoint folder `{folder}` holds {listed(torn)}, but no whole checkpoint",
                path=folder,
                hint="move them away to start afresh, or give --checkpoint.initial_load_path with their new place as well, "
                "to start from their weights",
            )
        if initial_load_path is not None:
            return first_weights(initial_load_path, folder, notes)
        return Start(notes=notes)
    newest = committed[-1]
    assert newest.manifest is not None
    if any(
        e.manifest is not None and e.manifest.sequence > newest.manifest.sequence for e in committed
    ):  # of step-0 only
        notes = (
            *notes,
            f"step-0 was made after {newest.path.name} and is not looked at: the run goes on from its own steps",
        )
    if newest.step >= steps and newest.step > 0:
        return Start(newest.path, newest.manifest, finished=True, notes=notes)
    if newest.manifest.kind == "model" and newest.step > 0:
        full = [e for e in committed if e.manifest is not None and e.manifest.kind == "full" and e.step > 0]
        if not full:
            raise NotACheckpoint(
                f"the newest checkpoint `{newest.path}` holds weights only, and there is no full one to resume from",
                path=newest.path,
                hint=f"start a new run from its weights: --checkpoint.folder NEW --checkpoint.initial_load_path {newest.path}",
            )
        note = f"{newest.path.name} holds weights only; resuming from {full[-1].path.name}, the newest full checkpoint"
        return _start_of(full[-1], (*notes, note))
    return _start_of(newest, notes)


def _start_of(entry: Entry, notes: tuple[str, ...]) -> Start:
    assert entry.manifest is not None
    return Start(entry.path, entry.manifest, resume=entry.step > 0, notes=notes)


def _named(folder: Path, found: list[Entry], load_step: int, steps: int, notes: tuple[str, ...]) -> Start:
    directory = step_directory(folder, load_step)
    entry = next((e for e in found if e.path == directory), None)
    if entry is None:
        there = [str(e.step) for e in found if e.committed]
        raise NotACheckpoint(
            f"checkpoint.load_step is {load_step}, but `{directory}` does not exist",
            path=directory,
            hint=f"`{folder}` has steps {listed(there)}" if there else f"`{folder}` holds no checkpoint",
        )
    if is_foreign(directory) and load_step == 0:
        return Start(
            directory, None, notes=(f"{directory} is a DCP checkpoint of another program: taking its weights",)
        )
    if entry.manifest is None:
        assert entry.problem is not None
        whole = [str(e.step) for e in found if e.committed]
        entry.problem.hint = f"whole steps: {listed(whole)}; choose one with --checkpoint.load_step" if whole else None
        raise entry.problem
    later = [
        e
        for e in found
        if e.manifest is not None
        and e.manifest.source.get("load_step") == load_step
        and e.manifest.source.get("load_save_id") == entry.manifest.save_id
    ]
    if later:
        newest = later[-1]
        assert newest.manifest is not None
        note = f"load_step {load_step} was applied before: going on from {newest.path.name}, which came of it"
        if newest.step >= steps:
            return Start(newest.path, newest.manifest, finished=True, notes=(*notes, note))
        full = [e for e in later if e.manifest is not None and e.manifest.kind == "full"]
        return _start_of(full[-1] if full else entry, (*notes, note))
    if entry.manifest.kind == "model" and load_step > 0:
        raise NotACheckpoint(
            f"checkpoint.load_step {load_step} holds weights only, it cannot be resumed",
            path=directory,
            hint=f"start a new run from its weights: --checkpoint.folder NEW --checkpoint.initial_load_path {directory}",
        )
    return _start_of(entry, notes)


def first_weights(initial_load_path: str, folder: Path, notes: tuple[str, ...] = ()) -> Start:
    """What `initial_load_path` names, for a run in `folder`. Only looks; raises CheckpointErrors, by the name of what it is."""
    path = Path(initial_load_path)
    if not initial_load_path:
        raise NotACheckpoint(
            "checkpoint.initial_load_path is empty, expected a checkpoint's directory", hint="name one, or leave it out"
        )
    wrong = mistaken(path, step_directory(folder, 0))
    if wrong is not None:
        raise wrong
    if is_foreign(path):
        return Start(path, None, notes=(*notes, f"{path} is a DCP checkpoint of another program: taking its weights"))
    return Start(path, read_manifest(path), notes=notes)


@collector_at_rest()
def load(directory: Path, state: Mapping[str, Tensor], ranks: Ranks, *, cast: bool = False) -> int:
    """Fill tensors from a checkpoint, by stored name. Collective; all ranks succeed or all raise.

    Rank 0 reads the index for all. Names, shapes, dtypes and each rank's boxes are compared before a byte of a tensor is
    read. Returns this rank's bytes read.
    Raises: TensorMismatch, CheckpointError for a tensor that cannot be filled, IntegrityError, StorageError.
    """
    manifest, index = ranks.on_first(lambda: _opened(directory, alone=ranks.size == 1))
    parts: dict[str, tuple[Tensor, Box]] = {}

    def check_and_want() -> Offer | None:
        check_names(directory, index, state, cast=cast)
        parts.update(parts_to_fill(state))
        return want(index, {name: box for name, (_, box) in parts.items()}) if ranks.size > 1 else None

    wants = ranks.everywhere(check_and_want)
    if ranks.size == 1:
        return read_tensors(directory, index, parts, manifest=manifest)
    return read_exchanging(directory, index, parts, [w for w in wants if w is not None], ranks, manifest=manifest)


def _opened(directory: Path, *, alone: bool) -> tuple[Manifest | None, Index]:
    """Manifest and index, for this rank alone or to be sent to the others, who need of the manifest the files only."""
    manifest, index = open_index(directory)
    if alone:
        return manifest, index
    files = None if manifest is None else replace(manifest, tensors={}, config=None)
    return files, packed(index)


def open_index(directory: Path) -> tuple[Manifest | None, Index]:
    """Manifest and index of a checkpoint, or of a foreign DCP directory, which has no manifest."""
    manifest = None if is_foreign(directory) else read_manifest(directory)
    return manifest, read_index(index_bytes(directory, manifest), directory)


def stored_names(directory: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Every stored tensor's shape and dtype name, from the DCP index; what is no tensor has none."""
    _, index = open_index(directory)
    return {name: (tensor.shape, tensor.dtype) for name, tensor in index.tensors.items()}
