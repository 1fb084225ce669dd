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
    "ring 2, kept operations": {
        "parallelism": {"context_parallel_degree": 2},
        "activation_checkpoint": {"mode": "selective", "selective_ac_option": "op"},
    },
    "ring 4": {"parallelism": {"context_parallel_degree": 4}},
    "ring 2, tp 2": {"parallelism": {"context_parallel_degree": 2, "tensor_parallel_degree": 2}},
    "ring 2, pp 2": {"parallelism": {"context_parallel_degree": 2, "pipeline_parallel_degree": 2}},
}
# What a kernel has returned is kept for backward: writing to it is what torch refuses. In bfloat16 the log-sum-exp alone
# comes as the merge wants it, and was written to.
HALF: dict[str, dict[str, dict[str, Any]]] = {
    f"ring 2, bfloat16, {title}": {
        "training": {"dtype": "float32", "mixed_precision_param": "bfloat16"},
        "parallelism": {"context_parallel_degree": 2},
        "activation_checkpoint": mode,
    }
    for title, mode in {
        "all kept": {"mode": "none"},
        "kept operations": {"mode": "selective", "selective_ac_option": "op"},
    }.items()
}


@pytest.fixture(scope="module")
def runs(
    tmp_path_factory: pytest.TempPathFactory, launch: Any, tiny: Any, metrics: Metrics
) -> dict[str, list[tuple[int, float, float]]]:
    folder = tmp_path_factory.mktemp("ring")
    by_world: dict[int, list[str]] = {}
    configs = {}
    for title, changes in (CASES | HALF).items():
        ring = {"context_parallel_method": "ring"} | changes.get("parallelism", {})
        world = ring.get("context_parallel_degree", 1) * ring.get("tensor_parallel_degree", 1)
        by_world.setdefault(world * ring.get("pipeline_parallel_degree", 1), []).append(title)
        configs[title] = tiny(
            folder / title.replace(" ", "-"),
            checkpoint={"enable_checkpoint": False},
            **({"training": {"dtype": "float64"}} | changes | {"parallelism": ring}),
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


def test_recomputing_all_but_the_expensive_operations_changes_no_bit_in_bfloat16(
    runs: dict[str, list[tuple[int, float, float]]],
) -> None:
    kept, recomputed = (runs[title] for title in HALF)
    assert recomputed == kept
    assert len(kept) == 4
