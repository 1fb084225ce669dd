"""The token cache: what is in it, when it is used again, and who builds it."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from reshard.config import Config, Training
from reshard.errors import ConfigError, DataError
from reshard.text import (
    fingerprint_difference,
    full_fingerprint,
    load_tokenizer,
    open_source,
    prepare,
    tokenizer_for,
)
from reshard.text.cache import is_held_out

MakeConfig = Callable[..., Config]


def run_python(code: str, *arguments: str) -> subprocess.Popen[str]:
    env = os.environ | {"PYTHONPATH": ":".join(sys.path), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
    )


def split_documents(tokens: np.ndarray, bos: int, eos: int) -> list[list[int]]:
    """The documents of a token stream, without their marks; fails where a mark is missing."""
    found = []
    rest = tokens.tolist()
    while rest:
        assert rest[0] == bos
        end = rest.index(eos)
        found.append(rest[1:end])
        rest = rest[end + 1 :]
    return found


def test_the_stream_is_every_document_between_its_marks(make_config: MakeConfig, many_texts: Path) -> None:
    config = make_config(training={"dataset": str(many_texts)}, validation={"fraction": 0.2})
    data, tokenizer = prepare(config, 512)
    assert data.train.dtype == data.validation.dtype == np.uint16
    texts = list(open_source(config.training).documents())
    train = split_documents(data.train, 256, 257)
    validation = split_documents(data.validation, 256, 257)
    assert [tokenizer.decode(ids) for ids in train] == [t for i, t in enumerate(texts) if not is_held_out(i, 0.2)]
    assert [tokenizer.decode(ids) for ids in validation] == [t for i, t in enumerate(texts) if is_held_out(i, 0.2)]
    assert data.documents == len(train) + len(validation) == 100
    assert 8 <= len(validation) <= 35
    assert data.fingerprint["train_tokens"] == len(data.train)
    assert data.fingerprint["documents"] == 100
    assert not data.reused
    assert not data.train.flags.writeable


def test_a_large_vocabulary_takes_four_bytes(make_config: MakeConfig, many_texts: Path, tmp_path: Path) -> None:
    content = {
        "version": "1.0", "added_tokens": [], "normalizer": None, "post_processor": None, "decoder": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "model": {"type": "WordLevel", "vocab": {"[UNK]": 0, "the": 70_000, "thing": 65_536}, "unk_token": "[UNK]"},
    }  # fmt: skip
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    config = make_config(
        training={"dataset": str(many_texts)}, model={"tokenizer_path": str(tmp_path / "tokenizer.json")}
    )
    data, _ = prepare(config, 70_001)
    assert data.train.dtype == np.uint32
    assert set(np.unique(data.train)) == {0, 65_536, 70_000}
    with pytest.raises(ConfigError, match=r"70001 tokens.*70000"):
        prepare(config, 70_000)


def test_the_same_question_is_answered_from_the_cache(make_config: MakeConfig, many_texts: Path) -> None:
    config = make_config(training={"dataset": str(many_texts)})
    first, _ = prepare(config, 512)
    before = (first.folder / "train.bin").stat().st_mtime_ns
    for same in (config, config.with_values(training={"seq_len": 8, "rng_seed": 5}, validation={"sequences": 3})):
        again, _ = prepare(same, 600)
        assert again.reused
        assert again.folder == first.folder
        assert again.fingerprint == first.fingerprint
        assert (again.train == first.train).all()
    assert (first.folder / "train.bin").stat().st_mtime_ns == before
    assert sorted(p.name for p in first.folder.iterdir()) == ["meta.json", "train.bin", "validation.bin"]


def test_what_decides_the_tokens_makes_another_cache(
    make_config: MakeConfig, many_texts: Path, tokenizer_model: Path
) -> None:
    config = make_config(training={"dataset": str(many_texts)})
    folders = {prepare(config, 600)[0].folder}
    folders.add(prepare(config.with_values(validation={"fraction": 0.3}), 600)[0].folder)
    folders.add(prepare(config.with_values(model={"tokenizer_path": str(tokenizer_model)}), 600)[0].folder)
    (many_texts / "000.txt").write_text("changed", encoding="utf-8")
    folders.add(prepare(config, 600)[0].folder)
    (many_texts / "100.txt").write_text("one more", encoding="utf-8")
    folders.add(prepare(config, 600)[0].folder)
    assert len(folders) == 5


def test_cache_folder_is_where_the_config_says(make_config: MakeConfig, many_texts: Path, tmp_path: Path) -> None:
    config = make_config(training={"dataset": str(many_texts)})
    assert prepare(config, 512)[0].folder.parent == tmp_path / "outputs" / "tokens"
    elsewhere = config.with_values(training={"cache_folder": str(tmp_path / "fast" / "disk")})
    assert prepare(elsewhere, 512)[0].folder.parent == tmp_path / "fast" / "disk"


def test_stdlib_takes_seconds(make_config: MakeConfig) -> None:
    config = make_config()
    started = time.perf_counter()
    data, tokenizer = prepare(config, 512)
    assert time.perf_counter() - started < 10  # 0.2 s on an idle core
    assert len(data.train) + len(data.validation) > 8 << 20
    assert data.documents > 400
    assert 0.001 < len(data.validation) / len(data.train) < 0.1
    assert int((data.train == tokenizer.eos_id).sum() + (data.validation == tokenizer.eos_id).sum()) == data.documents


def test_bpe_is_trained_on_the_training_documents_only(make_config: MakeConfig, many_texts: Path) -> None:
    marked = many_texts / "001.txt"  # document 1 is always held out
    marked.write_text("quokkaquokka " * 1000, encoding="utf-8")
    config = make_config(training={"dataset": str(many_texts)}, model={"tokenizer_path": "bpe"})
    data, tokenizer = prepare(config, 512)
    [held] = tokenizer.encode_batch(["quokkaquokka"])
    assert len(held) > 6
    assert tokenizer.decode(data.validation).count("quokka") >= 1000
    assert "quokka" not in tokenizer.decode(data.train)
    everything = prepare(config.with_values(validation={"fraction": 0.0}), 512)[1]
    assert len(everything.encode_batch(["quokkaquokka"])[0]) <= 2
    assert tokenizer_for(config, 512).identity == tokenizer.identity


def test_another_text_with_the_tokenizer_of_a_run(make_config: MakeConfig, many_texts: Path, tmp_path: Path) -> None:
    config = make_config(training={"dataset": str(many_texts)}, model={"tokenizer_path": "bpe"})
    tokenizer = tokenizer_for(config, 300)
    other = tmp_path / "other.txt"
    other.write_text("entirely different words " * 20)
    data, used = prepare(config.with_values(training={"dataset": str(other)}), 300, tokenizer=tokenizer)
    assert used is tokenizer
    assert tokenizer.decode(data.train).startswith("<|begin_of_text|>entirely different words")


def test_held_out_documents_depend_on_their_number_only() -> None:
    for fraction in (0.01, 0.02, 0.1, 0.5):
        chosen = [i for i in range(20_000) if is_held_out(i, fraction)]
        assert abs(len(chosen) / 20_000 - fraction) < 0.25 * fraction
        assert chosen[0] == 1
    assert {i for i in range(1000) if is_held_out(i, 0.1)} <= {i for i in range(1000) if is_held_out(i, 0.2)}
    assert not any(is_held_out(i, 0.0) for i in range(1000))
    assert not is_held_out(0, 0.999999)


@pytest.mark.parametrize("fraction", [1e-9, 0.02, 0.5, 0.999])
@pytest.mark.parametrize("count", [2, 3, 10])
def test_each_side_has_a_document(make_config: MakeConfig, tmp_path: Path, count: int, fraction: float) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps({"text": f"document number {i}"}) + "\n" for i in range(count)))
    data, _ = prepare(
        make_config(training={"dataset": str(file), "seq_len": 4}, validation={"fraction": fraction}), 512
    )
    train, validation = split_documents(data.train, 256, 257), split_documents(data.validation, 256, 257)
    assert len(train) >= 1
    assert len(validation) >= 1
    assert len(train) + len(validation) == count


def test_nothing_is_held_out_of_fraction_zero(make_config: MakeConfig, many_texts: Path) -> None:
    data, _ = prepare(make_config(training={"dataset": str(many_texts)}, validation={"fraction": 0.0}), 512)
    assert len(data.validation) == 0
    assert data.validation.dtype == np.uint16
    assert len(split_documents(data.train, 256, 257)) == 100


def test_one_document_holds_out_its_end(make_config: MakeConfig, tmp_path: Path) -> None:
    file = tmp_path / "book.txt"
    text = "".join(f"word {i} " for i in range(400))
    file.write_text(text)
    whole = [256, *text.encode(), 257]
    for fraction in (0.1, 1e-9, 0.99):
        data, _ = prepare(make_config(training={"dataset": str(file)}, validation={"fraction": fraction}), 512)
        assert [*data.train.tolist(), *data.validation.tolist()] == whole
        assert len(data.validation) == max(1, int(len(whole) * fraction))
    assert data.documents == 1


def test_a_document_in_pieces_is_one_document(make_config: MakeConfig, tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    text = "0123456789 abcde\n" * 200_000
    file.write_text(text)
    (tmp_path / "b.txt").write_text("short")
    data, _ = prepare(make_config(training={"dataset": str(tmp_path / "*.txt")}), 512)
    assert data.documents == 2
    assert bytes(data.train[1:-1].astype(np.uint8)) == text.encode()
    assert data.train[[0, -1]].tolist() == [256, 257]
    assert data.validation.tolist() == [256, *b"short", 257]


def test_too_little_text(make_config: MakeConfig, tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("123456789")
    config = make_config(training={"dataset": str(file), "seq_len": 10}, validation={"fraction": 0.0})
    assert len(prepare(config, 512)[0].train) == 11
    with pytest.raises(DataError, match=r"training text has 11 tokens.*seq_len 11 needs 12"):
        prepare(config.with_values(training={"seq_len": 11}), 512)
    (tmp_path / "b.txt").write_text("\n")
    with pytest.raises(DataError, match="is empty"):
        prepare(config.with_values(training={"dataset": str(tmp_path / "b.txt")}), 512)
    validating = config.with_values(validation={"freq": 10})
    with pytest.raises(DataError, match="held-out text has 0 tokens") as caught:
        prepare(validating, 512)
    assert "--validation.fraction" in str(caught.value)


def test_fingerprints(make_config: MakeConfig, many_texts: Path) -> None:
    config = make_config(training={"dataset": str(many_texts), "rng_seed": 3})
    data, _ = prepare(config, 512)
    saved = full_fingerprint(data, config)
    assert all(isinstance(value, str | int) for value in saved.values())
    saved = json.loads(json.dumps(saved))
    assert fingerprint_difference(saved, full_fingerprint(data, config)) is None

    def difference(**sections: dict[str, object]) -> str:
        other = config.with_values(**sections)
        found = fingerprint_difference(saved, full_fingerprint(prepare(other, 512)[0], other))
        assert found is not None
        return found

    assert difference(training={"seq_len": 8}) == "seq_len was 16, is 8"
    assert difference(training={"rng_seed": 4}) == "rng_seed was 3, is 4"
    assert difference(training={"seq_len": 8, "rng_seed": 4}) == "seq_len was 16, is 8; rng_seed was 3, is 4"
    assert "validation_fraction was 0.02, is 0.5" in difference(validation={"fraction": 0.5})
    assert difference(model={"tokenizer_path": "bpe"}).startswith("tokenizer was ")
    # The same text under another name and place is the same stream.
    moved = many_texts.with_name("moved")
    many_texts.rename(moved)
    other = config.with_values(training={"dataset": "renamed", "dataset_path": str(moved)})
    assert fingerprint_difference(saved, full_fingerprint(prepare(other, 512)[0], other)) is None
    # Other text of the same length under the same name is not.
    moved.rename(many_texts)
    file = many_texts / "003.txt"
    file.write_text(file.read_text().replace("thing", "night"))
    assert difference().startswith("the text itself, digest was ")
    assert fingerprint_difference({}, saved) is not None


def test_a_checkpoint_without_a_fingerprint_does_not_match() -> None:
    assert fingerprint_difference({}, {"seq_len": 4, "digest": "x"}) == "seq_len was not recorded, is 4"


MANY = """
import logging, sys, time
from pathlib import Path
from reshard.config import Config
from reshard.text import prepare
config = Config().with_values(
    job={"dump_folder": sys.argv[1]}, model={"tokenizer_path": "bpe"}, training={"dataset": sys.argv[2], "seq_len": 16}
)
print("ready", flush=True)
while not Path(sys.argv[3]).exists():
    time.sleep(0.001)
logging.basicConfig(level=logging.INFO)
data, tokenizer = prepare(config, 400)
print(data.reused, data.fingerprint["digest"], tokenizer.identity, "torch" in sys.modules)
"""


def test_many_processes_at_once_build_once(make_config: MakeConfig, tmp_path: Path, many_texts: Path) -> None:
    for i in range(30):  # enough work that the others really wait
        (many_texts / f"long{i}.txt").write_text(f"some words about number {i} and {i * i}\n" * 2000)
    go = tmp_path / "go"
    processes = [run_python(MANY, str(tmp_path / "outputs"), str(many_texts), str(go)) for _ in range(5)]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    go.touch()
    answers, logs = zip(*(process.communicate(timeout=120) for process in processes), strict=True)
    assert [process.returncode for process in processes] == [0] * 5, logs
    fields = [answer.split() for answer in answers]
    assert sorted(f[0] for f in fields) == ["False", "True", "True", "True", "True"]
    assert len({tuple(f[1:3]) for f in fields}) == 1
    assert {f[3] for f in fields} == {"False"}  # tokenising needs no torch
    assert sum(log.count("training a BPE") for log in logs) == 1
    assert sum(log.count("tokenising ") for log in logs) == 1
    assert sum("waiting for another process" in log for log in logs) >= 1


def test_a_whole_cache_needs_no_right_to_write(make_config: MakeConfig, many_texts: Path) -> None:
    """A shared cache on a read-only disk: not even a lock can be taken there."""
    config = make_config(training={"dataset": str(many_texts)}, model={"tokenizer_path": "bpe"})
    data, _ = prepare(config, 300)
    for lock in config.token_folder.rglob("*.lock"):
        lock.unlink()
    for target in (data.folder, *config.token_folder.rglob("tokenizer.json")):
        target.with_name(target.name + ".lock").mkdir()  # opening it as a file fails, even for root
    assert prepare(config, 300)[0].reused


BAR = """
import sys
from reshard.config import Config
from reshard.text import prepare
prepare(Config().with_values(job={"dump_folder": sys.argv[1]}, training={"seq_len": 16}), 512, progress=sys.argv[2] == "yes")
"""


@pytest.mark.parametrize(
    ("terminal", "progress", "shown"), [(True, "yes", True), (True, "no", False), (False, "yes", False)]
)
def test_a_progress_bar_on_terminals_only(tmp_path: Path, terminal: bool, progress: str, shown: bool) -> None:
    ours, theirs = pty.openpty() if terminal else os.pipe()
    env = os.environ | {"PYTHONPATH": ":".join(sys.path), "TERM": "xterm", "COLUMNS": "120"}
    process = subprocess.Popen(
        [sys.executable, "-c", BAR, str(tmp_path), progress], stdout=subprocess.PIPE, stderr=theirs, env=env
    )
    os.close(theirs)
    said = b""
    try:
        while block := os.read(ours, 4096):
            said += block
    except OSError:
        pass  # how a terminal says that its other end is closed
    os.close(ours)
    assert process.stdout is not None
    assert process.stdout.read() == b""
    assert process.wait(timeout=60) == 0
    assert (b"tokenising stdlib" in said) == shown, said
    assert shown or said == b""


def test_the_room_opens_without_torch_or_any_library_of_text(tmp_path: Path) -> None:
    code = (
        "import sys, reshard.text, reshard.commands.tokenize;"
        "print([m for m in ('torch', 'tokenizers', 'tiktoken', 'datasets', 'pyarrow', 'rich', 'filelock') if m in sys.modules])"
    )
    out, log = run_python(code).communicate(timeout=60)
    assert out.strip() == "[]", log


def test_tokenize_command(make_config: MakeConfig, many_texts: Path) -> None:
    from reshard.commands import tokenize

    config = make_config(training={"dataset": str(many_texts)}, model={"vocab_size": 300, "tokenizer_path": "bpe"})
    report = tokenize.run(config)
    data, tokenizer = prepare(config, 300)
    assert data.reused
    assert report == {
        "folder": str(data.folder),
        "dataset": str(many_texts),
        "documents": 100,
        "train_tokens": len(data.train),
        "validation_tokens": len(data.validation),
        "vocabulary": tokenizer.vocab_size,
        "sequences_per_epoch": (len(data.train) - 1) // 16,
        "reused": False,
    }
    assert tokenize.run(config) == report | {"reused": True}
    json.dumps(report)
    with pytest.raises(ConfigError, match="258"):
        tokenize.run(make_config(model={"vocab_size": 200}))


def test_source_and_tokenizer_can_be_asked_before_anything_is_tokenised(tmp_path: Path) -> None:
    assert open_source(Training()).total_bytes
    assert load_tokenizer("bytes", vocab_size=1, cache_folder=tmp_path / "none").vocab_size == 258
    assert not (tmp_path / "none").exists()
