"""Does a run's own tokenizer leave with its weights, so that the text of an export is the text of the training?"""

import base64
import json
import logging
from pathlib import Path

import pytest
import tokenizers

from reshard.cli import main
from reshard.commands.convert import Options
from reshard.commands.export import export_source
from reshard.commands.seed import seed
from reshard.commands.sources import open_source
from reshard.commands.tokenizer_files import with_tokenizer
from reshard.config import load_config
from reshard.errors import ConfigError, DataError
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


@pytest.fixture
def slow(tmp_path, step):
    """A Hugging Face folder whose tokenizer is of the older kind, without a tokenizer.json."""
    from reshard.commands.convert import Options, run

    run(step, tmp_path / "hf", to="hf", options=Options(no_tokenizer=True))
    assert not list((tmp_path / "hf").glob("*token*"))
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / "hf" / name).write_text("{}")
    return tmp_path / "hf"


def test_a_tokenizer_that_would_be_lost_is_refused_unless_it_may_be(slow, tmp_path, capsys):
    for target in ("again", "m.gguf"):
        words = ["convert", str(slow), str(tmp_path / target), *(["--to", "hf"] if target == "again" else [])]
        with pytest.raises(SystemExit) as stop:
            main(words)
        assert stop.value.code == 2
        said = capsys.readouterr().err
        assert "its tokenizer is vocab.json, merges.txt, without a tokenizer.json" in said
        assert "--no-tokenizer" in said
        assert not (tmp_path / target).exists()
        main([*words, "--no-tokenizer"])
    assert not any("tokenizer.ggml" in key for key in read_gguf(tmp_path / "m.gguf").values)
    with pytest.raises(ConfigError, match="contradict each other"):
        Options(tokenizer=slow, no_tokenizer=True)
    logging.getLogger().handlers.clear()


def test_of_tokenizers_of_other_kinds_too(step, tmp_path, caplog):
    """SentencePiece's, as tokenizer.json and as a GGUF: to be had in the one format, lost in the other."""
    from reshard.commands.convert import run

    pieces = tokenizers.Tokenizer(tokenizers.models.BPE(byte_fallback=True, unk_token="<unk>"))
    pieces.save(str(tmp_path / "tokenizer.json"))
    run(step, tmp_path / "hf", to="hf", options=Options(tokenizer=tmp_path / "tokenizer.json"))
    with pytest.raises(DataError, match="not a byte-level BPE") as error:
        run(tmp_path / "hf", tmp_path / "m.gguf")
    assert "--no-tokenizer" in error.value.hint
    # At the end of a run nobody is there to be asked: the model goes without, and that is said.
    source = open_source(tmp_path / "hf")
    with caplog.at_level(logging.WARNING):
        (written,) = export_source(source, tmp_path / "run", ["gguf"])
    assert "exporting without a tokenizer" in caplog.text
    assert open_source(written).spec == source.spec


def test_ids_and_length_through_a_checkpoint_are_left_out_or_the_tokenizers(slow, step, tmp_path, caplog):
    """DCP has no place for them: that is said, and nothing is made up; a tokenizer that is given knows its own."""
    from transformers import GenerationConfig, LlamaConfig

    from reshard.commands.convert import run

    config = json.loads((slow / "config.json").read_text())
    said = {"bos_token_id": 5, "eos_token_id": 9, "pad_token_id": 7, "max_position_embeddings": 333}
    (slow / "config.json").write_text(json.dumps(config | said))
    with caplog.at_level(logging.INFO):
        run(slow, tmp_path / "dcp")
        run(tmp_path / "dcp", tmp_path / "back", to="hf")
    assert "keeps no tokenizer, bos_token_id, eos_token_id, pad_token_id, context_length" in caplog.text
    assert "does not say bos_token_id, eos_token_id, max_position_embeddings: left out" in caplog.text
    back = json.loads((tmp_path / "back" / "config.json").read_text())
    assert not back.keys() & said.keys()
    assert GenerationConfig.from_pretrained(tmp_path / "back").eos_token_id is None
    run(slow, tmp_path / "direct", to="hf", options=Options(no_tokenizer=True))
    direct = LlamaConfig.from_pretrained(tmp_path / "direct")
    assert {key: getattr(direct, key) for key in said} == said
    run(step, tmp_path / "own", to="hf")
    run(tmp_path / "dcp", tmp_path / "given", to="hf", options=Options(tokenizer=tmp_path / "own"))
    given = json.loads((tmp_path / "given" / "config.json").read_text())
    assert (given["bos_token_id"], given["eos_token_id"]) == (256, 257)
    assert "model_max_length" not in json.loads((tmp_path / "own" / "tokenizer_config.json").read_text())


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


RANKS = b"".join(base64.b64encode(bytes([i])) + b" %d\n" % i for i in range(256))


DAMAGED = {
    "cut": RANKS[:1500],
    "a rank twice": RANKS.replace(b" 17\n", b" 18\n"),
    "zeros": RANKS[:500] + bytes(64) + RANKS[564:],
    "none": b"hello",
    "empty": b"",
    "a pointer": b"version https://git-lfs.github.com/spec/v1\nsize 2183982\n",
}


@pytest.mark.parametrize("target", ["hf", "gguf", "meta", "torchtune"])
@pytest.mark.parametrize("what", DAMAGED)
def test_a_damaged_tokenizer_is_not_handed_on(what, target, step, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(DAMAGED[what])
    source = open_source(step)
    with pytest.raises(DataError, match=r"tokenizer\.model"):
        with_tokenizer(source, source.spec, target, tmp_path / "tokenizer.model")


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json"]
)
def test_nor_are_files_beside_the_weights_that_are_cut(name, step, tmp_path):
    from reshard.commands.convert import run

    run(step, tmp_path / "hf", to="hf")
    run(tmp_path / "hf", tmp_path / "again", to="hf")
    content = (tmp_path / "hf" / name).read_bytes()
    (tmp_path / "hf" / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=rf"{name}.* is not JSON"):
        run(tmp_path / "hf", tmp_path / "more", to="hf")
    assert not (tmp_path / "more").exists()
