"""Is a journal one whole JSON line a step, over restarts and crashes?"""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path

import pytest

from reshard.config import Config
from reshard.train.metrics import Journal, Reporter, last_of_each_step, read_journal


def write(path: Path, *records: dict[str, object]) -> None:
    journal = Journal(path)
    for record in records:
        journal.write(record)
    journal.close()


def test_records_come_back_in_order_and_restarts_append(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "metrics.jsonl"
    write(path, {"step": 1}, {"step": 2})
    write(path, {"step": 3})
    assert read_journal(path) == [{"step": 1}, {"step": 2}, {"step": 3}]
    assert path.read_bytes().count(b"\n") == 3


def test_floats_keep_every_digit(tmp_path: Path) -> None:
    values = [1 / 3, 0.1 + 0.2, 6.755256579076066, 5e-324, 1e308, math.pi]
    write(tmp_path / "m", *({"step": i, "loss": v} for i, v in enumerate(values)))
    assert [r["loss"] for r in read_journal(tmp_path / "m")] == values


def test_a_line_is_there_as_soon_as_it_is_written(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "m")
    journal.write({"step": 1})
    assert read_journal(tmp_path / "m") == [{"step": 1}]  # a crash right now loses nothing
    journal.close()


@pytest.mark.parametrize("kept", range(1, 22))
def test_a_torn_last_line_costs_itself_only(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "m"
    write(path, {"step": 1, "loss": 2.5})
    whole = path.read_bytes()
    torn = json.dumps({"step": 2, "loss": 1.5}).encode()[:kept]
    path.write_bytes(whole + torn)
    assert read_journal(path) == [{"step": 1, "loss": 2.5}]
    write(path, {"step": 2, "loss": 1.25})
    assert read_journal(path) == [{"step": 1, "loss": 2.5}, {"step": 2, "loss": 1.25}]


def test_a_line_that_only_lacks_its_end_counts(tmp_path: Path) -> None:
    path = tmp_path / "m"
    path.write_bytes(b'{"step": 1}\n{"step": 2}')
    write(path, {"step": 3})
    assert [r["step"] for r in read_journal(path)] == [1, 2, 3]


def test_lines_that_are_no_records_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "m"
    path.write_bytes(b'\n\x00\x00\x00\n17\n"text"\n[1]\n\xff\xfe\n{"step": 4}\n')
    assert read_journal(path) == [{"step": 4}]


def test_an_empty_journal_has_no_records(tmp_path: Path) -> None:
    Journal(tmp_path / "m").close()
    assert read_journal(tmp_path / "m") == []


def test_the_last_line_of_a_step_counts() -> None:
    records = [{"step": 1, "loss": 3}, {"step": 2, "loss": 2}, {"step": 2, "loss": 1.5}, {"step": 3, "loss": 1}]
    assert {s: r["loss"] for s, r in last_of_each_step(records).items()} == {1: 3, 2: 1.5, 3: 1}


def reporter(folder: Path, *, first: bool = True, device: str = "cpu") -> Reporter:
    config = Config().with_values(job={"dump_folder": str(folder)}, metrics={"log_freq": 2}, training={"steps": 5})
    return Reporter(config, first=first, device_name=device, flops_per_token=1e9, world_size=2)


def run(report: Reporter, steps: int = 5) -> None:
    report.start_clock()
    for step in range(1, steps + 1):
        report.step(step=step, loss=1 / step, grad_norm=2 / 3, lr=1e-4 / 3, tokens_seen=64 * step, tokens=64)
    report.event("save", step=steps, path="somewhere")
    report.close()


def test_exactly_one_line_a_step_with_the_promised_fields(tmp_path: Path) -> None:
    run(reporter(tmp_path))
    records = read_journal(tmp_path / "metrics.jsonl")
    assert [r["step"] for r in records] == [1, 2, 3, 4, 5]
    fields = {"step", "loss", "grad_norm", "lr", "tokens_seen", "tokens_per_s", "step_time_s", "memory_gib"}
    assert all(set(r) == fields for r in records)
    assert [r["loss"] for r in records] == [1, 1 / 2, 1 / 3, 1 / 4, 1 / 5]
    assert {r["grad_norm"] for r in records} == {2 / 3}
    assert all(r["tokens_per_s"] == pytest.approx(64 / r["step_time_s"]) for r in records)
    assert all(0.01 < r["memory_gib"] < 100 for r in records)


def test_events_go_to_a_journal_of_their_own(tmp_path: Path) -> None:
    run(reporter(tmp_path))
    (event,) = read_journal(tmp_path / "events.jsonl")
    assert (event["event"], event["step"], event["path"]) == ("save", 5, "somewhere")
    assert event["at"].endswith("+00:00")


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    run(reporter(tmp_path, first=False))
    assert list(tmp_path.iterdir()) == []


def test_mfu_is_shown_where_the_peak_is_known(tmp_path: Path) -> None:
    run(reporter(tmp_path, device="NVIDIA H100 80GB HBM3"))
    for record in read_journal(tmp_path / "metrics.jsonl"):
        assert record["mfu"] == pytest.approx(1e9 * record["tokens_per_s"] / (989e12 * 2))


def test_console_has_the_first_the_last_and_every_log_freq_th_step(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "reshard"):
        run(reporter(tmp_path))
    lines = [r.getMessage() for r in caplog.records if r.getMessage().startswith("step")]
    assert [line.split()[1] for line in lines] == ["1", "2", "4", "5"]
    assert "loss 0.5000" in lines[1]


def test_tensorboard_gets_the_same_numbers(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    metrics = {"enable_tensorboard": True, "save_tb_folder": "tb"}
    config = Config().with_values(job={"dump_folder": str(tmp_path)}, metrics=metrics)
    report = Reporter(config, first=True, device_name="cpu", flops_per_token=1.0, world_size=1)
    run(report, steps=3)
    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    assert [(e.step, round(e.value, 4)) for e in events.Scalars("loss")] == [(1, 1.0), (2, 0.5), (3, 0.3333)]
