"""Which part of the model does a rank hold? Tensor parallel, then FSDP2 or HSDP, applied to a meta-device Llama.

The order is fixed: recompute is inside the blocks, TP replaces the parameters, compile wraps the blocks' code,
FSDP2 shards what TP left. Names never change on the way.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from reshard.config import ActivationCheckpoint, Config
from reshard.errors import ConfigError, LayoutError
from reshard.model.llama import Block, Llama
from reshard.parallel.dims import Layout


def shard_model(model: Llama, mesh: DeviceMesh | None, layout: Layout, config: Config, compute: torch.dtype) -> None:
    """Give this rank its part of the model, in place. Parameters stay on the meta device.

    mesh: None where there is one rank and no mixed precision; then only recompute and compile apply.
    compute: dtype of forward and backward; where it is not the parameters' own, FSDP casts.
    """
    set_recompute(model, config.activation_checkpoint)
    if mesh is not None and layout.tp > 1:
        apply_tensor_parallel(model, mesh["tp"], loss_parallel=not config.parallelism.disable_loss_parallel)
        if config.parallelism.enable_async_tensor_parallel:
            overlap_tensor_parallel(mesh["tp"])
    if config.training.compile:
        for block in model.layers.values():
            block.compile()
    parameter_dtype = next(model.parameters()).dtype
    if mesh is not None and (layout.dp * layout.cp > 1 or compute != parameter_dtype):
        apply_fsdp(model, mesh, layout, config, compute if compute != parameter_dtype else None)


def set_recompute(model: Llama, option: ActivationCheckpoint) -> None:
    """Activation checkpointing by block: none, every n-th block whole, or all but the expensive operations."""
    if option.mode == "none":
        return
    if option.mode == "full":
        chosen: dict[str, Any] = {}
        every = 1
    elif option.selective_ac_option == "op":
        chosen, every = {"context_fn": _keep_expensive_operations}, 1
    elif option.selective_ac_option.isdigit() and int(option.selective_ac_option) > 0:
        chosen, every = {}, int(option.selective_ac_option)
    else:
        raise ConfigError(
            f"activation_checkpoint.selective_ac_option is `{option.selective_ac_option}`, "
            "expected `op` or a positive whole number",
            key="activation_checkpoint.selective_ac_option",
        )
    for number, block in model.layers.items():
        if (int(number) + 1) % every == 0:
            # Nothing in a Llama draws random numbers, so there is no RNG state to stash and restore.
            cast(Block, block).recompute = {"preserve_rng_state": False, **chosen}


def _keep_expensive_operations() -> Any:
    aten = torch.ops.aten
    kept = {
        aten.mm.default,
        aten._scaled_dot_product_flash_attention_for_cpu.default,
        aten._scaled_dot_product_flash_attention.default,
        aten._scaled_dot_product_efficient_attention.default,
        aten._scaled_dot_product_cudnn_attention.default,
        torch.ops._c10d_functional.reduce_scatter_tensor.default,
    }

    def policy(_context: Any, operation: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if operation in kept else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)  # type: ignore[no-untyped-call]


def apply_tensor_parallel(model: Llama, mesh: DeviceMesh, *, loss_parallel: bool) -> None:
    """Split heads, feed-forward and vocabulary over the `tp` axis; between them the sequence is split.

    With loss_parallel the logits stay split over the vocabulary and the loss is computed inside torch's
    loss_parallel(). Every parameter becomes a DTensor, norms included, so that clipping and AdamW see one kind.
    """
    plan: dict[str, ParallelStyle] = {}
    if model.part.embed:
        plan["tok_embeddings"] = RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1))
    if model.part.head:
        plan["norm"] = SequenceParallel()
        if model.shares_embedding:
            # The embedding's rows are split already (Shard(0)); the product is split over the vocabulary by itself.
            plan["output"] = PrepareModuleInput(
                input_layouts=(Shard(1), None), desired_input_layouts=(Replicate(), None), use_local_output=False
            )
        else:
            plan["output"] = ColwiseParallel(
                input_layouts=Shard(1),
                output_layouts=Shard(-1) if loss_parallel else Replicate(),
                use_local_output=not loss_parallel,
            )
    parallelize_module(model, mesh, plan)
    if model.part.embed:
        # It comes as a tensor that is still on its way, which a compiled block takes in without its gradient's way back
        # (torch 2.13.0). Any operation waits for it.
        model.tok_embeddings.register_forward_hook(lambda _m, _i, out: out.clone())
    if model.part.head and model.shares_embedding and not loss_parallel:
        model.output.register_forward_hook(lambda _m, _i, out: out.full_tensor())
    block_plan: dict[str, ParallelStyle] = {
        "attention_norm": SequenceParallel(),
        "attention": PrepareModuleInput(
            input_layouts=(Shard(1), None, None), desired_input_layouts=(Replicate(), None, None)
        ),
        "attention.wq": ColwiseParallel(),
        "attention.wk": ColwiseParallel(),
        "attention.wv": ColwiseParallel(),
        "attention.wo": RowwiseParallel(output_layouts=Shard(1)),
        "ffn_norm": SequenceParallel(),
        "feed_forward": PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),)),
        "feed_forward.w1": ColwiseParallel(),
        "feed_forward.w2": RowwiseParallel(output_layouts=Shard(1)),
        "feed_forward.w3": ColwiseParallel(),
    }
    for block in model.layers.values():
        parallelize_module(block, mesh, block_plan)


def apply_fsdp(model: Llama, mesh: DeviceMesh, layout: Layout, config: Config, cast_to: torch.dtype | None) -> None:
    """Shard parameters, gradients and optimizer state over dp_shard; replicate over dp_replicate (HSDP).

    Gradients are summed, not averaged: each micro-batch's loss is already divided by the global batch's tokens.
    """
    dp_mesh = mesh["dp_replicate", "fsdp"] if layout.dp_replicate > 1 else mesh["fsdp"]
    policy = MixedPrecisionPolicy(
        param_dtype=cast_to,
        reduce_dtype=torch.float32 if cast_to is not None else None,
        cast_forward_inputs=False,  # it would also round the float32 RoPE tables; the embedding casts by itself
    )
    # A pipeline runs many forwards before the first backward: gathering again for each would cost more than it saves.
    wish = config.parallelism.fsdp_reshard_after_forward
    reshard = wish == "always" or (wish == "default" and layout.pp == 1)
    for block in model.layers.values():
        fully_shard(block, mesh=dp_mesh, mp_policy=policy, reshard_after_forward=reshard)
    # The root keeps the embedding and the output gathered from forward to backward: it needs them again at once.
    fully_shard(model, mesh=dp_mesh, mp_policy=policy, reshard_after_forward=False)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            # Plain sums work on every backend; a factor other than the group's size would need NCCL's PREMUL_SUM.
            module.set_force_sum_reduction_for_comms(True)


def set_gradient_sync(model: nn.Module, on: bool) -> None:
    """Reduce gradients in the coming backward, or only add them up (all micro-steps but the last)."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(on)


def overlap_tensor_parallel(mesh: DeviceMesh) -> None:
    """Let the compiler overlap tensor-parallel communication with its products. (Not yet run on a GPU.)

    Raises LayoutError where the device has no symmetric memory, which it works with.
    """
    if mesh.device_type != "cuda":
        raise LayoutError(
            f"parallelism.enable_async_tensor_parallel works on CUDA only, this is {mesh.device_type}",
            hint="leave it out: the result is the same",
        )
    # Private names, there is no public switch; torch 2.13.0.
    from torch._inductor import config as inductor
    from torch.distributed._symmetric_memory import enable_symm_mem_for_group

    inductor._micro_pipeline_tp = True
    enable_symm_mem_for_group(mesh.get_group().group_name)
