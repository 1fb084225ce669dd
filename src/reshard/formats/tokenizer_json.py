"""How does Hugging Face's tokenizer.json describe a byte-level BPE? Built from ranks, or from tokens and merges.

Bytes are spelled as printable letters; a merge is two tokens that become one. Meta's tokenizer.model only ranks tokens:
which merges lead to them follows from the ranks.
Sources: OpenAI's GPT-2 encoder.py (the spelling of bytes); tiktoken's _educational.py (merging by rank); meta-llama's
llama3/llama/tokenizer.py and llama-models' (the special tokens).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from reshard.formats.hf_config import as_json

# How Llama 3 cuts text before it merges bytes; `pat_str` in Meta's tokenizer.py.
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
Special = tuple[int, str, bool]  # id, text, whether decoding may skip it


def byte_letters() -> list[str]:
    """The letter that stands for each of the 256 bytes: itself where it can be seen, else one from U+0100 on."""
    seen = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    letters = {byte: chr(byte) for byte in seen}
    unseen = [byte for byte in range(256) if byte not in letters]
    letters |= {byte: chr(0x100 + i) for i, byte in enumerate(unseen)}
    return [letters[byte] for byte in range(256)]


def spelled(token: bytes, letters: Sequence[str]) -> str:
    """A token's bytes in letters."""
    return "".join(letters[byte] for byte in token)


def merges_of(ranks: Mapping[bytes, int]) -> list[tuple[bytes, bytes]]:
    """Every pair of tokens that makes a token, in the order in which tiktoken would prefer them."""
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        pairs = [(token[:i], token[i:]) for i in range(1, len(token)) if token[:i] in ranks and token[i:] in ranks]
        pairs.sort(key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
        merges += [(rank, pair) for pair in pairs]
    return [pair for _, pair in merges]


def llama3_specials(first: int, names: Sequence[str], *, newer: bool) -> list[Special]:
    """The special tokens behind the ranks. names: of the first release; newer: as Llama 3.1 renamed them."""
    named = list(names)
    if newer:
        fixed = {
            0: named[0], 1: named[1], 4: "<|finetune_right_pad_id|>", 6: "<|start_header_id|>", 7: "<|end_header_id|>",
            8: "<|eom_id|>", 9: "<|eot_id|>", 10: "<|python_tag|>",
        }  # fmt: skip
        numbers = iter(range(len(named)))
        named = [fixed.get(i) or f"<|reserved_special_token_{next(numbers)}|>" for i in range(len(named))]
    return [(first + i, name, True) for i, name in enumerate(named)]


def from_ranks(ranks: Mapping[bytes, int], special: Sequence[Special], bos_id: int | None) -> bytes:
    """tokenizer.json with the ids of a tokenizer.model."""
    letters = byte_letters()
    vocabulary = {spelled(token, letters): rank for token, rank in sorted(ranks.items(), key=lambda item: item[1])}
    merges = [f"{spelled(left, letters)} {spelled(right, letters)}" for left, right in merges_of(ranks)]
    return tokenizer_json(vocabulary, merges, special, bos_id)


def tokenizer_json(
    vocabulary: Mapping[str, int],
    merges: Sequence[str],
    special: Sequence[Special],
    bos_id: int | None,
    eos_id: int | None = None,
) -> bytes:
    """A tokenizer.json that cuts text as Llama 3 does; every text begins with bos and ends with eos, where they are given."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    processor = None
    texts = {i: text for i, text, _ in special}
    bos_id, eos_id = (i if i in texts else None for i in (bos_id, eos_id))
    if bos_id is not None or eos_id is not None:
        added = {texts[i]: i for i in (bos_id, eos_id) if i is not None}
        parts = []
        for i in (0, 1):
            before, after = (
                [{"SpecialToken": {"id": texts[token], "type_id": i}}] if token is not None else []
                for token in (bos_id, eos_id)
            )
            parts.append([*before, {"Sequence": {"id": "AB"[i], "type_id": i}}, *after])
        processor = {
            "type": "TemplateProcessing",
            "single": parts[0],
            "pair": [*parts[0], *parts[1]],
            "special_tokens": {text: {"id": text, "ids": [i], "tokens": [text]} for text, i in added.items()},
        }
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": i, "content": text, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
                "special": skipped,
            }
            for i, text, skipped in special
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": LLAMA3_SPLIT}, "behavior": "Isolated", "invert": False},
                byte_level,
            ],
        },
        "post_processor": processor,
        "decoder": {**byte_level, "add_prefix_space": True, "use_regex": True},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": True,
            "vocab": dict(vocabulary), "merges": list(merges),
        },
    }  # fmt: skip
    return (json.dumps(content, ensure_ascii=False) + "\n").encode("utf-8", "surrogateescape")


def settings_of(
    named: Mapping[str, str | None],
    context_length: int | None,
    templates: Mapping[str, str] | None = None,
) -> dict[str, bytes]:
    """The two small files that AutoTokenizer wants beside tokenizer.json; what is not known is left out.

    named: bos_token, eos_token, ... -> the token. templates: chat templates by name, the first one called "default".
    """
    tokens = {key: token for key, token in named.items() if token is not None}
    chat: dict[str, Any] = {}
    if templates:
        several = [{"name": name, "template": template} for name, template in templates.items()]
        chat = {"chat_template": templates["default"] if list(templates) == ["default"] else several}
    length = {} if context_length is None else {"model_max_length": context_length}
    return {
        "tokenizer_config.json": as_json(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                **tokens,
                **chat,
                "clean_up_tokenization_spaces": False,
                "model_input_names": ["input_ids", "attention_mask"],
                **length,
            }
        ),
        "special_tokens_map.json": as_json(tokens),
    }
