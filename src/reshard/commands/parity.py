"""Does every layout compute the same? `reshard parity`: a few float64 steps of each, compared with one process.

All of them start from the same first weights (training.rng_seed decides them, whatever the layout) and read the same
global batches. In float64 the order of a sum costs 1e-16 and a mistake costs everything else, so the verdict is plain.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from reshard.commands.check import check
from reshard.config import Checkpoint, Config, Parallelism, config_to_toml
from reshard.errors import LayoutError, TrainingError, nearest
from reshard.parallel.dims import Layout
from reshard.parallel.world import end_with_parent
from reshard.progress import progress_bar

TOLERANCE = 1e-11

# As typed -> the field of Layout, and its degree in the config.
AXES = {
    "rep": ("dp_replicate", "data_parallel_replicate_degree"),
    "fsdp": ("dp_shard", "data_parallel_shard_degree"),
    "cp": ("cp", "context_parallel_degree"),
    "tp": ("tp", "tensor_parallel_degree"),
    "pp": ("pp", "pipeline_parallel_degree"),
}
SCHEDULES: tuple[str, ...] = get_args(Parallelism.model_fields["pipeline_parallel_schedule"].annotation)

# What torchrun tells its workers. Ours are no part of a run that this process may belong to.
_RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")

Curve = list[tuple[float, float]]  # loss and gradient norm of each step


@dataclass(frozen=True)
class Wanted:
    """One layout to try, as it was typed. schedule: None takes the config's."""

    name: str
    layout: Layout
    schedule: str | None = None

    @property
    def folder(self) -> str:
        """Its name as a file name."""
        return self.name.replace(":", "-")


ONE = Wanted("1", Layout())


@dataclass(frozen=True)
class Row:
    """How far a layout is from one process.

    loss: largest difference of a step's loss, nats per token. grad_norm: of a step's gradient norm, relative. Both None
    where the run failed; then `problem` says how.
    """

    layout: str
    world_size: int
    steps: int
    loss: float | None
    grad_norm: float | None
    same: bool | None
    problem: str | None = None


def parse_layouts(text: str) -> list[Wanted]:
    """`fsdp4; tp2; pp2:ZBVZeroBubble.fsdp2` -> layouts, each once. Raises LayoutError."""
    names = list(dict.fromkeys(name.strip() for name in text.split(";") if name.strip()))
    if not names:
        raise LayoutError("--layouts names no layout", hint='--layouts "fsdp2;tp2;pp2.fsdp2"')
    return [parse_layout(name) for name in names]


def parse_layout(name: str) -> Wanted:
    """One layout: rep, fsdp, cp, tp and pp with their degrees, joined by dots; pp may name its schedule after a colon."""
    if name == ONE.name:
        return ONE
    degrees: dict[str, int] = {}
    schedule = None
    for part in name.split("."):
        found = re.fullmatch(r"([a-z]+)([1-9][0-9]*)(?::(\w+))?", part)
        if found is None or found[1] not in AXES:
            raise LayoutError(
                f"layout `{name}`: `{part}` is not one of {', '.join(AXES)} with a degree",
                hint="e.g. fsdp4, pp2.tp2 or pp2:ZBVZeroBubble.fsdp2; layouts are separated by semicolons",
            )
        field = AXES[found[1]][0]
        if field in degrees:
            raise LayoutError(f"layout `{name}` gives {found[1]} twice")
        degrees[field] = int(found[2])
        if found[3] is not None:
            if found[1] != "pp" or found[3] not in SCHEDULES:
                close = nearest(found[3], SCHEDULES) or "ZBVZeroBubble"
                raise LayoutError(
                    f"layout `{name}`: `{found[3]}` is not a schedule of pp ({', '.join(SCHEDULES)})",
                    hint=f"e.g. pp2:{close}",
                )
            schedule = found[3]
    return Wanted(name, Layout(**degrees), schedule)


def rows(
    config: Config,
    layouts: Sequence[Wanted],
    run_all: Callable[[list[Config]], list[str | None]],
    *,
    steps: int,
    folder: Path,
) -> list[Row]:
    """Train each layout and compare it with one process; one row for each, in the order asked for.

    run_all: trains each config to its end on the ranks that it asks for; says for each what went wrong, or None.
    folder: every layout gets a folder of its own in it. Raises LayoutError where a layout cannot run at all, before any
    does, and TrainingError where one process fails.
    """
    wanted = [ONE, *(layout for layout in layouts if layout != ONE)]
    batch = config.training.global_batch_size
    if batch < 1:  # any number divides among any ranks; this one keeps the largest of them busy
        batch = config.training.batch_size * max(w.layout.dp for w in wanted)
    configs = [config_for(config, w, steps=steps, global_batch_size=batch, folder=folder / w.folder) for w in wanted]
    for w, one in zip(wanted, configs, strict=True):
        try:
            check(one, w.layout.world_size)
        except LayoutError as error:
            raise LayoutError(f"layout `{w.name}`: {error.message}", hint=error.hint) from None
    problems = run_all(configs)
    if problems[0] is not None:
        raise TrainingError(f"one process alone failed: {problems[0]}", step=0)
    expected = read_curve(folder / ONE.folder)
    found = [
        compare(w, expected, read_curve(folder / w.folder)) if problem is None else _failed(w, problem)
        for w, problem in zip(wanted, problems, strict=True)
    ]
    return [row for row in found if row.layout in {w.name for w in layouts}]


def config_for(config: Config, wanted: Wanted, *, steps: int, global_batch_size: int, folder: Path) -> Config:
    """The config of one layout's run: float64, no checkpoints, one step of warm-up so that the weights move at once."""
    degrees: dict[str, Any] = {key: getattr(wanted.layout, field) for field, key in AXES.values()}
    if wanted.schedule is not None:
        degrees["pipeline_parallel_schedule"] = wanted.schedule
    if wanted.layout.pp == 1:
        degrees["pipeline_parallel_split_points"] = []
    return config.with_values(
        job={"dump_folder": str(folder)},
        training={
            "dtype": "float64",
            "global_batch_size": global_batch_size,
            "steps": max(config.training.steps, steps),
            "stop_after": steps,
            "warmup_steps": min(config.training.warmup_steps, 1),
            "cache_folder": str(config.token_folder),
        },
        parallelism=degrees,
        validation={"freq": 0},
        checkpoint=Checkpoint().model_dump(),
        metrics={"enable_tensorboard": False},
        profiling={"enable_profiling": False},
    )


def read_curve(folder: Path) -> Curve:
    """Loss and gradient norm of every step that a run reported."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(record["loss"], record["grad_norm"]) for record in records]


def compare(wanted: Wanted, expected: Curve, found: Curve) -> Row:
    """The largest differences, and whether they are those of float64 alone."""
    if len(found) != len(expected):
        return _failed(wanted, f"it took {len(found)} steps of {len(expected)}")
    loss = max(abs(a - b) for (a, _), (b, _) in zip(expected, found, strict=True))
    norm = max(abs(a - b) / a for (_, a), (_, b) in zip(expected, found, strict=True))
    same = loss <= TOLERANCE and norm <= TOLERANCE
    return Row(wanted.name, wanted.layout.world_size, len(found), loss, norm, same)


def _failed(wanted: Wanted, problem: str) -> Row:
    return Row(wanted.name, wanted.layout.world_size, 0, None, None, None, problem)


def run(config: Config, layouts: Sequence[Wanted], *, steps: int) -> list[Row]:
    """`rows`, each layout on processes of its own; configs and output stay in <dump_folder>/parity/<layout>/."""
    folder = Path(config.job.dump_folder) / "parity"
    with progress_bar("parity", len(layouts) + (ONE not in layouts), unit="items") as advance:

        def run_all(configs: list[Config]) -> list[str | None]:
            problems = []
            for one in configs:
                problems.append(train_on_ranks(one))
                advance(1)
            return problems

        return rows(config, layouts, run_all, steps=steps, folder=folder)


def train_on_ranks(config: Config) -> str | None:
    """`reshard train` on new processes, as many as the degrees ask for. Returns what went wrong, or None.

    The ranks meet at a free port. They end with this process, however it ends (on Linux).
    """
    folder = Path(config.job.dump_folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("metrics.jsonl", "events.jsonl"):
        (folder / name).unlink(missing_ok=True)
    toml, log = folder / "config.toml", folder / "output.log"
    toml.write_text(config_to_toml(config), encoding="utf-8")
    ranks = 1
    for _, key in AXES.values():
        ranks *= getattr(config.parallelism, key)
    command = ["-m", "reshard", "train", str(toml)]
    if ranks > 1:
        command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), *command]
    environment = {key: value for key, value in os.environ.items() if key not in _RANK_VARIABLES}
    with open(log, "wb") as output:
        started = subprocess.Popen(
            [sys.executable, *command], stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
            env={**environment, "OMP_NUM_THREADS": "1"}, preexec_fn=end_with_parent,  # noqa: PLW1509  no threads here
        )  # fmt: skip
        try:
            code = started.wait()
        finally:
            if started.poll() is None:  # we were interrupted: torchrun ends its workers when it is asked to end
                started.send_signal(signal.SIGTERM)
                started.wait()
    if code == 0:
        return None
    sentences = [line for line in log.read_text(errors="replace").splitlines() if line.startswith("error")]
    return f"{sentences[0] if sentences else f'it ended with exit code {code}'}; see {log}"


def table(found: Sequence[Row]) -> str:
    """For people."""
    width = max(len("layout"), *(len(row.layout) for row in found))
    lines = [f"{'layout':{width}}  ranks  {'loss differs by':>16}  {'gradient norm by':>16}  same as one process"]
    for row in found:
        if row.loss is None or row.grad_norm is None:
            lines.append(f"{row.layout:{width}}  {row.world_size:5}  {'-':>16}  {'-':>16}  cannot tell: {row.problem}")
            continue
        verdict = "yes" if row.same else "NO"
        lines.append(f"{row.layout:{width}}  {row.world_size:5}  {row.loss:16.1e}  {row.grad_norm:16.1e}  {verdict}")
    return "\n".join(lines)


def exit_code(found: Sequence[Row]) -> int:
    """0: all are the same, 1: one is not, 2: one could not be told."""
    if any(row.same is False for row in found):
        return 1
    return 2 if any(row.same is None for row in found) else 0
