"""`reshard generate` continues as the whole model would, token by token."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from reshard.commands.generate import continuation
from reshard.model.init import initial_rows
from reshard.model.llama import Llama
from reshard.model.spec import LlamaSpec

SPEC = LlamaSpec(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=128, vocab_size=96)


def model(rng_seed: int = 0) -> Llama:
    made = Llama(SPEC)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            parameter.copy_(initial_rows(SPEC, rng_seed, name, 0, parameter.shape[0]))
    made.init_rope(torch.arange(64))
    return made


@pytest.mark.parametrize("prompt", [[5], [5, 17, 3, 80, 2, 9, 11]])
def test_greedy_is_what_the_model_would_say_reading_everything_anew(prompt: list[int]) -> None:
    whole, tokens = model(), list(prompt)
    with torch.inference_mode():
        for _ in range(20):
            tokens.append(int(whole(torch.tensor([tokens]))[0, -1].argmax()))
    assert list(continuation(model(), prompt, 20)) == tokens[len(prompt) :]


def test_sampling_follows_the_probabilities_and_the_seed() -> None:
    drawn = [next(continuation(model(), [5, 17], 1, temperature=1.0, seed=s)) for s in range(200)]
    with torch.inference_mode():
        probabilities = model()(torch.tensor([[5, 17]]))[0, -1].softmax(0)
    likeliest = int(probabilities.argmax())
    assert Counter(drawn)[likeliest] / 200 == pytest.approx(float(probabilities[likeliest]), abs=0.1)
    assert next(continuation(model(), [5, 17], 1, temperature=1.0, seed=7)) == drawn[7]


def test_top_k_keeps_to_the_likeliest() -> None:
    with torch.inference_mode():
        allowed = set(model()(torch.tensor([[5, 17]]))[0, -1].topk(3).indices.tolist())
    drawn = {next(continuation(model(), [5, 17], 1, temperature=5.0, top_k=3, seed=s)) for s in range(60)}
    assert drawn == allowed
