"""How does any training loop save and load with the engine? `reshard.save` and `reshard.load`, for nested state dicts.

    model_state, optimizer_state = get_state_dict(model, optimizer)          # torch.distributed.checkpoint.state_dict
    reshard.save("checkpoints/step-10", {"model": model_state, "optimizer": optimizer_state, "step": 10})

Tensors and DTensors are stored as in every checkpoint of ours, and load onto any other layout. Numbers, strings and
lists of them are stored as JSON in one more tensor: nothing is ever pickled, and opening a checkpoint runs no code.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from functools import partial
from operator import setitem
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from reshard.checkpoint.kinds import problem_of
from reshard.checkpoint.layout import entries, step_of
from reshard.checkpoint.left_out import Held, Wanted, left_out
from reshard.checkpoint.load import load as load_tensors
from reshard.checkpoint.load import open_index
from reshard.checkpoint.manifest import crc32_hex
from reshard.checkpoint.plan import Planner
from reshard.checkpoint.ranks import Ranks
from reshard.checkpoint.reader import read_objects
from reshard.checkpoint.replicas import HINT, Differ, against, check_differ
from reshard.checkpoint.save import About
from reshard.checkpoint.save import save as save_state
from reshard.checkpoint.saver import Saver
from reshard.checkpoint.state import State, bytes_of
from reshard.errors import CheckpointError, TensorMismatch, listed
from reshard.paths import local_path

logger = logging.getLogger(__name__)

VALUES = "reshard.values"  # the tensor that holds what is no tensor: JSON in UTF-8, one number for each byte
_PLAIN = (bool, int, float, str, type(None))


def save(
    path: str | os.PathLike[str],
    state_dict: Mapping[str, Any],
    *,
    process_group: dist.ProcessGroup | None = None,
    step: int | None = None,
    differ: Differ = "refuse",
) -> None:
    """Save a nested state dict as one committed checkpoint directory. Every rank calls it, with its part.

    state_dict: dicts and lists, with tensors, DTensors, numbers, strings, booleans and None at the ends. A plain tensor
    or a value has to be the same on every rank that has it, and is compared; so are parts that DTensors of different
    meshes claim under one name. process_group: of the ranks that save together, able to
    move CPU tensors; None takes all ranks, or this process alone where torch.distributed is not initialised.
    step: for the record; None takes it from a name like `step-10`.
    differ: what becomes of a save whose ranks differ: "refuse", or "first", which stores what the lowest rank has and
    names it in the log (batch norm under DDP needs it). Compared are all bytes, of up to 64 MiB a rank; of what is more,
    64 numbers of each tensor, at other places in each save, and the log says so.
    An older checkpoint of this name is replaced only when the new one is whole; an empty directory is used.
    Raises CheckpointError on every rank, and then nothing is left of this save: for what cannot be stored, for values on
    which ranks disagree, for a directory that holds what is not ours, for a disk that refuses.
    """
    ranks = _ranks(process_group)
    directory, state, about = _state(path, state_dict, step, ranks, differ)
    save_state(directory, state, about, ranks, planner=Planner(ranks, differ))


def load(
    path: str | os.PathLike[str],
    state_dict: MutableMapping[str, Any],
    *,
    process_group: dist.ProcessGroup | None = None,
    cast: bool = False,
    strict: bool = True,
) -> list[str]:
    """Fill a nested state dict in place from a checkpoint, saved on this or any other layout. Every rank calls it.

    Each of its tensors is overwritten and each of its values replaced. Returns the names of all that the checkpoint holds
    and no rank's state dict takes, the same on every rank.
    strict: what lies under a key of the state dict's top level (`model`, `optimizer`) is a section. Of a section that the
    state dict names, all that is stored has to be taken, over all ranks together: an optimizer that has not taken a step
    has no moments, and is refused. Sections that it does not name are left out, as `load(path, {"model": ...})` means it; a
    tensor at the top level is a section of its own. False: any part will do.
    cast: convert numbers to the dtypes in state_dict, instead of refusing. DCP directories of other programs will do.
    Raises on every rank: TensorMismatch before anything is touched, where names, shapes or dtypes do not fit, or a part of
    a section is lacking; IntegrityError where a byte is not what was written; StorageError; CheckpointError for what load
    cannot fill.
    """
    ranks = _ranks(process_group)
    held: list[Held] = []  # on the first rank only

    def stored_values() -> dict[str, Any]:
        values, names = _stored(local_path(path))
        held.append(names)
        return values

    stored = ranks.on_first(stored_values)
    directory = Path(path)
    sections: list[str] = []
    tensors: dict[str, Tensor] = {}
    values: list[_Leaf] = []

    def look() -> str:
        sections.extend(str(key) for key in state_dict)
        for leaf in _leaves(local_path(path), state_dict):
            if isinstance(leaf.value, Tensor):
                tensors[leaf.name] = leaf.value
            else:
                values.append(leaf)
        missing = [leaf.name for leaf in values if leaf.name not in stored]
        if missing:
            raise TensorMismatch(f"checkpoint `{directory}` lacks values", path=directory, missing=missing)
        return crc32_hex(json.dumps((sections, list(tensors), [leaf.name for leaf in values])).encode())

    alike = len(set(ranks.everywhere(look))) == 1
    wanted = Wanted(sections, [*tensors, *(leaf.name for leaf in values)])
    of_ranks = [wanted] if alike else ranks.everywhere(lambda: wanted)
    left = ranks.on_first(lambda: left_out(directory, held[0], of_ranks, strict=strict))
    load_tensors(directory, tensors, ranks, cast=cast)
    for leaf in values:
        leaf.put(_like(leaf.value, stored[leaf.name]))
    return left


def newest(folder: str | os.PathLike[str], *, process_group: dist.ProcessGroup | None = None) -> Path | None:
    """The checkpoint of a folder, among those named `step-N`, that was saved last; None where there is none.

    `step-0` is older than every other, whenever it was saved: a run begins with it, and goes on from later steps. Torn and
    damaged ones are passed over, as far as file names and sizes show it. Every rank calls it, and gets the answer of the
    first. Raises StorageError.
    """

    def look() -> Path | None:
        committed = [entry.path for entry in entries(local_path(folder)) if entry.committed]
        return committed[-1] if committed else None

    return _ranks(process_group).on_first(look)


class AsyncSaver:
    """Saves while training goes on. Use it as a context, the same way on all ranks: leaving it waits for the last save.

        with reshard.AsyncSaver() as saver:
            for step in ...:
                ...
                saver.save(f"checkpoints/step-{step}", state)       # returns as soon as the state is copied

    One save is in flight at a time: the next one waits for it, and raises what it has failed with.
    process_group, differ: as `save`. write_limit_mb_s: of each rank, so that writing leaves the disk and the cores to
    training.
    """

    def __init__(
        self,
        *,
        process_group: dist.ProcessGroup | None = None,
        write_limit_mb_s: float = 0,
        differ: Differ = "refuse",
    ) -> None:
        self._ranks, self._process_group, self._differ = _ranks(process_group), process_group, differ
        background = Ranks()
        if self._ranks.size > 1:
            members = dist.get_process_group_ranks(process_group or dist.group.WORLD)
            # Of all ranks, a group is made by all: torch's way for some of them hangs where one is in more groups than another.
            some = len(members) < dist.get_world_size()
            background = Ranks(dist.new_group(members, backend="gloo", use_local_synchronization=some))
        self._saver = Saver(self._ranks, background, write_limit_mb_s * 1e6, differ)

    def save(self, path: str | os.PathLike[str], state_dict: Mapping[str, Any], *, step: int | None = None) -> None:
        """Begin to save; arguments and errors as `reshard.save`, those of writing are raised by the next call.

        What the caller does next changes nothing in what is saved. On CUDA copies may still be under way: what this
        thread queues next on the current stream of each device waits for them; other streams of the caller do not.
        """
        if not _ranks(self._process_group).are(self._ranks):
            raise CheckpointError(
                f"`{path}` cannot be saved: torch.distributed was set up anew since this AsyncSaver was made",
                path=os.fspath(path),
                hint="make another: reshard.AsyncSaver()",
            )
        directory, state, about = _state(path, state_dict, step, self._ranks, self._differ)
        self._saver.start(directory, state, about)
        self._saver.fence()

    def wait(self) -> None:
        """Until nothing is in flight. Raises what the save has failed with."""
        self._saver.collect()

    def __enter__(self) -> AsyncSaver:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._saver.__exit__(kind, error, at)


# -- a nested state dict, and what is at its ends


class _Leaf(NamedTuple):
    path: tuple[str, ...]
    value: Any
    put: Callable[[Any], None]  # puts another value into its place

    @property
    def name(self) -> str:
        return ".".join(self.path)


def _leaves(directory: Path, state_dict: Mapping[str, Any]) -> Iterator[_Leaf]:
    """Every tensor and value. Raises CheckpointError for what cannot be stored."""
    names: set[str] = set()
    for leaf in _walk(state_dict, ()):
        problem = None
        if isinstance(leaf.value, Tensor):
            problem = problem_of(leaf.value)
        elif not is_plain(leaf.value):
            problem = f"a {type(leaf.value).__name__}, expected a tensor, a number, a string, or a list or dict of them"
        if leaf.name in names or leaf.name == VALUES:
            problem = "another part of the state dict, or ours, which has the same name"
        if problem:
            raise CheckpointError(
                f"`{leaf.name}` cannot be a part of checkpoint `{directory}`: it is {problem}", path=directory
            )
        names.add(leaf.name)
        yield leaf


def _walk(node: Any, path: tuple[str, ...]) -> Iterator[_Leaf]:
    for key, value in node.items() if isinstance(node, Mapping) else enumerate(node):
        here = (*path, str(key))
        if isinstance(value, Mapping) or (isinstance(value, list) and not is_plain(value)):
            yield from _walk(value, here)
        else:
            yield _Leaf(here, value, partial(setitem, node, key))


def is_plain(value: Any) -> bool:
    """A number or a string, or nothing but such in lists: one value, as DCP has it, too."""
    return all(map(is_plain, value)) if isinstance(value, list | tuple) else isinstance(value, _PLAIN)


def _state(
    path: str | os.PathLike[str], state_dict: Mapping[str, Any], step: int | None, ranks: Ranks, differ: Differ
) -> tuple[Path, State, About]:
    """Where to save what: the tensors, nested as they came, and all ranks' values in one more. Collective."""
    leaves: list[_Leaf] = []
    told: list[About] = []

    def look() -> tuple[str, str]:
        check_differ(differ)
        told.append(_about(local_path(path), step))
        leaves.extend(_leaves(Path(path), state_dict))
        return crc32_hex(as_json().encode()), differ

    def as_json() -> str:  # also as it travels: a number may be of a class that other processes cannot find
        return json.dumps(_values(leaves))

    sums, differs = (set(said) for said in zip(*ranks.everywhere(look), strict=True))
    directory = Path(path)
    if len(differs) > 1:
        raise CheckpointError(
            f'`{directory}` was not saved: some ranks ask for differ="refuse", others for "first"',
            path=directory,
            hint="pass the same differ on all ranks",
        )
    values = _values(leaves)
    if len(sums) > 1:
        values = _merged(directory, ranks, map(json.loads, ranks.everywhere(as_json)), differ)
    state: dict[str, Any] = {}
    for leaf in leaves:
        if isinstance(leaf.value, Tensor):
            node = state
            for key in leaf.path[:-1]:
                node = node.setdefault(key, {})
            node[leaf.path[-1]] = leaf.value
    if values:
        state[VALUES] = torch.frombuffer(bytearray(json.dumps(values).encode()), dtype=torch.uint8)
    return directory, state, told[0]


def _values(leaves: list[_Leaf]) -> dict[str, Any]:
    return {leaf.name: leaf.value for leaf in leaves if not isinstance(leaf.value, Tensor)}


def _merged(directory: Path, ranks: Ranks, of_ranks: Iterable[dict[str, Any]], differ: Differ) -> dict[str, Any]:
    """One set of values. Raises CheckpointError for those that are not the same on all ranks that have them."""
    holders: dict[str, list[tuple[int, Any]]] = {}
    for rank, values in enumerate(of_ranks):
        for name, value in values.items():
            holders.setdefault(name, []).append((rank, value))
    told = []
    for name, held in holders.items():
        lowest, first = held[0]
        others = [(rank, value) for rank, value in held if json.dumps(value) != json.dumps(first)]
        if others:
            rank, value = others[0]
            who = against(lowest, [rank for rank, _ in others])
            told.append(f"`{name}` {who}: {value!r} by rank {rank}, {first!r} by rank {lowest}")
    if told and differ == "refuse":
        raise CheckpointError(
            f"ranks hold other values under one name, so `{directory}` was not saved: {listed(told)}",
            path=directory,
            hint=HINT,
        )
    if told and ranks.is_first:
        logger.warning("%s: the lowest rank's values are stored of %s", directory, ", ".join(told))
    return {name: held[0][1] for name, held in holders.items()}


def _stored(directory: Path) -> tuple[dict[str, Any], Held]:
    """What a checkpoint holds beside tensors (of a foreign one, what its pickles say that is plain), and all its names."""
    manifest, index = open_index(directory)
    values: dict[str, Any] = {}
    if VALUES in index.tensors:
        text = torch.empty(index.tensors[VALUES].shape, dtype=torch.uint8)
        load_tensors(directory, {VALUES: text}, Ranks())
        values = json.loads(bytes(bytes_of(text)))
    elif manifest is None:
        values = {name: value for name, value in read_objects(directory, index).items() if is_plain(value)}
    names = dict.fromkeys((*index.tensors, *values, *index.objects))
    names.pop(VALUES, None)
    return values, Held(list(names), index.paths, index.objects.keys() - values.keys())


def _like(old: Any, new: Any) -> Any:
    """The new value, with tuples where the old one has them: JSON knows only lists."""
    if isinstance(new, list):
        olds = old if isinstance(old, list | tuple) and len(old) == len(new) else [None] * len(new)
        items = [_like(o, n) for o, n in zip(olds, new, strict=True)]
        return tuple(items) if isinstance(old, tuple) else items
    return new


def _about(directory: Path, step: int | None) -> About:
    return About(step=step_for(directory, step), kind="full", source={"kind": "api"})


def step_for(directory: Path, step: int | None) -> int:
    """The step to record: the one given, that of a name like `step-10`, or 0. Raises CheckpointError where they differ."""
    named = step_of(directory)
    if step is not None and named not in (None, step):
        raise CheckpointError(
            f"`{directory}` would hold step {step}, expected {named} by its name",
            path=directory,
            hint="leave step away, or choose another name",
        )
    return step if step is not None else named or 0


# -- which ranks


def _ranks(group: dist.ProcessGroup | None) -> Ranks:
    """The ranks of a group as it is now; None: all, or this process alone. Raises CheckpointError for one that is no more."""
    if not (dist.is_available() and dist.is_initialized()):
        return Ranks()
    group = group or _world()
    if not _is_alive(group):
        raise CheckpointError(
            "the process group was destroyed, or this rank is not in it",
            hint="give the group that these ranks form now, and call it on its ranks only",
        )
    return Ranks(group) if group.size() > 1 else Ranks()


def _world() -> dist.ProcessGroup:
    """All ranks, on a group that moves CPU tensors: the default one, or where that does not, one more."""
    world = dist.group.WORLD
    assert world is not None
    return world if "cpu:" in dist.get_backend_config() else _on_cpu(world)


_OF_WORLD: list[tuple[dist.ProcessGroup, dist.ProcessGroup]] = []  # the default group, and ours of the same ranks


def _on_cpu(world: dist.ProcessGroup) -> dist.ProcessGroup:
    """The group that was made for this default group; anew where that has been made anew, or ours was destroyed."""
    if not _OF_WORLD or _OF_WORLD[0][0] is not world or not _is_alive(_OF_WORLD[0][1]):
        _OF_WORLD[:] = [(world, dist.new_group(backend="gloo"))]
    return _OF_WORLD[0][1]


def _is_alive(group: dist.ProcessGroup) -> bool:
    """Is it a group of torch's that nobody has destroyed, with this rank in it?"""
    try:
        return bool(dist.get_process_group_ranks(group))
    except (KeyError, ValueError):
        return False
