"""How do weights alone get into a model, and out of it? From any DCP directory, under its own program's names.

A weights-only checkpoint, a full one of ours, and torchtitan's four ways to name a Llama are all the same here.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from reshard.checkpoint.load import load, stored_names
from reshard.checkpoint.ranks import Ranks
from reshard.checkpoint.state import State, dtype_name, local_part
from reshard.errors import TensorMismatch
from reshard.model.names import TORCHTITAN, canonical_names
from reshard.model.spec import LlamaSpec

logger = logging.getLogger(__name__)

EMBEDDING, OUTPUT = "tok_embeddings.weight", "output.weight"
# What else a full checkpoint holds, ours or torchtitan's: these are not weights.
_OTHER_PARTS = ("optimizer.", "train_state.", "lr_scheduler.", "dataloader.")


def weights_state(parameters: Mapping[str, nn.Parameter], spec: LlamaSpec) -> State:
    """Weights only, under flat Meta names. A tied model's output is written too: torchtune wants to find it."""
    return {**parameters, OUTPUT: parameters[EMBEDDING]} if spec.tied else dict(parameters)


def load_weights(directory: Path, parameters: Mapping[str, nn.Parameter], spec: LlamaSpec, ranks: Ranks) -> None:
    """Fill the model from the weights of any checkpoint of ours or DCP directory of torchtitan's; cast to its dtype.

    Raises TensorMismatch where names or shapes do not fit, or where a tied model's output differs from its embedding.
    """
    shapes = ranks.on_first(lambda: stored_names(directory))
    names = canonical_names([name for name in shapes if not name.startswith(_OTHER_PARTS)], TORCHTITAN)
    by_canonical = {canonical: name for name, canonical in names.items()}
    check_shapes(directory, parameters, {c: shapes[name][0] for c, name in by_canonical.items()}, spec)
    dtypes = {shapes[by_canonical[name]][1] for name in parameters}
    own = {dtype_name(p.dtype) for p in parameters.values()}
    if dtypes != own:
        logger.info("casting the weights of %s from %s to %s", directory, "/".join(sorted(dtypes)), "/".join(own))
    load(directory, {by_canonical[name]: p for name, p in parameters.items()}, ranks, cast=True)
    if spec.tied and OUTPUT in by_canonical:
        _check_tie(directory, by_canonical[OUTPUT], parameters[EMBEDDING], ranks)


def check_shapes(
    path: Path, parameters: Mapping[str, nn.Parameter], found: Mapping[str, tuple[int, ...]], spec: LlamaSpec
) -> None:
    """Do the weights at a path fit the model? found: canonical name -> shape. Raises TensorMismatch, with all of it.

    A tied model may come with an output of its own; that it equals the embedding is for the reader to check.
    """
    missing = [name for name in parameters if name not in found]
    unexpected = [name for name in found if name not in parameters and not (name == OUTPUT and spec.tied)]
    wrong = {
        name: (str(tuple(p.shape)), str(found[name]))
        for name, p in parameters.items()
        if name in found and found[name] != tuple(p.shape)
    }
    if not (missing or unexpected or wrong):
        return
    hint = "compare [model] with the checkpoint's: name, flavor and the numbers that replace the flavor's"
    if missing == [OUTPUT] and not unexpected and not wrong:
        hint = "it has no output.weight, its embeddings are tied: --model.tied_embeddings true"
    raise TensorMismatch(
        f"the weights of `{path}` do not fit the model",
        path=path,
        missing=missing,
        unexpected=unexpected,
        wrong=wrong,
        hint=hint,
    )


def _check_tie(directory: Path, stored_name: str, embedding: nn.Parameter, ranks: Ranks) -> None:
    output = torch.empty_like(embedding)
    load(directory, {stored_name: output}, ranks, cast=True)
    equal = torch.equal(local_part(output)[0], local_part(embedding)[0])
    if not all(ranks.everywhere(lambda: equal)):
        raise TensorMismatch(
            f"`{directory}` has an output.weight that differs from its embedding, but the model's are tied",
            path=directory,
            hint="train it untied: --model.tied_embeddings false",
        )
