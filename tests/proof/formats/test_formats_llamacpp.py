"""Does llama.cpp itself run our GGUF exports: the same tokens of a text, the same greedy continuation?

llama.cpp comes prebuilt in the npm package node-llama-cpp, installed on the first run into .venv-llamacpp.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest
import tokenizers
import torch
from filelock import FileLock

from reshard.commands.convert import Options, run
from reshard.formats.meta import write_meta
from reshard.model.llama import Llama
from reshard.model.spec import LlamaSpec, RopeScaling, parameter_shapes

ROOT = Path(__file__).resolve().parents[3]
HOME = ROOT / ".venv-llamacpp"
PIN = "node-llama-cpp@3.22.1"
GENERATED = 32
END = 511  # the last token of the vocabulary
SIZES = {"dim": 256, "n_layers": 3, "n_heads": 4, "n_kv_heads": 2, "ffn_dim": 512, "vocab_size": 512}
CASES = {
    "plain, bfloat16": (LlamaSpec(**SIZES), "bfloat16"),
    "tied": (LlamaSpec(**SIZES, tied=True), None),
    "factor 8": (LlamaSpec(**SIZES, rope_scaling=RopeScaling(8.0)), None),
    # With a theta this small, scaling is felt within a few positions.
    "factor 32": (LlamaSpec(**SIZES, rope_theta=100.0, rope_scaling=RopeScaling(32.0, original_context=64)), "float32"),
}
PROMPT = "Train Llama-family models, and look after their checkpoints: 3.1415 of them, naïvely."

PROGRAM = """
import {getLlama, LlamaLogLevel} from "node-llama-cpp";
const [,, path, prompt, count] = process.argv;
const llama = await getLlama({gpu: false, build: "never", logLevel: LlamaLogLevel.error, maxThreads: 1});
const model = await llama.loadModel({modelPath: path, gpuLayers: 0});
const context = await model.createContext({contextSize: 256, threads: 1});
const tokens = [model.tokens.bos, ...model.tokenize(prompt)];
const generated = [];
for await (const token of context.getSequence().evaluate(tokens, {temperature: 0})) {
  generated.push(token);
  if (generated.length >= Number(count)) break;
}
console.log(JSON.stringify({tokens, generated, text: model.detokenize(generated), eos: model.tokens.eos}));
process.exit(0);
"""


@pytest.fixture(scope="session")
def llama_cpp():
    """The folder with a program that runs llama.cpp. Whatever goes wrong here is a failure, never a skip."""
    HOME.mkdir(exist_ok=True)
    ready = HOME / "pin.txt"
    with FileLock(HOME / "making.lock"):
        if not ready.exists() or ready.read_text() != PIN:
            subprocess.run(["npm", "install", "--no-fund", "--no-audit", PIN], cwd=HOME, check=True, timeout=900)
            ready.write_text(PIN)
    (HOME / "generate.mjs").write_text(PROGRAM)
    return HOME


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A byte-level BPE of 512 tokens, trained on our licence (a text that stays), as a run of ours would have it."""
    from reshard.formats.tokenizer_json import LLAMA3_SPLIT, tokenizer_json

    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(LLAMA3_SPLIT), behavior="isolated")
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([split, byte_level])
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=510, initial_alphabet=alphabet, show_progress=False)
    inner.train_from_iterator([(ROOT / "LICENSE").read_text()], trainer)
    model = json.loads(inner.to_str())["model"]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    special = [(510, "<|begin_of_text|>", True), (511, "<|end_of_text|>", True)]
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    path.write_bytes(tokenizer_json(model["vocab"], merges, special, 510))
    return path


def make_weights(spec):
    generator = torch.Generator().manual_seed(11)  # whose choices of tokens are clear for 22 tokens and more
    weights = {}
    for name, shape in parameter_shapes(spec).items():
        values = torch.randn(shape, generator=generator)
        if name.endswith("norm.weight"):
            values = 1 + 0.3 * values
        elif "tok_embeddings" not in name:
            values *= 1.5 / shape[1] ** 0.5
        elif spec.tied:
            values *= 0.2
        weights[name] = values.bfloat16().float()
    return weights


def greedy(spec, weights, tokens):
    model = Llama(spec)
    model.load_state_dict(weights, strict=True)
    model.init_rope(torch.arange(256))
    sequence, margins = list(tokens), []
    with torch.inference_mode():
        for _ in range(GENERATED):
            best = model.eval()(torch.tensor([sequence]))[0, -1].topk(2)
            margins.append(float(best.values[0] - best.values[1]))
            sequence.append(int(best.indices[0]))
    return sequence[len(tokens) :], margins


@pytest.mark.parametrize("case", CASES)
def test_same_tokens_and_same_continuation(llama_cpp, tokenizer, tmp_path, case):
    spec, dtype = CASES[case]
    weights = make_weights(spec)
    if spec.rope_scaling and spec.rope_scaling.factor == 32:
        # params.json cannot say it for this width: the checkpoint comes from a bare .pt
        torch.save(weights, tmp_path / "m.pt")
        run_from = tmp_path / "m.pt"
        write_config(tmp_path / "config.json", spec)
        model = str(tmp_path / "config.json")
    else:
        write_meta(tmp_path / "meta", weights, spec, 2)
        run_from, model = tmp_path / "meta", None
    run(run_from, tmp_path / "m.gguf", model=model, options=Options(dtype=dtype, tokenizer=tokenizer))
    done = subprocess.run(
        ["node", "generate.mjs", tmp_path / "m.gguf", PROMPT, str(GENERATED)],
        cwd=llama_cpp, capture_output=True, text=True, check=False, timeout=300, env=os.environ,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    theirs = json.loads(done.stdout.splitlines()[-1])
    inner = tokenizers.Tokenizer.from_file(str(tokenizer))
    assert theirs["tokens"] == inner.encode(PROMPT).ids
    assert theirs["eos"] == END
    ours, margins = greedy(spec, weights, theirs["tokens"])
    # llama.cpp's sums are of another order and its activations partly of another dtype: where two tokens are almost as
    # likely, either may win. Up to there, everything is equal; and it ends where the text does.
    sure = next((i for i, margin in enumerate(margins) if margin < 0.03 or ours[i] == END), GENERATED)
    assert sure >= 16
    assert theirs["generated"][:sure] == ours[:sure]


def write_config(path, spec):
    from reshard.formats.hf_config import as_json, config_of

    path.write_bytes(as_json(config_of(spec, "float32", {})))
