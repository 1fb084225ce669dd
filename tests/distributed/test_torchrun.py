"""Are the ranks of these tests those of torchrun? The same run, by the command that a user types."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tomli_w


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["fsdp2", "tp2"])
def test_torchrun_computes_bit_for_bit_what_launched_ranks_do(
    layout: str, launch: Any, tiny: Any, tmp_path: Path, metrics: Any, stored: Any
) -> None:
    launch(tiny(tmp_path / "launched", layout))
    config = tmp_path / "config.toml"
    config.write_text(tomli_w.dumps(tiny(tmp_path / "typed", layout)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    done = subprocess.run(
        [*command, "reshard", "train", str(config)], check=False, capture_output=True, text=True, timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert metrics(tmp_path / "typed") == metrics(tmp_path / "launched")
    assert stored(tmp_path / "typed/checkpoint/step-4") == stored(tmp_path / "launched/checkpoint/step-4")
