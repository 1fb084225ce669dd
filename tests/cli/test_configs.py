"""Do the configs run on what they say, is each of their lines explained, and does each recipe fit its GPUs?"""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from reshard.commands.check import check
from reshard.config import Config, load_config

PROJECT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((PROJECT / "train_configs").glob("*.toml"))
SIZES = {"debug_model", "llama3_2_1b", "llama3_2_3b", "llama3_8b", "llama3_70b", "llama3_405b"}
WITHOUT_METAS_FILES = ["--model.tokenizer_path", "bytes"]
GPU_GIB = 74  # what 80 GB leave to a program


def named(path: Path) -> str:
    return path.stem


def loaded(path: Path, words: list[str] | None = None) -> Config:
    config, warnings = load_config(path, [*(words or []), *WITHOUT_METAS_FILES])
    assert warnings == []
    return config


def documented_world(path: Path) -> int:
    """How many processes the first line is about: `8 nodes of 8 GPUs`, `one node of 8 GPUs`, `one GPU`, `two CPU cores`."""
    first = path.read_text(encoding="utf-8").splitlines()[0]
    count = {"one": 1, "two": 2}
    if found := re.search(r"(\w+) nodes? of (\d+) GPUs", first):
        return (count.get(found[1]) or int(found[1])) * int(found[2])
    found = re.search(r"(one|two) (?:GPU|CPU)", first)
    assert found is not None, first
    return count[found[1]]


def test_there_is_one_for_each_size() -> None:
    assert {path.stem for path in CONFIGS} == SIZES


@pytest.mark.parametrize("path", CONFIGS, ids=named)
def test_it_runs_on_what_its_first_line_says(path: Path) -> None:
    check(loaded(path), documented_world(path))


@pytest.mark.parametrize("path", CONFIGS, ids=named)
def test_each_line_is_explained(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    bare = [line for line in lines if "=" in line.partition("#")[0] and not re.search(r"\s# \S.{4,}$", line)]
    assert bare == []
    assert [line for line in lines if len(line) > 128] == []
    assert {len(list(section)) > 0 for section in tomllib.loads("\n".join(lines)).values()} == {True}
    head = "\n".join(line for line in lines[:8] if line.startswith("#"))
    assert f"train_configs/{path.name}" in head or path.stem == "debug_model"  # how to start it


class Recipe(NamedTuple):
    """A launcher's line: its config, processes, keys, and the GiB of its fullest GPU where the page says them."""

    line: str
    config: str
    world: int
    keys: list[str]
    gib: int | None


def recipes() -> list[Recipe]:
    """Every line of README.md and docs/recipes.md that starts a training on GPUs or ranks."""
    found = []
    for page in ("README.md", "docs/recipes.md"):
        text = (PROJECT / page).read_text(encoding="utf-8")
        for block in re.findall(r"^```bash\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE):
            for line in block.replace("\\\n", " ").splitlines():
                if re.match(r"NGPU=|NNODES=|sbatch |torchrun ", line):
                    found.append(recipe(line))
    return found


def recipe(line: str) -> Recipe:
    words = shlex.split(line, comments=True)
    given = dict(word.split("=", 1) for word in words if re.match(r"[A-Z]+=", word))
    keys_from = next((i for i, word in enumerate(words) if re.match(r"--\w+\.\w+", word)), len(words))
    nodes = int(given.get("NNODES") or (words[words.index("--nodes") + 1] if "--nodes" in words else 1))
    per_node = int(given.get("NGPU") or (words[words.index("--nproc-per-node") + 1] if "torchrun" in words else 8))
    config = given.get("CONFIG") or next(word for word in words if word.endswith(".toml"))
    gib = re.search(r"# (\d+) GiB", line)
    return Recipe(re.sub(r"\s+", " ", line), config, nodes * per_node, words[keys_from:], int(gib[1]) if gib else None)


def test_recipes_are_found() -> None:
    worlds = {r.world for r in recipes()}
    assert {1, 2, 8, 16, 32, 64, 512} <= worlds  # one GPU, one node, several
    assert len([r for r in recipes() if r.gib]) >= 8


@pytest.mark.slow
@pytest.mark.parametrize("given", recipes(), ids=lambda r: r.line[:90])
def test_every_recipe_fits(given: Recipe, typed: Any) -> None:
    """It passes `reshard config --check`, and `reshard plan` says what the page says."""
    check(loaded(PROJECT / given.config, given.keys), given.world)
    if given.gib is None:
        return
    plan = ["reshard", "plan", given.config, *given.keys]
    done = typed([*plan, *WITHOUT_METAS_FILES, "--world-size", str(given.world), "--json"], PROJECT)
    assert done.code == 0, done.err
    gib = json.loads(done.out)["fullest_rank_bytes"] / 2**30
    assert round(gib) == given.gib
    assert gib < GPU_GIB
