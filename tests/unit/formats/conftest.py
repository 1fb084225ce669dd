"""Tiny Llamas, and Meta directories that are cut by hand: none of the code under test takes part."""

import json

import pytest
import torch

from reshard.model.spec import LlamaSpec, parameter_shapes

# Meta's cutting, written out: dim per tensor kind, everything else is in every file.
CUT = {"wq": 0, "wk": 0, "wv": 0, "wo": 1, "w1": 0, "w2": 1, "w3": 0, "output": 0, "tok_embeddings": 0}


def make_spec(**changes):
    """dim 64, GQA; 16 query and 8 KV heads divide into up to 8 shards."""
    values = {"dim": 64, "n_layers": 2, "n_heads": 16, "n_kv_heads": 8, "ffn_dim": 192, "vocab_size": 128}
    return LlamaSpec(**(values | changes))


def make_weights(spec, dtype=torch.bfloat16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in parameter_shapes(spec).items()}


def make_params(spec, **changes):
    params = {
        "dim": spec.dim, "n_layers": spec.n_layers, "n_heads": spec.n_heads, "n_kv_heads": spec.n_kv_heads,
        "vocab_size": spec.vocab_size, "multiple_of": 32, "norm_eps": spec.norm_eps, "rope_theta": spec.rope_theta,
    }  # fmt: skip
    return {key: value for key, value in (params | changes).items() if value is not None}


def cut_by_hand(weights, shards, embedding_dim=0):
    """One dict per file."""
    files = [{} for _ in range(shards)]
    for name, tensor in weights.items():
        kind = name.split(".")[-2]
        dim = embedding_dim if kind == "tok_embeddings" else CUT.get(kind)
        parts = [tensor] * shards if dim is None else torch.chunk(tensor, shards, dim)
        for file, part in zip(files, parts, strict=True):
            file[name] = part.clone()
    return files


def save_meta(directory, files, params):
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "params.json").write_text(json.dumps(params))
    for i, file in enumerate(files):
        torch.save(file, directory / f"consolidated.{i:02d}.pth")
    return directory


class Tiny:
    """What the tests build with."""

    spec = staticmethod(make_spec)
    weights = staticmethod(make_weights)
    params = staticmethod(make_params)
    cut = staticmethod(cut_by_hand)
    save = staticmethod(save_meta)


@pytest.fixture(scope="session")
def tiny():
    torch.set_num_threads(1)
    return Tiny
