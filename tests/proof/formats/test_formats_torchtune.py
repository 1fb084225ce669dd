"""Do torchtune's three checkpointers load our exports, by the recipe that lies beside them, and compute the same?

torchtune lives in an environment of its own, which the first run makes (.venv-torchtune), as for test_torchtune.py.
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

from reshard.commands.convert import Options, run
from reshard.formats.meta import write_meta
from reshard.formats.torchtune import builder_of
from reshard.model.llama import Llama
from reshard.model.spec import FLAVORS, LlamaSpec, RopeScaling, flavor, parameter_count, parameter_shapes

ROOT = Path(__file__).resolve().parents[3]
VENV = ROOT / ".venv-torchtune"
PINS = ("torch==2.13.0", "torchao==0.15.0", "torchtune==0.6.1")
TOKENS = 96
TOLERANCE = 2e-5
SMALL = {"dim": 64, "n_layers": 3, "n_heads": 4, "n_kv_heads": 2, "ffn_dim": 192, "vocab_size": 128}
CASES = {
    "llama3": LlamaSpec(**SMALL),
    "llama3_1": LlamaSpec(**SMALL, rope_scaling=RopeScaling(factor=8.0)),
    "llama3_2": LlamaSpec(
        dim=2048, n_layers=1, n_heads=32, n_kv_heads=8, ffn_dim=256, vocab_size=128, tied=True,
        rope_scaling=RopeScaling(factor=32.0),
    ),
}  # fmt: skip


def command(*words, **environment):
    done = subprocess.run(
        [str(word) for word in words],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=1800,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )  # fmt: skip
    assert done.returncode == 0, f"{' '.join(map(str, words))}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="session")
def torchtune():
    """The python of the environment that has torchtune. Whatever goes wrong here is a failure, never a skip."""
    python, ready = VENV / "bin" / "python", VENV / "pins.txt"
    VENV.mkdir(exist_ok=True)
    with FileLock(VENV / "making.lock"):
        if not ready.exists() or ready.read_text().split() != list(PINS):
            command(sys.executable, "-m", "venv", VENV)
            command(python, "-m", "pip", "install", "--quiet", PINS[0])
            command(python, "-m", "pip", "install", "--quiet", *PINS)
            ready.write_text("\n".join(PINS))
    return python


def make_weights(spec):
    generator = torch.Generator().manual_seed(7)
    weights = {}
    for name, shape in parameter_shapes(spec).items():
        values = torch.randn(shape, generator=generator)
        if name.endswith("norm.weight"):
            weights[name] = 1 + 0.3 * values
        else:
            weights[name] = values * (0.3 if "tok_embeddings" in name else 1.0 / shape[1] ** 0.5)
    return weights


def logits_of_ours(spec, weights, tokens_BS):
    model = Llama(spec)
    model.load_state_dict(weights, strict=True)
    model.init_rope(torch.arange(tokens_BS.shape[1]))
    with torch.inference_mode():
        return model.eval()(tokens_BS).numpy()


def hf_recipe(spec, directory):
    """What a user of FullModelHFCheckpointer writes; our Hugging Face export has no YAML of its own."""
    builder, arguments = builder_of(spec)
    kind = "LLAMA3_2" if spec.tied else "LLAMA3"
    files = ", ".join(p.name for p in sorted(directory.glob("*.safetensors")))
    lines = [
        "model:",
        f"  _component_: {builder}",
        *(f"  {k}: {v:.8f}" if isinstance(v, float) else f"  {k}: {v}" for k, v in arguments.items()),
    ]
    lines += [
        "checkpointer:", "  _component_: torchtune.training.FullModelHFCheckpointer", f"  checkpoint_dir: {directory}",
        f"  checkpoint_files: [{files}]", f"  output_dir: {directory}-tuned", f"  model_type: {kind}",
    ]  # fmt: skip
    return "\n".join(lines)


@pytest.mark.parametrize("way", ["torchtune", "meta", "hf"])
@pytest.mark.parametrize("case", CASES)
def test_equal_logits(torchtune, tmp_path, case, way):
    spec = CASES[case]
    weights = make_weights(spec)
    tokens_BS = torch.randint(spec.vocab_size, (2, TOKENS), generator=torch.Generator().manual_seed(3))
    write_meta(tmp_path / "meta", weights, spec, 2)
    run(tmp_path / "meta", tmp_path / "step-0")
    out = tmp_path / "out"
    if way == "hf":
        run(tmp_path / "step-0", out, to="hf", options=Options(max_shard_bytes=100_000))
        recipe = tmp_path / "hf.yaml"
        recipe.write_text(hf_recipe(spec, out))
    else:
        run(tmp_path / "step-0", out, to="torchtune", options=Options(names=way))
        recipe = out / "checkpointer.yaml"
    np.save(tmp_path / "tokens.npy", tokens_BS.numpy())
    reads = Path(__file__).with_name("formats_torchtune_reads.py")
    command(torchtune, reads, recipe, tmp_path / "tokens.npy", tmp_path / "logits.npy", PYTHONPATH="")
    theirs = np.load(tmp_path / "logits.npy")
    worst = np.abs(theirs - logits_of_ours(spec, weights, tokens_BS)).max()
    print(f"{case} by {way}: differ by {worst:.2e} at most, logits up to {np.abs(theirs).max():.1f}")
    assert theirs.std() > 0.1
    assert worst < TOLERANCE


def test_every_released_size_has_its_builder(torchtune):
    """The builders exist, and build a model of the same shapes: checked on meta tensors."""
    names = {
        ("llama3", "8B"),
        ("llama3", "70B"),
        ("llama3_1", "8B"),
        ("llama3_1", "405B"),
        ("llama3_2", "1B"),
        ("llama3_2", "3B"),
    }
    code = (
        "import sys, json, importlib, torch\n"
        "builder, arguments = json.loads(sys.argv[1])\n"
        "package, _, name = builder.rpartition('.')\n"
        "with torch.device('meta'):\n"
        "    model = getattr(importlib.import_module(package), name)(**arguments)\n"
        "print(sum(p.numel() for p in model.parameters()))\n"
    )
    assert set(FLAVORS) >= {size for _, size in names}
    for name, size in sorted(names):
        spec = flavor(name, size)
        builder, arguments = builder_of(spec)
        assert arguments == {}
        counted = command(torchtune, "-c", code, json.dumps([builder, arguments]), PYTHONPATH="")
        assert int(counted) == parameter_count(spec), (name, size)
