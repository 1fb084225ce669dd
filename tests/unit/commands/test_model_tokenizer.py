"""Do eval and generate read a model's text with its own tokenizer, and refuse where they would have to guess it?"""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from reshard.commands.convert import run as convert
from reshard.commands.evaluate import run as evaluate
from reshard.commands.generate import run as generate
from reshard.commands.model_tokenizer import model_tokenizer
from reshard.commands.open_model import what_it_is
from reshard.config import Config, config_to_toml
from reshard.errors import ConfigError, DataError
from reshard.text.tokenizers import Tokenizer
from reshard.train.loop import train

TEXT = "the quick brown fox jumps over the lazy dog, and the dog sleeps on\n"


def config_of(place: Path, tokenizer_path: str) -> Config:
    return Config().with_values(
        job={"dump_folder": str(place / "run")},
        model={
            "dim": 32, "n_layers": 1, "n_heads": 2, "n_kv_heads": 2, "ffn_dim": 32, "vocab_size": 300,
            "tokenizer_path": tokenizer_path,
        },
        training={"dataset": str(place / "text.jsonl"), "seq_len": 16, "batch_size": 1, "steps": 1},
        checkpoint={"enable_checkpoint": True},
    )  # fmt: skip


def write_text(place: Path, text: str = TEXT) -> None:
    (place / "text.jsonl").write_text("".join(json.dumps({"text": f"{text}{i}"}) + "\n" for i in range(20)))


def trained(place: Path, tokenizer_path: str) -> Path:
    place.mkdir(exist_ok=True)
    write_text(place)
    outcome = train(config_of(place, tokenizer_path))
    assert outcome.checkpoint is not None
    return outcome.checkpoint


@pytest.fixture(scope="module")
def of_bytes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A step of a run that was trained on bytes."""
    return trained(tmp_path_factory.mktemp("bytes"), "bytes")


@pytest.fixture(scope="module")
def without(of_bytes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights as a Hugging Face folder that has no tokenizer."""
    folder = tmp_path_factory.mktemp("export") / "hf"
    convert(of_bytes, folder, to="hf")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    return folder


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Somebody's tokenizer.json: 256 bytes with ids that are not the bytes, and one token more."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    letters = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=257, initial_alphabet=letters, show_progress=False)
    model.train_from_iterator([TEXT] * 4, trainer)
    path = tmp_path_factory.mktemp("theirs") / "tokenizer.json"
    model.save(str(path))
    return path


def found(path: Path, named: str | None = None, config_path: Path | None = None) -> Tokenizer:
    config, source = what_it_is(path, config_path, None)
    names_it = config_path is not None and "tokenizer_path" in config.model.model_fields_set
    return model_tokenizer(source, config, named=named, config_names_it=names_it)


def refusal(path: Path, named: str | None = None) -> DataError:
    with pytest.raises(DataError) as caught:
        found(path, named)
    return caught.value


def ids(tokenizer: Tokenizer) -> list[int]:
    return [int(i) for i in tokenizer.encode_batch(["the dog"])[0]]


EVAL: dict[str, Any] = {
    "config_path": None,
    "flavor": None,
    "seq_len": 16,
    "sequences": 1,
    "batch_size": 1,
}
GENERATE: dict[str, Any] = {
    "config_path": None,
    "flavor": None,
    "max_tokens": 1,
    "temperature": 0.0,
    "top_k": 0,
    "seed": 0,
}


def test_a_run_says_that_it_was_trained_on_bytes(of_bytes: Path) -> None:
    assert ids(found(of_bytes)) == list(b"the dog")


def test_a_gguf_has_its_tokenizer_inside(of_bytes: Path, tmp_path: Path) -> None:
    convert(of_bytes, tmp_path / "m.gguf", to="gguf")
    assert ids(found(tmp_path / "m.gguf")) == list(b"the dog")


@pytest.mark.parametrize("verb", ["eval", "generate"])
def test_weights_without_a_tokenizer_are_refused_until_one_is_named(verb: str, without: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT * 9)

    def read(named: str | None) -> object:
        if verb == "eval":
            return evaluate(without, tokenizer=named, data=str(tmp_path / "text.txt"), **EVAL)
        return generate(without, "the", tokenizer=named, **GENERATE)

    with pytest.raises(DataError) as caught:
        read(None)
    assert caught.value.message == f"`{without}` has no tokenizer beside its weights"
    assert "--tokenizer bytes" in (caught.value.hint or "")
    read("bytes")  # as the hint says


def test_what_lies_beside_the_weights_is_their_own(without: Path, other: Path, tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    shutil.copytree(without, folder)
    shutil.copy(other, folder)
    assert ids(found(folder)) == tokenizers.Tokenizer.from_file(str(other)).encode("the dog").ids != list(b"the dog")
    assert ids(found(folder, named="bytes")) == list(b"the dog")


def test_a_config_file_names_one_only_where_it_sets_the_key(without: Path, of_bytes: Path, tmp_path: Path) -> None:
    text = config_to_toml(config_of(of_bytes.parents[2], "bytes"))
    (tmp_path / "names.toml").write_text(text)
    (tmp_path / "silent.toml").write_text(text.replace('tokenizer_path = "bytes"\n', ""))
    assert ids(found(without, config_path=tmp_path / "names.toml")) == list(b"the dog")
    with pytest.raises(DataError, match="has no tokenizer beside its weights"):
        found(without, config_path=tmp_path / "silent.toml")


def test_a_tokenizer_that_a_run_has_lost_or_changed_is_refused(other: Path, tmp_path: Path, caplog: Any) -> None:
    mine = tmp_path / "tokenizer.json"
    shutil.copy(other, mine)
    step = trained(tmp_path, str(mine))
    assert ids(found(step)) == tokenizers.Tokenizer.from_file(str(other)).encode("the dog").ids
    content = json.loads(mine.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    mine.write_text(json.dumps(content))
    assert "was trained with tokenizer" in refusal(step).message
    assert str(mine) in refusal(step).message
    mine.unlink()
    assert f"the one that it was trained with, `{mine}`, is not there" in refusal(step).message
    caplog.set_level(logging.WARNING)
    found(step, named="bytes")  # whoever names another one has it, and is told
    assert "was trained with tokenizer" in caplog.text


def test_a_bpe_whose_text_has_grown_is_another_tokenizer(tmp_path: Path) -> None:
    step = trained(tmp_path, "bpe")
    was = ids(found(step))
    write_text(tmp_path, "zebras, quite unlike dogs, have stripes. " * 3)
    assert "was trained with tokenizer" in refusal(step).message
    write_text(tmp_path)  # as the hint says
    assert ids(found(step)) == was


def test_a_tokenizer_that_does_not_fit_the_model_is_refused(of_bytes: Path, tmp_path: Path) -> None:
    words = {f"w{i}": i for i in range(400)}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    model.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ConfigError, match="has 400 tokens, but the model's vocabulary 300"):
        found(of_bytes, named=str(tmp_path))
