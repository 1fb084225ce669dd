"""What happens in a training run? One function, read from top to bottom.

Data before ranks, ranks before model, model before checkpoint; then the steps. The rooms below do the work.
"""

from __future__ import annotations

import gc
import logging
import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import loss_parallel

from reshard.checkpoint.commit import recover
from reshard.checkpoint.layout import named_steps, step_directory
from reshard.checkpoint.load import Start
from reshard.checkpoint.lock import check_shared, own_folder
from reshard.checkpoint.quarantine import SetAside
from reshard.checkpoint.ranks import Ranks
from reshard.checkpoint.retain import retain
from reshard.checkpoint.save import About
from reshard.checkpoint.saver import Saved, Saver
from reshard.checkpoint.state import dtype_from_name, dtype_name
from reshard.checkpoint.weights import weights_state
from reshard.config import Config, check_checkpointing, config_to_toml
from reshard.errors import TrainingError, listed
from reshard.model.build import spec_of
from reshard.model.llama import Llama, Part
from reshard.model.spec import LlamaSpec, flops_per_token, parameter_count
from reshard.parallel.context import apply_context_parallel, positions_of
from reshard.parallel.dims import Layout, build_mesh, check_fit, plan_batches, resolve_layout
from reshard.parallel.pipeline import Pipeline, parts_of_rank, tie_of
from reshard.parallel.shard import shard_model
from reshard.parallel.world import Place, World, join, place_from_environment, set_timeouts
from reshard.text.cache import TokenData, full_fingerprint, prepare
from reshard.text.order import TrainingText, held_out
from reshard.train.metrics import Reporter
from reshard.train.optimizer import build_optimizer, clip_gradients, learning_rate, set_learning_rate
from reshard.train.passes import Passes
from reshard.train.signals import asked_to_stop
from reshard.train.space import check_space
from reshard.train.start import (
    TrainState,
    check_data,
    final_step,
    first_choice,
    fresh_global_batch,
    full_state,
    in_turn,
    load_or_fall_back,
    look_at_first_weights,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """How a run ended: its last step, its last loss (None where there was nothing to do), its last checkpoint.

    stopped: the name of the signal that ended it before its last step.
    """

    step: int
    loss: float | None
    checkpoint: Path | None
    stopped: str | None = None


def train(config: Config) -> Outcome:
    """Train as the config says, on this process's share of the ranks. Every rank calls it. Raises ReshardError."""
    check_checkpointing(config)
    place = place_from_environment()
    layout = resolve_layout(config, place.world_size)
    spec = spec_of(config)
    check_fit(layout, spec, config)
    if place.rank == 0 and config.checkpoint.export_dtype != "float32" and not config.checkpoint.model_weights_only:
        logger.warning("checkpoint.export_dtype has no effect without checkpoint.model_weights_only")
    look_at_first_weights(config)
    data, _ = prepare(config, spec.vocab_size, progress=True)
    fingerprint = full_fingerprint(data, config)
    compute = compute_dtype(config)
    need_group = compute != dtype_from_name(config.training.dtype)
    with join(place, config.comm, need_group=need_group, sequences=layout.cp_groups()) as world:
        ranks = Ranks(world.control)
        if place.rank == 0 and config.job.print_args:
            logger.info("resolved config:\n%s", config_to_toml(config))
        with own_folder(config.checkpoint_folder, ranks) if config.checkpoint.enable_checkpoint else nullcontext():
            return _train(config, world, layout, spec, ranks, data, fingerprint, compute)


def _train(
    config: Config,
    world: World,
    layout: Layout,
    spec: LlamaSpec,
    ranks: Ranks,
    data: TokenData,
    fingerprint: dict[str, Any],
    compute: torch.dtype,
) -> Outcome:
    t, folder, place = config.training, config.checkpoint_folder, world.place
    torch.use_deterministic_algorithms(t.deterministic)

    # -- what to start from --------------------------------------------------------------------------------------
    start = Start()
    aside: list[SetAside] = []
    if config.checkpoint.enable_checkpoint:
        for line in ranks.on_first(lambda: recover(folder)):
            logger.info("%s", line)
        check_shared(folder, ranks)
        start, aside = ranks.on_first(lambda: first_choice(config))
        for line in start.notes:
            logger.info("%s", line)
        if start.finished:
            assert start.manifest is not None
            logger.info("%s has reached training.steps %d: nothing to do", start.directory, t.steps)
            return Outcome(start.manifest.step, None, start.directory)
        check_data(start, fingerprint, config)
        ranks.on_first(lambda: check_space(folder, spec, config))
    elif place.rank == 0 and (unused := named_steps(folder)):
        logger.warning(
            "`%s` holds %s, of which nothing is loaded: checkpoint.enable_checkpoint is false",
            folder, listed(path.name for path, _ in unused),
        )  # fmt: skip

    # -- the model, this rank's part of it -----------------------------------------------------------------------
    begun = time.perf_counter()
    mesh = build_mesh(layout, world.device.type) if dist.is_initialized() else None
    positions_S = positions_of(layout.place_of(place.rank)["cp"], layout.cp, t.seq_len)
    stages = parts_of_rank(layout.place_of(place.rank)["pp"], spec, config.parallelism, t.seq_len)
    models = [_part_of_model(part, mesh, positions_S, config, world, layout, spec, compute) for _, part in stages]
    parameters = {name: p for model in models for name, p in model.named_parameters()}
    optimizer = build_optimizer(parameters, config.optimizer, tied=spec.tied)

    state = TrainState(global_batch_size=fresh_global_batch(config, layout.dp), rng_seed=t.rng_seed)
    start, state, lost = load_or_fall_back(start, state, config, spec, fingerprint, parameters, optimizer, ranks)
    batches = plan_batches(layout, config, state.global_batch_size)

    # -- what the steps need -------------------------------------------------------------------------------------
    text = TrainingText(data.train, t.seq_len, state.rng_seed)
    validation = held_out(data.validation, t.seq_len, config.validation.sequences) if config.validation.freq else None
    axes = ("dp_replicate", "fsdp", "pp") if mesh is not None else ()
    groups = {axis: mesh[axis].get_group() for axis in axes if mesh is not None and mesh[axis].size() > 1}
    passes = Passes(
        parts=models,
        batches=batches,
        dp_rank=layout.dp_rank(place.rank),
        dp=layout.dp,
        positions_S=positions_S,
        groups=list(groups.values()),
        device=world.device,
        loss_context=loss_parallel if layout.tp > 1 and not config.parallelism.disable_loss_parallel else nullcontext,
        tokens_per_step=state.global_batch_size * t.seq_len,
        # Under sequence parallel each tp rank hands on its share of the positions.
        hidden=lambda n: torch.empty(n, len(positions_S) // layout.tp, spec.dim, dtype=compute, device=world.device),
    )
    if layout.pp > 1:
        numbered = [(number, model) for (number, _), model in zip(stages, models, strict=True)]
        passes.pipeline = Pipeline.build(
            numbered, config.parallelism, groups["pp"], world.device, batches.count, passes.loss
        )
        passes.tie = tie_of(spec, config.parallelism, layout.pp, parameters, groups["pp"])
    clean_up = partial(
        retain,
        folder,
        config.checkpoint.keep_latest_k,
        keep_every_n=config.checkpoint.keep_every_n,
        protected=start.directory,
    )
    last_step = final_step(config)
    origin = About(
        step=state.step,
        kind="full",
        source=_source(start, config),
        parent=start.manifest.save_id if start.manifest is not None else None,
        layout=layout.to_dict(),
        config=config.model_dump(),
        model=spec.to_dict(),
        data=fingerprint,
    )
    report = Reporter(
        config,
        first=place.rank == 0,
        device_name=torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "cpu",
        flops_per_token=flops_per_token(spec, t.seq_len),
        world_size=place.world_size,
    )
    report.event(
        "start", step=state.step, layout=layout.to_dict(), world_size=place.world_size, resumed=start.resume,
        loaded=str(start.directory) if start.directory else None, notes=list(start.notes),
        setup_s=time.perf_counter() - begun,
    )  # fmt: skip
    for step_lost in (*aside, *lost):
        report.event("rollback", step=state.step, **step_lost.to_dict())
    logger.info(
        "%s: %s parameters, %s, %s, global batch %d x %d tokens, %d micro-step(s), from %s",
        config.model.flavor, f"{parameter_count(spec):,}", layout, _dtypes(t.dtype, compute),
        state.global_batch_size, t.seq_len, batches.count, _where(start, state),
    )  # fmt: skip
    if state.step >= last_step:
        logger.info(
            "step %d is the last that this run may take (stop_after %d): nothing to do", state.step, t.stop_after
        )

    # -- the steps -----------------------------------------------------------------------------------------------
    directory, loss_value, stopped, last_save, first_step = None, None, None, time.monotonic(), state.step + 1
    background = Ranks(world.background) if config.checkpoint.async_mode != "disabled" else None
    limit = config.checkpoint.async_write_limit_mb_s * 1e6
    report.start_clock()
    with (
        _profiler(config, place) as profiler,
        _collector_at_rest(),
        asked_to_stop() as asked,
        # What should be equal and is not ends no run: it is in the log, and after a resume it is equal again.
        Saver(ranks, background, limit, differ="first") as saver,
    ):
        while state.step < last_step:
            step = state.step + 1
            optimizer.zero_grad(set_to_none=True)
            loss = passes.train(text, state.next_sequence, state.global_batch_size)
            norm = clip_gradients(parameters, t.max_norm, groups.get("pp"), tied=spec.tied)
            loss_value, norm_value = loss.item(), norm.item()
            if not (math.isfinite(loss_value) and math.isfinite(norm_value)):
                raise TrainingError(
                    f"step {step}: loss {loss_value}, gradient norm {norm_value}, expected finite numbers; "
                    "the weights were not changed",
                    step=step,
                    hint="lower optimizer.lr or lengthen training.warmup_steps; the run resumes from its newest checkpoint",
                )
            lr = learning_rate(step, config)
            set_learning_rate(optimizer, lr)
            saver.fence()
            optimizer.step()
            if text.epoch_of(state.next_sequence) != text.epoch_of(state.next_sequence + state.global_batch_size):
                logger.info("step %d ends epoch %d of the text", step, text.epoch_of(state.next_sequence))
            state = state.after_step(t.seq_len)
            report.step(
                step=step, loss=loss_value, grad_norm=norm_value, lr=lr, tokens_seen=state.tokens_seen,
                tokens=passes.tokens_per_step,
            )  # fmt: skip
            if profiler is not None:
                profiler.step()
            if step % t.gc_freq == 0:
                gc.collect(1)
            if validation is not None and (step % config.validation.freq == 0 or step == last_step):
                value = passes.evaluate(validation)
                report.event("validation", step=step, loss=value, sequences=len(validation))
                logger.info("step %d  validation loss %.4f", step, value)
            stop, overdue, over = ranks.maximum(asked.signal, _overdue(last_save, config, ranks), saver.status())
            saved = saver.collect() if over else []
            due = step == last_step or stop or overdue or in_turn(step, config)
            if config.checkpoint.enable_checkpoint and due and step in start.handed_over and step < last_step:
                # What was handed over stays. A run that is to stop takes one more step instead.
                logger.info("step %d is not saved: step-%d holds weights only, as they were handed over", step, step)
                due = stop = 0
            if config.checkpoint.enable_checkpoint and due:
                directory, last_save = step_directory(folder, step), time.monotonic()
                if config.checkpoint.model_weights_only and step == t.steps:
                    about = replace(origin, step=step, kind="model")
                    export = dtype_from_name(config.checkpoint.export_dtype)
                    saved += saver.start(directory, weights_state(parameters, spec), about, export)
                else:
                    about = replace(origin, step=step, train_state=asdict(state))
                    saved += saver.start(directory, full_state(parameters, spec, optimizer, state), about)
            if stop or step == last_step:
                saved += saver.collect()
            for done in saved:
                _after_save(done, clean_up, ranks, report)
            if stop and step < last_step:
                stopped = signal.Signals(stop).name
                where = f"saved {directory}" if config.checkpoint.enable_checkpoint else "checkpoints are not enabled"
                logger.info("%s: stopping after step %d, %s", stopped, step, where)
                report.event("stop", step=step, signal=stopped)
                break
            if step == first_step:  # the first one may compile, and wait for slow starters
                set_timeouts(config.comm, list(groups.values()))
            report.start_clock()  # saves and validations are not part of the next step's time
    report.event("end", step=state.step, loss=loss_value, **({"stopped": stopped} if stopped else {}))
    report.close()
    return Outcome(state.step, loss_value, directory, stopped)


def _part_of_model(
    part: Part,
    mesh: DeviceMesh | None,
    positions_S: Tensor,
    config: Config,
    world: World,
    layout: Layout,
    spec: LlamaSpec,
    compute: torch.dtype,
) -> Llama:
    """One stage of the model, this rank's shards of it, with memory but no values yet."""
    with torch.device("meta"):
        model = Llama(spec, part).to(dtype_from_name(config.training.dtype))
    shard_model(model, mesh, layout, config, compute)
    model.to_empty(device=world.device)
    model.init_rope(positions_S)
    if world.sequence is not None:
        method = config.parallelism.context_parallel_method
        apply_context_parallel(model, world.sequence, config.training.seq_len, method, compute)
    return model


def compute_dtype(config: Config) -> torch.dtype:
    """Dtype of forward and backward: mixed precision's, or the parameters' own."""
    own = dtype_from_name(config.training.dtype)
    asked = config.training.mixed_precision_param
    if asked == "auto":
        return torch.bfloat16 if own == torch.float32 and torch.cuda.is_available() else own
    return own if own != torch.float32 else dtype_from_name(asked)


def _overdue(last_save: float, config: Config, ranks: Ranks) -> bool:
    """Has the interval passed, counted in seconds? By rank 0's clock; the others learn it with the step's other news."""
    counts = config.checkpoint.interval_type == "seconds" and ranks.is_first
    return counts and time.monotonic() - last_save >= config.checkpoint.interval


def _after_save(saved: Saved, clean_up: Callable[[], list[Path]], ranks: Ranks, report: Reporter) -> None:
    """Report a checkpoint that is committed, and delete those that it makes superfluous. Collective."""
    manifest = saved.manifest
    logger.info("saved %s (%s, %.1f MB, %.2f s)", saved.directory, manifest.kind, manifest.bytes / 1e6, saved.write_s)
    report.event(
        "save", step=manifest.step, kind=manifest.kind, bytes=manifest.bytes, path=str(saved.directory),
        stall_s=saved.stall_s, write_s=saved.write_s,
    )  # fmt: skip
    for gone in ranks.on_first(clean_up):
        logger.info("deleted %s", gone)


def _source(start: Start, config: Config) -> dict[str, Any]:
    """What a checkpoint of this run says of its origin. A rollback stays on record for all that follows from it."""
    source: dict[str, Any] = {"kind": "train", "from": str(start.directory) if start.directory else None}
    if start.manifest is None:
        return source
    before = start.manifest.source
    if "load_step" in before:
        source |= {"load_step": before["load_step"], "load_save_id": before["load_save_id"]}
    if config.checkpoint.load_step == start.manifest.step:
        source |= {"load_step": start.manifest.step, "load_save_id": start.manifest.save_id}
    return source


def _where(start: Start, state: TrainState) -> str:
    if start.directory is None:
        return f"its own first weights (rng_seed {state.rng_seed})"
    return f"{start.directory} ({'resuming after step ' + str(state.step) if start.resume else 'weights'})"


def _dtypes(own: str, compute: torch.dtype) -> str:
    return own if dtype_from_name(own) == compute else f"{own} computing in {dtype_name(compute)}"


@contextmanager
def _collector_at_rest() -> Iterator[None]:
    """Python's garbage collector runs only when the loop says so: on all ranks at once, so that none waits for one."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _profiler(config: Config, place: Place) -> AbstractContextManager[torch.profiler.profile | None]:
    if not config.profiling.enable_profiling:
        return nullcontext()
    folder = Path(config.job.dump_folder) / config.profiling.save_traces_folder
    folder.mkdir(parents=True, exist_ok=True)
    return torch.profiler.profile(
        schedule=torch.profiler.schedule(wait=max(0, config.profiling.profile_freq - 2), warmup=1, active=1),
        on_trace_ready=lambda p: p.export_chrome_trace(str(folder / f"rank{place.rank}_step{p.step_num}.json")),
    )
