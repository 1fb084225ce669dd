"""Does a run's own tokenizer leave with its weights, so that the text of an export is the text of the training?"""

import json
from pathlib import Path

import pytest
import tokenizers

from reshard.commands.seed import seed
from reshard.commands.sources import open_source
from reshard.commands.tokenizer_files import with_tokenizer
from reshard.config import load_config
from reshard.formats.gguf_file import read_gguf
from reshard.formats.tokenizer_json import byte_letters, llama3_specials, merges_of
from reshard.text.tokenizers import LLAMA3_SPECIALS, ByteTokenizer

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def step(tmp_path_factory):
    """A seed of the debug model, whose tokenizer is bytes."""
    folder = tmp_path_factory.mktemp("run")
    words = ["--job.dump_folder", str(folder), "--model.tokenizer_path", "bytes", "--model.n_layers", "1"]
    config, _ = load_config(ROOT / "train_configs" / "debug_model.toml", words)
    return seed(config)


def test_bytes_become_a_tokenizer_json_with_the_same_ids(step):
    source = open_source(step)
    prepared = with_tokenizer(source, source.spec, "hf", None)
    inner = tokenizers.Tokenizer.from_str(prepared.assets["tokenizer.json"].decode())
    for text in ("plain", "Grüße, 世界 \x00\t\n  123456", ""):
        assert inner.encode(text).ids == [256, *ByteTokenizer().encode_batch([text])[0].tolist()]
        assert inner.decode(inner.encode(text).ids) == text
    assert (prepared.about["bos_token_id"], prepared.about["eos_token_id"]) == (256, 257)
    assert json.loads(prepared.assets["tokenizer_config.json"])["eos_token"] == "<|end_of_text|>"


def test_and_lie_inside_of_a_gguf(step, tmp_path):
    from reshard.commands.convert import run

    run(step, tmp_path / "m.gguf")
    values = read_gguf(tmp_path / "m.gguf").values
    assert values["tokenizer.ggml.bos_token_id"] == 256
    assert values["tokenizer.ggml.tokens"][65] == "A"
    assert values["tokenizer.ggml.tokens"][32] == "\u0120"
    assert values["tokenizer.ggml.token_type"][255:259] == [1, 3, 3, 5]


def test_a_pt_is_written_without_a_word_about_tokenizers(step, caplog):
    source = open_source(step)
    assert with_tokenizer(source, source.spec, "torch", None) is source
    assert with_tokenizer(source, source.spec, "dcp", None) is source
    assert not caplog.records


def test_the_letters_of_bytes_are_gpt2s():
    letters = byte_letters()
    assert set(letters) == set(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    assert (letters[32], letters[10], letters[65]) == ("\u0120", "\u010a", "A")


def test_merges_follow_the_ranks():
    ranks = {b"a": 0, b"b": 1, b"c": 2, b"ab": 3, b"bc": 4, b"abc": 5}
    assert merges_of(ranks) == [(b"a", b"b"), (b"b", b"c"), (b"a", b"bc"), (b"ab", b"c")]


def test_newer_releases_renamed_special_tokens_but_moved_none():
    old, new = ({i: n for i, n, _ in llama3_specials(128000, LLAMA3_SPECIALS, newer=x)} for x in (False, True))
    assert len(old) == len(new) == len(set(new.values())) == 256
    for i, name in {0: "<|begin_of_text|>", 1: "<|end_of_text|>", 9: "<|eot_id|>"}.items():
        assert old[128000 + i] == new[128000 + i] == name
    assert new[128004] == "<|finetune_right_pad_id|>"
    assert new[128008] == "<|eom_id|>"
    assert new[128010] == "<|python_tag|>"
    assert (new[128005], new[128011], new[128255]) == tuple(f"<|reserved_special_token_{i}|>" for i in (2, 3, 247))
