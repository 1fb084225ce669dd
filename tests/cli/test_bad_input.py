"""Is every bad input answered by one sentence and a hint, with exit code 2, and is nothing overwritten?"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

CONFIG = "train_configs/debug_model.toml"


def train(shell: Any, tiny: str, folder: Path, words: str = "") -> Any:
    return shell(f"reshard train {CONFIG} --checkpoint.enable_checkpoint {tiny} --job.dump_folder {folder} {words}")


def content(folder: Path) -> dict[str, str]:
    """Every file below a folder, and its digest; without the lock, which belongs to whoever looks."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in {".lock", ".owner.json"}]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def steps(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoint").iterdir() if not path.name.startswith("."))


# -- before anything is read or written -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "sentence", "hint"),
    [
        ("--checkpoint.intervall 3", "config key `checkpoint.intervall` in the command line is not known",
         "did you mean `checkpoint.interval`?"),
        ("--checkpoint.export_dtype bf16", "config key `checkpoint.export_dtype`: expected 'float16', 'bfloat16', "
         "'float32' or 'float64', got 'bf16'", "did you mean `bfloat16`?"),
        ("--model.vocab_size 100", "tokenizer bytes has 258 tokens, but the model's vocabulary 100",
         "--model.vocab_size 258 makes room, or take another --model.tokenizer_path"),
        ("--model.tokenizer_path no/such/tokenizer.model", "tokenizer `no/such/tokenizer.model` does not exist; expected "
         "bytes, bpe, a tokenizer.json or a tokenizer.model",
         "tokenizer.model comes with Meta's weights, tokenizer.json with Hugging Face's"),
        ("--model.flavor 7B", "model.flavor `7B` is not known for llama3, expected one of debugmodel, 1B, 3B, 8B, 70B, 405B",
         "did you mean `70B`?"),
        ("--parallelism.tensor_parallel_degree 2", "1 ranks do not divide by the fixed degrees (dp_replicate 1 x "
         "dp_shard -1 x cp 1 x tp 2 x pp 1): 1 / 2", "start 2 ranks, or lower a degree"),
    ],
)  # fmt: skip
def test_refused_at_once(shell: Any, tiny: str, tmp_path: Path, words: str, sentence: str, hint: str) -> None:
    for command in ("train", "config --check"):
        done = shell(f"reshard {command} {CONFIG} {tiny} --job.dump_folder {tmp_path}/run {words}")
        assert (done.code, done.out) == (2, "")
        assert done.sentence == sentence
        assert done.hint == hint
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("config", "world_size"),
    [("llama3_2_1b", 1), ("llama3_2_3b", 8), ("llama3_8b", 8), ("llama3_70b", 64), ("llama3_405b", 512)],
)
def test_the_configs_that_come_with_reshard_lack_only_the_tokenizer(shell: Any, config: str, world_size: int) -> None:
    """They fit the number of GPUs that they name; the tokenizer comes with Meta's weights."""
    command = f"reshard config --check --world-size {world_size} train_configs/{config}.toml"
    done = shell(f"{command} --model.tokenizer_path bytes")
    assert (done.code, done.err) == (0, "")
    done = shell(command)
    assert done.code == 2
    assert done.sentence.startswith("tokenizer `./")
    assert done.sentence.endswith(
        "original/tokenizer.model` does not exist; expected bytes, bpe, a tokenizer.json or a tokenizer.model"
    )
    assert done.hint == "tokenizer.model comes with Meta's weights, tokenizer.json with Hugging Face's"


# -- text -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "bytes_", "sentence"),
    [
        ("empty.txt", b"", "is empty: it has no document with any text in it"),
        ("blank.txt", b" \n\n \t\n", "is empty: it has no document with any text in it"),
        ("latin.txt", "Der Löwe brüllt.\n".encode("latin-1") * 100, "is not UTF-8"),
        ("short.txt", b"too short", "sequence"),
    ],
)
def test_text_that_cannot_be_trained_on(
    shell: Any, tiny: str, tmp_path: Path, name: str, bytes_: bytes, sentence: str
) -> None:
    (tmp_path / name).write_bytes(bytes_)
    words = f"--training.dataset {tmp_path / name} --training.cache_folder {tmp_path}/tokens"
    done = train(shell, tiny, tmp_path / "run", words)
    assert done.code == 2
    assert sentence in done.sentence
    assert name in done.sentence or "tokens" in done.sentence
    assert not (tmp_path / "run").exists()
    assert (tmp_path / name).read_bytes() == bytes_


# -- what lies in the checkpoint folder -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(shell: Any, tiny: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with step-2 and step-4, made in a folder full of what is not ours."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    checkpoints = folder / "checkpoint"
    for name in ("notes.txt", "step-3", "old-step-900/.metadata", "step-7-keep/__0_0.distcp", "mine/step-8/x.pt"):
        (checkpoints / name).parent.mkdir(parents=True, exist_ok=True)
        (checkpoints / name).write_text(f"this is {name}")
    before = content(folder)
    done = train(shell, tiny, folder, "--checkpoint.interval 2 --checkpoint.keep_latest_k 5")
    assert done.code == 0, done.err
    assert before.items() <= content(folder).items()
    assert steps(folder) == ["mine", "notes.txt", "old-step-900", "step-2", "step-3", "step-4", "step-7-keep"]
    assert [line for line in done.err.splitlines() if "its own first weights" in line], done.err  # 900 was not taken
    return folder


@pytest.fixture
def copy(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


def test_what_is_not_ours_stays_as_it_is(shell: Any, tiny: str, trained: Path) -> None:
    before = content(trained)
    done = train(shell, tiny, trained)
    assert done.code == 0, done.err
    assert "has reached training.steps 4: nothing to do" in done.err
    assert content(trained) == before


def test_a_torn_step_is_passed_over_and_kept(shell: Any, tiny: str, copy: Path) -> None:
    torn = copy / "checkpoint" / "step-4"
    (torn / "manifest.json").unlink()
    before = content(torn)
    done = train(shell, tiny, copy)
    assert done.code == 0, done.err
    assert "ignored step-4" in done.err
    assert "resuming after step 2" in done.err
    assert content(copy / "checkpoint" / "step-4.damaged") == before  # step 4 was reached again, and saved
    assert (torn / "manifest.json").exists()


def test_what_is_not_ours_under_a_name_that_the_run_needs(shell: Any, tiny: str, copy: Path) -> None:
    """Said before a step is trained, by name; nothing has changed then."""
    mine = copy / "checkpoint" / "step-6" / "notes.txt"
    mine.parent.mkdir()
    mine.write_text("mine")
    before = content(copy)
    done = train(shell, tiny, copy, "--training.steps 6 --checkpoint.interval 2")
    assert done.code == 2
    assert done.sentence == (
        f"`{mine.parent}` holds notes.txt, not part of a checkpoint of ours: nothing was written, renamed or deleted"
    )
    assert content(copy) == before
    hint = "this run would save step 6 there: choose another --checkpoint.folder, or keep what is there under another one: "
    assert done.hint == f"{hint}mv {mine.parent} {mine.parent}.kept"


def test_a_torn_step_that_was_asked_for(shell: Any, tiny: str, copy: Path) -> None:
    (copy / "checkpoint" / "step-4" / "manifest.json").unlink()
    before = content(copy)
    done = train(shell, tiny, copy, "--checkpoint.load_step 4")
    assert done.code == 2
    assert str(copy / "checkpoint" / "step-4") in done.sentence
    assert done.hint == "whole steps: 2; choose one with --checkpoint.load_step"
    assert content(copy) == before


def test_a_step_that_does_not_exist(shell: Any, tiny: str, copy: Path) -> None:
    before = content(copy)
    done = train(shell, tiny, copy, "--checkpoint.load_step 3 --training.steps 9")
    assert done.code == 2
    assert done.sentence.startswith("checkpoint.load_step is 3, but `")
    assert "2, 4" in done.hint
    assert content(copy) == before


@pytest.mark.parametrize("names", [["__0_0.distcp"], [".metadata", "__0_0.distcp"]], ids=["torn", "foreign"])
def test_nothing_but_a_torn_or_foreign_step(shell: Any, tiny: str, tmp_path: Path, names: list[str]) -> None:
    step = tmp_path / "run" / "checkpoint" / "step-5"
    step.mkdir(parents=True)
    for name in names:
        (step / name).write_text("somebody's weeks of work")
    before = content(tmp_path)
    done = train(shell, tiny, tmp_path / "run")
    assert done.code == 2
    assert done.sentence == f"checkpoint folder `{step.parent}` holds step-5, but no whole checkpoint"
    assert done.hint.startswith("move them away to start afresh, or give --checkpoint.initial_load_path")
    assert content(tmp_path) == before


@pytest.mark.slow
def test_under_torchrun_the_sentence_is_said_once(shell: Any, tiny: str, tmp_path: Path) -> None:
    step = tmp_path / "run" / "checkpoint" / "step-5"
    step.mkdir(parents=True)
    (step / "__0_0.distcp").write_text("torn")
    words = f"--checkpoint.enable_checkpoint {tiny} --job.dump_folder {tmp_path}/run"
    done = shell(f"NGPU=2 LOG_RANK=0,1 CONFIG={CONFIG} ./run_llama_train.sh {words}")
    assert done.code == 1  # torchrun's own
    sentences = [line for line in done.err.splitlines() if line.startswith("error")]
    assert sentences == [f"error: checkpoint folder `{step.parent}` holds step-5, but no whole checkpoint"]


def test_a_folder_that_is_a_file(shell: Any, tiny: str, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file")
    done = train(shell, tiny, tmp_path / "run")
    assert done.code == 2
    assert str(tmp_path / "run") in done.sentence
    assert (tmp_path / "run").read_text() == "a file"


def test_a_seed_does_not_replace_a_checkpoint(shell: Any, tiny: str, tmp_path: Path) -> None:
    words = f"{CONFIG} {tiny} --job.dump_folder {tmp_path}"
    assert shell(f"reshard seed {words}").code == 0
    before = content(tmp_path)
    done = shell(f"reshard seed {words} --training.rng_seed 1")
    assert done.code == 2
    assert str(tmp_path / "checkpoint" / "step-0") in done.sentence
    assert content(tmp_path) == before


# -- the disk, and other runs -----------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of one megabyte, where this process may mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", place], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("only root may mount a small disk; test_no_room_for_a_model_larger_than_the_disk holds the rest")
    yield place
    subprocess.run(["umount", place], check=True)


def test_no_disk_space_at_the_start(shell: Any, tiny: str, small_disk: Path) -> None:
    done = train(shell, tiny, small_disk / "run")
    assert done.code == 2
    assert done.sentence.startswith(
        f"checkpoint folder `{small_disk}/run/checkpoint` has 0.00 GB free, one checkpoint takes"
    )
    assert "--job.dump_folder" in done.hint
    assert content(small_disk) == {}


def test_no_room_for_a_model_larger_than_the_disk(tmp_path: Path) -> None:
    """The real disk, and more than any has: the largest Llama's 4.9 TB, and where a disk holds that, a larger vocabulary."""
    from reshard.config import Config
    from reshard.errors import StorageError
    from reshard.model.spec import FLAVORS
    from reshard.train.space import check_space

    largest = FLAVORS["405B"]
    sizes = {r"432350384\.04": replace(largest, vocab_size=1 << 40)}
    if shutil.disk_usage(tmp_path).free < 4.8e12:
        sizes[r"4870\.24"] = largest
    for size, spec in sizes.items():
        with pytest.raises(StorageError, match=rf"GB free, one checkpoint takes {size} GB"):
            check_space(tmp_path, spec, Config())


def test_a_second_run_in_the_same_folder(shell: Any, tiny: str, tmp_path: Path, project: Path) -> None:
    words = f"train {CONFIG} --checkpoint.enable_checkpoint {tiny} --job.dump_folder {tmp_path}/run"
    long = [*words.split(), "--training.steps", "1000000", "--checkpoint.interval", "1000000"]
    first = subprocess.Popen(
        [sys.executable, "-m", "reshard", *long], cwd=project, stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        owner = tmp_path / "run" / "checkpoint" / ".owner.json"
        deadline = time.monotonic() + 60
        while not owner.exists() and time.monotonic() < deadline and first.poll() is None:
            time.sleep(0.1)
        done = shell(f"reshard {words}")
        assert done.code == 2
        assert done.sentence.startswith(
            f"checkpoint folder `{tmp_path}/run/checkpoint` is in use by another run (host "
        )
        assert f"process {first.pid}" in done.sentence
        assert done.hint == "wait for it to end, or choose another --job.dump_folder or --checkpoint.folder"
        assert first.poll() is None  # the first one goes on
    finally:
        first.kill()
        first.wait()
    # The lock dies with its holder: nothing is left to clean up by hand.
    assert train(shell, tiny, tmp_path / "run").code == 0


# -- other people's files ---------------------------------------------------------------------------------------------


def test_a_missing_meta_shard(shell: Any, tmp_path: Path) -> None:
    import torch

    from reshard.formats.meta import write_meta
    from reshard.model.spec import LlamaSpec, parameter_shapes

    spec = LlamaSpec(dim=64, n_layers=1, n_heads=4, n_kv_heads=4, ffn_dim=128, vocab_size=512)
    weights = {name: torch.randn(shape) for name, shape in parameter_shapes(spec).items()}
    write_meta(tmp_path / "Llama", weights, spec, 4)
    (tmp_path / "Llama" / "consolidated.02.pth").unlink()
    before = content(tmp_path)
    for command in ("reshard convert", "python3 scripts/convert_llama_to_dcp.py"):
        done = shell(f"{command} {tmp_path}/Llama {tmp_path}/out/step-0")
        assert (done.code, done.out) == (2, "")
        assert "consolidated.02.pth" in done.sentence
    assert content(tmp_path) == before
    assert not (tmp_path / "out" / "step-0").exists()
