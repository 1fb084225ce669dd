"""Is a tokenizer that was cut, zeroed or emptied noticed before it is handed on? Real files, and every way to cut them."""

from __future__ import annotations

import base64
import json
import zlib
from pathlib import Path

import pytest
import tokenizers

from reshard.errors import DataError
from reshard.text.tokenizers import LLAMA3_SPECIALS, check_vocabulary, load_tokenizer
from reshard.text.whole import check_whole

# What sentencepiece 0.2.1 trained: BPE, 14 pieces, no normalisation.
SENTENCEPIECE = zlib.decompress(
    base64.b85decode(
        "c-rIQ<6^Zb&C9kEWdH&RCN3T>W}9LtkC}^?i^WDC!R6#)N=yQA8o<nCAhTgVh?xXpG92LI=3+@q0xNNVaFQX4z?`IHu(AaQxcIo(A5Ck7syuLj"
        "i-U_X5y*M~W`Qj@2x5U$3moL);$jA>2C@|n3b9KtDe!eLF-Y-nab%{X=9OfYR0=Tw0FkOB@c"
    )
)


def whole(name: str, data: bytes, vocab_size: int | None = None) -> bool:
    try:
        check_whole(name, Path(name), data, vocab_size)
    except DataError:
        return False
    return True


def zeroed(data: bytes, at: int) -> bytes:
    return data[:at] + bytes(min(16, len(data) - at)) + data[at + 16 :]


def test_a_sentencepiece_model_cut_or_zeroed_anywhere() -> None:
    assert whole("tokenizer.model", SENTENCEPIECE)
    for at in range(len(SENTENCEPIECE)):
        assert not whole("tokenizer.model", SENTENCEPIECE[:at]), at
        damaged = zeroed(SENTENCEPIECE, at)
        assert damaged == SENTENCEPIECE or not whole("tokenizer.model", damaged), at  # its last byte is zero


def test_ranks_cut_anywhere(tokenizer_model: Path, ranks: dict[bytes, int], caplog: pytest.LogCaptureFixture) -> None:
    """Between two lines too, where the model has more tokens than the padding of a vocabulary or reserved ones explain."""
    many = b"".join(
        base64.b64encode(token) + b" %d\n" % i
        for i, token in enumerate([*(bytes((i,)) for i in range(256)), *(b"x%d" % i for i in range(2000))])
    )
    lines = many.splitlines(keepends=True)
    vocab_size = len(lines) + len(LLAMA3_SPECIALS)
    for at in [*range(0, 4000, 7), len(many) - 3]:
        last_line = at - (many.rfind(b"\n", 0, at) + 1)
        if last_line and many[at : at + 1] != b"\n":
            assert not whole("tokenizer.model", many[:at], vocab_size), at
    assert whole("tokenizer.model", many, vocab_size)
    assert whole("tokenizer.model", many[:-1], vocab_size)  # the last line is all there
    assert whole("tokenizer.model", many, -(-vocab_size // 1024) * 1024)  # padded
    assert whole("tokenizer.model", many, vocab_size + 8)  # tokens of its own
    short = b"".join(lines[:1900])
    assert not whole("tokenizer.model", short, vocab_size)
    tokenizer_model.write_bytes(short)
    tokenizer = load_tokenizer(str(tokenizer_model), vocab_size=vocab_size, cache_folder=Path())
    check_vocabulary(tokenizer, 1900 + len(LLAMA3_SPECIALS))
    assert not caplog.records
    check_vocabulary(tokenizer, vocab_size)  # a run may have been trained so from its start: said, not refused
    assert "was the file cut at the end of a line?" in caplog.text


def test_the_released_sizes_fit_and_what_was_cut_of_them_does_not() -> None:
    from reshard.text.tokenizers import lacking_tokens

    assert lacking_tokens(128_256, 128_256) == lacking_tokens(128_256, 131_072) == lacking_tokens(128_256, 128_264) == 0
    assert lacking_tokens(127_743, 128_256) == 513
    assert lacking_tokens(64_000, 128_256) == 64_256


def test_json_files_cut_or_zeroed_anywhere() -> None:
    inner = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]))
    settings = json.dumps({"eos_token": "b", "model_max_length": 128})
    for name, text in (("tokenizer.json", inner.to_str()), ("tokenizer_config.json", settings)):
        data = text.encode()
        assert whole(name, data)
        for at in range(len(data)):
            assert not whole(name, data[:at]), at
            assert not whole(name, zeroed(data, at)), at
    for data in (b"", bytes(64), b"[]", b'"text"'):
        assert not whole("special_tokens_map.json", data)
    assert not whole("chat_template.jinja", b"{{ x }}" + bytes(8))


def test_a_panic_of_the_library_is_an_error_of_ours(tmp_path: Path) -> None:
    """Rust's PanicException is no Exception."""
    inner = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]))
    content = json.loads(inner.to_str())
    content["model"]["continuing_subword_prefix"] = "\r\n"
    data = json.dumps(content)
    with pytest.raises(BaseException, match=r".") as theirs:
        tokenizers.Tokenizer.from_str(data)
    assert not isinstance(theirs.value, Exception)
    assert not whole("tokenizer.json", data.encode())
    (tmp_path / "tokenizer.json").write_text(data)
    with pytest.raises(DataError, match="cannot be read as"):
        load_tokenizer(str(tmp_path), vocab_size=512, cache_folder=tmp_path)


def test_settings_that_are_cut_are_not_passed_over(tmp_path: Path) -> None:
    inner = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]))
    inner.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "b"}')
    assert load_tokenizer(str(tmp_path), vocab_size=512, cache_folder=tmp_path).eos_id == 1
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "b"')
    with pytest.raises(DataError, match=r"tokenizer_config\.json"):
        load_tokenizer(str(tmp_path), vocab_size=512, cache_folder=tmp_path)
