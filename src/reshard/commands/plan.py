"""Who would hold what, and does it fit? `reshard plan`: any number of ranks, none of them needed.

Weights, gradients, optimizer state and checkpoint sizes are counted shard by shard. Activations are counted by running
the shapes of one layer on torch's meta device and adding up what autograd keeps.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any, cast

import torch
from torch import Tensor

from reshard.checkpoint.archive import head, tail
from reshard.checkpoint.state import Box, dtype_from_name, row_cuts
from reshard.config import Config
from reshard.model.build import spec_of
from reshard.model.llama import Block, Llama, Part, cross_entropy_sum
from reshard.model.spec import LlamaSpec, parameter_count, parameter_shapes
from reshard.parallel.dims import Layout, check_fit, plan_batches, resolve_layout
from reshard.parallel.pipeline import split_layers, stage_count, stages_of_rank

# Which dim of a parameter tensor parallel splits; norms are whole on every rank. See parallel/shard.py.
_TP_DIM = {"tok_embeddings": 0, "output": 0, "wq": 0, "wk": 0, "wv": 0, "w1": 0, "w3": 0, "wo": 1, "w2": 1}


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one rank, the fullest of its pipeline position.

    gathered: weights that FSDP gathers whole for a while, and their whole gradients. activations: what autograd keeps for
    the micro-batches in flight, the loss included.
    """

    pipeline_rank: int
    layers: str
    parameters: int
    weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    gathered_bytes: int
    activations_bytes: int

    @property
    def total_bytes(self) -> int:
        """All of it at once: the peak of a step, allocator and buffers of the network apart."""
        return (
            self.weights_bytes
            + self.gradients_bytes
            + self.optimizer_bytes
            + self.gathered_bytes
            + self.activations_bytes
        )


def run(config: Config, world_size: int, device: str = "cpu") -> dict[str, Any]:
    """The plan as plain JSON values. Raises what `train` on this many ranks would: ConfigError, LayoutError.

    device: cuda or cpu, of the ranks planned for: on cuda, mixed_precision_param "auto" means bfloat16.
    """
    if device == "cuda" and config.training.mixed_precision_param == "auto":
        config = config.with_values(training={"mixed_precision_param": "bfloat16"})
    layout = resolve_layout(config, world_size)
    spec = spec_of(config)
    check_fit(layout, spec, config)
    asked = config.training.global_batch_size
    global_batch = asked if asked > 0 else config.training.batch_size * layout.dp
    batches = plan_batches(layout, config, global_batch)
    stages = stage_count(config.parallelism)
    layers = split_layers(spec, stages, config.parallelism.pipeline_parallel_split_points, config.training.seq_len)
    ranks = []
    for pp_rank in range(layout.pp):
        numbers = stages_of_rank(pp_rank, layout.pp, stages, config.parallelism.pipeline_parallel_schedule)
        parts = [Part(layers[n], embed=n == 0, head=n == stages - 1) for n in numbers]
        flight = _in_flight(config, pp_rank, layout.pp, batches.count)
        ranks.append(rank_memory(spec, layout, config, pp_rank, parts, batches.size, flight))
    shapes = parameter_shapes(spec)
    itemsize = dtype_from_name(config.training.dtype).itemsize
    export = dtype_from_name(config.checkpoint.export_dtype)
    full = sum(stored_bytes(s, dtype_from_name(config.training.dtype)) for s in shapes.values()) * 3
    exported = {**shapes, "output.weight": shapes["tok_embeddings.weight"]} if spec.tied else shapes
    fullest = max(ranks, key=lambda r: r.total_bytes)
    return {
        "model": config.model.flavor,
        "parameters": parameter_count(spec),
        "world_size": world_size,
        "layout": layout.to_dict(),
        "stages": [f"layers {r.start}-{r.stop - 1}" for r in layers],
        "global_batch": global_batch,
        "micro_batches": {"count": batches.count, "size": batches.size, "padded_rows": batches.rows - batches.share},
        "ranks": [{**r.__dict__, "total_bytes": r.total_bytes} for r in ranks],
        "fullest_rank_bytes": fullest.total_bytes,
        "checkpoint": {
            "full_bytes": full,
            "weights_only_bytes": sum(stored_bytes(s, export) for s in exported.values()),
            "bytes_per_rank": -(-3 * parameter_count(spec) * itemsize // world_size),
            "files": world_size,
        },
    }


def rank_memory(
    spec: LlamaSpec, layout: Layout, config: Config, pp_rank: int, parts: list[Part], size: int, flight: int
) -> RankMemory:
    """Count one rank's bytes. size: sequences of a micro-batch; flight: micro-batches kept at once."""
    own = dtype_from_name(config.training.dtype)
    asked = config.training.mixed_precision_param
    compute = torch.bfloat16 if own == torch.float32 and asked == "bfloat16" else own
    names = [name for part in parts for name in parameter_names(spec, part)]
    shapes = {name: tp_shape(name, _shape_of(name, spec), layout.tp) for name in names}
    fsdp = layout.dp_shard * layout.cp
    local = sum(fsdp_numbers(shape, fsdp) for shape in shapes.values())
    groups: Counter[str] = Counter()
    for name, shape in shapes.items():
        groups[".".join(name.split(".")[:2]) if name.startswith("layers.") else "root"] += prod(shape)
    sharded = fsdp > 1 or layout.dp_replicate > 1 or compute != own
    block = max((n for group, n in groups.items() if group != "root"), default=0)
    # The root group stays gathered from forward to backward; of the blocks, one computes while the next is gathered.
    kept = config.parallelism.fsdp_reshard_after_forward == "never" or layout.pp > 1
    gathered = sum(groups.values()) if kept else groups["root"] + 2 * block
    whole_gradients = groups["root"] + block if not kept else sum(groups.values())
    return RankMemory(
        pipeline_rank=pp_rank,
        layers=", ".join(f"{p.layers.start}-{p.layers.stop - 1}" for p in parts),
        parameters=local,
        weights_bytes=local * own.itemsize,
        gradients_bytes=local * own.itemsize,
        optimizer_bytes=2 * local * own.itemsize,
        gathered_bytes=(gathered + whole_gradients) * compute.itemsize if sharded else 0,
        activations_bytes=flight * sum(activation_bytes(spec, layout, config, part, size, compute) for part in parts),
    )


def parameter_names(spec: LlamaSpec, part: Part) -> list[str]:
    """Which parameters does a part hold? In a pipeline a tied embedding is at both ends."""
    names = ["tok_embeddings.weight"] if part.embed else []
    layers = [f"layers.{i}." for i in part.layers]
    names += [name for name in parameter_shapes(spec) if name.startswith(tuple(layers))]
    if part.head:
        names.append("norm.weight")
        if not (spec.tied and part.embed):
            names.append("output.weight")
    return names


def _shape_of(name: str, spec: LlamaSpec) -> tuple[int, ...]:
    return parameter_shapes(replace(spec, tied=False))[name]


def tp_shape(name: str, shape: tuple[int, ...], tp: int) -> tuple[int, ...]:
    """A parameter's shape on one tensor-parallel rank."""
    kind = name.split(".")[-2]
    if kind not in _TP_DIM:
        return shape
    dim = _TP_DIM[kind]
    return tuple(n // tp if i == dim else n for i, n in enumerate(shape))


def fsdp_numbers(shape: tuple[int, ...], ranks: int) -> int:
    """Numbers on the fullest of the ranks that share dim 0: rows are dealt in runs of equal length, rounded up."""
    return -(-shape[0] // ranks) * prod(shape[1:])


def _in_flight(config: Config, pp_rank: int, pp: int, count: int) -> int:
    """Micro-batches of which a pipeline rank keeps activations at once; per stage where it holds several."""
    if pp == 1:
        return 1
    schedule = config.parallelism.pipeline_parallel_schedule
    most = {"GPipe": count, "1F1B": pp - pp_rank, "ZBVZeroBubble": pp}.get(schedule, pp + pp - pp_rank)
    return min(count, most)


def activation_bytes(
    spec: LlamaSpec, layout: Layout, config: Config, part: Part, size: int, compute: torch.dtype
) -> int:
    """What autograd keeps of one micro-batch in one part of the model, on one rank, as activation checkpointing has it."""
    seq = config.training.seq_len // layout.cp
    tp = layout.tp
    local = replace(
        spec,
        n_heads=spec.n_heads // tp,
        n_kv_heads=spec.n_kv_heads // tp,
        ffn_dim=spec.ffn_dim // tp,
        vocab_size=spec.vocab_size // tp,
    )
    with torch.device("meta"):
        layer = Llama(local, Part(range(1), embed=False, head=False)).to(compute)
        ends = Llama(local, Part(range(0), embed=part.embed, head=part.head)).to(compute)
    dtype = torch.promote_types(compute, torch.float32)
    for model in (layer, ends):
        model.cos = torch.empty(seq, spec.head_dim // 2, dtype=dtype, device="meta")
        model.sin = torch.empty_like(model.cos)
    for block in layer.layers.values():
        cast(Block, block).attention.attend = _attention_shapes
    x = torch.empty(size, seq, spec.dim, dtype=compute, device="meta", requires_grad=True)
    entry = x.numel() * x.itemsize // tp  # a recomputed layer keeps its input alone, sequence-parallel
    whole = _kept(lambda: layer(x), layer)
    number, every = len(part.layers), _recomputed_every(config)
    recomputed = sum(1 for i in part.layers if every and (i + 1) % every == 0)
    # While a recomputed layer is in backward, its activations are there as well: one at a time.
    total = (number - recomputed) * whole + recomputed * entry + (whole if recomputed else 0)
    labels = torch.zeros(size, seq, dtype=torch.int64, device="meta")
    if part.head:
        start = labels if part.embed else x
        total += _kept(lambda: cross_entropy_sum(ends(start), labels), ends)
        total += size * seq * local.vocab_size * dtype.itemsize  # the loss's gradient by the logits
    return total


def _recomputed_every(config: Config) -> int:
    """Every how many layers is one recomputed as a whole? 0: none. (`op` keeps most; it is counted as none.)"""
    mode, option = config.activation_checkpoint.mode, config.activation_checkpoint.selective_ac_option
    if mode == "full":
        return 1
    return int(option) if mode == "selective" and option.isdigit() else 0


def _kept(forward: Any, model: Llama) -> int:
    """Bytes that autograd keeps of a forward, each storage once, parameters and tables not counted."""
    known = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, tuple[int, Tensor]] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            kept[storage._cdata] = (storage.nbytes(), tensor)  # the tensor is held, so that no id is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        forward()
    return sum(nbytes for nbytes, _ in kept.values())


class _AttentionShapes(torch.autograd.Function):
    """Keeps what a fused attention keeps: queries, keys, values, the output and one number per query and head."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        raise AssertionError("shapes only")


def _attention_shapes(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out: Tensor = _AttentionShapes.apply(q, k, v)  # type: ignore[no-untyped-call]
    return out


def stored_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Bytes of a tensor in a checkpoint, archives included, stored by one rank."""
    total = 0
    for cut in row_cuts(Box((0,) * len(shape), shape), dtype.itemsize):
        size = len(head(dtype, cut.sizes)) + cut.volume * dtype.itemsize + len(tail(dtype, cut.sizes, 0))
        total += -(-size // 64) * 64
    return total


def table(report: Mapping[str, Any]) -> list[str]:
    """The plan for people."""
    gib = 2**30
    layout = ".".join(f"{axis}{n}" for axis, n in report["layout"].items() if n > 1) or "1 rank"
    micro, checkpoint = report["micro_batches"], report["checkpoint"]
    lines = [
        f"{report['model']}: {report['parameters']:,} parameters on {report['world_size']} rank(s), {layout}",
        f"global batch {report['global_batch']} sequences: {micro['count']} micro-batch(es) of {micro['size']} on each rank"
        + (f", {micro['padded_rows']} row(s) padded" if micro["padded_rows"] else ""),
        "",
        f"{'pipeline rank':14}{'layers':>14}{'parameters':>16}"
        + "".join(f"{title:>9}" for title in ("weights", "grads", "optim", "gathered", "activ.", "GiB")),
    ]
    for r in report["ranks"]:
        columns = (
            "weights_bytes",
            "gradients_bytes",
            "optimizer_bytes",
            "gathered_bytes",
            "activations_bytes",
            "total_bytes",
        )
        numbers = "".join(f"{r[key] / gib:9.2f}" for key in columns)
        lines.append(f"{r['pipeline_rank']:<14}{r['layers']:>14}{r['parameters']:>16,}{numbers}")
    lines += [
        "",
        f"checkpoint: {checkpoint['full_bytes'] / 1e9:,.2f} GB full, "
        f"{checkpoint['weights_only_bytes'] / 1e9:,.2f} GB weights only, "
        f"{checkpoint['bytes_per_rank'] / 1e9:,.3f} GB and one file per rank",
    ]
    return lines
