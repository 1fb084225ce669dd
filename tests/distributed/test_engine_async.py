"""Are saves in the background the saves that a run would have made at once? The rest: tests/proof/faults/test_async.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest


@pytest.mark.parametrize("layout", ["1", "fsdp2", "tp2"])
def test_background_saves_are_bit_for_bit_those_made_at_once(
    layout: str, launch: Any, tiny: Any, tmp_path: Path, stored: Any, metrics: Any, events: Any
) -> None:
    """Training goes on while they are written: the limit lets each take as long as several steps."""
    each = {"interval": 1, "keep_latest_k": 0}
    launch(tiny(tmp_path / "at-once", layout, checkpoint=each))
    slow = {**each, "async_mode": "async", "async_write_limit_mb_s": 5.0}
    launch(tiny(tmp_path / "background", layout, checkpoint=slow))
    assert metrics(tmp_path / "background") == metrics(tmp_path / "at-once")
    for step in (1, 2, 3, 4):
        name = f"checkpoint/step-{step}"
        assert stored(tmp_path / "background" / name) == stored(tmp_path / "at-once" / name)
    saves = [event for event in events(tmp_path / "background") if event["event"] == "save"]
    assert [event["step"] for event in saves] == [1, 2, 3, 4]
    assert all(event["write_s"] > event["stall_s"] for event in saves)


def test_a_background_save_that_fails_is_everybodys_error(launch: Any, tiny: Any, tmp_path: Path, stored: Any) -> None:
    config = {"interval": 1, "async_mode": "async"}
    launch(tiny(tmp_path / "run", "fsdp2", training={"stop_after": 1}, checkpoint=config))
    whole = stored(tmp_path / "run/checkpoint/step-1")
    ranks = launch(tiny(tmp_path / "run", "fsdp2", checkpoint=config), file_size_limit={1: 100_000})
    for rank in ranks:
        assert rank.error["type"] == "StorageError"
        assert "step-2" in rank.error["message"]
        assert "__1_0.distcp" in rank.error["message"]
    left = {path.name for path in (tmp_path / "run/checkpoint").iterdir() if not path.name.startswith(".")}
    assert left == {"step-1"}
    assert stored(tmp_path / "run/checkpoint/step-1") == whole
