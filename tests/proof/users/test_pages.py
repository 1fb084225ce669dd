"""Do the pages' longer commands run as they stand? Those of tests/cli/test_docs.py's list that need no cluster."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

PROJECT = Path(__file__).resolve().parents[3]
PAGES = [PROJECT / "README.md", *sorted((PROJECT / "docs").rglob("*.md"))]


def clone(tmp_path: Path) -> Path:
    """What a command needs of a clone, in a folder that may be written to."""
    for name in ("scripts", "train_configs"):
        shutil.copytree(PROJECT / name, tmp_path / name)
    shutil.copy(PROJECT / "run_llama_train.sh", tmp_path)
    return tmp_path


def parities() -> list[str]:
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    return sorted(set(re.findall(r"^(reshard parity [^#\n]+?)\s*(?:#.*)?$", text, flags=re.MULTILINE)))


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("line", parities())
def test_parity_as_the_pages_have_it(line: str, shell: Any, tmp_path: Path) -> None:
    done = shell(f"{line} --json", cwd=clone(tmp_path), timeout_s=1500)
    assert done.code == 0, done.out + done.err
    layouts = re.search(r'--layouts "([^"]+)"', line)
    assert layouts is not None
    assert len(done.out.splitlines()) >= len(layouts[1].split(";"))
    assert all(json.loads(row) for row in done.out.splitlines())


@pytest.mark.timeout(1800)
def test_the_demo(shell: Any, tmp_path: Path) -> None:
    """What `make demo` runs."""
    done = shell("python scripts/demo.py", cwd=clone(tmp_path), timeout_s=1700)
    assert done.code == 0, done.out + done.err
    found = re.search(r"held-out loss: ([\d.]+) -> ([\d.]+) ", done.out)
    assert found is not None, done.out
    assert float(found[2]) < float(found[1]) - 2
    outputs = tmp_path / "outputs" / "demo"
    assert (outputs / "loss.png").stat().st_size > 10_000
    assert (outputs / "checkpoint.pt").stat().st_size > 10_000_000
