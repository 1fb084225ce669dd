"""Does a step change the weights as asked? The learning rate, the two groups, the state's names, clipping."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn

from reshard.config import Config
from reshard.train.optimizer import (
    build_optimizer,
    clip_gradients,
    group_values,
    learning_rate,
    optimizer_moments,
    set_learning_rate,
)

torch.set_num_threads(1)


def config(training: dict[str, Any] | None = None, schedule: dict[str, Any] | None = None, lr: float = 1.0) -> Config:
    training = {"warmup_steps": 10, "steps": 100} | (training or {})
    return Config().with_values(optimizer={"lr": lr}, training=training, lr_scheduler=schedule or {})


def curve(*steps: int, **parts: Any) -> list[float]:
    return [learning_rate(step, config(**parts)) for step in steps]


# -- the learning rate ------------------------------------------------------------------------------------------------


def test_warm_up_is_linear_and_ends_at_the_peak() -> None:
    assert curve(1, 5, 10, lr=2.0) == [0.2, 1.0, 2.0]


def test_without_warm_up_the_first_step_is_at_the_peak() -> None:
    assert curve(1, training={"warmup_steps": 0}, schedule={"decay_type": "constant"}) == [1.0]


@pytest.mark.parametrize("decay_type", ["linear", "cosine", "sqrt"])
@pytest.mark.parametrize("warmup", [0, 10])
def test_decay_falls_from_the_peak_and_the_last_step_still_moves(decay_type: str, warmup: int) -> None:
    rates = curve(*range(1, 101), training={"warmup_steps": warmup}, schedule={"decay_type": decay_type})
    after = rates[warmup:] if warmup else rates
    assert all(a > b > 0 for a, b in pairwise(after))
    assert max(rates) <= 1.0
    assert 0 < rates[-1] < 0.05


def test_linear_decay_in_numbers() -> None:
    # 90 steps from the peak at 10, the 91st would be at zero.
    assert curve(11, 55, 100) == pytest.approx([1 - 1 / 91, 1 - 45 / 91, 1 / 91])


def test_cosine_decay_in_numbers() -> None:
    expected = 0.5 * (1 + math.cos(math.pi * 45 / 91))
    assert curve(55, schedule={"decay_type": "cosine"}) == pytest.approx([expected])


def test_sqrt_decay_in_numbers() -> None:
    assert curve(55, schedule={"decay_type": "sqrt"}) == pytest.approx([1 - math.sqrt(45 / 91)])


def test_constant_stays() -> None:
    assert set(curve(10, 11, 50, 100, 5000, schedule={"decay_type": "constant"})) == {1.0}


def test_lr_min_is_a_part_of_the_peak_and_the_floor() -> None:
    rates = curve(*range(11, 200), schedule={"lr_min": 0.1}, lr=2.0)
    assert min(rates) == pytest.approx(0.2)
    assert rates[-1] == pytest.approx(0.2)  # after the end too


def test_warm_up_stable_decay() -> None:
    rates = curve(10, 11, 50, 80, 81, 100, schedule={"decay_ratio": 0.2})
    assert rates[:4] == [1.0, 1.0, 1.0, 1.0]  # decays over the last 20 of 100 steps
    assert rates[4] == pytest.approx(1 - 1 / 21)
    assert rates[5] == pytest.approx(1 / 21)


def test_a_decay_ratio_of_one_begins_after_the_warm_up() -> None:
    assert curve(10, 11, schedule={"decay_ratio": 1.0}) == pytest.approx([1.0, 1 - 1 / 91])


def test_decay_steps_is_its_own_option_and_defaults_to_steps() -> None:
    # A run that is lengthened keeps its curve if decay_steps says where the curve ends.
    long = {"training": {"steps": 400}, "schedule": {"decay_steps": 100}}
    assert curve(*range(1, 101), **long) == curve(*range(1, 101))
    assert curve(*range(1, 101), training={"steps": 400}) != curve(*range(1, 101))
    assert set(curve(200, 400, **long)) == {0.0}


def test_stop_after_does_not_bend_the_curve() -> None:
    assert curve(*range(1, 101), training={"stop_after": 50}) == curve(*range(1, 101))


def test_a_step_is_a_pure_function() -> None:
    same = config()
    once = [learning_rate(step, same) for step in range(1, 101)]
    assert [learning_rate(step, same) for step in reversed(range(1, 101))] == once[::-1]


def test_more_warm_up_than_steps() -> None:
    assert curve(5, 50, training={"warmup_steps": 100, "steps": 50}) == [0.05, 0.5]


# -- the optimizer ----------------------------------------------------------------------------------------------------


def parameters() -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "tok_embeddings.weight": (6, 4),
        "layers.0.attention.wq.weight": (4, 4),
        "layers.0.ffn_norm.weight": (4,),
        "norm.weight": (4,),
    }
    return {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in shapes.items()}


def with_gradients(params: dict[str, nn.Parameter], value: float | None = None) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    for p in params.values():
        p.grad = torch.full_like(p, value) if value is not None else torch.randn(p.shape, generator=generator)
    return params


def test_norms_and_embeddings_decay_by_default_and_not_by_option() -> None:
    params = parameters()
    (group,) = build_optimizer(params, Config().optimizer).param_groups
    assert group["weight_decay"] == 0.1
    assert len(group["params"]) == 4
    option = Config().with_values(optimizer={"decay_norms_and_embeddings": False}).optimizer
    decay, plain = build_optimizer(params, option).param_groups
    assert [id(p) for p in decay["params"]] == [id(params["layers.0.attention.wq.weight"])]
    assert decay["weight_decay"] == 0.1
    assert len(plain["params"]) == 3
    assert plain["weight_decay"] == 0


@pytest.mark.parametrize("implementation", ["for-loop", "foreach", "fused"])
@pytest.mark.parametrize("name", ["AdamW", "Adam"])
def test_two_steps_are_those_of_the_textbook(name: str, implementation: str) -> None:
    asked = Config().with_values(
        optimizer={"name": name, "implementation": implementation, "beta2": 0.99, "weight_decay": 0.3}
    )
    params = with_gradients(parameters())
    expected = {n: (p.detach().double(), 0.0, 0.0) for n, p in params.items()}
    optimizer = build_optimizer(params, asked.optimizer)
    for step, lr in ((1, 1e-2), (2, 5e-3)):
        for n, p in params.items():
            assert p.grad is not None
            w, m, v = expected[n]
            g = p.grad.double() + (0.3 * w if name == "Adam" else 0)
            w = w * (1 - lr * 0.3) if name == "AdamW" else w
            m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g * g
            step_size = (m / (1 - 0.9**step)) / ((v / (1 - 0.99**step)) ** 0.5 + 1e-8)
            expected[n] = (w - lr * step_size, m, v)
        set_learning_rate(optimizer, lr)
        optimizer.step()
    for n, p in params.items():
        torch.testing.assert_close(p.detach().double(), expected[n][0], rtol=1e-5, atol=1e-6)


def test_state_is_there_before_the_first_step_and_is_what_torch_would_make() -> None:
    params, others = with_gradients(parameters()), with_gradients(parameters())
    ours = build_optimizer(params, Config().optimizer)
    assert all(float(t.abs().sum()) == 0 for t in optimizer_moments(ours, params).values())
    lr = Config().optimizer.lr
    theirs = torch.optim.AdamW(others.values(), lr=lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, fused=True)
    for _ in range(3):
        ours.step()
        theirs.step()
    for name, other in others.items():
        assert torch.equal(params[name], other)
        for key, value in theirs.state[other].items():
            mine = optimizer_moments(ours, params)[f"state.{name}.{key}"]
            assert torch.equal(mine, value)
            assert (mine.dtype, mine.shape) == (value.dtype, value.shape)


def test_moments_are_the_tensors_themselves() -> None:
    params = parameters()
    optimizer = build_optimizer(params, Config().optimizer)
    moments = optimizer_moments(optimizer, params)
    assert set(moments) == {f"state.{name}.{key}" for name in params for key in ("step", "exp_avg", "exp_avg_sq")}
    moments["state.norm.weight.exp_avg"].fill_(3)
    assert optimizer.state[params["norm.weight"]]["exp_avg"][0] == 3


def test_group_values_are_once_per_group_with_every_digit() -> None:
    asked = Config().with_values(optimizer={"lr": 0.1, "beta2": 0.999, "decay_norms_and_embeddings": False}).optimizer
    optimizer = build_optimizer(parameters(), asked)
    set_learning_rate(optimizer, 1 / 3)
    values = {name: tensor.item() for name, tensor in group_values(optimizer).items()}
    assert values["groups.decay.lr"] == values["groups.no_decay.lr"] == 1 / 3
    assert values["groups.decay.beta2"] == 0.999
    assert (values["groups.decay.weight_decay"], values["groups.no_decay.weight_decay"]) == (0.1, 0.0)


# -- clipping ---------------------------------------------------------------------------------------------------------


def norm_of(params: dict[str, nn.Parameter]) -> float:
    return math.sqrt(sum(float(p.grad.double().pow(2).sum()) for p in params.values() if p.grad is not None))


def test_clipping_is_by_the_norm_of_all_and_returns_what_it_was() -> None:
    params = with_gradients(parameters())
    before = {n: p.grad.clone() for n, p in params.items() if p.grad is not None}
    norm = norm_of(params)
    assert clip_gradients(params, 0.5).item() == pytest.approx(norm)
    assert norm_of(params) == pytest.approx(0.5, rel=1e-4)
    for n, p in params.items():
        torch.testing.assert_close(p.grad, before[n] * (0.5 / norm), rtol=1e-4, atol=0)


def test_what_is_short_enough_is_left_alone() -> None:
    params = with_gradients(parameters(), value=1e-3)
    clip_gradients(params, 1.0)
    assert all(bool((p.grad == 1e-3).all()) for p in params.values() if p.grad is not None)


def test_max_norm_0_only_measures() -> None:
    params = with_gradients(parameters(), value=5.0)
    assert clip_gradients(params, 0.0).item() == pytest.approx(norm_of(params))
    assert all(bool((p.grad == 5.0).all()) for p in params.values() if p.grad is not None)
