"""Are the name tables right? Against the parameters of the spec, and against names written out by hand."""

import pytest

from reshard.errors import TensorMismatch
from reshard.model.names import HUGGING_FACE, META, TORCHTITAN, TORCHTUNE, canonical_name, canonical_names, foreign_name
from reshard.model.spec import LlamaSpec, parameter_shapes

SPEC = LlamaSpec(dim=64, n_layers=12, n_heads=4, n_kv_heads=2, ffn_dim=192, vocab_size=128)


@pytest.mark.parametrize("dialect", [META, TORCHTITAN, TORCHTUNE, HUGGING_FACE], ids=lambda d: d.title)
def test_every_parameter_has_one_name_and_comes_back(dialect):
    names = list(parameter_shapes(SPEC))
    foreign = [foreign_name(name, dialect) for name in names]
    assert len(set(foreign)) == len(names)
    assert list(canonical_names(foreign, dialect).values()) == names


@pytest.mark.parametrize(
    ("dialect", "theirs", "ours"),
    [
        (META, "layers.11.attention.wo.weight", "layers.11.attention.wo.weight"),
        (META, "rope.freqs", None),
        (TORCHTITAN, "model.layers.0.feed_forward.w3.weight", "layers.0.feed_forward.w3.weight"),
        (TORCHTITAN, "layers.0.feed_forward.w3.weight", "layers.0.feed_forward.w3.weight"),
        (TORCHTITAN, "model.freqs_cis", None),
        (TORCHTITAN, "freqs_cis", None),
        (TORCHTITAN, "layers.3.attention.qkv_linear.wk.weight", "layers.3.attention.wk.weight"),
        (TORCHTITAN, "lm_head.weight", "output.weight"),
        (TORCHTITAN, "model.output.weight", "output.weight"),
        (TORCHTUNE, "layers.7.attn.output_proj.weight", "layers.7.attention.wo.weight"),
        (TORCHTUNE, "layers.7.sa_norm.scale", "layers.7.attention_norm.weight"),
        (TORCHTUNE, "layers.7.mlp_norm.scale", "layers.7.ffn_norm.weight"),
        (HUGGING_FACE, "model.layers.7.mlp.gate_proj.weight", "layers.7.feed_forward.w1.weight"),
        (HUGGING_FACE, "model.layers.7.mlp.up_proj.weight", "layers.7.feed_forward.w3.weight"),
        (HUGGING_FACE, "model.layers.7.mlp.down_proj.weight", "layers.7.feed_forward.w2.weight"),
        (HUGGING_FACE, "model.layers.7.input_layernorm.weight", "layers.7.attention_norm.weight"),
        (HUGGING_FACE, "model.layers.7.post_attention_layernorm.weight", "layers.7.ffn_norm.weight"),
        (HUGGING_FACE, "model.layers.0.self_attn.rotary_emb.inv_freq", None),
        (HUGGING_FACE, "lm_head.weight", "output.weight"),
    ],
)
def test_known_names(dialect, theirs, ours):
    assert canonical_name(theirs, dialect) == ours


@pytest.mark.parametrize(
    "name",
    [
        "layers.01.attention.wq.weight",
        "layers.-1.attention.wq.weight",
        "layers.٣.attention.wq.weight",
        "layers.LAYER.attention.wq.weight",
        "layers.0.attention.wq",
        "layers.0.attention.wq.weight_scale",
        "_orig_mod.layers.0.attention.wq.weight",
        "model.tok_embeddings.weight",
        "lm_head.weight",
        "",
    ],
)
def test_meta_does_not_know(name):
    with pytest.raises(TensorMismatch):
        canonical_name(name, META)
    with pytest.raises(TensorMismatch):
        foreign_name(name, TORCHTUNE)


def test_all_unknown_names_are_listed_with_the_nearest_known_one():
    with pytest.raises(TensorMismatch) as raised:
        canonical_names(["layers.3.attention.wqq.weight", "norm.weight", "bias"], META)
    assert raised.value.unexpected == ("layers.3.attention.wqq.weight", "bias")
    assert "layers.3.attention.wq.weight" in raised.value.hint


def test_two_names_of_one_tensor_are_refused():
    with pytest.raises(TensorMismatch, match=r"layers\.0\.attention\.wq\.weight"):
        canonical_names(["layers.0.attention.wq.weight", "model.layers.0.attention.qkv_linear.wq.weight"], TORCHTITAN)
