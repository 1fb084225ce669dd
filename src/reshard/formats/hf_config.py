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
from reshard.model.spec import LlamaSpec, RopeScaling, release_context

CONFIG, GENERATION = "config.json", "generation_config.json"
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
LLAMA3_VOCAB = 128256
_PLAIN: dict[str, tuple[Any, ...]] = {  # what would change the arithmetic, and the values that do not (nor does null)
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "quantization_config": (),
    "partial_rotary_factor": (1,),
    "sliding_window": (0,),
    "attn_logit_softcapping": (0,),
    "final_logit_softcapping": (0,),
    "attention_multiplier": (),
    "clip_qkv": (),
    "embedding_multiplier": (1,),
    "logit_scale": (1,),
    "logits_scaling": (1,),
    "residual_multiplier": (1,),
    "num_experts": (0,),
    "num_local_experts": (0, 1),
    "qk_layernorm": (False,),
    "qk_norm": (False,),
    "use_qk_norm": (False,),
    "is_causal": (True,),
}
_ROPE_PLAIN: dict[str, tuple[Any, ...]] = {  # the same, inside of rope_scaling and rope_parameters
    "partial_rotary_factor": (1,),
    "attention_factor": (1,),
    "mscale": (1,),
    "mscale_all_dim": (1,),
}
_ROPE_NUMBERS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


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
        if config.get(key) is None or _is_one_of(config[key], plain) or _is_switched_off(config, key):
            continue
        hint = "quantised weights cannot be kept, use the bf16 release" if key == "quantization_config" else None
        raise FormatError(f"{path}: {key} is {str(config[key])[:60]}, which no plain Llama has", path=path, hint=hint)
    if type(config.get("tie_word_embeddings")) not in (bool, type(None)):
        got = str(config["tie_word_embeddings"])[:60]
        raise FormatError(f"{path}: tie_word_embeddings is {got!r}, expected true or false", path=path)
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


def _is_one_of(value: Any, plain: tuple[Any, ...]) -> bool:
    return type(value) in (bool, int, float, str) and value in plain


def _is_switched_off(config: Mapping[str, Any], key: str) -> bool:
    """A window of attention that is not used, or that no text of the model's length leaves."""
    if key != "sliding_window":
        return False
    window, positions = config[key], config.get("max_position_embeddings")
    never_left = type(window) is int and type(positions) is int and window >= positions
    return never_left or config.get("use_sliding_window") is False


def _rope(config: Mapping[str, Any], path: Path) -> tuple[Any, RopeScaling | None]:
    """Theta, and the scaling. transformers 4 wrote rope_theta and rope_scaling, transformers 5 writes rope_parameters."""
    said = [_rope_object(config, key, path) for key in ("rope_parameters", "rope_scaling")]
    if said[0] and said[1] and any(said[0][key] != said[1][key] for key in said[0].keys() & said[1].keys()):
        raise FormatError(f"{path}: rope_parameters and rope_scaling contradict each other", path=path)
    rope = said[0] | said[1]
    outside = config.get("rope_theta", 10000.0)
    theta = rope.get("rope_theta", outside)
    if config.get("rope_theta") is not None and theta != outside:
        raise FormatError(f"{path}: rope_theta is {outside!r}, and {theta!r} in its RoPE", path=path)
    kind = rope.get("rope_type", "default")
    if kind == "linear" and rope.get("factor") == 1:
        kind, rope = "default", {key: value for key, value in rope.items() if key != "factor"}
    if kind not in ("default", "llama3"):
        raise FormatError(
            f"{path}: RoPE is scaled by {str(kind)[:60]!r}, expected 'llama3' or none",
            path=path,
            hint="no other scaling can be kept yet",
        )
    _refuse_other_rope(rope, kind, config, path)
    if kind == "default":
        return theta, None
    for key in _ROPE_NUMBERS:
        if not (type(rope.get(key)) in (int, float) and 0 < rope[key] < float("inf")):
            raise FormatError(f"{path}: RoPE's {key} is {rope.get(key)!r}, expected a positive number", path=path)
    factor, low, high, original = (rope[key] for key in _ROPE_NUMBERS)
    if original != int(original):
        raise FormatError(f"{path}: RoPE's {_ROPE_NUMBERS[3]} is {original!r}, expected a whole number", path=path)
    return theta, RopeScaling(float(factor), float(low), float(high), int(original))


def _rope_object(config: Mapping[str, Any], key: str, path: Path) -> dict[str, Any]:
    """What rope_scaling or rope_parameters says, its type under one name, without what is null."""
    said = config.get(key)
    if said is not None and not isinstance(said, dict):
        raise FormatError(f"{path}: {key} is {str(said)[:60]!r}, expected an object", path=path)
    rope = {name: value for name, value in (said or {}).items() if value is not None}
    if nested := [name for name, value in rope.items() if isinstance(value, dict)]:
        raise FormatError(
            f"{path}: {key} has a RoPE for {listed(nested)} alone, expected one for all layers", path=path
        )
    old = rope.pop("type", None)
    if old is not None:
        rope.setdefault("rope_type", old)
    return rope


def _refuse_other_rope(rope: Mapping[str, Any], kind: str, config: Mapping[str, Any], path: Path) -> None:
    """Raises FormatError for what would be lost: a number that belongs to no scaling, or to another one."""
    known = {"rope_type", "rope_theta", _ROPE_NUMBERS[3], *(_ROPE_NUMBERS if kind == "llama3" else ())}
    for key, value in rope.items():
        if key not in known and not _is_one_of(value, _ROPE_PLAIN.get(key, (1,) if key == "factor" else ())):
            raise FormatError(
                f"{path}: RoPE's {key} is {str(value)[:60]}, which {'no unscaled RoPE' if kind == 'default' else kind} has",
                path=path,
                hint=f'if RoPE is scaled, its rope_type has to be said; if not, take "{key}" out',
            )
    outside = config.get(_ROPE_NUMBERS[3])
    if kind == "llama3" and outside is not None and outside != rope.get(_ROPE_NUMBERS[3]):
        raise FormatError(
            f"{path}: {_ROPE_NUMBERS[3]} is {outside!r}, and {rope.get(_ROPE_NUMBERS[3])!r} in its RoPE", path=path
        )


def context_length(spec: LlamaSpec, about: Mapping[str, Any]) -> int | None:
    """How many positions is the model meant for? What the source says, else as its release. None: not known."""
    said = about.get("context_length")
    return said if type(said) is int else release_context(spec)


def token_ids(about: Mapping[str, Any]) -> dict[str, Any]:
    """bos_token_id, eos_token_id and pad_token_id: those that are known."""
    return {key: about[key] for key in TOKEN_IDS if about.get(key) is not None}


def llama3_ids(spec: LlamaSpec) -> dict[str, Any]:
    """The ids of Llama 3's own tokenizer. Base and instruct models end a text differently: either may be meant."""
    stops = [128001, 128008, 128009] if spec.rope_scaling else [128001, 128009]
    return {"bos_token_id": 128000, "eos_token_id": 128001, "stop_token_ids": stops}


def config_of(spec: LlamaSpec, dtype: str, about: Mapping[str, Any]) -> dict[str, Any]:
    """config.json for a model; dtype as torch names it. What is not known is left out: null would be an answer."""
    scaling = None
    positions = context_length(spec, about)
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
        **token_ids(about),
        "head_dim": spec.head_dim,
        "hidden_act": "silu",
        "hidden_size": spec.dim,
        "initializer_range": 0.02,
        "intermediate_size": spec.ffn_dim,
        **({} if positions is None else {"max_position_embeddings": positions}),
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
    """generation_config.json: where to stop, and for Llama 3 how to sample as its releases do.

    Where no token is known it says that it only repeats config.json, as transformers' own does: what a user writes there
    later is then not overruled.
    """
    ids = token_ids(about)
    if about.get("stop_token_ids"):
        ids["eos_token_id"] = about["stop_token_ids"]
    if spec.vocab_size != LLAMA3_VOCAB:
        return ids or {"_from_model_config": True}
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
