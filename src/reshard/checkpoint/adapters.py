"""How does torch.distributed.checkpoint use the engine? A StorageWriter and a StorageReader for its save and load.

    dcp.save(state, storage_writer=ReshardWriter("checkpoints/step-10"))
    dcp.load(state, storage_reader=ReshardReader("checkpoints/step-10"))

What is gained: a directory is committed whole or not at all, every byte has a checksum and is checked when it is read,
large tensors are cut into chunks, and a rank reads only the rows that it needs. Planning stays torch's, and reads are
not exchanged between ranks; `reshard.save` and `reshard.load` do both themselves.
What torch's planner has pickled is stored as it comes, and unpickled by torch, not by us.
Of what several ranks hold under one name torch's planner keeps one rank's. Plain tensors, numbers and strings are compared
before the commit, where the planner is torch's own or has its `state_dict`; DTensors of different meshes are not.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed._shard.sharded_tensor.api import ShardedTensor  # private: what FSDP1 leaves; torch 2.13.0
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from reshard.checkpoint.api import is_plain, step_for
from reshard.checkpoint.blocks import BlockWriter
from reshard.checkpoint.commit import remove_temporary, temporary_directory
from reshard.checkpoint.index import Chunk, Index
from reshard.checkpoint.kinds import problem_of
from reshard.checkpoint.load import open_index
from reshard.checkpoint.manifest import FileEntry, Manifest, TensorEntry, crc32
from reshard.checkpoint.metadata import described
from reshard.checkpoint.offers import Spread
from reshard.checkpoint.ours import refuse_others, remove
from reshard.checkpoint.plan import check_coverage
from reshard.checkpoint.reader import Files, Job, check_fillable, read_jobs
from reshard.checkpoint.replicas import (
    Differ,
    check_differ,
    checksum,
    log_first,
    log_sampled,
    only_sampled,
    ranks_with_much,
    refusal,
    sample_places,
    samples,
)
from reshard.checkpoint.save import About, finish_save
from reshard.checkpoint.state import Box, Known, bytes_of, cut_pieces, dtype_from_name, dtype_name, local_part
from reshard.checkpoint.writer import Places, Stored, append_piece
from reshard.errors import CheckpointError, NotACheckpoint
from reshard.paths import is_address, local_path

_WHOLE = WriteItemType.TENSOR, WriteItemType.BYTE_IO  # what each rank has as a whole, if it has it
_ANYWHERE = Box((), ())  # of what is compared as a whole


@dataclass(frozen=True)
class _Target:
    """What the coordinator tells a rank: where to write, and which of its names other ranks have, too."""

    temporary: Path
    file: str
    compared: frozenset[str] = frozenset()
    sampled: frozenset[str] = frozenset()


@dataclass(frozen=True)
class _Result:
    """What a rank tells the coordinator of one item: where its pieces lie, or its pickled bytes; and its files."""

    pieces: tuple[Stored, ...]
    files: dict[str, FileEntry]
    object: tuple[str, int, int] | None = None


@dataclass(frozen=True)
class _Sums:
    """What a rank tells the coordinator of the names that are compared."""

    by_name: dict[str, int]


class ReshardWriter(StorageWriter):
    """Writes one committed checkpoint directory for each dcp.save or dcp.async_save.

    path: the directory; `checkpoint_id` of the call takes precedence. step: for the record, by default from a name like
    `step-10`. An older checkpoint of the name is replaced when the new one is whole. A save that fails leaves a temporary
    directory beside it, which the next save of that name removes: torch does not tell a writer of another rank's failure.
    differ: as `reshard.save`; "first" needs a planner that has the lowest rank write, which torch's own does if it is asked.
    Raises (torch hands it on inside of a CheckpointException) CheckpointError for what cannot be stored and for a directory
    that holds files of others, OSError.
    """

    def __init__(
        self, path: str | os.PathLike[str] | None = None, *, step: int | None = None, differ: Differ = "refuse"
    ) -> None:
        check_differ(differ)
        self._path = None if path is None else local_path(path)
        self._step, self._differ = step, differ
        self._offered: frozenset[str] = (
            frozenset()
        )  # by this rank, of which the planner may have others' written instead
        self._temporary = Path()  # known to the coordinator only, as the next two are
        self._holders: dict[str, tuple[int, ...]] = {}
        self._sampled: frozenset[str] = frozenset()

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Another directory."""
        self._path = local_path(checkpoint_id) if checkpoint_id else self._path

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing to prepare; but a checkpoint is one thing, so all ranks must save it together."""
        if not kwargs.get("use_collectives", True):
            raise CheckpointError(
                f"`{self._directory}` cannot be saved with use_collectives=False: ranks commit it together",
                path=self._directory,
            )

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """As it is; with what this rank has that others may have, too, of which the planner will keep one."""
        self._offered = frozenset(item.index.fqn for item in plan.items)
        whole = {item.index.fqn: item.tensor_storage_size() or 0 for item in plan.items if item.type in _WHOLE}
        return replace(plan, storage_data=whole)

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Coordinator: make the temporary directory, and give each rank a file in it."""
        step_for(self._directory, self._step)  # an error now, before anything is written
        refuse_others(self._directory)
        remove_temporary(self._directory)  # what an earlier save of this name has left, which failed
        self._temporary = temporary_directory(self._directory, secrets.token_hex(8))
        sizes: dict[str, int] = {}
        holders: dict[str, tuple[int, ...]] = {}
        for rank, plan in enumerate(plans):
            for name, nbytes in (plan.storage_data or {}).items():
                sizes[name], holders[name] = nbytes, (*holders.get(name, ()), rank)
        self._holders = {name: ranks for name, ranks in holders.items() if len(ranks) > 1}
        much = ranks_with_much((sizes[name], ranks) for name, ranks in self._holders.items())
        self._sampled = frozenset(n for n, ranks in self._holders.items() if only_sampled(sizes[n], ranks, much))
        return [
            replace(plan, storage_data=_Target(self._temporary, f"__{rank}_0.distcp", names, self._sampled & names))
            for rank, plan in enumerate(plans)
            for names in [frozenset(name for name, ranks in self._holders.items() if rank in ranks)]
        ]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's items into its file; durable when the future is done, which it is on return."""
        target: _Target = plan.storage_data
        if not target.temporary.is_dir():
            raise CheckpointError(
                f"`{self._directory}` cannot be saved: this rank's plan is that of an earlier save",
                path=self._directory,
                hint="enable_plan_caching=False, or reshard.save, which keeps plans by what they are for",
            )
        _check_held(self._directory, planner, self._offered.union(item.index.fqn for item in plan.items))
        sums = WriteResult(MetadataIndex(""), 0, _Sums(_sums(target, planner)))
        done: Future[list[WriteResult]] = Future()
        done.set_result([sums, *(self._write(target, plan.items, planner) if plan.items else [])])
        return done

    def _write(self, target: _Target, items: list[WriteItem], planner: SavePlanner) -> list[WriteResult]:
        places = Places(target.file)
        out = BlockWriter(target.temporary / target.file)
        written: list[tuple[WriteItem, tuple[Stored, ...], tuple[str, int, int] | None]] = []
        try:
            # Tensors first: their places follow each other without regard to what else is in the file.
            for item in sorted(items, key=lambda item: item.type == WriteItemType.BYTE_IO):
                data = planner.resolve_data(item)
                if isinstance(data, BytesIO):
                    start = out.bytes
                    out.append(data.getbuffer())
                    written.append((item, (), (target.file, start, out.bytes - start)))
                else:
                    pieces = cut_pieces(item.index.fqn, *self._part(item, data))
                    written.append((item, tuple(append_piece(piece, places, out) for piece in pieces), None))
        except BaseException:
            out.abandon()
            raise
        files = out.close()
        return [
            WriteResult(
                item.index, sum(s.length for s in stored) or (place[2] if place else 0), _Result(stored, files, place)
            )
            for item, stored, place in written
        ]

    def _part(self, item: WriteItem, data: Tensor) -> tuple[tuple[int, ...], Tensor, Box, torch.dtype]:
        """Whole shape, this item's numbers, where they lie, and their dtype. Raises CheckpointError where they cannot."""
        assert item.tensor_data is not None
        chunk, shape = item.tensor_data.chunk, tuple(item.tensor_data.size)
        box = Box(tuple(chunk.offsets), tuple(chunk.sizes))
        problem = problem_of(data)
        if problem is None and (tuple(data.shape) != box.sizes or not box.within(shape)):
            problem = f"{list(data.shape)}, but torch's plan says {box} of {list(shape)}"
        if problem is not None:
            raise _refused(self._directory, item.index.fqn, problem)
        return shape, data.detach(), box, data.dtype

    def finish(self, metadata: dcp.Metadata, results: list[list[WriteResult]]) -> None:
        """Coordinator: compare what ranks have under one name, write index and manifest, commit."""
        told: list[tuple[str, _Result]] = [
            (r.index.fqn, r.storage_data) for of_rank in results for r in of_rank if isinstance(r.storage_data, _Result)
        ]
        tensors = {
            name: TensorEntry(tuple(entry.size), dtype_name(entry.properties.dtype))
            for name, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, dcp.TensorStorageMetadata)
        }
        stored = [piece for _, result in told for piece in result.pieces]
        try:
            self._compare(results)
            self._check_stored(tensors, stored)
            finish_save(
                self._temporary,
                self._directory,
                About(step=step_for(self._directory, self._step), kind="full", source={"kind": "dcp"}),
                tensors,
                metadata.planner_data or {},
                stored,
                {name: entry for _, result in told for name, entry in result.files.items()},
                {name: result.object for name, result in told if result.object is not None},
            )
        except BaseException:
            remove(self._temporary)
            raise

    def _check_stored(self, tensors: Mapping[str, TensorEntry], stored: Iterable[Stored]) -> None:
        """Do the pieces tile the tensors? A planner of somebody's may leave one out. Raises CheckpointError."""
        holders: dict[str, dict[Box, list[int]]] = {name: {} for name in tensors}
        for piece in stored:
            holders[piece.fqn].setdefault(piece.box, []).append(0)
        for name, entry in tensors.items():
            check_coverage(name, Spread(entry, holders[name]))
            if any(len(twice) > 1 for twice in holders[name].values()):
                raise _refused(self._directory, name, "stored twice by torch's plan")

    def _compare(self, results: list[list[WriteResult]]) -> None:
        """Raise CheckpointError where ranks differ, or where not the lowest rank has written what should be its."""
        sums = [r.storage_data.by_name for of_rank in results for r in of_rank if isinstance(r.storage_data, _Sums)]
        different = {}
        for name, ranks in self._holders.items():
            others = [rank for rank in ranks if sums[rank].get(name) != sums[ranks[0]].get(name)]
            if others:
                different[name, _ANYWHERE] = [ranks[0], *others]
        if different and self._differ == "refuse":
            raise refusal(self._directory, different)
        log_sampled(self._directory, len(self._sampled))
        firsts = self._sampled | {name for name, _ in different} if self._differ == "first" else frozenset()
        for rank, of_rank in enumerate(results):
            for name in firsts.intersection(result.index.fqn for result in of_rank):
                if rank != self._holders[name][0]:
                    raise CheckpointError(
                        f"`{self._directory}` was not saved: `{name}` was written by rank {rank}, "
                        f"expected rank {self._holders[name][0]}, the lowest that has it",
                        path=self._directory,
                        hint="planner=DefaultSavePlanner(dedup_save_to_lowest_rank=True)",
                    )
        log_first(self._directory, different)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """A path of this machine's file systems."""
        return not is_address(checkpoint_id)

    def storage_meta(self) -> dcp.StorageMeta | None:
        """For torch's own records."""
        return dcp.StorageMeta(checkpoint_id=self._path)

    @property
    def _directory(self) -> Path:
        return _given(self._path)


class ReshardReader(StorageReader):
    """Reads our checkpoints and other programs' DCP directories for dcp.load; no byte is used that was not checked.

    Which names are read is torch's planner's choice. It refuses those that the checkpoint lacks, unless allow_partial_load;
    of what the state dict lacks, an optimizer's moments for example, it says nothing. `reshard.load` does.
    path: the directory; `checkpoint_id` of the call takes precedence.
    Raises (torch hands it on inside of a CheckpointException) CheckpointErrors and FormatErrors, naming file and tensor.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None) -> None:
        self._path = None if path is None else local_path(path)
        self._opened: tuple[Manifest | None, Index] | None = None

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """A new load begins."""
        self._path = local_path(checkpoint_id) if checkpoint_id else self._path
        self._opened = None

    def read_metadata(self, *args: Any, **ignored: Any) -> dcp.Metadata:
        """The index as torch's planner wants it; read without running its pickle."""
        self._opened = open_index(_given(self._path))
        _, index = self._opened
        entries: dict[str, Any] = {
            name: described(TensorEntry(t.shape, t.dtype), [(chunk.offsets, chunk.sizes) for chunk in t.chunks])
            for name, t in index.tensors.items()
        }
        entries |= {name: dcp.BytesStorageMetadata() for name in index.objects}
        return dcp.Metadata(entries, planner_data=dict(index.paths))

    def set_up_storage_reader(self, metadata: dcp.Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing: read_metadata was here before, on every rank."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """As it is."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """As they are."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read what the plan wants into the planner's tensors; it is all there on return."""
        directory = _given(self._path)
        manifest, index = self._opened or open_index(directory)
        jobs: list[Job] = []
        targets: list[tuple[ReadItem, Tensor]] = []
        _check_held(directory, planner, index.tensors.keys(), filling=True)
        for item in plan.items:
            if item.type != LoadItemType.BYTE_IO:
                target = planner.resolve_tensor(item)
                problem = problem_of(target)
                if problem is None and tuple(target.shape) != tuple(item.lengths):
                    problem = f"{list(target.shape)}, but torch's plan says {list(item.lengths)}"
                if problem is not None:
                    raise _refused(directory, item.storage_index.fqn, problem)
                check_fillable(item.storage_index.fqn, target)
                targets.append((item, target.detach()))
                jobs.append(_job(index, item, target.detach()))
        with Files(directory, manifest) as files:
            for item in plan.items:
                if item.type == LoadItemType.BYTE_IO:
                    job = _object(index, item)
                    files.read_object(job)
                    planner.load_bytes(item, BytesIO(bytes_of(job.target)))
        read_jobs(directory, manifest, jobs)
        for item, target in targets:
            planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """A path of this machine's file systems."""
        return not is_address(checkpoint_id)


def _check_held(
    directory: Path, planner: SavePlanner | LoadPlanner, names: Collection[str], *, filling: bool = False
) -> None:
    """Are a planner's tensors of a kind that we know, and does this rank hold what torch says? Before anything is touched.

    Planners of torch and what derives from them have their `state_dict`; of others only the items can be looked at.
    Raises CheckpointError.
    """
    known = Known()
    for name, tensor in _objects_of(planner).items():
        if name in names and isinstance(tensor, Tensor) and not isinstance(tensor, ShardedTensor):
            problem = problem_of(tensor)
            if problem is not None:
                raise _refused(directory, name, problem)
            local, _ = local_part(tensor, name, known)
            if filling:
                check_fillable(name, local)


def _refused(directory: Path, name: str, problem: str) -> CheckpointError:
    return CheckpointError(f"`{name}` cannot be a part of checkpoint `{directory}`: it is {problem}", path=directory)


def _objects_of(planner: SavePlanner | LoadPlanner) -> Mapping[str, Any]:
    """What is saved or filled, by name; nothing where the planner is not torch's own, nor like it."""
    objects: Mapping[str, Any] = getattr(planner, "state_dict", {})
    return objects


def _sums(target: _Target, planner: SavePlanner) -> dict[str, int]:
    """Checksums of what other ranks have, too: plain tensors and values. Other objects are not compared."""
    objects = _objects_of(planner)
    places = sample_places(crc32(target.temporary.name.encode()))  # of this save, on all ranks
    sums = {}
    for name in target.compared:
        value = objects.get(name)
        if isinstance(value, Tensor):
            part = value.detach()
            sums[name] = checksum(samples([part], places) if name in target.sampled else [part])
        elif is_plain(value):
            sums[name] = crc32(json.dumps(value).encode())
    return sums


def _given(path: Path | None) -> Path:
    if path is None:
        raise NotACheckpoint("no checkpoint was named", hint="give a path, or checkpoint_id")
    return path


def _job(index: Index, item: ReadItem, target: Tensor) -> Job:
    """The part of a stored chunk that torch's planner asks for."""
    name = item.storage_index.fqn
    at = _chunk(index, item)
    chunk = Box(at.offsets, at.sizes)
    starts = tuple(o + s for o, s in zip(chunk.offsets, item.storage_offsets, strict=True))
    part = Box(starts, tuple(item.lengths))
    return Job(name, at.file, at.offset, at.length, dtype_from_name(index.tensors[name].dtype), chunk, part, target)


def _chunk(index: Index, item: ReadItem) -> Chunk:
    chunks, number = index.tensors[item.storage_index.fqn].chunks, item.storage_index.index
    offset = tuple(item.storage_index.offset or ())
    if number is not None and number < len(chunks) and chunks[number].offsets == offset:
        return chunks[number]
    return next(chunk for chunk in chunks if chunk.offsets == offset)


def _object(index: Index, item: ReadItem) -> Job:
    file, offset, length = index.objects[item.storage_index.fqn]
    whole = Box((0,), (length,))
    room = torch.empty(length, dtype=torch.uint8)
    return Job(item.storage_index.fqn, file, offset, length, torch.uint8, whole, whole, room)
