"""Are the named Llamas those that were released?"""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from reshard.config import Config
from reshard.errors import ConfigError, LayoutError
from reshard.model.build import spec_of
from reshard.model.llama import Llama
from reshard.model.spec import (
    FLAVORS,
    RELEASES,
    LlamaSpec,
    RopeScaling,
    ffn_dim_from_params,
    flavor,
    flops_per_token,
    parameter_count,
    parameter_shapes,
    scaling_of_release,
)

# As the model cards of the releases count them (a tied embedding once).
TRUE_COUNTS = {
    "1B": 1_235_814_400,
    "3B": 3_212_749_824,
    "8B": 8_030_261_248,
    "70B": 70_553_706_496,
    "405B": 405_853_388_800,
}


@pytest.mark.parametrize("name", TRUE_COUNTS)
def test_flavors_have_the_true_number_of_parameters(name: str) -> None:
    assert parameter_count(FLAVORS[name]) == TRUE_COUNTS[name]


@pytest.mark.parametrize("name", FLAVORS)
def test_shapes_are_those_of_the_module(name: str) -> None:
    spec = replace(FLAVORS[name], n_layers=2)
    with torch.device("meta"):
        model = Llama(spec)
    assert {n: tuple(p.shape) for n, p in model.named_parameters()} == parameter_shapes(spec)
    assert sum(p.numel() for p in model.parameters()) == parameter_count(spec)


@pytest.mark.parametrize(
    ("dim", "multiplier", "multiple_of", "expected"),
    [  # params.json of 3.2 1B, 3.2 3B, 8B, 70B, 405B, and Llama 2 7B, which has no multiplier
        (2048, 1.5, 256, 8192),
        (3072, 1.0, 256, 8192),
        (4096, 1.3, 1024, 14336),
        (8192, 1.3, 4096, 28672),
        (16384, 1.2, 4096, 53248),
        (4096, None, 256, 11008),
    ],
)
def test_ffn_dim_is_what_params_json_computes(
    dim: int, multiplier: float | None, multiple_of: int, expected: int
) -> None:
    assert ffn_dim_from_params(dim, multiplier, multiple_of) == expected


def test_the_debug_model_is_the_one_of_the_issue() -> None:
    debug = FLAVORS["debugmodel"]
    assert (debug.dim, debug.n_layers, debug.n_heads, debug.n_kv_heads, debug.vocab_size) == (256, 8, 16, 8, 512)
    assert debug.head_dim == 16


@pytest.mark.parametrize(
    ("name", "size", "factor"),
    [
        ("llama3", "8B", None),
        ("llama3", "70B", None),
        ("llama3", "405B", 8.0),
        ("llama3", "1B", 32.0),
        ("llama3_1", "8B", 8.0),
        ("llama3_1", "70B", 8.0),
        ("llama3_1", "405B", 8.0),
        ("llama3_2", "1B", 32.0),
        ("llama3_2", "3B", 32.0),
        ("llama3_3", "70B", 8.0),
    ],
)
def test_each_release_has_its_rope_scaling(name: str, size: str, factor: float | None) -> None:
    scaling = flavor(name, size).rope_scaling
    assert (scaling.factor if scaling else None) == factor
    if scaling:
        assert (scaling.low_freq_factor, scaling.high_freq_factor, scaling.original_context) == (1.0, 4.0, 8192)


def test_scaling_of_a_release_by_its_width() -> None:
    assert [scaling_of_release(dim).factor for dim in (2048, 3072, 4096, 8192)] == [32, 32, 8, 8]


def test_tied_are_the_small_ones_of_3_2() -> None:
    assert [name for name, spec in FLAVORS.items() if spec.tied] == ["1B", "3B"]
    assert "output.weight" not in parameter_shapes(FLAVORS["1B"])
    assert "output.weight" in parameter_shapes(FLAVORS["8B"])


@pytest.mark.parametrize(
    "spec", [FLAVORS["debugmodel"], FLAVORS["3B"], replace(FLAVORS["8B"], rope_scaling=RopeScaling(4.0))]
)
def test_a_spec_survives_json(spec: LlamaSpec) -> None:
    assert LlamaSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


def test_an_unknown_key_of_a_spec_is_refused() -> None:
    with pytest.raises(ConfigError, match="n_experts"):
        LlamaSpec.from_dict({**FLAVORS["8B"].to_dict(), "n_experts": 8})


@pytest.mark.parametrize(
    ("name", "size", "key", "hint"),
    [
        ("lama3", "8B", "model.name", "llama3"),
        ("llama3_1", "8b", "model.flavor", "8B"),
        ("llama3_2", "8B", "model.flavor", None),
        ("llama3", "debug_model", "model.flavor", "debugmodel"),
    ],
)
def test_an_unknown_release_or_size_is_refused_with_the_nearest(
    name: str, size: str, key: str, hint: str | None
) -> None:
    with pytest.raises(ConfigError) as caught:
        flavor(name, size)
    assert caught.value.key == key
    assert (name if key == "model.name" else size) in caught.value.message
    valid = RELEASES if key == "model.name" else RELEASES[name]
    assert all(word in caught.value.message for word in valid)
    if hint:
        assert f"`{hint}`" in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("changes", "numbers"),
    [({"n_heads": 7, "head_dim": 0}, ("256", "7")), ({"n_kv_heads": 5}, ("16", "5")), ({"head_dim": 5}, ("5",))],
)
def test_heads_that_do_not_fit_are_refused_with_the_numbers(changes: dict[str, int], numbers: tuple[str, ...]) -> None:
    with pytest.raises(LayoutError) as caught:
        replace(FLAVORS["debugmodel"], **changes)
    assert all(number in caught.value.message for number in numbers)


def test_numbers_of_the_config_replace_the_flavors() -> None:
    model = {
        "dim": 64,
        "n_layers": 2,
        "n_heads": 4,
        "n_kv_heads": 2,
        "vocab_size": 300,
        "rope_theta": 1e4,
        "norm_eps": 1e-6,
    }
    spec = spec_of(
        Config().with_values(model={**model, "ffn_dim": 96, "tied_embeddings": True, "rope_scaling_factor": 4.0})
    )
    expected = LlamaSpec(64, 2, 4, 2, 96, 300, rope_theta=1e4, norm_eps=1e-6, tied=True, rope_scaling=RopeScaling(4.0))
    assert spec == expected
    assert spec.head_dim == 16


def test_scaling_can_be_switched_off() -> None:
    assert spec_of(Config().with_values(model={"name": "llama3_1", "flavor": "8B"})).rope_scaling is not None
    off = Config().with_values(model={"name": "llama3_1", "flavor": "8B", "rope_scaling_factor": 0.0})
    assert spec_of(off).rope_scaling is None


def test_fewer_heads_take_fewer_kv_heads_along() -> None:
    assert spec_of(Config().with_values(model={"dim": 64, "n_heads": 4})).n_kv_heads == 4


def test_flops_per_token_count_what_multiplies() -> None:
    spec = LlamaSpec(dim=8, n_layers=3, n_heads=2, n_kv_heads=2, ffn_dim=16, vocab_size=10)
    matrices = 3 * (4 * 8 * 8 + 3 * 8 * 16) + 10 * 8
    norms = 3 * 2 * 8 + 8
    assert flops_per_token(spec, seq_len=5) == 6 * (matrices + norms) + 12 * 3 * 8 * 5
    tied = replace(spec, tied=True)
    assert flops_per_token(tied, seq_len=5) == flops_per_token(spec, seq_len=5)  # the product is done all the same
