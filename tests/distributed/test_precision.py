"""Mixed precision, bfloat16 throughout, and torch.compile: do they run, and stay close to float32?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

STEPS = 6
MIXED = {"mixed_precision_param": "bfloat16"}


@pytest.fixture(scope="module")
def float32(launch: Any, tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("float32")
    launch(tiny(folder, training={"steps": STEPS}))
    return folder


@pytest.mark.parametrize("layout", ["1", "fsdp2", "tp2", "hsdp2x2", "fsdp2xtp2"])
def test_mixed_precision_is_close_to_float32_but_not_float32(
    layout: str, launch: Any, tiny: Any, float32: Path, tmp_path: Path, metrics: Any, plain: Any
) -> None:
    ranks = launch(tiny(tmp_path, layout, training={"steps": STEPS, **MIXED}))
    assert ranks[0].error is None
    assert any("computing in bfloat16" in line for line in ranks[0].log)
    expected, found = metrics(float32), metrics(tmp_path)
    for (_, loss, norm), (_, other_loss, other_norm) in zip(expected, found, strict=True):
        assert other_loss == pytest.approx(loss, rel=5e-3)
        assert other_norm == pytest.approx(norm, rel=5e-2)
    # bfloat16 has 8 bits: it must show, or else nothing was computed in it.
    assert abs(expected[0][1] - found[0][1]) > 1e-6
    # What is kept stays in float32.
    assert {
        str(t.dtype) for n, t in plain(tmp_path / f"checkpoint/step-{STEPS}").items() if n.startswith("model.")
    } == {"torch.float32"}


def test_mixed_precision_is_the_same_on_one_and_two_ranks(launch: Any, tiny: Any, tmp_path: Path, metrics: Any) -> None:
    # Products are rounded to bfloat16 alike wherever they are computed; only gradient sums differ, and those are float32.
    for layout in ("1", "fsdp2"):
        launch(tiny(tmp_path / layout, layout, training={"steps": STEPS, **MIXED}))
    for (_, loss, norm), (_, other_loss, other_norm) in zip(
        metrics(tmp_path / "1"), metrics(tmp_path / "fsdp2"), strict=True
    ):
        assert other_loss == pytest.approx(loss, rel=1e-3)
        assert other_norm == pytest.approx(norm, rel=2e-2)
    first_1, first_2 = metrics(tmp_path / "1")[0], metrics(tmp_path / "fsdp2")[0]
    assert first_2[1] == pytest.approx(first_1[1], rel=1e-6)


@pytest.mark.parametrize("layout", ["1", "fsdp2", "tp2"])
def test_a_mixed_precision_run_resumes_bitwise(
    layout: str, launch: Any, tiny: Any, tmp_path: Path, metrics: Any, stored: Any
) -> None:
    training = {"steps": STEPS, **MIXED}
    stopped = tiny(tmp_path / "b", layout, training={**training, "stop_after": 3})
    launch.each([tiny(tmp_path / "a", layout, training=training), stopped])
    launch(tiny(tmp_path / "b", layout, training=training))
    assert metrics(tmp_path / "a") == metrics(tmp_path / "b")
    last = f"checkpoint/step-{STEPS}"
    assert stored(tmp_path / "a" / last) == stored(tmp_path / "b" / last)


@pytest.mark.parametrize("layout", ["1", "fsdp2"])
def test_bfloat16_throughout_trains_and_stores_bfloat16(
    layout: str, launch: Any, tiny: Any, float32: Path, tmp_path: Path, metrics: Any, plain: Any
) -> None:
    launch(tiny(tmp_path, layout, training={"steps": STEPS, "dtype": "bfloat16"}))
    for (_, loss, _), (_, other_loss, _) in zip(metrics(float32), metrics(tmp_path), strict=True):
        assert other_loss == pytest.approx(loss, rel=1e-2)
    saved = plain(tmp_path / f"checkpoint/step-{STEPS}")
    kept = [t for n, t in saved.items() if n.startswith("model.") or n.endswith(("exp_avg", "exp_avg_sq"))]
    assert {t.dtype for t in kept} == {torch.bfloat16}


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["1"])
def test_compiled_blocks_compute_what_eager_ones_do(
    layout: str, launch: Any, tiny: Any, tmp_path: Path, metrics: Any, stored: Any
) -> None:
    training = {"steps": 3}
    launch(tiny(tmp_path / "eager", layout, training=training))
    ranks = launch(tiny(tmp_path / "compiled", layout, training={**training, "compile": True}), timeout_s=550)
    assert ranks[0].error is None
    for (_, loss, norm), (_, other_loss, other_norm) in zip(
        metrics(tmp_path / "eager"), metrics(tmp_path / "compiled"), strict=True
    ):
        assert other_loss == pytest.approx(loss, rel=1e-6)
        assert other_norm == pytest.approx(norm, rel=1e-5)
    step = "checkpoint/step-3"
    assert set(stored(tmp_path / "eager" / step)) == set(stored(tmp_path / "compiled" / step))  # names stay Meta's
