"""Does a built wheel work where nothing of the project's tree is? Built, looked into, installed into a venv, used."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of what git has or would take, so that nothing else can get in."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=PROJECT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if listed.returncode:
        pytest.fail("not a git checkout: what belongs into the wheel cannot be told")
    for name in filter(None, listed.stdout.split("\0")):
        if (PROJECT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(PROJECT / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet", "--no-index"]
    done = subprocess.run(
        [*command, "--wheel-dir", str(out), str(source)], cwd=out, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    [built] = out.glob("*.whl")
    return built


def test_what_is_in_it(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        [info] = [name for name in names if name.endswith(".dist-info/METADATA")]
        metadata = archive.read(info).decode()
        [entries] = [name for name in names if name.endswith(".dist-info/entry_points.txt")]
        assert "reshard = reshard.cli:main" in archive.read(entries).decode()
    source = {
        path.relative_to(PROJECT / "src").as_posix()
        for path in (PROJECT / "src" / "reshard").rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    dist = info.rpartition("/")[0]
    assert names - {name for name in names if name.startswith(f"{dist}/")} == source
    assert "reshard/py.typed" in names
    assert f"{dist}/licenses/LICENSE" in names
    assert "License-Expression: Apache-2.0" in metadata
    assert "Requires-Python: >=3.11" in metadata
    assert "torch>=2.13" in metadata


def bare_environment() -> dict[str, str]:
    """Nothing in it leads back to the tree."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL_ENV", "PYTEST"))}
    return {**kept, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def elsewhere(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A venv with the wheel in it, and the libraries of this one beside, without its editable reshard. The `reshard` in it."""
    place = tmp_path_factory.mktemp("venv") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(place)], check=True)
    python = place / "bin" / "python"
    site = next((place / "lib").glob("python*/site-packages"))
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index", "--quiet"]
    done = subprocess.run([*command, str(wheel)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    # The path is added as text: .pth files in that folder, the editable reshard's among them, are not read.
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return place / "bin" / "reshard"


def typed(program: Path, words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [program, *words.split()], cwd=cwd, capture_output=True, text=True, check=False, env=bare_environment()
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def test_it_is_the_wheel_that_runs(elsewhere: Path, tmp_path: Path) -> None:
    program = "import reshard;print(reshard.__file__)"
    done = subprocess.run(
        [elsewhere.with_name("python"), "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True,
        env=bare_environment(),
    )  # fmt: skip
    assert done.stdout.startswith(str(elsewhere.parents[1]))


def test_it_works_from_an_empty_folder(elsewhere: Path, tmp_path: Path) -> None:
    """With a copy of the debug config, as one who has installed it from a wheel would have it."""
    help_text = typed(elsewhere, "--help", tmp_path).stdout
    assert "Train Llama-family models" in help_text
    assert typed(elsewhere, "--version", tmp_path).stdout.startswith("reshard ")
    assert "[checkpoint]" in typed(elsewhere, "config", tmp_path).stdout  # needs no file at all

    shutil.copy(PROJECT / "train_configs" / "debug_model.toml", tmp_path / "mine.toml")
    assert typed(elsewhere, "seed mine.toml", tmp_path).stdout == "outputs/checkpoint/step-0\n"
    words = "--training.steps 2 --training.seq_len 32 --training.batch_size 1 --checkpoint.enable_checkpoint"
    typed(elsewhere, f"train mine.toml {words} --training.dataset mine.toml", tmp_path)
    report = json.loads(typed(elsewhere, "inspect outputs/checkpoint/step-2 --json", tmp_path).stdout)
    assert (report["step"], report["holds"]) == (2, "full")
    typed(elsewhere, "verify outputs/checkpoint", tmp_path)
    typed(elsewhere, "convert outputs/checkpoint/step-2 out/hf --to hf", tmp_path)
    assert typed(elsewhere, "diff out/hf outputs/checkpoint/step-2", tmp_path).stdout.startswith("same")
