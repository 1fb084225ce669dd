"""Is ring attention the attention of one process? In float64, on two and four ranks, alone and with its neighbours."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Metrics = Callable[[Path], list[tuple[int, float, float]]]

CASES: dict[str, dict[str, dict[str, Any]]] = {
    "one": {},
    "ring 2": {"parallelism": {"context_parallel_degree": 2}},
    "ring 2, recomputed": {
        "parallelism": {"context_parallel_degree": 2},
        "activation_checkpoint": {"mode": "full"},
    },
    "ring 4": {"parallelism": {"context_parallel_degree": 4}},
    "ring 2, tp 2": {"parallelism": {"context_parallel_degree": 2, "tensor_parallel_degree": 2}},
    "ring 2, pp 2": {"parallelism": {"context_parallel_degree": 2, "pipeline_parallel_degree": 2}},
}


@pytest.fixture(scope="module")
def runs(
    tmp_path_factory: pytest.TempPathFactory, launch: Any, tiny: Any, metrics: Metrics
) -> dict[str, list[tuple[int, float, float]]]:
    folder = tmp_path_factory.mktemp("ring")
    by_world: dict[int, list[str]] = {}
    configs = {}
    for title, changes in CASES.items():
        ring = {"context_parallel_method": "ring"} | changes.get("parallelism", {})
        world = ring.get("context_parallel_degree", 1) * ring.get("tensor_parallel_degree", 1)
        by_world.setdefault(world * ring.get("pipeline_parallel_degree", 1), []).append(title)
        configs[title] = tiny(
            folder / title.replace(" ", "-"),
            training={"dtype": "float64"},
            checkpoint={"enable_checkpoint": False},
            **(changes | {"parallelism": ring}),
        )
    for titles in by_world.values():
        for ranks in launch.each([configs[title] for title in titles]):
            assert all(rank.error is None for rank in ranks)
    return {title: metrics(Path(config["job"]["dump_folder"])) for title, config in configs.items()}


@pytest.mark.parametrize("title", [title for title in CASES if title != "one"])
def test_loss_and_gradient_norm_are_those_of_one_process(
    runs: dict[str, list[tuple[int, float, float]]], title: str
) -> None:
    for (_, loss, norm), (_, got_loss, got_norm) in zip(runs["one"], runs[title], strict=True):
        assert got_loss == pytest.approx(loss, rel=1e-11)
        assert got_norm == pytest.approx(norm, rel=1e-11)
