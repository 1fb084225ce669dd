"""What do Hugging Face's config.json and generation_config.json say of a Llama? Both ways, keys old and new.

transformers 5 writes `rope_parameters` and `dtype`; every reader (transformers 4 and 5, vLLM, llama.cpp's converter)
understands the older `rope_theta`, `rope_scaling` and `torch_dtype`, so those are written.
Sources: transformers' configuration_llama.py and convert_llama_weights_to_hf.py; config.json of the released models.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from reshard.errors import ConfigError, FormatError, LayoutError, listed
from reshard.model.spec import LlamaSpec, RopeScaling

CONFIG, GENERATION = "config.json", "generation_config.json"
LLAMA3_VOCAB = 128256
_PLAIN: dict[str, tuple[Any, ...]] = {  # what would change the arithmetic, and the values that do not
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "quantization_config": (),
}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises FormatError."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FormatError(f"{path} cannot be read: {error.strerror or error}", path=path) from None
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path} is not JSON: {error}", path=path) from None
    if not isinstance(content, dict):
        raise FormatError(f"{path} holds a {type(content).__name__}, expected a JSON object", path=path)
    return content


def spec_from_config(config: Mapping[str, Any], path: Path) -> LlamaSpec:
    """The model of a config.json. Raises FormatError for one that is no plain Llama, or does not say enough."""
    kind = config.get("model_type")
    if kind != "llama":
        raise FormatError(f"{path} is of model_type {kind!r}, expected 'llama'", path=path)
    for key, plain in _PLAIN.items():
        if key in config and config[key] is not None and config[key] not in plain:
            hint = "quantised weights cannot be kept, use the bf16 release" if key == "quantization_config" else None
            raise FormatError(
                f"{path}: {key} is {str(config[key])[:60]}, which no plain Llama has", path=path, hint=hint
            )
    sizes = {
        "dim": "hidden_size", "n_layers": "num_hidden_layers", "n_heads": "num_attention_heads",
        "ffn_dim": "intermediate_size", "vocab_size": "vocab_size",
    }  # fmt: skip
    missing = [theirs for theirs in sizes.values() if config.get(theirs) is None]
    if missing:
        raise FormatError(f"{path} does not say {listed(missing)}", path=path)
    values: dict[str, Any] = {ours: config[theirs] for ours, theirs in sizes.items()}
    values["n_kv_heads"] = config.get("num_key_value_heads") or values["n_heads"]
    values["head_dim"] = config.get("head_dim") or 0
    for name, value in values.items():
        if not (type(value) is int and (0 < value < 2**31 or (name == "head_dim" and value == 0))):
            raise FormatError(
                f"{path}: {sizes.get(name, name)} is {value!r}, expected a positive whole number", path=path
            )
    theta, scaling = _rope(config, path)
    epsilon = config.get("rms_norm_eps", 1e-6)
    for key, number in (("rope_theta", theta), ("rms_norm_eps", epsilon)):
        if not (type(number) in (int, float) and 0 < number < float("inf")):
            raise FormatError(f"{path}: {key} is {number!r}, expected a positive number", path=path)
    try:
        return LlamaSpec(
            **values, rope_theta=float(theta), norm_eps=float(epsilon), rope_scaling=scaling,
            tied=bool(config.get("tie_word_embeddings", False)),
        )  # fmt: skip
    except LayoutError as error:
        raise FormatError(f"{path}: {error.message}", path=path) from None


def _rope(config: Mapping[str, Any], path: Path) -> tuple[Any, RopeScaling | None]:
    new, old = config.get("rope_parameters"), config.get("rope_scaling")
    said = new if new is not None else old
    if said is not None and not isinstance(said, dict):
        raise FormatError(f"{path}: its RoPE is {str(said)[:60]!r}, expected an object", path=path)
    said = said or {}
    theta = config.get("rope_theta", said.get("rope_theta", 10000.0))
    kind = said.get("rope_type", said.get("type", "default"))
    if kind in (None, "default"):
        return theta, None
    if kind != "llama3":
        raise FormatError(f"{path}: RoPE is scaled by {kind!r}, expected 'llama3' or none", path=path)
    keys = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    for key in keys:
        if not (type(said.get(key)) in (int, float) and 0 < said[key] < float("inf")):
            raise FormatError(f"{path}: RoPE's {key} is {said.get(key)!r}, expected a positive number", path=path)
    factor, low, high, original = (said[key] for key in keys)
    return theta, RopeScaling(float(factor), float(low), float(high), int(original))


def context_length(spec: LlamaSpec, about: Mapping[str, Any]) -> int:
    """How many positions is the model meant for? What the source says, else as the releases of its kind."""
    if type(about.get("context_length")) is int:
        return int(about["context_length"])
    if spec.rope_scaling is not None:
        return 131072
    return 8192 if spec.rope_theta >= 500000.0 else 4096


def token_ids(spec: LlamaSpec, about: Mapping[str, Any]) -> dict[str, Any]:
    """bos_token_id and eos_token_id, where they are known; those of Llama 3 for a vocabulary of its size."""
    known = {key: about.get(key) for key in ("bos_token_id", "eos_token_id")}
    if spec.vocab_size == LLAMA3_VOCAB and about.get("eos_token_id") is None:
        known = {"bos_token_id": 128000, "eos_token_id": 128001}
    return known


def config_of(spec: LlamaSpec, dtype: str, about: Mapping[str, Any]) -> dict[str, Any]:
    """config.json for a model; dtype as torch names it."""
    scaling = None
    if spec.rope_scaling is not None:
        scaling = {
            "rope_type": "llama3",
            "factor": spec.rope_scaling.factor,
            "low_freq_factor": spec.rope_scaling.low_freq_factor,
            "high_freq_factor": spec.rope_scaling.high_freq_factor,
            "original_max_position_embeddings": spec.rope_scaling.original_context,
        }
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        **token_ids(spec, about),
        "head_dim": spec.head_dim,
        "hidden_act": "silu",
        "hidden_size": spec.dim,
        "initializer_range": 0.02,
        "intermediate_size": spec.ffn_dim,
        "max_position_embeddings": context_length(spec, about),
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": spec.n_heads,
        "num_hidden_layers": spec.n_layers,
        "num_key_value_heads": spec.n_kv_heads,
        "pretraining_tp": 1,
        "rms_norm_eps": spec.norm_eps,
        "rope_scaling": scaling,
        "rope_theta": spec.rope_theta,
        "tie_word_embeddings": spec.tied,
        "torch_dtype": dtype,
        "use_cache": True,
        "vocab_size": spec.vocab_size,
    }


def generation_config_of(spec: LlamaSpec, about: Mapping[str, Any]) -> dict[str, Any]:
    """generation_config.json: where to stop, and for Llama 3 how to sample as its releases do."""
    ids = token_ids(spec, about)
    if spec.vocab_size != LLAMA3_VOCAB:
        return ids
    if about.get("eos_token_id") in (None, 128001):  # base and instruct models end differently: either may be meant
        ids["eos_token_id"] = [128001, 128008, 128009] if spec.rope_scaling else [128001, 128009]
    return {**ids, "do_sample": True, "temperature": 0.6, "top_p": 0.9}


def as_json(content: Mapping[str, Any]) -> bytes:
    """A small file's content, for people to read."""
    return (json.dumps(content, indent=2) + "\n").encode()


def parse_size(text: str) -> int:
    """ "5GB" -> 5,000,000,000; "512MiB" -> 536,870,912; a bare number is bytes. Raises ConfigError."""
    units = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
    units |= {"KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}
    number = text.strip().rstrip("BKMGTIbkmgti ")
    unit = text.strip()[len(number) :].strip().upper()
    try:
        size = int(float(number) * units[unit])
    except (ValueError, KeyError, OverflowError):
        raise ConfigError(f"`{text}` is not a size, expected e.g. 512MiB or 5GB") from None
    if size <= 0:
        raise ConfigError(f"`{text}` is not a size: it must be above zero")
    return size
