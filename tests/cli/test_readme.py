"""Does the README tell the truth? Its example runs, and every command, key and file that it names exists."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from reshard.cli import cli
from reshard.config import config_to_toml, load_config

PROJECT = Path(__file__).resolve().parents[2]
PAGES = ["README.md", "CONTRIBUTING.md", "docs/coming-from-torchtitan.md", "docs/log.md"]
MARK = "<!-- The next block is run by tests/cli/test_readme.py"


def blocks(text: str) -> list[str]:
    """The bash blocks of a page, with lines that end in a backslash joined."""
    return [block.replace("\\\n", " ") for block in re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)]


def commands() -> list[list[str]]:
    lines = "\n".join(blocks((PROJECT / "README.md").read_text(encoding="utf-8"))).splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.strip()]


@pytest.mark.slow
def test_from_metas_weights_to_one_file(shell: Any, text: Path, tmp_path: Path) -> None:
    """The README's block, typed as it stands, in a folder that holds what the reader would have."""
    import torch

    from reshard.formats.meta import write_meta
    from reshard.model.build import spec_of
    from reshard.model.spec import parameter_shapes

    page = (PROJECT / "README.md").read_text(encoding="utf-8")
    [block] = [blocks(part)[0] for part in page.split(MARK)[1:]]

    # The reader's folder: our scripts, weights of Meta's in two shards, and the config for a model of that size.
    for name in ("scripts", "run_llama_train.sh"):
        (tmp_path / name).symlink_to(PROJECT / name)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "activate").touch()
    words = (
        "--model.dim 64 --model.n_layers 2 --model.n_heads 4 --model.n_kv_heads 2 --model.ffn_dim 128 --model.vocab_size 512 "
        f"--model.tokenizer_path bytes --training.dataset {text} --training.seq_len 32 --training.global_batch_size 4 "
        "--training.steps 4 --training.warmup_steps 1 --training.compile false --checkpoint.interval 2 --validation.freq 0"
    )
    config, _ = load_config(PROJECT / "train_configs" / "llama3_8b.toml", words.split())
    (tmp_path / "train_configs").mkdir()
    (tmp_path / "train_configs" / "llama3_8b.toml").write_text(config_to_toml(config))
    spec = spec_of(config)
    generator = torch.Generator().manual_seed(0)
    weights = {n: 0.02 * torch.randn(s, generator=generator) for n, s in parameter_shapes(spec).items()}
    weights = {n: (w + 1 if w.ndim == 1 else w).bfloat16() for n, w in weights.items()}
    write_meta(tmp_path / "Meta-Llama-3-8B" / "original", weights, spec, 2)

    # Two processes in place of eight, four steps in place of a thousand; nothing else is changed.
    done = shell("set -e\n" + block.replace("NGPU=8", "NGPU=2").replace("step-1000", "step-4"), cwd=tmp_path)
    assert done.code == 0, done.err
    assert "held-out loss: " in done.out

    start = json.loads((tmp_path / "outputs" / "events.jsonl").read_text().splitlines()[0])
    assert (start["loaded"], start["layout"]["dp_shard"]) == ("outputs/checkpoint/step-0", 2)
    saved = sorted(path.name for path in (tmp_path / "outputs" / "checkpoint").glob("step-*"))
    assert saved == ["step-0", "step-2", "step-4"]
    exported = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert {name: tuple(tensor.shape) for name, tensor in exported.items()} == parameter_shapes(spec)
    assert {tensor.dtype for tensor in exported.values()} == {torch.bfloat16}
    moved = [(exported[name].float() - weights[name].float()).abs().max() for name in weights]
    assert 0 < max(moved) < 0.01  # it went on from Meta's weights, and it trained


def test_every_verb_is_shown_and_exists() -> None:
    shown = {words[1] for words in commands() if words[0] == "reshard"}
    assert shown == set(cli.commands)


def test_every_key_and_config_is_one() -> None:
    for words in commands():
        configs = [word.removeprefix("CONFIG=") for word in words if word.endswith(".toml")]
        keys = [i for i, word in enumerate(words) if re.match(r"--\w+\.\w+", word)]
        if configs or keys:
            load_config(PROJECT / configs[0] if configs else None, words[keys[0] :] if keys else [])


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page: str) -> None:
    path = PROJECT / page
    for target in re.findall(r"\]\(([^)#:]+)\)", path.read_text(encoding="utf-8")):
        assert (path.parent / target).exists(), target


def test_every_room_is_in_the_tree() -> None:
    page = (PROJECT / "README.md").read_text(encoding="utf-8")
    rooms = [path.parent.name for path in (PROJECT / "src" / "reshard").glob("*/__init__.py")]
    assert [room for room in rooms if f"\n  {room}/ " not in page] == []


def test_the_two_commands_are_on_the_first_screen() -> None:
    first = (PROJECT / "README.md").read_text(encoding="utf-8").splitlines()[:15]
    targets = (PROJECT / "Makefile").read_text()
    for name in ("demo", "test"):
        assert any(line.startswith(f"make {name} ") for line in first)
        assert f"\n{name}: install\n" in targets


def test_ci_runs_make_test() -> None:
    script = (PROJECT / ".ci" / "run").read_text()
    assert script.splitlines()[0] == "#!/usr/bin/env bash"
    assert "set -euo pipefail" in script
    assert script.splitlines()[-1] == "make test"
