"""Tokenizers: round trips, equality with the libraries' own encodings, specials in text, and what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiktoken
import tokenizers

from reshard.errors import ConfigError, DataError
from reshard.text.tokenizers import (
    BOS,
    EOS,
    LLAMA3_SPECIALS,
    LLAMA3_SPLIT,
    LONGEST_RUN,
    Tokenizer,
    check_tokenizer,
    check_vocabulary,
    load_tokenizer,
)

TEXTS = [
    "the thing is returning 12345 times",
    "def f(x):\n    return x  # é, ü, 漢字, 🙂\n\n\n\tthe end\r\n",
    "",
    " ",
    "\x00\x7f",
    "the<|end_of_text|>in<|begin_of_text|>",
    "a" * 1000 + " " * 1000 + "b",
]
SPECIAL_LOOKING = "x<|end_of_text|>y<|begin_of_text|>z<|eot_id|></s><s>"


def load(path: Path | str, cache: Path = Path(), vocab_size: int = 512, **more: Any) -> Tokenizer:
    return load_tokenizer(str(path), vocab_size=vocab_size, cache_folder=cache, **more)


def corpus() -> list[str]:
    return ["def function(self, value):\n    return self.value + value\n" * 20, "the cat sat on the mat. " * 50]


def test_bytes() -> None:
    tokenizer = load("bytes")
    assert (tokenizer.name, tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == ("bytes", 258, 256, 257)
    for text, ids in zip(TEXTS, tokenizer.encode_batch(TEXTS), strict=True):
        assert ids.tolist() == list(text.encode())
        assert tokenizer.decode(ids) == text
    assert tokenizer.decode([256, 104, 105, 257, 300, -1, 0xC3]) == BOS + "hi" + EOS + "\ufffd" * 3


def test_meta_tokenizer_encodes_as_tiktoken_does(tokenizer_model: Path, ranks: dict[bytes, int]) -> None:
    tokenizer = load(tokenizer_model)
    specials = {name: len(ranks) + i for i, name in enumerate(LLAMA3_SPECIALS)}
    encoding = tiktoken.Encoding("test", pat_str=LLAMA3_SPLIT, mergeable_ranks=ranks, special_tokens=specials)
    assert tokenizer.vocab_size == len(ranks) + 256 == encoding.n_vocab
    assert tokenizer.bos_id == encoding.encode_single_token("<|begin_of_text|>")
    assert tokenizer.eos_id == encoding.encode_single_token("<|end_of_text|>")
    for text, ids in zip(TEXTS, tokenizer.encode_batch(TEXTS), strict=True):
        assert ids.tolist() == encoding.encode(text, disallowed_special=())
        assert tokenizer.decode(ids) == text
    assert tokenizer.decode([tokenizer.bos_id, ranks[b"the"], 100_000, tokenizer.eos_id]) == BOS + "the\ufffd" + EOS


def test_llama3_special_tokens_are_the_released_ones() -> None:
    assert len(LLAMA3_SPECIALS) == len(set(LLAMA3_SPECIALS)) == 256
    ids = {name: 128_000 + i for i, name in enumerate(LLAMA3_SPECIALS)}
    assert ids["<|begin_of_text|>"] == 128_000
    assert ids["<|end_of_text|>"] == 128_001
    assert ids["<|start_header_id|>"] == 128_006
    assert ids["<|end_header_id|>"] == 128_007
    assert ids["<|eot_id|>"] == 128_009
    assert ids["<|reserved_special_token_250|>"] == 128_255


def test_the_order_of_lines_in_tokenizer_model_does_not_matter(tokenizer_model: Path) -> None:
    before = load(tokenizer_model)
    lines = tokenizer_model.read_bytes().splitlines(keepends=True)
    tokenizer_model.write_bytes(b"".join(reversed(lines)))
    after = load(tokenizer_model)
    assert after.identity == before.identity
    assert [a.tolist() for a in after.encode_batch(TEXTS)] == [b.tolist() for b in before.encode_batch(TEXTS)]


@pytest.mark.parametrize("character", [" ", "x", "\n", "\u3000"])
def test_runs_that_would_overflow_the_regex_are_cut(tokenizer_model: Path, character: str) -> None:
    """tiktoken alone dies of a million spaces (a stack overflow in its regex)."""
    tokenizer = load(tokenizer_model)
    text = "a" + character * 1_000_000 + "b"
    [ids] = tokenizer.encode_batch([text])
    assert tokenizer.decode(ids) == text


def test_runs_are_cut_where_meta_cuts_them(tokenizer_model: Path, ranks: dict[bytes, int]) -> None:
    tokenizer = load(tokenizer_model)
    encoding = tiktoken.Encoding("test", pat_str=LLAMA3_SPLIT, mergeable_ranks=ranks, special_tokens={})
    n = LONGEST_RUN
    [whole, cut] = tokenizer.encode_batch(["a " + "th" * (n // 2), "a " + "t" + "th" * (n // 2)])
    assert whole.tolist() == encoding.encode_ordinary("a " + "th" * (n // 2))
    parts = ["a t" + "th" * (n // 2 - 1) + "t", "h"]
    assert cut.tolist() == [i for part in parts for i in encoding.encode_ordinary(part)]


@pytest.mark.parametrize("kind", ["bytes", "bpe", "json", "tiktoken"])
def test_text_that_looks_special_is_ordinary_text(kind: str, tmp_path: Path, tokenizer_model: Path) -> None:
    if kind == "bpe":
        tokenizer = load("bpe", tmp_path, training_texts=lambda: [SPECIAL_LOOKING * 100, *corpus()])
    elif kind == "json":
        tokenizer = load(_json_file(tmp_path, special=False))
    else:
        tokenizer = load(tokenizer_model if kind == "tiktoken" else kind)
    assert tokenizer.bos_id is not None
    assert tokenizer.eos_id is not None
    [ids] = tokenizer.encode_batch([SPECIAL_LOOKING])
    assert not {tokenizer.bos_id, tokenizer.eos_id} & set(ids.tolist())
    assert len(ids) > 12
    assert tokenizer.decode(ids) == SPECIAL_LOOKING


def test_bpe_round_trip_and_reuse(tmp_path: Path) -> None:
    tokenizer = load("bpe", tmp_path, 300, training_texts=corpus)
    assert tokenizer.vocab_size == 300
    for text, ids in zip(TEXTS, tokenizer.encode_batch(TEXTS), strict=True):
        assert tokenizer.decode(ids) == text
    [ids] = tokenizer.encode_batch(corpus()[:1])
    assert len(ids) < 0.5 * len(corpus()[0])
    file = tmp_path / "bpe-300" / "tokenizer.json"
    before = file.stat()

    def never() -> list[str]:
        raise AssertionError("a trained tokenizer was trained again")

    again = load("bpe", tmp_path, 300, training_texts=never)
    assert again.identity == tokenizer.identity
    assert file.stat().st_mtime_ns == before.st_mtime_ns
    assert sorted(p.name for p in file.parent.iterdir() if not p.name.endswith(".lock")) == ["tokenizer.json"]
    # Given by its path it is the same tokenizer, so caches and checkpoints know it.
    assert load(file).identity == load(file.parent).identity == tokenizer.identity
    assert load("bpe", tmp_path, 310, training_texts=corpus).identity != tokenizer.identity


def test_bpe_training_is_the_same_in_every_process(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from reshard.text import load_tokenizer, open_source;"
        "from reshard.config import Training;"
        "texts = lambda: [t for i, t in enumerate(open_source(Training()).documents()) if i < 60];"
        "print(load_tokenizer('bpe', vocab_size=700, cache_folder=Path(sys.argv[1]), training_texts=texts).identity)"
    )
    identities = set()
    for i, threads in enumerate(("1", "2", "4")):
        env = os.environ | {"RAYON_NUM_THREADS": threads, "PYTHONHASHSEED": threads, "PYTHONPATH": ":".join(sys.path)}
        run = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / str(i))], capture_output=True, text=True, check=True, env=env
        )
        identities.add(run.stdout.strip())
    assert len(identities) == 1
    assert len(identities.pop()) == 64
    assert len({(tmp_path / str(i) / "bpe-700" / "tokenizer.json").read_bytes() for i in range(3)}) == 1


def test_bpe_trains_on_a_bounded_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reshard.text.tokenizers.BPE_SAMPLE_BYTES", 10_000)
    taken = 0

    def endless() -> Any:
        nonlocal taken
        while True:
            taken += 1
            yield "the thing é " * 100

    load("bpe", tmp_path, 300, training_texts=endless)
    assert taken == 8  # of 1,300 bytes each


def test_a_damaged_trained_tokenizer_is_trained_again(tmp_path: Path) -> None:
    tokenizer = load("bpe", tmp_path, 300, training_texts=corpus)
    file = tmp_path / "bpe-300" / "tokenizer.json"
    file.write_bytes(file.read_bytes()[:1000])
    assert load("bpe", tmp_path, 300, training_texts=corpus).identity == tokenizer.identity


def test_bpe_needs_room_and_text(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"at least 258.*has 257"):
        load("bpe", tmp_path, 257, training_texts=corpus)
    with pytest.raises(DataError, match="not trained yet") as caught:
        load("bpe", tmp_path, 300)
    assert "reshard tokenize" in str(caught.value)
    small = load("bpe", tmp_path, 5000, training_texts=lambda: ["ab ab ab"])
    assert 258 <= small.vocab_size < 270


def _json_file(folder: Path, *, special: bool = True, **changes: Any) -> Path:
    """A tokenizer.json as other programs write it: byte-level BPE with specials at the end, at will with traps."""
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    inner.train_from_iterator(
        corpus(), tokenizers.trainers.BpeTrainer(vocab_size=290, initial_alphabet=alphabet, show_progress=False)
    )
    inner.add_tokens([tokenizers.AddedToken(name, special=special, normalized=False) for name in (BOS, EOS)])
    content = json.loads(inner.to_str())
    for key, value in changes.items():
        content[key] = content[key] | value if isinstance(content.get(key), dict) else value
    file = folder / "tokenizer.json"
    file.write_text(json.dumps(content))
    return file


def test_hugging_face_tokenizer_encodes_as_the_library_does(tmp_path: Path) -> None:
    file = _json_file(tmp_path)
    reference = tokenizers.Tokenizer.from_file(str(file))
    tokenizer = load(file)
    assert tokenizer.vocab_size == 292
    assert (tokenizer.bos_id, tokenizer.eos_id) == (290, 291)
    ordinary = [text for text in TEXTS if "<|" not in text]
    for text, ids in zip(ordinary, tokenizer.encode_batch(ordinary), strict=True):
        assert ids.tolist() == reference.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids) == text
    assert tokenizer.decode([290, *tokenizer.encode_batch(["the"])[0], 9999, 291]) == BOS + "the\ufffd" + EOS


def test_a_length_limit_padding_or_dropout_in_the_file_does_nothing(tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    plain = load(_json_file(tmp_path / "plain"))
    limit = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
    pad = {"strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None}
    pad |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "!"}
    trapped = load(_json_file(tmp_path, truncation=limit, padding=pad, model={"dropout": 0.9}))
    text = corpus()[0]
    wanted = plain.encode_batch([text, "a"])
    for _ in range(3):
        got = trapped.encode_batch([text, "a"])
        assert [ids.tolist() for ids in got] == [ids.tolist() for ids in wanted]
    assert trapped.identity == plain.identity


def test_bos_and_eos_of_a_hugging_face_tokenizer(tmp_path: Path) -> None:
    file = _json_file(tmp_path)
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"bos_token": {"content": "a"}, "eos_token": "b"}))
    assert (load(file).bos_id, load(file).eos_id) == (290, 291)  # Llama's pair wins over what a chat release says
    content = json.loads(file.read_text())
    content["added_tokens"] = [
        {**content["added_tokens"][0], "id": 290, "content": "<|endoftext|>"},
        {**content["added_tokens"][0], "id": 291, "content": "<|im_end|>"},
    ]
    file.write_text(json.dumps(content))
    config.write_text(json.dumps({"bos_token": None, "eos_token": "<|im_end|>"}))
    assert (load(file).bos_id, load(file).eos_id) == (None, 291)
    config.write_text(json.dumps({"bos_token": "<|endoftext|>", "eos_token": {"content": "<|endoftext|>"}}))
    assert (load(file).bos_id, load(file).eos_id) == (None, 290)  # one token between documents, not two
    config.unlink()
    assert (load(file).bos_id, load(file).eos_id) == (None, 290)


def test_a_vocabulary_with_eos_as_a_plain_word_is_refused_when_the_text_has_it(tmp_path: Path) -> None:
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"the": 0, "</s>": 1, "[UNK]": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    words.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load(tmp_path)
    assert tokenizer.eos_id == 1
    assert tokenizer.encode_batch(["the cat"])[0].tolist() == [0, 2]
    with pytest.raises(DataError, match=r"contains '</s>'"):
        tokenizer.encode_batch(["the </s> the"])


def test_vocabulary_has_gaps_and_is_counted_by_its_highest_id(tmp_path: Path) -> None:
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 700}, unk_token="a"))
    words.save(str(tmp_path / "tokenizer.json"))
    assert load(tmp_path).vocab_size == 701


def test_vocabulary_against_the_model(tokenizer_model: Path) -> None:
    check_vocabulary(load("bytes"), 258)
    with pytest.raises(ConfigError, match=r"bytes has 258 tokens.*257") as caught:
        check_vocabulary(load("bytes"), 257)
    assert "--model.vocab_size 258" in str(caught.value)
    assert caught.value.key == "model.vocab_size"
    check_tokenizer(str(tokenizer_model), 527)
    check_tokenizer("bpe", 258)
    for path, size in ((str(tokenizer_model), 526), ("bpe", 257), ("bytes", 1)):
        with pytest.raises(ConfigError):
            check_tokenizer(path, size)


def test_identities_differ_where_ids_do(tmp_path: Path, tokenizer_model: Path) -> None:
    bpe = load("bpe", tmp_path, 300, training_texts=corpus)
    identities = {
        load("bytes").identity,
        load(tokenizer_model).identity,
        load(_json_file(tmp_path)).identity,
        bpe.identity,
    }
    assert len(identities) == 4
    assert all(len(identity) == 64 for identity in identities)


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        (b"", "is empty"),
        (b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02\n\x0c\n\x03<s>", r"SentencePiece model \(Llama 2"),
        (b"hello\n", "line 1 is not `<base64> <rank>`"),
        (b"AA== 0\nAQ== x\n", "line 2 is not `<base64> <rank>`"),
        (b"AA== 0\nAQ== 2\n", "ranks are not 0 to 1"),
        (b"AA== 0\nAA== 1\n", "ranks are not 0 to 1"),
        (b"AA== 0\nAQ== 1\n", "254 of the 256 bytes have no rank, the first is 2"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:82\nsize 2183982\n", "Git LFS pointer"),
        (b"{not json", "is not JSON"),
        (b"{}", "no `model`"),
        (b'{"model": {"type": "Nonsense"}}', "cannot be read"),
        (b'{"model": {}, "added_tokens": [3]}', "not tokens"),
        (b'{"model": {}, "added_tokens": {"a": 3}}', "not tokens"),
    ],
)
def test_files_that_are_no_tokenizer(tmp_path: Path, content: bytes, wanted: str) -> None:
    file = tmp_path / "tokenizer.model"
    file.write_bytes(content)
    with pytest.raises(DataError, match=wanted) as caught:
        load(file)
    assert str(file) in caught.value.message


def test_a_tokenizer_model_that_is_cut_off(tokenizer_model: Path) -> None:
    data = tokenizer_model.read_bytes()
    tokenizer_model.write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError, match=r"have no rank|is not `<base64>|ranks are not"):
        load(tokenizer_model)


def test_places_where_there_is_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist") as caught:
        load("byte")
    assert "did you mean `bytes`" in str(caught.value)
    with pytest.raises(DataError, match="does not exist"):
        load(tmp_path / "tokenizer.model")
    with pytest.raises(DataError, match=r"neither tokenizer.json nor tokenizer.model"):
        load(tmp_path)


def test_folders(tmp_path: Path, tokenizer_model: Path) -> None:
    wanted = load(tokenizer_model).identity
    assert load(tmp_path).identity == wanted
    release = tmp_path / "Meta-Llama-3-8B"
    (release / "original").mkdir(parents=True)
    tokenizer_model.rename(release / "original" / "tokenizer.model")
    assert load(release).identity == wanted


def test_ids_are_plain_arrays(tmp_path: Path, tokenizer_model: Path) -> None:
    for tokenizer in (load("bytes"), load(tokenizer_model), load(_json_file(tmp_path))):
        assert tokenizer.encode_batch([]) == []
        for ids in tokenizer.encode_batch(["", "the thing"]):
            assert isinstance(ids, np.ndarray)
            assert ids.dtype == np.int32
            assert ids.ndim == 1
