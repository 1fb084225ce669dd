"""Is the model that weights were made for the one that they are to be put into? Asked wherever the two meet. Imports no torch.

Shapes alone do not tell: heads, RoPE and epsilon change every result, and no shape.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from reshard.config import Config
from reshard.errors import ReshardError, TensorMismatch
from reshard.model.build import spec_of
from reshard.model.spec import LlamaSpec

_FLOAT32 = 1e-6  # relative: GGUF and others keep epsilon and theta in float32
_SCALING = "rope_scaling"


def differences(stored: Mapping[str, Any], spec: LlamaSpec) -> dict[str, tuple[Any, Any]]:
    """Key -> (stored, spec's) of all that is not the same; of a scaled RoPE each number is a key.

    stored: LlamaSpec.to_dict(), as a manifest has it. An older one lacks keys: these are not compared. A key that no spec
    has, of a later version, differs unless it is off.
    """
    theirs, ours = _flat(stored), _flat(spec.to_dict())
    if stored.get(_SCALING, spec.rope_scaling) is None or spec.rope_scaling is None:  # not scaled, on one side or both
        theirs, ours = ({k: v for k, v in flat.items() if not k.startswith(_SCALING)} for flat in (theirs, ours))
        if _SCALING in stored:
            theirs, ours = theirs | {_SCALING: stored[_SCALING]}, ours | {_SCALING: spec.to_dict()[_SCALING]}
    found = {key: (value, ours[key]) for key, value in theirs.items() if key in ours and not _same(value, ours[key])}
    unknown = {key: (value, None) for key, value in theirs.items() if key not in ours and value not in (None, False)}
    return found | unknown


def check_model(path: Path, stored: Mapping[str, Any], config: Config, *, but: Iterable[str] = ()) -> None:
    """Raise TensorMismatch where the weights at a path are of another model than the config's [model] describes.

    It names every key with both values, and the options that describe the weights' own model. but: keys that the caller
    settles by the weights themselves.
    """
    found = {key: pair for key, pair in differences(stored, spec_of(config)).items() if key not in but}
    if not found:
        return
    raise TensorMismatch(
        f"the weights of `{path}` are of another model than [model] describes",
        path=path,
        wrong={key: (str(ours), str(theirs)) for key, (theirs, ours) in found.items()},
        hint=_hint(stored, config, found, but),
    )


def _hint(stored: Mapping[str, Any], config: Config, found: Mapping[str, Any], but: Iterable[str]) -> str:
    values: dict[str, Any] = {}
    for key in found:
        name = key.partition(".")[0]
        if name == _SCALING:
            values["rope_scaling_factor"] = float((stored[name] or {"factor": 0.0}).get("factor", 0.0))
        elif name == "tied":
            values["tied_embeddings"] = stored[name]
        elif name in type(config.model).model_fields:
            values[name] = stored[name]
    if "n_heads" in values and "n_kv_heads" in stored:
        values["n_kv_heads"] = stored["n_kv_heads"]  # would follow the heads otherwise
    try:
        left = differences(stored, spec_of(config.with_values(model=values)))
    except ReshardError:
        left = dict(found)
    beyond = [key for key in left if key not in but]
    if beyond:
        return (
            f"no option of [model] describes {', '.join(beyond)} of these weights: `reshard eval` and `reshard convert` "
            "read them, but they cannot be trained"
        )
    options = " ".join(f"--model.{name} {_typed(value)}" for name, value in values.items())
    return f"train the model that the weights were made for: {options}"


def _typed(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _flat(model: Mapping[str, Any]) -> dict[str, Any]:
    scaling = model.get(_SCALING)
    inner = {f"{_SCALING}.{key}": value for key, value in scaling.items()} if isinstance(scaling, Mapping) else {}
    return {key: value for key, value in model.items() if key != _SCALING} | inner


def _same(left: Any, right: Any) -> bool:
    if isinstance(left, float) or isinstance(right, float):
        try:
            return math.isclose(left, right, rel_tol=_FLOAT32)
        except TypeError:
            return False
    return bool(left == right)
