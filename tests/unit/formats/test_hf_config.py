"""Does a config.json that is read, or written, say what transformers would understand? Silence is never null, nor a guess."""

import json

import pytest

from reshard.errors import FormatError
from reshard.formats.hf_config import as_json, config_of, generation_config_of, spec_from_config
from reshard.model.spec import LlamaSpec, RopeScaling, flavor

SPEC = LlamaSpec(dim=64, n_layers=1, n_heads=4, n_kv_heads=2, ffn_dim=96, vocab_size=128, rope_theta=10000.0)
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}  # fmt: skip
NEW = {"rope_theta": 10000.0, "rope_type": "default"}


def config(**changes):
    content = config_of(SPEC, "float32", {"context_length": 256}) | changes
    return {key: value for key, value in content.items() if value is not ...}


def with_new(**changes):
    """As transformers 5 writes it."""
    return config(rope_scaling=..., rope_theta=..., rope_parameters=NEW | changes)


REFUSED = {
    "linear": (config(rope_scaling={"type": "linear", "factor": 4.0}), "scaled by 'linear'"),
    "dynamic": (config(rope_scaling={"type": "dynamic", "factor": 1.0}), "scaled by 'dynamic'"),
    "yarn": (with_new(rope_type="yarn", factor=4.0), "scaled by 'yarn'"),
    "longrope": (config(rope_scaling={"rope_type": "longrope", "short_factor": [1.0] * 8}), "scaled by 'longrope'"),
    "a factor without a type": (config(rope_scaling={"factor": 4.0}), "RoPE's factor is 4.0"),
    "numbers of a scaling without its type": (
        with_new(low_freq_factor=1.0, factor=1.0, high_freq_factor=4.0), "RoPE's low_freq_factor",
    ),
    "a factor of attention": (config(rope_scaling=LLAMA3 | {"attention_factor": 1.2}), "RoPE's attention_factor is 1.2"),
    "half a context": (config(rope_scaling=LLAMA3 | {"original_max_position_embeddings": 64.5}), "expected a whole number"),
    "two contexts": (
        config(rope_scaling=LLAMA3, original_max_position_embeddings=32), "original_max_position_embeddings is 32",
    ),
    "partial rotation": (config(partial_rotary_factor=0.5), "partial_rotary_factor is 0.5"),
    "partial rotation, new": (with_new(partial_rotary_factor=0.5), "partial_rotary_factor is 0.5"),
    "a RoPE for some layers": (
        config(rope_scaling=..., rope_theta=..., rope_parameters={"full_attention": {**NEW, **LLAMA3}}),
        "for full_attention alone",
    ),
    "two that differ": (config(rope_parameters=NEW, rope_scaling=LLAMA3), "contradict each other"),
    "two thetas": (
        config(rope_parameters={**NEW, "rope_theta": 20000.0}, rope_scaling=...), "rope_theta is 10000.0, and 20000.0",
    ),
    "gelu": (config(hidden_act="gelu"), "hidden_act is gelu"),
    "biases": (config(attention_bias=True), "attention_bias is True"),
    "biases of the feed-forward": (config(mlp_bias=True), "mlp_bias is True"),
    "a window": (config(sliding_window=64), "sliding_window is 64"),
    "scaled logits": (config(logit_scale=0.5), "logit_scale is 0.5"),
    "scaled logits, Granite's": (config(logits_scaling=8), "logits_scaling is 8"),
    "capped logits": (config(final_logit_softcapping=30.0), "final_logit_softcapping is 30.0"),
    "capped attention": (config(attn_logit_softcapping=50.0), "attn_logit_softcapping is 50.0"),
    "experts": (config(num_local_experts=8), "num_local_experts is 8"),
    "a tie that is no truth": (config(tie_word_embeddings="false"), "tie_word_embeddings is 'false'"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_be_lost_is_refused_by_name(tmp_path, case):
    content, named = REFUSED[case]
    with pytest.raises(FormatError) as error:
        spec_from_config(content, tmp_path / "config.json")
    assert named in error.value.message
    assert "\n" not in error.value.message


HARMLESS = {
    "linear by 1": config(rope_scaling={"type": "linear", "factor": 1.0}),
    "nothing": config(rope_scaling={}),
    "null": with_new(factor=None, partial_rotary_factor=None),
    "all of it rotates": with_new(partial_rotary_factor=1.0),
    "new and old agree": config(rope_parameters=NEW, rope_scaling=None),
    "a window that no text leaves": config(sliding_window=256),
    "a window that is off": config(sliding_window=64, use_sliding_window=False),
    "values that change nothing": config(logit_scale=1.0, num_local_experts=0, final_logit_softcapping=None),
    "a tie that is not said": config(tie_word_embeddings=...),
}


@pytest.mark.parametrize("case", HARMLESS)
def test_what_changes_nothing_is_not(tmp_path, case):
    """By the frequencies that transformers computes from the same file."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    assert spec_from_config(HARMLESS[case], tmp_path / "config.json") == SPEC
    (tmp_path / "config.json").write_bytes(as_json(HARMLESS[case]))
    plain = LlamaRotaryEmbedding(LlamaConfig(hidden_size=64, num_attention_heads=4, rope_theta=10000.0))
    found = LlamaRotaryEmbedding(LlamaConfig.from_pretrained(tmp_path))
    assert found.inv_freq.equal(plain.inv_freq)
    assert found.attention_scaling == plain.attention_scaling


def test_what_is_not_known_is_left_out(tmp_path):
    """No null, no number of nobody's; transformers reads it, and takes no token for the end of a text."""
    from transformers import GenerationConfig, LlamaConfig

    known = {"bos_token_id": 5, "eos_token_id": [9, 11], "pad_token_id": 0, "context_length": 333}
    for about in ({}, {"bos_token_id": 5}, known):
        content, generation = config_of(SPEC, "float32", about), generation_config_of(SPEC, about)
        assert {key: content[key] for key in content if content[key] is None} == {"rope_scaling": None}
        for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
            assert (key in content) == (key in generation) == (key in about)
            assert content.get(key) == generation.get(key) == about.get(key)
        assert content.get("max_position_embeddings") == about.get("context_length")
        assert None not in generation.values()
        (tmp_path / "config.json").write_bytes(as_json(content))
        (tmp_path / "generation_config.json").write_bytes(as_json(generation))
        assert GenerationConfig.from_pretrained(tmp_path).eos_token_id == about.get("eos_token_id")
        read = LlamaConfig.from_pretrained(tmp_path)
        assert [getattr(read, key) for key in about if key != "context_length"] == [
            about[key] for key in about if key != "context_length"
        ]


@pytest.mark.parametrize("spec", [
    SPEC, LlamaSpec(**{**SPEC.__dict__, "rope_theta": 500000.0}), LlamaSpec(**{**SPEC.__dict__, "rope_scaling": RopeScaling()}),
    LlamaSpec(**{**flavor("llama3", "8B").__dict__, "rope_theta": 1e6}),
], ids=["Llama 2's theta", "Llama 3's theta", "scaled", "8B with another theta"])  # fmt: skip
def test_only_a_release_has_a_length_without_saying_it(spec):
    assert "max_position_embeddings" not in config_of(spec, "bfloat16", {})
    assert json.loads(as_json(config_of(flavor("llama3", "8B"), "bfloat16", {})))["max_position_embeddings"] == 8192
