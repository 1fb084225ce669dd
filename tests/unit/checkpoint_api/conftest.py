"""What these tests share: one thread, and a model whose state is worth saving."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Callable

import pytest
import torch
from torch import nn

torch.set_num_threads(1)

Trained = tuple[nn.Module, torch.optim.Optimizer]


@pytest.fixture
def trained() -> Callable[..., Trained]:
    """trained(steps, seed): a small model and its AdamW after some steps."""

    def make(steps: int = 2, seed: int = 0) -> Trained:
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 3))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, betas=(0.8, 0.9))
        take_steps(model, optimizer, steps)
        return model, optimizer

    return make


def take_steps(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for i in range(steps):
        x = torch.randn(16, 12, generator=torch.Generator().manual_seed(i))
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


@pytest.fixture
def step_on() -> Callable[[nn.Module, torch.optim.Optimizer, int], None]:
    return take_steps
