"""How many ranks along which axis? The layout: five degrees, their product the world size. Imports no torch at the top.

Axes from the slowest network to the fastest: pp, dp_replicate, dp_shard, cp, tp.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from reshard.config import Config
from reshard.errors import LayoutError
from reshard.model.spec import LlamaSpec
from reshard.parallel.pipeline import split_layers, stage_count

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

# The axes of the device mesh. Ranks that share a sequence hold the same weights and see different tokens, so to FSDP they
# are data-parallel ranks: dp_shard and cp are one axis of it.
AXES = ("pp", "dp_replicate", "fsdp", "tp")


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

    def axis_sizes(self) -> tuple[int, ...]:
        """Extents of AXES."""
        return (self.pp, self.dp_replicate, self.dp_shard * self.cp, self.tp)

    def place_of(self, rank: int) -> dict[str, int]:
        """Where a rank stands along the five degrees. tp counts fastest, pp slowest."""
        place = {}
        for name in ("tp", "cp", "dp_shard", "dp_replicate", "pp"):
            rank, place[name] = divmod(rank, getattr(self, name))
        return place

    def dp_rank(self, rank: int) -> int:
        """Which share of the batch is this rank's?"""
        place = self.place_of(rank)
        return place["dp_replicate"] * self.dp_shard + place["dp_shard"]

    def cp_groups(self) -> list[list[int]]:
        """The ranks that share a sequence, for every sequence."""
        groups: dict[tuple[int, ...], list[int]] = {}
        for rank in range(self.world_size):
            place = self.place_of(rank)
            key = tuple(place[name] for name in ("pp", "dp_replicate", "dp_shard", "tp"))
            groups.setdefault(key, []).append(rank)
        return list(groups.values())

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
    if p.enable_async_tensor_parallel and not config.training.compile:
        raise LayoutError(
            "parallelism.enable_async_tensor_parallel needs training.compile: the compiler splits the products",
            hint="add --training.compile, or leave it out",
        )
    return Layout(
        dp_replicate=p.data_parallel_replicate_degree,
        dp_shard=shard,
        cp=p.context_parallel_degree,
        tp=p.tensor_parallel_degree,
        pp=p.pipeline_parallel_degree,
    )


def check_fit(layout: Layout, spec: LlamaSpec, config: Config) -> None:
    """Do model and sequence divide among the ranks, and go the options together? Raises LayoutError with the numbers."""
    seq_len = config.training.seq_len
    if layout.cp > 1 and seq_len % (2 * layout.cp):
        raise LayoutError(
            f"a sequence of {seq_len} tokens does not divide into the {2 * layout.cp} pieces of "
            f"context_parallel_degree {layout.cp}",
            hint=f"--training.seq_len {max(1, seq_len // (2 * layout.cp)) * 2 * layout.cp}",
        )
    for what, number in (
        ("query heads", spec.n_heads),
        ("KV heads", spec.n_kv_heads),
        ("rows of the feed-forward", spec.ffn_dim),
        ("rows of the vocabulary", spec.vocab_size),
        ("tokens of a rank's sequence", seq_len // layout.cp),
    ):
        if number % layout.tp:
            raise LayoutError(
                f"{number} {what} do not divide among tensor_parallel_degree {layout.tp}",
                hint="choose a degree that divides them",
            )
    recompute = config.activation_checkpoint
    whole = recompute.mode == "full" or (recompute.mode == "selective" and recompute.selective_ac_option != "op")
    if layout.tp > 1 and config.training.compile and whole:  # torch 2.13.0: an assertion of its compiler
        raise LayoutError(
            "blocks that tensor parallel splits cannot be compiled and recomputed whole, but training.compile is true "
            f"and activation_checkpoint.mode is `{recompute.mode}`",
            hint="--activation_checkpoint.mode none, or --activation_checkpoint.selective_ac_option op",
        )
    if layout.pp > 1:
        split_layers(spec, stage_count(config.parallelism), config.parallelism.pipeline_parallel_split_points, seq_len)
        _check_schedule(layout, config)


def _check_schedule(layout: Layout, config: Config) -> None:
    """Can this schedule run what the config asks for? Raises LayoutError."""
    p, recompute = config.parallelism, config.activation_checkpoint
    fewest = p.pipeline_parallel_microbatches
    if p.pipeline_parallel_schedule == "1F1B" and fewest is not None and fewest < layout.pp:
        raise LayoutError(
            f"parallelism.pipeline_parallel_microbatches is {fewest}, but 1F1B needs at least one for each of the "
            f"{layout.pp} stages",
            hint=f"--parallelism.pipeline_parallel_microbatches {layout.pp}, or leave it out",
        )
    if p.pipeline_parallel_schedule != "ZBVZeroBubble":
        return
    # It goes backward twice through each block, first for the inputs and later for the weights.
    if config.training.compile:
        raise LayoutError(
            "ZBVZeroBubble cannot run compiled blocks, and training.compile is true",
            hint="--training.compile false, or another parallelism.pipeline_parallel_schedule",
        )
    if p.fsdp_reshard_after_forward == "always":  # torch 2.13.0 then loses gradients, without an error
        raise LayoutError(
            "ZBVZeroBubble cannot free the gathered weights after forward, and parallelism.fsdp_reshard_after_forward "
            "is `always`",
            hint="--parallelism.fsdp_reshard_after_forward default, or another parallelism.pipeline_parallel_schedule",
        )
    if recompute.mode == "selective" and recompute.selective_ac_option == "op":
        raise LayoutError(
            "ZBVZeroBubble cannot recompute by operation, and activation_checkpoint.selective_ac_option is `op`",
            hint="--activation_checkpoint.selective_ac_option 2, or another parallelism.pipeline_parallel_schedule",
        )


@dataclass(frozen=True)
class Batches:
    """How a data-parallel rank runs its share of the global batch: equally many equal micro-batches on every rank.

    share: sequences of the global batch that are a rank's own, at most. Rows beyond it, or beyond the global batch, are
    padding with labels that do not count, so any number of ranks computes the exact mean over the global batch's tokens.
    """

    share: int
    count: int
    size: int

    @property
    def rows(self) -> int:
        """Sequences that a rank computes per step, padding included."""
        return self.count * self.size


def plan_batches(layout: Layout, config: Config, global_batch_size: int) -> Batches:
    """Micro-batches of at most training.batch_size sequences, as many as the pipeline needs.

    global_batch_size: sequences per optimizer step, already resolved (never -1). Raises LayoutError where it is 0.
    """
    if global_batch_size < 1:
        raise LayoutError(f"the global batch has {global_batch_size} sequences, expected at least 1")
    share = -(-global_batch_size // layout.dp)
    size = min(config.training.batch_size, share)
    count = -(-share // size)
    if layout.pp > 1:
        p = config.parallelism
        count = p.pipeline_parallel_microbatches or max(count, stage_count(p))
        if p.pipeline_parallel_schedule == "Interleaved1F1B":
            count = -(-count // layout.pp) * layout.pp  # it runs them in rounds of pp
        size = -(-share // count)
    return Batches(share, count, size)


def build_mesh(layout: Layout, device_type: str) -> DeviceMesh:
    """The device mesh with all axes, also those of degree 1. Needs an initialised process group."""
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh(device_type, layout.axis_sizes(), mesh_dim_names=AXES)
