"""Does transformers compute the same from our Hugging Face exports, and we from its own files?

Meta files in 1 to 8 shards -> DCP -> Hugging Face; the reader is AutoModelForCausalLM, the other side our own model
filled with the weights the Meta files were made of. A mistake of each classic kind, put in on purpose, must show.
"""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from reshard.commands.convert import Options, run
from reshard.commands.diff import compare
from reshard.commands.sources import open_source
from reshard.formats.meta import write_meta
from reshard.model.llama import Llama
from reshard.model.spec import LlamaSpec, RopeScaling, parameter_shapes

TOKENS = 80  # more than one: position 0 is not rotated, and hides every mistake about it
TOLERANCE = 2e-5
SMALL = {"dim": 64, "n_layers": 3, "n_heads": 16, "n_kv_heads": 8, "ffn_dim": 192, "vocab_size": 128}
# The width of Llama 3.2 1B: the only way in which params.json says a factor of 32.
WIDE = {"dim": 2048, "n_layers": 1, "n_heads": 32, "n_kv_heads": 8, "ffn_dim": 256, "vocab_size": 128}
CASES = {
    "1 shard": (LlamaSpec(**SMALL), 1),
    "2 shards, tied": (LlamaSpec(**SMALL, tied=True), 2),
    "4 shards, factor 8": (LlamaSpec(**SMALL, rope_scaling=RopeScaling(factor=8.0)), 4),
    "8 shards": (LlamaSpec(**SMALL), 8),
    "8 shards, 2 KV heads": (LlamaSpec(**(SMALL | {"n_kv_heads": 2})), 8),
    "factor 32, tied": (LlamaSpec(**WIDE, tied=True, rope_scaling=RopeScaling(factor=32.0)), 1),
}


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    torch.set_num_threads(1)


def make_weights(spec):
    """Random, of a size that keeps logits of order 1; norms apart from 1, so that swapping them is seen."""
    generator = torch.Generator().manual_seed(7)
    weights = {}
    for name, shape in parameter_shapes(spec).items():
        values = torch.randn(shape, generator=generator)
        if name.endswith("norm.weight"):
            weights[name] = 1 + 0.3 * values
        else:
            weights[name] = values * (1.0 if "tok_embeddings" in name else 1.0 / shape[1] ** 0.5)
    if spec.tied:
        weights["tok_embeddings.weight"] *= 0.05
    return weights


def tokens_of(spec):
    return torch.randint(spec.vocab_size, (2, TOKENS), generator=torch.Generator().manual_seed(3))


def ours(spec, weights):
    model = Llama(spec)
    model.load_state_dict(weights, strict=True)
    model.init_rope(torch.arange(TOKENS))
    with torch.inference_mode():
        return model.eval()(tokens_of(spec))


def theirs(spec, directory):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")
    with torch.inference_mode():
        return model.eval()(tokens_of(spec)).logits


def exported(tmp_path, spec, weights, shards, **options):
    write_meta(tmp_path / "meta", weights, spec, shards)
    run(tmp_path / "meta", tmp_path / "dcp")
    return run(tmp_path / "dcp", tmp_path / "hf", to="hf", options=Options(**options))


@pytest.mark.parametrize("case", CASES)
def test_equal_logits(tmp_path, case):
    spec, shards = CASES[case]
    weights = make_weights(spec)
    directory = exported(tmp_path, spec, weights, shards, max_shard_bytes=100_000)
    assert (directory / "model.safetensors.index.json").exists()
    assert (theirs(spec, directory) - ours(spec, weights)).abs().max() < TOLERANCE

    # And their own way of writing the same model, with the keys of their version, is read as the same.
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).save_pretrained(tmp_path / "again")
    assert "rope_parameters" in json.loads((tmp_path / "again" / "config.json").read_text())
    again = open_source(tmp_path / "again")
    assert again.spec == spec
    report = compare(open_source(tmp_path / "meta"), again)
    assert report.same(), report


def test_the_config_has_the_old_keys_that_everybody_reads(tmp_path):
    spec = LlamaSpec(**SMALL, rope_scaling=RopeScaling(factor=8.0))
    config = json.loads((exported(tmp_path, spec, make_weights(spec), 1) / "config.json").read_text())
    assert config["rope_theta"] == 500000.0
    assert config["rope_scaling"]["factor"] == 8.0
    assert "rope_parameters" not in config
    assert config["torch_dtype"] == "float32"


def swapped(a, b):
    def change(spec, tensors):
        for i in range(spec.n_layers):
            left, right = f"model.layers.{i}.{a}.weight", f"model.layers.{i}.{b}.weight"
            tensors[left], tensors[right] = tensors[right], tensors[left]

    return change


def back_to_pairs(which, heads):
    def change(spec, tensors):
        for i in range(spec.n_layers):
            name = f"model.layers.{i}.self_attn.{which}_proj.weight"
            n = getattr(spec, heads)
            rows, dim = tensors[name].shape
            halves = tensors[name].view(n, 2, rows // n // 2, dim)
            tensors[name] = halves.transpose(1, 2).reshape(rows, dim).contiguous()

    return change


def wrong_factor(spec, tensors):
    pass


MISTAKES = {
    "queries not permuted": back_to_pairs("q", "n_heads"),
    "keys not permuted": back_to_pairs("k", "n_kv_heads"),
    "gate and up swapped": swapped("mlp.gate_proj", "mlp.up_proj"),
    "norms swapped": swapped("input_layernorm", "post_attention_layernorm"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_that_each_classic_mistake_would_show(tmp_path, mistake):
    spec = LlamaSpec(**SMALL)
    weights = make_weights(spec)
    directory = exported(tmp_path, spec, weights, 2)
    tensors = load_file(directory / "model.safetensors")
    MISTAKES[mistake](spec, tensors)
    save_file({name: t.contiguous().clone() for name, t in tensors.items()}, directory / "model.safetensors")
    wrong = (theirs(spec, directory) - ours(spec, weights)).abs()
    assert wrong.max() > 100 * TOLERANCE
    if "permuted" in mistake:
        assert wrong[:, 0].max() < TOLERANCE  # which is why nobody may test with one token


def test_that_a_wrong_rope_factor_would_show(tmp_path):
    spec = LlamaSpec(**(SMALL | {"n_heads": 4, "n_kv_heads": 2}), rope_theta=10000.0, rope_scaling=RopeScaling(8.0))
    weights = make_weights(spec)
    run(_meta(tmp_path, weights, spec), tmp_path / "hf", to="hf")
    assert (theirs(spec, tmp_path / "hf") - ours(spec, weights)).abs().max() < TOLERANCE
    run(tmp_path / "meta", tmp_path / "hf32", to="hf", rope_factor=32.0)
    assert (theirs(spec, tmp_path / "hf32") - ours(spec, weights)).abs().max() > 10 * TOLERANCE


def _meta(tmp_path, weights, spec):
    write_meta(tmp_path / "meta", weights, spec, 1)
    return tmp_path / "meta"
