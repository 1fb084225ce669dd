"""The fault suite in half a minute: some hundred faults, some hundred crashes, a few kills. The whole: tests/proof."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1]))

from faults import campaign, crash, damage, kills, states, stories
from faults.loading import plain_bits, start_ours
from faults.runs import Workshop, train_words, workshop


@pytest.fixture(scope="module")
def shop() -> Iterator[Workshop]:
    with workshop() as made:
        yield made


def test_every_fault_is_refused_or_harmless(shop: Workshop) -> None:
    """A checkpoint with optimizer of four ranks, every file and region of it."""
    place = shop.folder("faults")
    ended = shop.runs.run(train_words(place / "run", shop.text, steps=2, interval=1), world=4)
    assert ended.code == 0, ended.err[0]
    good, stale = (place / f"run/checkpoint/step-{step}" for step in (2, 1))
    faults = list(damage.faults(good, stale, flips=2, others=1))
    tally = campaign.run(faults, good, place / "case", start_ours, plain_bits(good), ours=True, verified=True)
    assert len(tally.outcomes) == len(faults) > 400
    assert tally.those(campaign.WRONG, campaign.UNSAID, campaign.DIED) == []
    assert campaign.not_noticed(tally) == []
    assert {outcome.kind for outcome in tally.those(campaign.HARMLESS)} <= {"extra file", "truncated", "extended"}


def test_every_crash_state_starts_rightly(shop: Workshop) -> None:
    if reason := crash.can_trace():
        pytest.skip(reason)
    place = shop.folder("crashes")
    story = stories.new_steps(shop.runs, place, shop.text, world=2, steps=2)
    report = states.try_all(story, states.states_of(story.history, chance=0, others=20), shop.folder("state"))
    assert report.failures == []
    assert report.states > 300


def test_a_killed_run_leaves_its_newest_step(shop: Workshop) -> None:
    report = kills.kill_saves(shop.runs, shop.folder("kills"), shop.text, kills=3, world=2)
    assert report.failures == []
    assert report.kills == 3
