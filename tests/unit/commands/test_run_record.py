"""Does a run's record say which steps count, on which layout, and what was left behind?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from reshard.commands.run_record import layout_name, read_run, run_of_checkpoints
from reshard.errors import DataError
from reshard.train.metrics import Journal

ONE = {"dp_replicate": 1, "dp_shard": 1, "cp": 1, "tp": 1, "pp": 1}
FSDP2, TP2 = ONE | {"dp_shard": 2}, ONE | {"tp": 2}


class Trainer:
    """Writes the two journals as a run does, with a loss that tells which start took the step."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.starts, self.minute = folder, 0, 0
        self.metrics, self.events = Journal(folder / "metrics.jsonl"), Journal(folder / "events.jsonl")

    def event(self, name: str, **values: Any) -> None:
        self.minute += 1
        at = f"2026-01-02T{self.minute // 60:02}:{self.minute % 60:02}:00.000+00:00"
        self.events.write({"event": name, "at": at, **values})

    def start(self, step: int, layout: dict[str, int], **values: Any) -> None:
        self.starts += 1
        loaded = f"out/checkpoint/step-{step}" if step else None
        self.event("start", **{"step": step, "layout": layout, "world_size": 2, "resumed": step > 0, "loaded": loaded,
                               "notes": [], **values})  # fmt: skip

    def steps(self, first: int, last: int) -> None:
        for step in range(first, last + 1):
            self.metrics.write({"step": step, "loss": step + self.starts / 10, "grad_norm": 1.0, "lr": 1e-3})

    def save(self, step: int, **values: Any) -> None:
        self.event("save", **{"step": step, "kind": "full", "bytes": 100, "path": f"out/checkpoint/step-{step}",
                              "stall_s": 0.1, "write_s": 0.4, **values})  # fmt: skip


@pytest.fixture
def trainer(tmp_path: Path) -> Trainer:
    return Trainer(tmp_path)


def test_a_run_that_was_moved_and_went_back(trainer: Trainer) -> None:
    trainer.start(0, ONE)
    trainer.steps(1, 10)
    trainer.save(10)
    trainer.event("end", step=10)
    trainer.start(10, FSDP2)
    trainer.steps(11, 14)
    trainer.save(14)
    trainer.steps(15, 17)  # and is killed
    trainer.start(14, FSDP2)
    trainer.steps(15, 20)
    trainer.save(20)
    trainer.event("stop", step=20, signal="SIGTERM")
    trainer.event("end", step=20)
    trainer.start(14, TP2)  # somebody asked for it
    trainer.steps(15, 16)
    run = read_run(trainer.folder)

    assert [(s.number, s.layout, s.start_step, s.last_step, s.kept_last_step) for s in run.stretches] == [
        (1, "1 rank", 0, 10, 10), (2, "fsdp2", 10, 17, 14), (3, "fsdp2", 14, 20, 14), (4, "tp2", 14, 16, 16)
    ]  # fmt: skip
    assert [s.ending for s in run.stretches] == ["ended", "cut off", "stopped by SIGTERM", "cut off"]
    expected = [(n, n + 0.1) for n in range(1, 11)] + [(n, n + 0.2) for n in range(11, 15)] + [(15, 15.4), (16, 16.4)]
    assert run.series("loss") == expected
    assert [s.values("loss", kept=False) for s in run.stretches] == [
        [], [(n, n + 0.2) for n in (15, 16, 17)], [(n, n + 0.3) for n in range(15, 21)], []
    ]  # fmt: skip
    assert run.last_step == 16
    assert [(m.kind, m.step) for m in run.marks] == [
        ("start", 0), ("save", 10), ("reshard", 10), ("save", 14), ("resume", 14), ("save", 20), ("stop", 20),
        ("rollback", 14), ("reshard", 14),
    ]  # fmt: skip
    texts = [m.text for m in run.marks]
    assert "resharded 1 rank → fsdp2 from step-10" in texts
    assert "resumed on fsdp2 from step-14, 3 steps taken again" in texts
    assert "went back to step 14: 6 steps left behind" in texts


def test_a_start_that_took_no_step_takes_none_from_others(trainer: Trainer) -> None:
    trainer.start(0, ONE)
    trainer.steps(1, 4)
    trainer.start(2, TP2)
    trainer.event("end", step=2)  # stop_after was reached already
    trainer.start(2, FSDP2)
    trainer.steps(3, 5)
    run = read_run(trainer.folder)
    assert [sorted(s.records) for s in run.stretches] == [[1, 2, 3, 4], [], [3, 4, 5]]
    assert run.series("loss")[2:] == [(3, 3.3), (4, 4.3), (5, 5.3)]


def test_damage_that_was_set_aside_is_a_rollback_before_the_restart(trainer: Trainer) -> None:
    trainer.start(0, ONE)
    trainer.steps(1, 8)
    trainer.save(4)
    trainer.save(8)
    trainer.start(4, TP2)
    trainer.event("rollback", step=4, set_aside="out/checkpoint/step-8", now="out/checkpoint/step-8.damaged",
                  reason="bad CRC32")  # fmt: skip
    trainer.steps(5, 6)
    marks = read_run(trainer.folder).marks[-2:]
    assert [(m.kind, m.text) for m in marks] == [
        ("rollback", "rolled back to step 4: step-8 was damaged (bad CRC32)"),
        ("reshard", "resharded 1 rank → tp2 from step-4"),
    ]


def test_a_new_run_in_an_old_folder(trainer: Trainer) -> None:
    trainer.start(0, ONE)
    trainer.steps(1, 6)
    trainer.start(0, ONE)
    trainer.steps(1, 3)
    run = read_run(trainer.folder)
    assert run.series("loss") == [(1, 1.2), (2, 2.2), (3, 3.2)]
    assert run.last_step == 3
    assert run.marks[-1].text == "began anew on 1 rank"


def test_torn_lines_and_values_of_other_types(trainer: Trainer) -> None:
    trainer.start(0, "a word", world_size="two", notes=7, loaded=3)  # type: ignore[arg-type]
    trainer.steps(1, 2)
    with open(trainer.folder / "metrics.jsonl", "ab") as file:
        for line in ('{"step": true, "loss": 1}', "[1, 2]", "nonsense", '{"loss": 3}', '{"step": -1}', '{"step": 2.5}',
                     '{"step": 3, "loss": "low", "grad_norm": NaN}', "[" * 100000, '{"step": 4, "loss": 1' + "0" * 400 + "}",
                     '{"step": 7, "loss": ' + "[" * 500 + "]" * 500 + "}", '{"step": 5, "lo'):  # fmt: skip
            file.write(line.encode() + b"\n")
        file.write(b'\xff\xfe{"step": 6')
    with open(trainer.folder / "events.jsonl", "ab") as file:
        for line in ('{"event": 3}', '{"event": "save", "step": "x"}', '{"event": "validation", "step": 1, "loss": null}',
                     '{"event": "save", "step": 2, "bytes": -5, "stall_s": Infinity, "at": "yesterday"}'):  # fmt: skip
            file.write(line.encode() + b"\n")
    run = read_run(trainer.folder)
    (stretch,) = run.stretches
    assert sorted(stretch.records) == [1, 2, 3, 4]
    assert run.series("loss") == [(1, 1.1), (2, 2.1)]
    assert (stretch.layout, stretch.world_size, stretch.notes, stretch.loaded) == ("not recorded", None, (), None)
    ((_, save),) = run.saves
    assert (save.step, save.bytes, save.stall_s, save.at) == (2, None, None, None)
    assert run.validations == []


def test_without_events_the_last_line_of_a_step_counts(trainer: Trainer) -> None:
    trainer.steps(1, 4)
    trainer.starts = 5
    trainer.steps(3, 4)
    (trainer.folder / "events.jsonl").unlink()
    run = read_run(trainer.folder)
    assert run.series("loss") == [(1, 1.0), (2, 2.0), (3, 3.5), (4, 4.5)]


def test_the_loss_of_a_checkpoint_is_that_of_the_stretch_that_saved_it(trainer: Trainer) -> None:
    trainer.start(0, ONE)
    trainer.steps(1, 3)
    trainer.save(3)
    trainer.start(0, ONE)
    trainer.steps(1, 3)
    trainer.save(3)
    for only in (None, {3}):
        run = read_run(trainer.folder, only)
        first, second = (save.at for _, save in run.saves)
        assert run.loss_at(3, first, current=False) == 3.1
        assert run.loss_at(3, second, current=True) == 3.2
        assert run.loss_at(2, None, current=False) is None
    assert read_run(trainer.folder, {3}).series("loss") == [(3, 3.2)]
    assert [sorted(s.records) for s in read_run(trainer.folder, {3}).stretches] == [[1, 2, 3], [1, 2, 3]]


def test_where_the_run_of_a_checkpoint_folder_lies(trainer: Trainer) -> None:
    trainer.start(0, ONE)
    trainer.steps(1, 1)
    deep = trainer.folder / "a" / "b"
    deep.mkdir(parents=True)
    found = run_of_checkpoints(deep, {"checkpoint": {"folder": "a/b"}}, {1})
    assert found is not None
    assert found.folder == trainer.folder
    assert run_of_checkpoints(deep, {"checkpoint": {"folder": "b"}}, {1}) is None
    assert run_of_checkpoints(trainer.folder / "checkpoint", None, {1}) is not None


def test_layouts_are_named_as_the_log_names_them() -> None:
    from reshard.parallel.dims import Layout

    for layout in (Layout(), Layout(dp_shard=4), Layout(2, 3, 4, 5, 6)):
        assert layout_name(layout.to_dict()) == str(layout)
    assert layout_name({}) == "not recorded"


@pytest.mark.parametrize("what", ["absent", "empty", "a file", "no lines", "a checkpoint folder", "above"])
def test_what_is_no_run_is_refused_with_a_hint(tmp_path: Path, what: str) -> None:
    folder, journal = tmp_path / "run", json.dumps({"step": 1, "loss": 2.0}) + "\n"
    if what == "a file":
        folder.write_text("x")
    elif what != "absent":
        folder.mkdir()
    if what == "no lines":
        (folder / "metrics.jsonl").write_text("torn")
    if what == "a checkpoint folder":
        (tmp_path / "metrics.jsonl").write_text(journal)
    if what == "above":
        (folder / "inner").mkdir()
        (folder / "inner" / "metrics.jsonl").write_text(journal)
    with pytest.raises(DataError) as caught:
        read_run(folder)
    hint = caught.value.hint or ""
    expected = {"a checkpoint folder": f"reshard report {tmp_path}", "above": f"reshard report {folder / 'inner'}",
                "no lines": "when its first step is done"}.get(what, "job.dump_folder")  # fmt: skip
    assert expected in hint
    assert str(folder) in caught.value.message
