"""How do weights alone get into a model, and out of it? From any DCP directory, under its own program's names.

A weights-only checkpoint, a full one of ours, and torchtitan's four ways to name a Llama are all the same here.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from reshard.checkpoint.load import load, stored_names
from reshard.checkpoint.ranks import Ranks
from reshard.checkpoint.state import State, dtype_name, local_part
from reshard.errors import TensorMismatch
from reshard.model.names import TORCHTITAN, canonical_names
from reshard.model.spec import LlamaSpec, parameter_shapes

logger = logging.getLogger(__name__)

P = TypeVar("P", bound=Tensor)

EMBEDDING, OUTPUT = "tok_embeddings.weight", "output.weight"
# What else a full checkpoint holds, ours or torchtitan's: these are not weights.
_OTHER_PARTS = ("optimizer.", "train_state.", "lr_scheduler.", "dataloader.")


def stored_once(parameters: Mapping[str, P], spec: LlamaSpec) -> dict[str, P]:
    """Parameters under the names that a full checkpoint has: a tied model's embedding is in it once.

    In a pipeline the last stage holds a copy of it as `output.weight`; it equals the embedding, so either may be stored.
    """
    if not spec.tied or OUTPUT not in parameters:
        return dict(parameters)
    copy = {} if EMBEDDING in parameters else {EMBEDDING: parameters[OUTPUT]}
    return {**{name: p for name, p in parameters.items() if name != OUTPUT}, **copy}


def repeat_embedding(parameters: Mapping[str, Tensor], spec: LlamaSpec) -> None:
    """Where a rank holds the embedding and its copy, only the embedding was loaded: fill the copy from it."""
    if spec.tied and OUTPUT in parameters and EMBEDDING in parameters:
        with torch.no_grad():
            local_part(parameters[OUTPUT])[0].copy_(local_part(parameters[EMBEDDING])[0])


def weights_state(parameters: Mapping[str, nn.Parameter], spec: LlamaSpec) -> State:
    """Weights only, under flat Meta names. A tied model's output is written too: torchtune wants to find it."""
    once = stored_once(parameters, spec)
    return {**once, OUTPUT: once[EMBEDDING]} if spec.tied and EMBEDDING in once else once


def load_weights(directory: Path, parameters: Mapping[str, nn.Parameter], spec: LlamaSpec, ranks: Ranks) -> None:
    """Fill the model from the weights of any checkpoint of ours or DCP directory of torchtitan's; cast to its dtype.

    parameters: what this rank holds of the model. Collective.
    Raises TensorMismatch where names or shapes do not fit, or where a tied model's output differs from its embedding.
    """
    shapes = ranks.on_first(lambda: stored_names(directory))
    names = canonical_names([name for name in shapes if not name.startswith(_OTHER_PARTS)], TORCHTITAN)
    by_canonical = {canonical: name for name, canonical in names.items()}
    check_shapes(directory, {c: shapes[name][0] for c, name in by_canonical.items()}, spec)
    once = stored_once(parameters, spec)
    dtypes = {shapes[by_canonical[name]][1] for name in once}
    own = {dtype_name(p.dtype) for p in once.values()}
    if dtypes != own:
        logger.info("casting the weights of %s from %s to %s", directory, "/".join(sorted(dtypes)), "/".join(own))
    load(directory, {by_canonical[name]: p for name, p in once.items()}, ranks, cast=True)
    repeat_embedding(parameters, spec)
    if spec.tied and OUTPUT in by_canonical:
        _check_tie(directory, by_canonical[OUTPUT], once.get(EMBEDDING), ranks)


def check_shapes(path: Path, found: Mapping[str, tuple[int, ...]], spec: LlamaSpec) -> None:
    """Do the weights at a path make this model? found: canonical name -> shape. Raises TensorMismatch, with all of it.

    A tied model may come with an output of its own; that it equals the embedding is for the reader to check.
    """
    expected = parameter_shapes(spec)
    missing = [name for name in expected if name not in found]
    unexpected = [name for name in found if name not in expected and not (name == OUTPUT and spec.tied)]
    wrong = {
        name: (str(shape), str(found[name])) for name, shape in expected.items() if found.get(name, shape) != shape
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


def _check_tie(directory: Path, stored_name: str, embedding: nn.Parameter | None, ranks: Ranks) -> None:
    """Compare a stored output with the embedding, on the ranks that hold one. Collective."""
    output = None if embedding is None else torch.empty_like(embedding)
    load(directory, {} if output is None else {stored_name: output}, ranks, cast=True)
    equal = output is None or embedding is None or torch.equal(local_part(output)[0], local_part(embedding)[0])
    if not all(ranks.everywhere(lambda: equal)):
        raise TensorMismatch(
            f"`{directory}` has an output.weight that differs from its embedding, but the model's are tied",
            path=directory,
            hint="train it untied: --model.tied_embeddings false",
        )
