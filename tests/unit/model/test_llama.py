"""Is the model a Llama? Against transformers on the same weights, and against its own promises on precision."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from reshard.model.llama import Llama, RMSNorm, cross_entropy_sum
from reshard.model.rope import rope_frequencies, rope_table, rotate
from reshard.model.spec import FLAVORS, LlamaSpec, RopeScaling, flavor, parameter_shapes

torch.set_num_threads(1)  # small tensors: a second thread only waits for the first

Weights = dict[str, Tensor]

DEBUG = FLAVORS["debugmodel"]
# A context that the test's 160 positions leave behind, so that slowed, mixed and kept frequencies all matter.
SCALED_8 = RopeScaling(factor=8.0, original_context=48)
SCALED_32 = RopeScaling(factor=32.0, original_context=48)
LENGTH = 160
# float32 through 8 layers, logits of order 1: rounding leaves at most 3e-5, the smallest mistake below makes 4.
CLOSE = 1e-4
CLEARLY_WRONG = 1.0


def random_weights(spec: LlamaSpec, seed: int = 0) -> Weights:
    """Weights at which every part has a say: attention that looks at single places, norms that are not one."""
    generator = torch.Generator().manual_seed(seed)
    weights: Weights = {}
    for name, shape in parameter_shapes(spec).items():
        values = torch.randn(shape, generator=generator)
        if name.endswith("norm.weight"):
            weights[name] = 1 + 0.3 * values
        elif name == "tok_embeddings.weight":
            weights[name] = values * (0.1 if spec.tied else 1)
        else:
            weights[name] = values * (1.5 if ".wq." in name or ".wk." in name else 1) / shape[1] ** 0.5
    return weights


def ours(spec: LlamaSpec, weights: Weights, positions: int = LENGTH, dtype: torch.dtype = torch.float32) -> Llama:
    with torch.device("meta"):
        model = Llama(spec).to(dtype)
    model.to_empty(device="cpu")
    model.init_rope(torch.arange(positions))
    model.load_state_dict(weights)
    return model


def halves(weight: Tensor, heads: int) -> Tensor:
    """Meta's rows of a head are pairs (0, 1), (2, 3) ...; transformers rotates row i with row i + head_dim / 2."""
    rows, dim = weight.shape
    return weight.view(heads, rows // heads // 2, 2, dim).transpose(1, 2).reshape(rows, dim)


def to_transformers(spec: LlamaSpec, weights: Weights) -> Weights:
    """The same weights as transformers names and orders them. Written for this test: it must not share our tables."""
    theirs = {
        "model.embed_tokens.weight": weights["tok_embeddings.weight"],
        "model.norm.weight": weights["norm.weight"],
        "lm_head.weight": weights["tok_embeddings.weight" if spec.tied else "output.weight"],
    }
    for i in range(spec.n_layers):
        w = {name.removeprefix(f"layers.{i}."): t for name, t in weights.items() if name.startswith(f"layers.{i}.")}
        theirs |= {
            f"model.layers.{i}.{name}.weight": tensor
            for name, tensor in {
                "input_layernorm": w["attention_norm.weight"],
                "self_attn.q_proj": halves(w["attention.wq.weight"], spec.n_heads),
                "self_attn.k_proj": halves(w["attention.wk.weight"], spec.n_kv_heads),
                "self_attn.v_proj": w["attention.wv.weight"],
                "self_attn.o_proj": w["attention.wo.weight"],
                "post_attention_layernorm": w["ffn_norm.weight"],
                "mlp.gate_proj": w["feed_forward.w1.weight"],
                "mlp.up_proj": w["feed_forward.w3.weight"],
                "mlp.down_proj": w["feed_forward.w2.weight"],
            }.items()
        }
    return theirs


def transformers_config(spec: LlamaSpec) -> LlamaConfig:
    rope = {"rope_type": "default", "rope_theta": spec.rope_theta}
    if spec.rope_scaling is not None:
        rope |= {
            "rope_type": "llama3",
            "factor": spec.rope_scaling.factor,
            "low_freq_factor": spec.rope_scaling.low_freq_factor,
            "high_freq_factor": spec.rope_scaling.high_freq_factor,
            "original_max_position_embeddings": spec.rope_scaling.original_context,
        }
    return LlamaConfig(
        hidden_size=spec.dim,
        num_hidden_layers=spec.n_layers,
        num_attention_heads=spec.n_heads,
        num_key_value_heads=spec.n_kv_heads,
        head_dim=spec.head_dim,
        intermediate_size=spec.ffn_dim,
        vocab_size=spec.vocab_size,
        rms_norm_eps=spec.norm_eps,
        max_position_embeddings=131072,
        rope_parameters=rope,
        tie_word_embeddings=spec.tied,
    )


def their_logits(spec: LlamaSpec, theirs: Weights, tokens: Tensor) -> Tensor:
    model = LlamaForCausalLM(transformers_config(spec)).eval()
    model.load_state_dict(theirs)
    with torch.no_grad():
        return model(tokens).logits


def our_logits(spec: LlamaSpec, weights: Weights, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return ours(spec, weights)(tokens)


def difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.randint(512, (2, LENGTH), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("scaling", [None, SCALED_8, SCALED_32], ids=["unscaled", "factor 8", "factor 32"])
def test_logits_are_those_of_transformers(scaling: RopeScaling | None, tied: bool, tokens: Tensor) -> None:
    spec = replace(DEBUG, rope_scaling=scaling, tied=tied)
    assert spec.n_kv_heads < spec.n_heads
    weights = random_weights(spec)
    logits = our_logits(spec, weights, tokens)
    assert logits.shape == (2, LENGTH, spec.vocab_size)
    assert logits.dtype == torch.float32
    assert logits.std() > 0.5  # not a comparison of zeros
    assert difference(logits, their_logits(spec, to_transformers(spec, weights), tokens)) < CLOSE


def test_scaling_matters_at_these_positions(tokens: Tensor) -> None:
    # Or else the comparison above would prove nothing about the scaling.
    weights = random_weights(DEBUG)
    plain, by_8, by_32 = (
        our_logits(replace(DEBUG, rope_scaling=scaling), weights, tokens) for scaling in (None, SCALED_8, SCALED_32)
    )
    assert difference(plain, by_8) > CLEARLY_WRONG
    assert difference(by_8, by_32) > CLEARLY_WRONG


def _everywhere(spec: LlamaSpec, change: Callable[[Weights, str], None]) -> Callable[[Weights], None]:
    def apply(theirs: Weights) -> None:
        for i in range(spec.n_layers):
            change(theirs, f"model.layers.{i}.")

    return apply


def _unpermuted(heads_of: dict[str, int]) -> Callable[[Weights, str], None]:
    def change(theirs: Weights, layer: str) -> None:
        for name, heads in heads_of.items():
            weight = theirs[f"{layer}self_attn.{name}.weight"]
            rows, dim = weight.shape
            back = weight.view(heads, 2, rows // heads // 2, dim).transpose(1, 2).reshape(rows, dim)
            theirs[f"{layer}self_attn.{name}.weight"] = back

    return change


def _k_with_query_heads(theirs: Weights, layer: str) -> None:
    _unpermuted({"k_proj": DEBUG.n_kv_heads})(theirs, layer)
    name = f"{layer}self_attn.k_proj.weight"
    theirs[name] = halves(theirs[name], DEBUG.n_heads)


def _swapped(a: str, b: str) -> Callable[[Weights, str], None]:
    def change(theirs: Weights, layer: str) -> None:
        a_name, b_name = f"{layer}{a}.weight", f"{layer}{b}.weight"
        theirs[a_name], theirs[b_name] = theirs[b_name], theirs[a_name]

    return change


MISTAKES = {
    "no permutation": _unpermuted({"q_proj": DEBUG.n_heads, "k_proj": DEBUG.n_kv_heads}),
    "q not permuted": _unpermuted({"q_proj": DEBUG.n_heads}),
    "k not permuted": _unpermuted({"k_proj": DEBUG.n_kv_heads}),
    "k permuted with n_heads": _k_with_query_heads,
    "w1 and w3 swapped": _swapped("mlp.gate_proj", "mlp.up_proj"),
    "norms swapped": _swapped("input_layernorm", "post_attention_layernorm"),
    "k and v swapped": _swapped("self_attn.k_proj", "self_attn.v_proj"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("scaling", [None, SCALED_8], ids=["unscaled", "factor 8"])
def test_the_classic_mistakes_would_show(mistake: str, scaling: RopeScaling | None, tokens: Tensor) -> None:
    spec = replace(DEBUG, rope_scaling=scaling)
    weights = random_weights(spec)
    theirs = to_transformers(spec, weights)
    _everywhere(spec, MISTAKES[mistake])(theirs)
    assert difference(our_logits(spec, weights, tokens), their_logits(spec, theirs, tokens)) > CLEARLY_WRONG


@pytest.mark.parametrize(
    ("name", "size"), [("llama3", "8B"), ("llama3_1", "8B"), ("llama3_2", "1B"), ("llama3_2", "3B")]
)
def test_frequencies_of_the_releases_are_those_of_transformers(name: str, size: str) -> None:
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    spec = flavor(name, size)
    theirs = LlamaRotaryEmbedding(transformers_config(spec)).inv_freq
    # A frequency is at most 1, so at 131,072 positions this is still below 0.02 radians.
    torch.testing.assert_close(rope_frequencies(spec), theirs, rtol=2e-7, atol=1e-9)


def test_rotation_keeps_length_and_depends_on_distance_only() -> None:
    cos, sin = rope_table(DEBUG, torch.arange(20), torch.float64)
    q, k = torch.randn(2, 1, 1, 1, DEBUG.head_dim, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    q_at, k_at = rotate(q.expand(1, 20, 1, -1), cos, sin), rotate(k.expand(1, 20, 1, -1), cos, sin)
    torch.testing.assert_close(q_at.norm(dim=-1), q.norm(dim=-1).expand(1, 20, 1))
    scores = torch.einsum("bqhe,bkhe->qk", q_at, k_at)
    assert abs(scores[5, 2] - scores[15, 12]) < 1e-5
    assert abs(scores[5, 2] - scores[5, 3]) > 1e-2


def test_no_token_sees_the_future(tokens: Tensor) -> None:
    weights = random_weights(DEBUG)
    changed = tokens.clone()
    changed[:, 100] = (changed[:, 100] + 1) % 512
    before, after = our_logits(DEBUG, weights, tokens), our_logits(DEBUG, weights, changed)
    assert torch.equal(before[:, :100], after[:, :100])
    assert difference(before[:, 101:], after[:, 101:]) > 1e-2


def test_a_shorter_sequence_is_a_prefix(tokens: Tensor) -> None:
    weights = random_weights(DEBUG)
    torch.testing.assert_close(our_logits(DEBUG, weights, tokens[:, :50]), our_logits(DEBUG, weights, tokens)[:, :50])


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_state_dict_is_the_parameters_under_metas_names_and_no_buffer(tied: bool) -> None:
    spec = replace(DEBUG, tied=tied)
    with torch.device("meta"):
        model = Llama(spec)
    assert {name: tuple(t.shape) for name, t in model.state_dict().items()} == parameter_shapes(spec)
    assert [name for name, _ in model.named_parameters()] == list(parameter_shapes(spec))


# -- precision: norms, RoPE and loss never below float32 --------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
def test_rotary_table_is_at_least_float32(dtype: torch.dtype, expected: torch.dtype) -> None:
    spec = replace(DEBUG, n_layers=1)
    model = ours(spec, random_weights(spec), dtype=dtype)
    assert model.cos.dtype == model.sin.dtype == expected


def test_rotation_of_bfloat16_is_rounded_once() -> None:
    cos, sin = rope_table(DEBUG, torch.arange(64))
    x = torch.randn(1, 64, 2, DEBUG.head_dim, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert torch.equal(rotate(x, cos, sin), rotate(x.float(), cos, sin).bfloat16())
    assert not torch.equal(rotate(x, cos, sin), rotate(x, cos.bfloat16(), sin.bfloat16()))


def _rms(x: Tensor, eps: float) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()


def test_norm_of_bfloat16_is_computed_in_float32() -> None:
    norm = RMSNorm(256, 1e-5).to(torch.bfloat16)
    x = torch.randn(4, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.no_grad():
        norm.weight.fill_(1)
        assert torch.equal(norm(x), _rms(x.float(), 1e-5).bfloat16())
        assert not torch.equal(norm(x), _rms(x, 1e-5))
    assert norm(x).dtype == torch.bfloat16


def test_norm_of_float64_is_computed_in_float64() -> None:
    norm = RMSNorm(256, 1e-5).double()
    x = torch.randn(4, 256, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad():
        norm.weight.fill_(1)
        assert difference(norm(x), _rms(x, 1e-5)) < 1e-14
        assert difference(_rms(x.float(), 1e-5).double(), _rms(x, 1e-5)) > 1e-9  # what a cast down would have cost


def test_norm_uses_its_epsilon() -> None:
    norm = RMSNorm(8, 1e-2)
    with torch.no_grad():
        norm.weight.fill_(1)
        x = torch.full((1, 8), 1e-3)
        torch.testing.assert_close(norm(x), x / (1e-6 + 1e-2) ** 0.5)


def test_loss_is_a_sum_and_does_not_count_minus_100() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(2, 5, 7, generator=generator), torch.randint(7, (2, 5), generator=generator)
    labels[0, 1] = labels[1, 4] = -100
    expected = -sum(
        float(torch.log_softmax(logits[b, s].double(), -1)[labels[b, s]])
        for b in range(2)
        for s in range(5)
        if labels[b, s] != -100
    )
    assert cross_entropy_sum(logits, labels).item() == pytest.approx(expected, rel=1e-6)
    assert cross_entropy_sum(logits, torch.full_like(labels, -100)).item() == 0  # a sum of nothing, not 0 / 0


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
def test_loss_is_at_least_float32(dtype: torch.dtype, expected: torch.dtype) -> None:
    logits = torch.randn(1, 64, 512, generator=torch.Generator().manual_seed(0)).to(dtype)
    labels = torch.arange(64)[None]
    loss = cross_entropy_sum(logits, labels)
    assert loss.dtype == expected
    assert loss == F.cross_entropy(logits[0].to(expected), labels[0], reduction="sum")


def test_a_float64_model_is_float64_from_end_to_end(tokens: Tensor) -> None:
    # Any float32 link in the chain would leave differences of 1e-7 between two ways to sum the same thing.
    spec = replace(DEBUG, n_layers=2)
    model = ours(spec, random_weights(spec), dtype=torch.float64)
    with torch.no_grad():
        whole = model(tokens)
        parts = torch.cat([model(tokens[:1]), model(tokens[1:])])
        halved = model(tokens[:, :80])
    assert whole.dtype == torch.float64
    assert difference(whole, parts) < 1e-12
    assert difference(whole[:, :80], halved) < 1e-12
