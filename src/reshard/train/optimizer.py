"""How does a step change the weights? AdamW, its state by name, the learning rate, and clipping."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from reshard.config import Config, LRScheduler
from reshard.config import Optimizer as OptimizerConfig

GROUPS = ("decay", "no_decay")


def build_optimizer(
    parameters: Mapping[str, nn.Parameter], config: OptimizerConfig, *, tied: bool = False
) -> torch.optim.Optimizer:
    """AdamW (or Adam) over named parameters, in at most two groups: with and without weight decay.

    Its state is made at once, as torch makes it at the first step, so that a checkpoint has somewhere to go.
    """
    split: dict[str, list[nn.Parameter]] = {name: [] for name in GROUPS}
    for name, parameter in parameters.items():
        # In a pipeline a tied embedding has a copy named output.weight, which must be treated as the embedding is.
        embedding = name == "tok_embeddings.weight" or (tied and name == "output.weight")
        plain = config.decay_norms_and_embeddings or not (name.endswith("norm.weight") or embedding)
        split["decay" if plain else "no_decay"].append(parameter)
    groups = [
        {"params": members, "weight_decay": config.weight_decay if name == "decay" else 0.0, "name": name}
        for name, members in split.items()
        if members
    ]
    # On CPU, too: foreach's many small passes over memory take some six times as long (docs/log.md).
    implementation = "fused" if config.implementation == "auto" else config.implementation
    cls = torch.optim.AdamW if config.name == "AdamW" else torch.optim.Adam
    optimizer = cls(
        groups,
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=implementation == "fused",
        foreach=implementation == "foreach",
    )
    for parameter in parameters.values():
        optimizer.state[parameter] = {
            "step": torch.zeros(
                (), dtype=torch.float32, device=parameter.device if implementation == "fused" else "cpu"
            ),
            "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
            "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
        }
    return optimizer


def optimizer_moments(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """`state.<fqn>.exp_avg` and so on: the tensors themselves, to save from or load into."""
    return {
        f"state.{name}.{key}": value
        for name, parameter in parameters.items()
        for key, value in optimizer.state[parameter].items()
    }


def group_values(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """`groups.<name>.lr` and so on, once per group, as 0-d float64. For the record: a resume takes the config's."""
    values: dict[str, Tensor] = {}
    for group in optimizer.param_groups:
        numbers = {
            "lr": group["lr"],
            "beta1": group["betas"][0],
            "beta2": group["betas"][1],
            "eps": group["eps"],
            "weight_decay": group["weight_decay"],
        }
        values |= {f"groups.{group['name']}.{k}": torch.tensor(v, dtype=torch.float64) for k, v in numbers.items()}
    return values


def learning_rate(step: int, config: Config) -> float:
    """The learning rate of optimizer step `step` (the first is 1): a pure function, so nothing of it is saved.

    Linear warm-up to optimizer.lr over warmup_steps, then down to lr x lr_min at decay_steps, which defaults to
    training.steps; with decay_ratio the peak is held until the last such part of it.
    """
    return config.optimizer.lr * _factor(step, config.training.warmup_steps, config.training.steps, config.lr_scheduler)


def _factor(step: int, warmup: int, steps: int, schedule: LRScheduler) -> float:
    if step <= warmup:
        return step / max(1, warmup)
    end = schedule.decay_steps or steps
    start = warmup if schedule.decay_ratio is None else max(warmup, end - round(end * schedule.decay_ratio))
    if schedule.decay_type == "constant" or step <= start:
        return 1.0
    # One more than the last step, so that the last one still moves the weights.
    progress = min(1.0, (step - start) / max(1, end + 1 - start))
    shape = {
        "linear": 1.0 - progress,
        "cosine": 0.5 * (1.0 + math.cos(math.pi * progress)),
        "sqrt": 1.0 - math.sqrt(progress),
    }[schedule.decay_type]
    return schedule.lr_min + (1.0 - schedule.lr_min) * shape


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Use this learning rate in the coming step."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def clip_gradients(
    parameters: Mapping[str, nn.Parameter],
    max_norm: float,
    pipeline: dist.ProcessGroup | None = None,
    *,
    tied: bool = False,
) -> Tensor:
    """Scale gradients down to the true global norm over all ranks; returns that norm, 0-d. max_norm 0: only measure.

    Sharded gradients are DTensors: their norm knows of the other shards. pipeline: the ranks that hold the other layers.
    tied: `output.weight` is a copy of the embedding, whose gradient counts once.
    """
    having = {name: p for name, p in parameters.items() if p.grad is not None}
    counted = [p.grad for name, p in having.items() if p.grad is not None and not (tied and name == "output.weight")]
    norm = torch.nn.utils.get_total_norm(counted)
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    if pipeline is not None and pipeline.size() > 1:
        square = norm**2
        dist.all_reduce(square, group=pipeline)
        norm = square.sqrt()
    if max_norm > 0:
        torch.nn.utils.clip_grads_with_norm_(list(having.values()), max_norm, norm)
    return norm
