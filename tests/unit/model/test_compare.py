"""Is another model found by what a manifest says, and do the options that are named describe it?"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from reshard.config import Config, load_config
from reshard.errors import TensorMismatch
from reshard.model.build import spec_of
from reshard.model.compare import check_model, differences
from reshard.model.spec import FLAVORS, LlamaSpec, RopeScaling, flavor

SPEC = LlamaSpec(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=128, vocab_size=512)
TINY = {"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "ffn_dim": 128, "vocab_size": 512}
SCALED = replace(SPEC, rope_scaling=RopeScaling())


def stored(spec: LlamaSpec, **other: Any) -> dict[str, Any]:
    """What a manifest has, which is JSON."""
    found: dict[str, Any] = json.loads(json.dumps(spec.to_dict() | other))
    return found


def refused(theirs: dict[str, Any], config: Config) -> TensorMismatch:
    with pytest.raises(TensorMismatch) as caught:
        check_model(Path("step-4"), theirs, config)
    return caught.value


@pytest.mark.parametrize(
    ("changes", "keys"),
    [
        ({"dim": 32, "head_dim": 8}, {"dim", "head_dim"}),
        ({"n_layers": 3}, {"n_layers"}),
        ({"n_heads": 8, "n_kv_heads": 2, "head_dim": 8}, {"n_heads", "head_dim"}),
        ({"n_heads": 2, "n_kv_heads": 2, "head_dim": 32}, {"n_heads", "head_dim"}),
        ({"n_kv_heads": 1}, {"n_kv_heads"}),
        ({"ffn_dim": 130}, {"ffn_dim"}),
        ({"vocab_size": 513}, {"vocab_size"}),
        ({"rope_theta": 10000.0}, {"rope_theta"}),
        ({"rope_theta": 500001.0}, {"rope_theta"}),
        ({"norm_eps": 1e-6}, {"norm_eps"}),
        ({"norm_eps": 1.01e-5}, {"norm_eps"}),
        ({"tied": True}, {"tied"}),
        ({"rope_scaling": {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_context": 8192}},
         {"rope_scaling"}),
        ({"rope_theta": 10000.0, "norm_eps": 1e-6, "tied": True}, {"rope_theta", "norm_eps", "tied"}),
    ],
)  # fmt: skip
def test_every_key_is_compared_and_the_options_that_are_named_describe_the_weights(
    changes: dict[str, Any], keys: set[str]
) -> None:
    theirs = stored(SPEC, **changes)
    config = Config().with_values(model=TINY)
    error = refused(theirs, config)
    assert set(error.wrong) == keys
    for key in keys - {"rope_scaling"}:
        assert f"{key} expected {getattr(SPEC, key)}, got {theirs[key]}" in error.message
    followed(error, TINY, theirs)


def followed(error: TensorMismatch, model: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Type what the hint says after the options that there were."""
    words = (error.hint or "").rpartition(": ")[2].split()
    before = [word for key, value in model.items() for word in (f"--model.{key}", str(value))]
    mended, _ = load_config(None, [*before, *words])
    assert spec_of(mended) == LlamaSpec.from_dict(theirs)
    check_model(Path("step-4"), theirs, mended)


@pytest.mark.parametrize("asked", [{"name": "llama3_1", "flavor": "debugmodel"}, {"flavor": "1B", "name": "llama3_2"}])
@pytest.mark.parametrize("theirs", [SPEC, SCALED, FLAVORS["8B"], flavor("llama3_1", "8B"), FLAVORS["3B"]])
def test_releases_and_flavors_differ_and_the_options_cross_over(asked: dict[str, str], theirs: LlamaSpec) -> None:
    followed(refused(stored(theirs), Config().with_values(model=asked)), asked, stored(theirs))


@pytest.mark.parametrize("key", ["factor", "low_freq_factor", "high_freq_factor", "original_context"])
def test_each_number_of_a_scaling_is_compared(key: str) -> None:
    scaling = {**SCALED.to_dict()["rope_scaling"], key: 16}
    error = refused(stored(SPEC, rope_scaling=scaling), Config().with_values(model=TINY | {"name": "llama3_1"}))
    assert set(error.wrong) == {f"rope_scaling.{key}"}
    assert ("--model.rope_scaling_factor 16" in (error.hint or "")) == (key == "factor")
    assert ("cannot be trained" in (error.hint or "")) == (key != "factor")  # no option says these


def test_heads_of_a_width_of_their_own_are_beyond_the_options() -> None:
    error = refused(stored(SPEC, head_dim=32), Config().with_values(model=TINY))
    assert "head_dim expected 16, got 32" in error.message
    assert "cannot be trained" in (error.hint or "")


def test_the_same_model_is_the_same_however_it_is_written() -> None:
    by_sizes = {"dim": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 8, "ffn_dim": 14336, "vocab_size": 128256}
    assert spec_of(Config().with_values(model=by_sizes)) == FLAVORS["8B"]
    check_model(Path("a"), stored(FLAVORS["8B"]), Config().with_values(model=by_sizes))
    whole = stored(SPEC, rope_theta=500000)  # JSON of another writer: a whole number
    rounded = stored(SPEC, norm_eps=float(np.float32(1e-5)))  # as GGUF keeps it
    older = {key: value for key, value in stored(SPEC).items() if key not in ("rope_scaling", "tied", "head_dim")}
    for theirs in (whole, rounded, older, stored(SPEC, of_a_later_version=None)):
        assert differences(theirs, SPEC) == {}
    older_scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    assert differences(stored(SPEC, rope_scaling=older_scaling), SCALED) == {}


def test_what_no_model_here_has_is_another_model() -> None:
    assert set(differences(stored(SPEC, qk_norm=True), SPEC)) == {"qk_norm"}
    assert "qk_norm" in refused(stored(SPEC, qk_norm=True), Config().with_values(model=TINY)).message
