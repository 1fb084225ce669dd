"""Is this file of a tokenizer all there? Asked before one is handed on; nothing is encoded with it."""

from __future__ import annotations

import json
from pathlib import Path

from reshard.errors import DataError
from reshard.text.sentencepiece import check_sentencepiece, is_sentencepiece
from reshard.text.tokenizers import LLAMA3_SPECIALS, check_tokenizer_json, lacking_tokens, tiktoken_ranks

NAMES = frozenset(
    ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
     "chat_template.jinja", "generation_config.json")
)  # fmt: skip


def check_whole(name: str, file: Path, data: bytes, vocab_size: int | None = None) -> None:
    """Is it what its name says, and whole? name: as of NAMES; file: how errors call it.

    vocab_size: of the model that it goes with, where that is known: a list of ranks that was cut at the end of a line is
    noticed by it alone. Raises DataError.
    """
    if not data.strip(b" \t\r\n\0"):
        raise DataError(f"{file} is {'empty' if not data else 'nothing but zeros or blanks'}", path=file)
    if name == "tokenizer.json":
        check_tokenizer_json(file, data)
    elif name == "tokenizer.model":
        _check_model(file, data, vocab_size)
    elif name.endswith(".json"):
        try:
            content = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{file} is not JSON: {error}", path=file) from None
        if not isinstance(content, dict):
            raise DataError(f"{file} holds a {type(content).__name__}, expected a JSON object", path=file)
    elif b"\0" in data:
        raise DataError(f"{file} is damaged: it has zeros where text is expected", path=file)


def _check_model(file: Path, data: bytes, vocab_size: int | None) -> None:
    if is_sentencepiece(data):
        check_sentencepiece(file, data)
        return
    tokens = len(tiktoken_ranks(file, data)) + len(LLAMA3_SPECIALS)
    lost = lacking_tokens(tokens, vocab_size) if vocab_size is not None else 0
    if lost:
        raise DataError(
            f"tokenizer {file} has {tokens} tokens with the special ones, the model's vocabulary {vocab_size}: the other "
            f"{lost} are more than padding or reserved tokens, so it was probably cut at the end of a line",
            path=file,
        )
