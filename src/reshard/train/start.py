"""Where does the run begin? From nothing, from weights, or from a full checkpoint of any layout.

The trainer's objects under the names that a checkpoint stores them by, and the checks before a byte is read.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from reshard.checkpoint.layout import named_steps
from reshard.checkpoint.load import Start, choose, first_weights, load
from reshard.checkpoint.ours import refuse_others
from reshard.checkpoint.quarantine import SetAside, set_aside, set_damaged_aside
from reshard.checkpoint.ranks import Ranks
from reshard.checkpoint.save import tensor_state
from reshard.checkpoint.state import State, local_part
from reshard.checkpoint.weights import EMBEDDING, OUTPUT, check_shapes, load_weights, repeat_embedding, stored_once
from reshard.config import Config
from reshard.errors import CheckpointError, ConfigError, FormatError, IntegrityError, LayoutError, NotACheckpoint
from reshard.model.build import spec_of
from reshard.model.compare import check_model, differences
from reshard.model.init import initial_rows
from reshard.model.spec import LlamaSpec
from reshard.text.cache import fingerprint_difference
from reshard.train.optimizer import group_values, optimizer_moments

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainState:
    """How far is the run? Five whole numbers that no rank owns and no layout changes."""

    step: int = 0
    tokens_seen: int = 0
    next_sequence: int = 0  # global index of the first sequence that was not yet trained on
    global_batch_size: int = 0  # sequences per optimizer step
    rng_seed: int = 0

    def after_step(self, seq_len: int) -> TrainState:
        """One optimizer step later."""
        return replace(
            self,
            step=self.step + 1,
            tokens_seen=self.tokens_seen + self.global_batch_size * seq_len,
            next_sequence=self.next_sequence + self.global_batch_size,
        )


def full_state(
    parameters: Mapping[str, nn.Parameter], spec: LlamaSpec, optimizer: torch.optim.Optimizer, train_state: TrainState
) -> State:
    """Everything that a resume needs, by stored name: what this rank holds of it."""
    once = stored_once(parameters, spec)
    return {
        "model": once,
        "optimizer": {**optimizer_moments(optimizer, once), **group_values(optimizer)},
        "train_state": tensor_state(asdict(train_state)),
    }


def initialise(parameters: Mapping[str, nn.Parameter], spec: LlamaSpec, rng_seed: int) -> None:
    """Fill this rank's shards with their first values, the same bits on every layout."""
    with torch.no_grad():
        for name, parameter in parameters.items():
            local, box = local_part(parameter)
            if box.volume:
                stored = EMBEDDING if spec.tied and name == OUTPUT else name
                rows = initial_rows(spec, rng_seed, stored, box.offsets[0], box.offsets[0] + box.sizes[0])
                others = tuple(slice(o, o + s) for o, s in zip(box.offsets[1:], box.sizes[1:], strict=True))
                local.copy_(rows[(slice(None), *others)])


def first_choice(config: Config) -> tuple[Start, list[SetAside]]:
    """What this run should start from, as the folder is now. Rank 0 only; see checkpoint.load.choose.

    Steps that their own manifest shows to be damaged are set aside first, unless one step is asked for by number. Raises
    CheckpointError, too, where the name of a step that the run will save is taken by what it may not replace; TensorMismatch
    where the checkpoint is of another model.
    """
    folder = config.checkpoint_folder
    aside = set_damaged_aside(folder) if config.checkpoint.load_step < 0 else []
    start = choose(
        folder,
        load_step=config.checkpoint.load_step,
        steps=config.training.steps,
        initial_load_path=config.checkpoint.initial_load_path,
    )
    if not start.finished:
        start = replace(start, notes=(*start.notes, *_compare_models(config, start), *_look_at_names(config, start)))
    return start, aside


def look_at_first_weights(config: Config) -> None:
    """Raise what `initial_load_path` alone shows to be wrong: before the text is tokenised. Any process may ask."""
    asked = config.checkpoint.initial_load_path
    if config.checkpoint.enable_checkpoint and asked is not None and not named_steps(config.checkpoint_folder):
        first_weights(asked, config.checkpoint_folder)


def _compare_models(config: Config, start: Start) -> list[str]:
    """What is to be said of the model that lies where this run starts from. Raises TensorMismatch where it is another one.

    Whether first weights are tied is settled by themselves: both names are there, and load_weights compares them.
    """
    if start.directory is None:
        return []
    stored = start.manifest.model if start.manifest is not None else None
    if stored is None:
        return [
            f"{start.directory} does not say which model it is: names and shapes are compared, but heads, RoPE and "
            "epsilon are taken from [model]"
        ]
    spec = spec_of(config)
    check_model(start.directory, stored, config, but=() if start.resume else ("tied",))
    if "tied" not in differences(stored, spec):
        return []
    becomes = "are tied, as [model] says, if they are the same" if spec.tied else "become two matrices, as [model] says"
    return [f"the embedding and output of {start.directory} {becomes} (tied_embeddings)"]


def _look_at_names(config: Config, start: Start) -> list[str]:
    """Is the name of a step that this run will save in use? Found now, not at that step. Returns what is to be said.

    Raises CheckpointError where what lies there is not ours, or where the run would end by replacing weights that an
    earlier end of it has handed over.
    """
    first = start.manifest.step if start.resume and start.manifest is not None else 0
    last, said = final_step(config), []
    for path, step in named_steps(config.checkpoint_folder):
        if step in start.handed_over:
            if step == last > first:
                _check_end(config, start, path)
                said.append(f"{path.name} holds weights only: this run replaces them at its end")
            continue
        saves = step == last or config.checkpoint.interval_type == "seconds" or in_turn(step, config)
        if saves and first < step <= last:
            refuse_others(path, hint=f"this run would save step {step} there: choose another --checkpoint.folder")
    return said


def _check_end(config: Config, start: Start, path: Path) -> None:
    """A run may end anew on weights of an earlier end of it, by weights only; not on a full checkpoint. Raises."""
    last, steps = final_step(config), config.training.steps
    if config.checkpoint.model_weights_only and last == steps:
        return
    later = last + 1
    while later in start.handed_over:
        later += 1
    end = f"--training.steps {later}" if last == steps else f"--training.stop_after {later}"
    raise CheckpointError(
        f"`{path}` holds weights only, as they were handed over, and this run would end there with a full checkpoint",
        path=path,
        hint=f"end at another step: {end}; or keep what is there under another name: mv {path} {path}.kept",
    )


def final_step(config: Config) -> int:
    """Where does this start of the run end, if it is not stopped?"""
    t = config.training
    return min(t.steps, t.stop_after) if t.stop_after else t.steps


def in_turn(step: int, config: Config) -> bool:
    """Does the interval, counted in steps, end with this one?"""
    return config.checkpoint.interval_type == "steps" and step % config.checkpoint.interval == 0


def load_or_fall_back(
    start: Start,
    fresh: TrainState,
    config: Config,
    spec: LlamaSpec,
    fingerprint: dict[str, Any],
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    ranks: Ranks,
) -> tuple[Start, TrainState, list[SetAside]]:
    """Fill model and optimizer, falling back past damaged steps. Returns what it came to, and what was set aside.

    fresh: the state of a run at step 0. Damage falls back only where the newest step was asked for, and never to
    nothing: with no whole checkpoint left the error is raised. All ranks agree on every step of it. Collective.
    """
    aside: list[SetAside] = []
    while True:
        try:
            if start.resume:
                return start, resume(start, config, spec, parameters, optimizer, ranks), aside
            if start.directory is not None:
                load_weights(start.directory, parameters, spec, ranks)
            else:
                initialise(parameters, spec, config.training.rng_seed)
            return start, fresh, aside
        except IntegrityError as error:
            damaged = start.directory
            # A foreign step-0 is not ours to rename, and there is nothing behind it.
            ours = start.manifest is not None and damaged is not None and damaged.parent == config.checkpoint_folder
            if config.checkpoint.load_step >= 0 or damaged is None or not ours:
                error.hint = error.hint or f"`reshard verify {damaged}` says what is damaged; name another step"
                raise
        for moment in optimizer_moments(optimizer, parameters).values():
            moment.zero_()  # some may have been read before the damage was met, and weights alone would leave them
        start, aside = ranks.on_first(partial(_next_choice, config, damaged, aside))
        check_data(start, fingerprint, config)
        if ranks.is_first:
            lost = ", ".join(a.directory.name for a in aside)
            logger.warning("falling back to %s; lost: %s", start.directory, lost)


def _next_choice(config: Config, damaged: Path, before: list[SetAside]) -> tuple[Start, list[SetAside]]:
    """Rank 0: set the damaged step aside and choose again."""
    aside = [*before, set_aside(damaged)]
    start, more = first_choice(config)
    aside += more
    if start.directory is None or start.finished:
        raise NotACheckpoint(
            f"no whole checkpoint is left in `{config.checkpoint_folder}`: {aside[-1].now.name} was set aside, "
            f"{aside[-1].reason}",
            path=config.checkpoint_folder,
            hint="start afresh in another --checkpoint.folder, or restore a checkpoint from a copy",
        )
    return start, aside


def check_data(start: Start, fingerprint: dict[str, Any], config: Config) -> None:
    """A resume reads on where it stopped, so it must be the same stream. Raises ConfigError naming the difference."""
    if not start.resume or start.manifest is None or "data" in config.checkpoint.exclude_from_loading:
        return
    difference = fingerprint_difference(start.manifest.data or {}, fingerprint)
    if difference is not None:
        raise ConfigError(
            f"checkpoint `{start.directory}` was trained on another token stream: {difference}",
            hint="restore the option, or begin the data anew with --checkpoint.exclude_from_loading data",
        )


def resume(
    start: Start,
    config: Config,
    spec: LlamaSpec,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    ranks: Ranks,
) -> TrainState:
    """Load a full checkpoint onto whatever layout this is. Raises before anything is touched where it does not fit."""
    assert start.directory is not None and start.manifest is not None
    excluded = config.checkpoint.exclude_from_loading
    once = stored_once(parameters, spec)
    moments = {} if "optimizer" in excluded else optimizer_moments(optimizer, once)
    stored = {n.removeprefix("model."): e for n, e in start.manifest.tensors.items() if n.startswith("model.")}
    check_shapes(start.directory, {name: entry.shape for name, entry in stored.items()}, spec)
    _check_dtype(start, {entry.dtype for entry in stored.values()}, config)
    numbers = tensor_state(asdict(TrainState()))
    wanted: dict[str, Tensor] = {f"model.{name}": p for name, p in once.items()}
    wanted |= {f"optimizer.{name}": moment for name, moment in moments.items()}
    wanted |= {f"train_state.{name}": number for name, number in numbers.items()}
    load(start.directory, wanted, ranks, cast=config.checkpoint.allow_dtype_change)
    repeat_embedding(parameters, spec)
    for key in ("step", "exp_avg", "exp_avg_sq") if moments else ():
        repeat_embedding({name: optimizer.state[p][key] for name, p in parameters.items()}, spec)
    train_state = TrainState(**{name: int(t) for name, t in numbers.items()})
    if asdict(train_state) != start.manifest.train_state:
        raise FormatError(
            f"the manifest of `{start.directory}` says {start.manifest.train_state}, its tensors {asdict(train_state)}",
            path=start.directory,
            hint="its author has changed one of the two: resume from another step",
        )
    if "data" in excluded:
        logger.info("data: starting the text afresh, as exclude_from_loading says")
        train_state = replace(train_state, next_sequence=0, rng_seed=config.training.rng_seed)
    return _global_batch(train_state, config)


def _global_batch(saved: TrainState, config: Config) -> TrainState:
    wanted = config.training.global_batch_size
    if wanted in (-1, 0, saved.global_batch_size):
        return saved
    logger.info("global batch changes from %d to %d sequences", saved.global_batch_size, wanted)
    return replace(saved, global_batch_size=wanted)


def _check_dtype(start: Start, stored: set[str], config: Config) -> None:
    if stored - {config.training.dtype} and not config.checkpoint.allow_dtype_change:
        raise ConfigError(
            f"checkpoint `{start.directory}` was trained in {'/'.join(sorted(stored))}, "
            f"training.dtype is {config.training.dtype}",
            key="training.dtype",
            hint=f"--training.dtype {sorted(stored)[0]}, or --checkpoint.allow_dtype_change to cast",
        )


def fresh_global_batch(config: Config, dp: int) -> int:
    """Sequences per optimizer step of a run that begins: the option, or one micro-step of every rank."""
    asked = config.training.global_batch_size
    if asked == 0:
        raise LayoutError("training.global_batch_size is 0, expected -1 (the default) or at least 1")
    return asked if asked > 0 else config.training.batch_size * dp
