"""Does torchtune compute the same from what we hand over? Meta files -> our script -> torch's dcp_to_torch -> torchtune.

The other side of the comparison is transformers' Llama, filled by the names and the rotary permutation written out
here, and our own model. torchtune lives in an environment of its own, which the first run makes (.venv-torchtune).
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock

from reshard.checkpoint.manifest import read_manifest
from reshard.formats.meta import write_meta
from reshard.model.llama import Llama
from reshard.model.spec import LlamaSpec, RopeScaling, parameter_shapes

ROOT = Path(__file__).resolve().parents[3]
VENV = ROOT / ".venv-torchtune"
# torch first and alone, then held while the others are resolved: torchao's newest breaks torchtune's import.
PINS = ("torch==2.13.0", "torchao==0.15.0", "torchtune==0.6.1")
TOKENS = 96  # more than one: position 0 is not rotated, and hides every mistake about it


def run(*command, **environment):
    done = subprocess.run(
        [str(word) for word in command],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=1800,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )  # fmt: skip
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="session")
def torchtune():
    """The python of the environment that has torchtune. Whatever goes wrong here is a failure, never a skip."""
    python, ready = VENV / "bin" / "python", VENV / "pins.txt"
    VENV.mkdir(exist_ok=True)
    with FileLock(VENV / "making.lock"):
        if not ready.exists() or ready.read_text().split() != list(PINS):
            run(sys.executable, "-m", "venv", VENV)
            run(python, "-m", "pip", "install", "--quiet", PINS[0])
            run(python, "-m", "pip", "install", "--quiet", *PINS)
            ready.write_text("\n".join(PINS))
    assert run(python, "-c", "import torch; print(torch.__version__)").strip() == torch.__version__
    return python


def make_weights(spec, dtype):
    """Random, of the size that keeps logits of order 10; norms apart from 1, so that swapping them is seen."""
    generator = torch.Generator().manual_seed(7)
    weights = {}
    for name, shape in parameter_shapes(spec).items():
        values = torch.randn(shape, generator=generator)
        if name.endswith("norm.weight"):
            weights[name] = (1 + 0.3 * values).to(dtype)
        else:
            weights[name] = (values * (1.0 if "tok_embeddings" in name else 1.5 / shape[1] ** 0.5)).to(dtype)
    if spec.tied:
        weights["tok_embeddings.weight"] = (weights["tok_embeddings.weight"].float() * 0.05).to(dtype)
    return weights


def rotary_halves(weight, heads):
    """Meta rotates neighbours (0, 1), transformers rotates halves (0, hd / 2): rows of each head change places."""
    rows, dim = weight.shape
    return weight.view(heads, rows // heads // 2, 2, dim).transpose(1, 2).reshape(rows, dim)


def logits_of_transformers(spec, weights, tokens_BS):
    from transformers import LlamaConfig, LlamaForCausalLM

    rope = {"rope_type": "default", "rope_theta": spec.rope_theta}
    if spec.rope_scaling is not None:
        rope = {
            "rope_type": "llama3", "rope_theta": spec.rope_theta, "factor": spec.rope_scaling.factor,
            "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
        }  # fmt: skip
    config = LlamaConfig(
        vocab_size=spec.vocab_size, hidden_size=spec.dim, intermediate_size=spec.ffn_dim,
        num_hidden_layers=spec.n_layers, num_attention_heads=spec.n_heads, num_key_value_heads=spec.n_kv_heads,
        max_position_embeddings=131072, rms_norm_eps=spec.norm_eps, tie_word_embeddings=spec.tied,
        rope_parameters=rope, attn_implementation="eager",
    )  # fmt: skip
    model = LlamaForCausalLM(config).float().eval()
    theirs = {
        "model.embed_tokens.weight": weights["tok_embeddings.weight"],
        "model.norm.weight": weights["norm.weight"],
    }
    theirs["lm_head.weight"] = weights["tok_embeddings.weight" if spec.tied else "output.weight"]
    for i in range(spec.n_layers):
        ours, name = f"layers.{i}", f"model.layers.{i}"
        theirs |= {
            f"{name}.self_attn.q_proj.weight": rotary_halves(weights[f"{ours}.attention.wq.weight"], spec.n_heads),
            f"{name}.self_attn.k_proj.weight": rotary_halves(weights[f"{ours}.attention.wk.weight"], spec.n_kv_heads),
            f"{name}.self_attn.v_proj.weight": weights[f"{ours}.attention.wv.weight"],
            f"{name}.self_attn.o_proj.weight": weights[f"{ours}.attention.wo.weight"],
            f"{name}.mlp.gate_proj.weight": weights[f"{ours}.feed_forward.w1.weight"],
            f"{name}.mlp.up_proj.weight": weights[f"{ours}.feed_forward.w3.weight"],
            f"{name}.mlp.down_proj.weight": weights[f"{ours}.feed_forward.w2.weight"],
            f"{name}.input_layernorm.weight": weights[f"{ours}.attention_norm.weight"],
            f"{name}.post_attention_layernorm.weight": weights[f"{ours}.ffn_norm.weight"],
        }
    model.load_state_dict({key: value.float() for key, value in theirs.items()}, strict=True)
    with torch.inference_mode():
        return model(tokens_BS).logits.numpy()


def logits_of_ours(spec, weights, tokens_BS):
    model = Llama(spec)
    model.load_state_dict({key: value.float() for key, value in weights.items()}, strict=True)
    model.init_rope(torch.arange(tokens_BS.shape[1]))
    with torch.inference_mode():
        return model.eval()(tokens_BS).numpy()


SMALL = {"dim": 64, "n_layers": 3, "n_heads": 4, "n_kv_heads": 2, "ffn_dim": 192, "vocab_size": 128}
# The width of Llama 3.2 1B: the only way in which params.json says a factor of 32.
WIDE = {"dim": 2048, "n_layers": 1, "n_heads": 32, "n_kv_heads": 8, "ffn_dim": 256, "vocab_size": 128}

CASES = {
    "llama3": (LlamaSpec(**SMALL), torch.float32, 1),
    "llama3 in 2 files, bfloat16": (LlamaSpec(**SMALL), torch.bfloat16, 2),
    "llama3_1 in 2 files": (LlamaSpec(**SMALL, rope_scaling=RopeScaling(factor=8.0)), torch.float32, 2),
    "llama3_2, tied": (LlamaSpec(**WIDE, tied=True, rope_scaling=RopeScaling(factor=32.0)), torch.float32, 1),
}


@pytest.mark.parametrize("case", CASES)
def test_equal_logits(torchtune, tmp_path, case):
    spec, dtype, shards = CASES[case]
    flavor = case.split(",")[0].split()[0]
    weights = make_weights(spec, dtype)
    tokens_BS = torch.randint(spec.vocab_size, (2, TOKENS), generator=torch.Generator().manual_seed(3))

    write_meta(tmp_path / "Llama", weights, spec, shards)
    step = tmp_path / "outputs" / "checkpoint" / "step-0"
    run(sys.executable, "scripts/convert_llama_to_dcp.py", tmp_path / "Llama", step)
    assert LlamaSpec.from_dict(read_manifest(step).model) == spec
    (tmp_path / "tune").mkdir()
    exported = tmp_path / "tune" / "checkpoint.pt"
    run(sys.executable, "-m", "torch.distributed.checkpoint.format_utils", "dcp_to_torch", step, exported)

    arguments = {
        "vocab_size": spec.vocab_size, "num_layers": spec.n_layers, "num_heads": spec.n_heads,
        "num_kv_heads": spec.n_kv_heads, "embed_dim": spec.dim, "max_seq_len": 131072,
        "rope_base": int(spec.rope_theta), "intermediate_dim": spec.ffn_dim, "norm_eps": spec.norm_eps,
    }  # fmt: skip
    request = {
        "checkpoint_dir": str(tmp_path / "tune"),
        "output_dir": str(tmp_path / "tuned"),
        "builder": f"torchtune.models.{flavor}.{flavor}",
        "arguments": arguments,
        "model_type": "LLAMA3_2" if flavor == "llama3_2" else "LLAMA3",
        "tokens": str(tmp_path / "tokens.npy"),
        "logits": str(tmp_path / "logits.npy"),
    }
    (tmp_path / "request.json").write_text(json.dumps(request))
    np.save(request["tokens"], tokens_BS.numpy())
    run(torchtune, Path(__file__).with_name("torchtune_reads.py"), tmp_path / "request.json", PYTHONPATH="")
    theirs = np.load(request["logits"])

    assert theirs.shape == (2, TOKENS, spec.vocab_size)
    assert 3 < np.abs(theirs).max() < 30
    for name, expected in (
        ("transformers", logits_of_transformers(spec, weights, tokens_BS)),
        ("reshard", logits_of_ours(spec, weights, tokens_BS)),
    ):
        worst = np.abs(theirs - expected).max()
        print(f"{case}: torchtune and {name} differ by {worst:.2e} at most, logits up to {np.abs(theirs).max():.1f}")
        assert worst < 2e-5, f"{case}: torchtune and {name} differ by {worst:.2e}"
