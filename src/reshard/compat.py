"""What did torchtitan call it? The early-2025 spellings that a config may still use. Imports nothing.

Four tables: other names for our keys, other spellings of their values, keys that are accepted without effect, keys that
are refused with a reason.
Source: torchtitan's config_manager.py and train_configs/, December 2024 to June 2025, and the specification.
"""

from __future__ import annotations

from typing import Any

from reshard.errors import ConfigError

# other name -> our name. Both given with different values is an error.
ALIASES: dict[str, str] = {
    "training.data_parallel_degree": "parallelism.data_parallel_shard_degree",
    "training.data_parallel_replicate_degree": "parallelism.data_parallel_replicate_degree",
    "training.data_parallel_shard_degree": "parallelism.data_parallel_shard_degree",
    "training.tensor_parallel_degree": "parallelism.tensor_parallel_degree",
    "training.disable_loss_parallel": "parallelism.disable_loss_parallel",
    "training.fsdp_reshard_after_forward": "parallelism.fsdp_reshard_after_forward",
    "experimental.enable_async_tensor_parallel": "parallelism.enable_async_tensor_parallel",
    "experimental.pipeline_parallel_degree": "parallelism.pipeline_parallel_degree",
    "experimental.pipeline_parallel_schedule": "parallelism.pipeline_parallel_schedule",
    "experimental.pipeline_parallel_split_points": "parallelism.pipeline_parallel_split_points",
    "experimental.pipeline_parallel_microbatches": "parallelism.pipeline_parallel_microbatches",
    "experimental.context_parallel_degree": "parallelism.context_parallel_degree",
    "training.local_batch_size": "training.batch_size",
    "training.seed": "training.rng_seed",
    "lr_scheduler.warmup_steps": "training.warmup_steps",
    "scheduler.warmup_steps": "training.warmup_steps",
    "scheduler.decay_type": "lr_scheduler.decay_type",
    "scheduler.decay_ratio": "lr_scheduler.decay_ratio",
    "scheduler.lr_min": "lr_scheduler.lr_min",
    "checkpoint.enable": "checkpoint.enable_checkpoint",
    "checkpoint.last_save_model_only": "checkpoint.model_weights_only",
    "checkpoint.last_save_model_weights_only": "checkpoint.model_weights_only",
}

# our name -> {other spelling of a value: ours}
VALUES: dict[str, dict[str, str]] = {
    "parallelism.pipeline_parallel_schedule": {
        "1f1b": "1F1B",
        "gpipe": "GPipe",
        "interleaved_1f1b": "Interleaved1F1B",
    },
}

_ANY = object()

# key -> (values that change nothing here, why another value is refused); _ANY accepts everything.
_WITHOUT_EFFECT: dict[str, tuple[Any, str]] = {
    "job.use_for_integration_test": (_ANY, ""),
    "metrics.enable_color_printing": (_ANY, ""),
    "metrics.rank_0_only": (_ANY, ""),
    "metrics.save_for_all_ranks": ((False,), "metrics are global here, every rank would write the same"),
    "metrics.enable_wandb": ((False,), "W&B is not a dependency; `wandb sync` reads the TensorBoard folder"),
    "model.norm_type": (
        ("rmsnorm", "fused_rmsnorm", "compiled_rmsnorm"),
        "Llama 3 is defined with RMSNorm, other norms would be another model",
    ),
    "model.print_after_conversion": (_ANY, ""),
    "model.converters": (([], ""), "float8 training is not supported"),
    "model.use_flex_attn": ((False,), "attention is torch's scaled_dot_product_attention"),
    "model.attn_mask_type": (("causal",), "attention is causal"),
    "optimizer.fused": (_ANY, ""),
    "optimizer.early_step_in_backward": ((False,), "it cannot clip by the global norm"),
    "training.enable_cpu_offload": ((False,), "CPU offload of parameters is not supported"),
    "training.enable_float8_linear": ((False,), "float8 training is not supported"),
    "training.enable_fsdp_float8_all_gather": ((False,), "float8 training is not supported"),
    "training.precompute_float8_dynamic_scale_for_fsdp": ((False,), "float8 training is not supported"),
    "training.enable_loss_parallel": ((True,), "the switch is parallelism.disable_loss_parallel"),
    "training.gc_debug": (_ANY, ""),
    "parallelism.enable_compiled_autograd": ((False,), "compiled autograd is not supported"),
    "experimental.enable_compiled_autograd": ((False,), "compiled autograd is not supported"),
    "experimental.context_parallel_rotate_method": (_ANY, ""),
    "experimental.custom_import": (("",), "a config runs no code of its own"),
    "experimental.custom_model_path": (("",), "a config runs no code of its own"),
    "experimental.custom_args_module": (("",), "a config runs no code of its own"),
    "parallelism.pipeline_parallel_schedule_csv": (_ANY, ""),
    "parallelism.pipeline_parallel_layers_per_stage": (_ANY, ""),
    "parallelism.pipeline_parallel_microbatch_size": (_ANY, ""),
    "parallelism.context_parallel_rotate_method": (_ANY, ""),
    "checkpoint.enable_first_step_checkpoint": ((False,), "use --checkpoint.interval 1 --training.stop_after 1"),
    "checkpoint.initial_load_model_only": (
        (True,),
        "initial_load_path brings weights only; to resume, use the folder itself",
    ),
    "checkpoint.initial_load_model_weights_only": (
        (True,),
        "initial_load_path brings weights only; to resume, use the folder itself",
    ),
    "profiling.enable_memory_snapshot": ((False,), "memory snapshots are not supported"),
    "profiling.save_memory_snapshot_folder": (_ANY, ""),
    "comm.trace_buf_size": (_ANY, ""),
    "memory_estimation.enabled": ((False,), "memory estimation is not part of training"),
    "memory_estimation.disable_fake_mode": (_ANY, ""),
    "float8.enable_float8_linear": ((False,), "float8 training is not supported"),
    "fault_tolerance.enable": ((False,), "torchft is not supported; a restart resumes from the newest checkpoint"),
}

# Sections of which every other key belongs to a feature that is switched off above.
_WITHOUT_EFFECT_SECTIONS = ("float8", "mx", "fault_tolerance")

SECTIONS = tuple(dict.fromkeys([*(key.partition(".")[0] for key in _WITHOUT_EFFECT), *_WITHOUT_EFFECT_SECTIONS]))


def foreign_key(section: str, key: str, value: Any) -> str | None:
    """Is this a key of torchtitan's that we do not have? Returns a warning, or None for a key of nobody.

    value: as read from TOML, or the text from a command line. Raises ConfigError where its value asks for
    something that reshard does not do.
    """
    name = f"{section}.{key}"
    if name not in _WITHOUT_EFFECT:
        if section in _WITHOUT_EFFECT_SECTIONS:
            return f"torchtitan's `{name}` has no effect here"
        return None
    harmless, reason = _WITHOUT_EFFECT[name]
    if harmless is not _ANY and not any(value == h or str(value).lower() == str(h).lower() for h in harmless):
        raise ConfigError(f"torchtitan's `{name} = {value}` is refused: {reason}", key=name)
    return f"torchtitan's `{name}` has no effect here"


def rows() -> list[tuple[str, str, str]]:
    """The table for people: (torchtitan's key, what happens, why)."""
    table = [(old, f"means {new}", "") for old, new in ALIASES.items()]
    table += [
        (f"{key} = {old!r}", f"means {new!r}", "") for key, old_new in VALUES.items() for old, new in old_new.items()
    ]
    for name, (harmless, reason) in _WITHOUT_EFFECT.items():
        accepted = "any value" if harmless is _ANY else " or ".join(repr(h) for h in harmless)
        table.append((name, f"accepted without effect: {accepted}", reason))
    return [
        *table,
        *((f"{section}.*", "accepted without effect: any value", "") for section in _WITHOUT_EFFECT_SECTIONS),
    ]
