"""Is a resume exact? A run that was stopped and started again is, bit for bit, the run that was not.

float32, where every difference in the order of a sum would show. Tensors are read by plain torch DCP, and what the
ranks held in memory is put together by DTensor: our own reader and writer are not asked about themselves.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from reshard.config import Config
from reshard.text import TrainingText, prepare

STEPS, STOP = 20, 10
SEQ_LEN, GLOBAL_BATCH = 32, 8
LAYOUTS = ["1", "fsdp2", "tp2", "fsdp2xtp2", "hsdp2x2"]
DATA_PARALLEL = {"1": 1, "fsdp2": 2, "tp2": 1, "fsdp2xtp2": 2, "hsdp2x2": 4}


class Story(NamedTuple):
    """One layout's three runs: not stopped; stopped after step 10; started again."""

    straight: list[Any]
    stopped: list[Any]
    resumed: list[Any]
    straight_folder: Path
    broken_folder: Path


@pytest.fixture(scope="module", params=LAYOUTS)
def layout(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def story(layout: str, launch: Any, tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    folder = tmp_path_factory.mktemp(layout)
    changes: dict[str, Any] = {"activation_checkpoint": {"mode": "selective"}}
    often = {**changes, "checkpoint": {"interval": STOP}}
    straight = tiny(folder / "straight", layout, training={"steps": STEPS}, **often)
    stopped = tiny(folder / "broken", layout, training={"steps": STEPS, "stop_after": STOP}, **changes)
    resumed = tiny(folder / "broken", layout, training={"steps": STEPS}, **changes)
    first, second = launch.each([straight, stopped], sequences=True, tensors=True)
    third = launch(resumed, sequences=True, tensors=True)  # on processes that have never seen the run
    return Story(first, second, third, folder / "straight", folder / "broken")


def test_losses_and_norms_are_bitwise_those_of_the_run_that_was_not_stopped(story: Story, metrics: Any) -> None:
    straight, broken = metrics(story.straight_folder), metrics(story.broken_folder)
    assert [step for step, _, _ in broken] == list(range(1, STEPS + 1))
    assert broken == straight  # floats with every digit
    assert len({loss for _, loss, _ in straight}) == STEPS
    assert story.resumed[0].loss == story.straight[0].loss == straight[-1][1]


def test_the_stop_saved_a_full_checkpoint_and_the_resume_said_so(story: Story, events: Any) -> None:
    assert story.stopped[0].step == STOP
    assert Path(story.stopped[0].checkpoint).name == f"step-{STOP}"
    happened = events(story.broken_folder)
    assert [(e["step"], e["kind"]) for e in happened if e["event"] == "save"] == [(STOP, "full"), (STEPS, "full")]
    first, second = (e for e in happened if e["event"] == "start")
    assert (first["step"], first["resumed"], first["loaded"]) == (0, False, None)
    assert (second["step"], second["resumed"]) == (STOP, True)
    assert second["loaded"].endswith(f"step-{STOP}")
    assert any("resuming after step 10" in line for line in story.resumed[0].log)


@pytest.mark.parametrize("step", [STOP, STEPS])
def test_every_stored_parameter_and_moment_is_bit_equal(story: Story, step: int, plain: Any) -> None:
    straight, broken = (plain(f / "checkpoint" / f"step-{step}") for f in (story.straight_folder, story.broken_folder))
    assert set(straight) == set(broken)
    kinds = {name.rpartition(".")[2] for name in straight if name.startswith("optimizer.state.")}
    assert kinds == {"step", "exp_avg", "exp_avg_sq"}
    for name, tensor in straight.items():
        assert tensor.dtype == broken[name].dtype
        assert bool((tensor == broken[name]).all()), name
        if name.startswith(("model.", "optimizer.state.")):
            assert float(tensor.double().abs().sum()) > 0, name  # nothing is equal because it is empty


def test_what_is_stored_is_what_the_ranks_held(story: Story, stored: Any) -> None:
    saves = [(story.straight, story.straight_folder, STEPS), (story.stopped, story.broken_folder, STOP),
             (story.resumed, story.broken_folder, STEPS)]  # fmt: skip
    for ranks, folder, step in saves:
        on_disk = stored(folder / "checkpoint" / f"step-{step}")
        for rank in ranks:
            assert rank.after
            assert {name: on_disk[name] for name in rank.after} == rank.after
    on_disk = stored(story.broken_folder / "checkpoint" / f"step-{STOP}")
    for rank in story.resumed:
        assert {name: on_disk[name] for name in rank.before} == rank.before


def test_the_ranks_read_on_where_they_had_stopped(story: Story, layout: str, tiny: Any, tmp_path: Path) -> None:
    for straight, stopped, resumed in zip(story.straight, story.stopped, story.resumed, strict=True):
        assert [*stopped.fed, *resumed.fed] == straight.fed
    config = Config().with_values(**tiny(tmp_path, layout))
    data, _ = prepare(config, 512, progress=False)
    text = TrainingText(data.train, SEQ_LEN, 0)
    micro_steps = GLOBAL_BATCH // (2 * DATA_PARALLEL[layout])
    # Ranks of one tensor-parallel group read the same; the last axis counts fastest, so each group's first will do.
    readers = story.straight[:: len(story.straight) // DATA_PARALLEL[layout]]
    for step in range(STEPS):
        read = [
            s for rank in readers for batch in rank.fed[step * micro_steps : (step + 1) * micro_steps] for s in batch
        ]
        expected = range(step * GLOBAL_BATCH, (step + 1) * GLOBAL_BATCH)
        assert read == [hashlib.blake2b(text[i][:-1].tobytes(), digest_size=8).hexdigest() for i in expected]


def test_a_third_start_has_nothing_to_do(story: Story, layout: str, launch: Any, tiny: Any, metrics: Any) -> None:
    before = metrics(story.broken_folder)
    for rank in launch(tiny(story.broken_folder, layout, training={"steps": STEPS})):
        assert rank.error is None
        assert rank.step == STEPS
        assert rank.loss is None
    assert metrics(story.broken_folder) == before
