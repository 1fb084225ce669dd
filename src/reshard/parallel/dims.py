"""How many ranks along which axis? The layout: five degrees, their product the world size. Imports no torch at the top.

Axes from the slowest network to the fastest: pp, dp_replicate, dp_shard, cp, tp.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from reshard.config import Config
from reshard.errors import LayoutError
from reshard.model.spec import LlamaSpec

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")


@dataclass(frozen=True)
class Layout:
    """The five degrees of a run."""

    dp_replicate: int = 1
    dp_shard: int = 1
    cp: int = 1
    tp: int = 1
    pp: int = 1

    @property
    def world_size(self) -> int:
        """Ranks in all."""
        return self.dp_replicate * self.dp_shard * self.cp * self.tp * self.pp

    @property
    def dp(self) -> int:
        """Ranks that read different sequences."""
        return self.dp_replicate * self.dp_shard

    def to_dict(self) -> dict[str, int]:
        """The degrees by name, for manifest and events."""
        return asdict(self)

    def __str__(self) -> str:
        names = {"dp_replicate": "rep", "dp_shard": "fsdp", "cp": "cp", "tp": "tp", "pp": "pp"}
        parts = [f"{names[axis]}{degree}" for axis, degree in asdict(self).items() if degree > 1]
        return ".".join(parts) or "1 rank"


def resolve_layout(config: Config, world_size: int) -> Layout:
    """The layout that the config asks for on this many ranks. Raises LayoutError with every factor."""
    p = config.parallelism
    shard = p.data_parallel_shard_degree
    if shard == 0:
        raise LayoutError("parallelism.data_parallel_shard_degree is 0, expected -1 (the rest) or at least 1")
    others = (
        p.data_parallel_replicate_degree
        * p.context_parallel_degree
        * p.tensor_parallel_degree
        * p.pipeline_parallel_degree
    )
    factors = (
        f"dp_replicate {p.data_parallel_replicate_degree} x dp_shard {shard} x cp {p.context_parallel_degree} x "
        f"tp {p.tensor_parallel_degree} x pp {p.pipeline_parallel_degree}"
    )
    if shard == -1:
        if world_size % others:
            raise LayoutError(
                f"{world_size} ranks do not divide by the fixed degrees ({factors}): {world_size} / {others}",
                hint=f"start {max(1, world_size // others) * others} ranks, or lower a degree",
            )
        shard = world_size // others
    if shard * others != world_size:
        raise LayoutError(
            f"the degrees multiply to {shard * others}, but {world_size} rank(s) were started ({factors})",
            hint=f"start {shard * others} ranks, or give `--parallelism.data_parallel_shard_degree -1`",
        )
    for name, degree in (("pipeline", p.pipeline_parallel_degree), ("context", p.context_parallel_degree)):
        if degree > 1:
            raise LayoutError(
                f"parallelism.{name}_parallel_degree is {degree}: {name} parallel is not yet available, expected 1"
            )
    if p.enable_async_tensor_parallel:
        raise LayoutError("parallelism.enable_async_tensor_parallel is not yet available, expected false")
    return Layout(
        dp_replicate=p.data_parallel_replicate_degree,
        dp_shard=shard,
        cp=p.context_parallel_degree,
        tp=p.tensor_parallel_degree,
        pp=p.pipeline_parallel_degree,
    )


def check_fit(layout: Layout, spec: LlamaSpec, config: Config) -> None:
    """Do model and sequence divide among the ranks? Raises LayoutError with the numbers."""
    for what, number in (
        ("query heads", spec.n_heads),
        ("KV heads", spec.n_kv_heads),
        ("rows of the feed-forward", spec.ffn_dim),
        ("rows of the vocabulary", spec.vocab_size),
        ("tokens of a sequence", config.training.seq_len),
    ):
        if number % layout.tp:
            raise LayoutError(
                f"{number} {what} do not divide among tensor_parallel_degree {layout.tp}",
                hint="choose a degree that divides them",
            )


def check_batch(layout: Layout, config: Config, global_batch_size: int) -> int:
    """How many micro-steps per optimizer step? Raises LayoutError where the global batch does not divide.

    global_batch_size: sequences per optimizer step, already resolved (never -1).
    """
    per_micro_step = config.training.batch_size * layout.dp
    if global_batch_size % per_micro_step or global_batch_size == 0:
        raise LayoutError(
            f"a global batch of {global_batch_size} sequences does not divide into micro-steps of "
            f"{layout.dp} data-parallel rank(s) x batch_size {config.training.batch_size}",
            hint=_batch_hint(layout, global_batch_size),
        )
    return global_batch_size // per_micro_step


def _batch_hint(layout: Layout, global_batch_size: int) -> str:
    if global_batch_size % layout.dp:
        return f"the {layout.dp} data-parallel ranks must divide {global_batch_size}; start another number of ranks"
    share = global_batch_size // layout.dp
    fitting = [n for n in range(1, share + 1) if share % n == 0]
    return f"each rank has {share} sequences a step: --training.batch_size {' or '.join(map(str, fitting[-3:]))}"


def build_mesh(layout: Layout, device_type: str) -> DeviceMesh:
    """The device mesh with all five axes, also those of degree 1. Needs an initialised process group."""
    from torch.distributed.device_mesh import init_device_mesh

    degrees = layout.to_dict()
    return init_device_mesh(device_type, tuple(degrees[axis] for axis in AXES), mesh_dim_names=AXES)
