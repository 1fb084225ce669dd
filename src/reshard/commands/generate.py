"""What does a checkpoint say? `reshard generate`: the quickest check that an import or a training is sane."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from reshard.commands.model_tokenizer import model_tokenizer
from reshard.commands.open_model import load_model, what_it_is
from reshard.commands.sources import RopeSaid
from reshard.errors import ConfigError, DataError
from reshard.model.llama import Block, Llama


def run(
    path: Path,
    prompt: str,
    *,
    config_path: Path | None,
    flavor: str | None,
    tokenizer: str | None,
    rope_scaling: RopeSaid | None = None,
    max_tokens: int,
    temperature: float,
    top_k: int,
    seed: int,
    show: Callable[[str], object] = lambda text: None,
) -> str:
    """The prompt's continuation, shown piece by piece as it comes. temperature 0: always the likeliest token.

    top_k: choose among so many of the likeliest only; 0: among all. Raises as eval does.
    """
    config, source = what_it_is(path, config_path, flavor, rope_scaling)
    assert source.spec is not None
    names_it = config_path is not None and "tokenizer_path" in config.model.model_fields_set
    known = model_tokenizer(source, config, named=tokenizer, config_names_it=names_it)
    (encoded,) = known.encode_batch([prompt])
    begin = [] if known.bos_id is None else [known.bos_id]
    tokens = [*begin, *(int(token) for token in encoded)]
    if not tokens:
        raise DataError("the prompt has no tokens, and the tokenizer no token to begin with", hint='--prompt "def "')
    if max_tokens < 1:
        raise ConfigError(f"{max_tokens} tokens cannot be generated, expected at least 1", key="max_tokens")
    model = load_model(source, len(tokens) + max_tokens)
    produced: list[int] = []
    written = ""
    for token in continuation(model, tokens, max_tokens, temperature=temperature, top_k=top_k, seed=seed):
        if token == known.eos_id:
            break
        produced.append(token)
        text = known.decode(produced)  # of all so far: a character may be made of several tokens
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            show(text[len(written) :])
            written = text
    return known.decode(produced)


def continuation(
    model: Llama, tokens: list[int], count: int, *, temperature: float = 0.0, top_k: int = 0, seed: int = 0
) -> Iterator[int]:
    """The next tokens, one after the other. The model's rotary table must reach to len(tokens) + count.

    Keys and values of what was read are kept, so that each new token is one pass of one position. A model is used for
    one continuation only.
    """
    generator = torch.Generator().manual_seed(seed)
    cos, sin = model.cos, model.sin
    for block in model.layers.values():
        cast(Block, block).attention.attend = _Remembering()
    at, coming = 0, tokens
    with torch.inference_mode():
        for _ in range(count):
            model.cos, model.sin = cos[at : at + len(coming)], sin[at : at + len(coming)]
            logits_V = model(torch.tensor([coming]))[0, -1].float()
            at += len(coming)
            token = _choose(logits_V, temperature, top_k, generator)
            yield token
            coming = [token]


class _Remembering:
    """Attention that keeps keys and values from call to call."""

    def __init__(self) -> None:
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    def __call__(self, q_BHSE: Tensor, k_BKSE: Tensor, v_BKSE: Tensor) -> Tensor:
        """(B, H, S, E). The first call reads the prompt, all others one position each."""
        first = self._keys is None
        self._keys = k_BKSE if self._keys is None else torch.cat((self._keys, k_BKSE), dim=2)
        self._values = v_BKSE if self._values is None else torch.cat((self._values, v_BKSE), dim=2)
        # A single new position may look at everything, so only the prompt needs the causal mask.
        return F.scaled_dot_product_attention(q_BHSE, self._keys, self._values, is_causal=first, enable_gqa=True)


def _choose(logits_V: Tensor, temperature: float, top_k: int, generator: torch.Generator) -> int:
    if temperature == 0:
        return int(logits_V.argmax())
    if top_k:
        least = logits_V.topk(min(top_k, len(logits_V))).values[-1]
        logits_V = logits_V.masked_fill(logits_V < least, float("-inf"))
    return int(torch.multinomial((logits_V / temperature).softmax(0), 1, generator=generator))
