"""What is left of a run that dies by SIGKILL? The short form is in tests/faults/test_faults_short.py."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2]))

from faults.kills import kill_a_training, kill_saves
from faults.runs import Workshop, workshop


@pytest.fixture(scope="module")
def shop() -> Iterator[Workshop]:
    with workshop() as made:
        yield made


@pytest.mark.parametrize(("mode", "kills"), [("disabled", 30), ("async", 20)])
def test_a_killed_run_leaves_its_newest_step(mode: str, kills: int, shop: Workshop) -> None:
    """Two ranks that save every step: after each death the newest step is the one the run had said it saved, or the one
    after it, bit for bit; nothing else has come to harm. In the background as well.
    """
    options = ("--checkpoint.async_mode", mode)
    report = kill_saves(shop.runs, shop.folder(f"saves-{mode}"), shop.text, kills=kills, world=2, options=options)
    assert report.failures == []
    assert report.kills == kills
    assert report.during["writing a step"] + report.during["committing, or deleting an old step"] > 3, report


@pytest.mark.parametrize(("world", "kills"), [(2, 20), (1, 20)])
def test_a_training_that_is_killed_twenty_times_is_the_same_training(world: int, kills: int, shop: Workshop) -> None:
    """Losses, gradient norms, the last checkpoint's weights and moments, all bit for bit those of the run in peace."""
    place = shop.folder(f"training-{world}")
    report = kill_a_training(shop.runs, place, shop.text, steps=200, kills=kills, interval=7, world=world)
    assert report.failures == []
    assert (report.kills, report.steps) == (kills, 200)
