"""How does a tokenizer lie inside of a GGUF? Tokens, merges, and names for what else a tokenizer does; both ways.

llama.cpp knows how text is cut by a name (`pre`), and that a text begins with bos by a flag. What no name and no flag
stands for cannot be said there, and is an error rather than another tokenizer.
Sources: llama.cpp's llama-vocab.cpp and conversion/base.py; gguf 0.19.0, vocab.py.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from reshard.errors import DataError, FormatError, listed
from reshard.formats.hf_config import GENERATION, token_ids
from reshard.formats.tokenizer_json import LLAMA3_SPLIT, settings_of, tokenizer_json
from reshard.model.spec import LlamaSpec

log = logging.getLogger(__name__)

_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5  # token types
_KEY = "tokenizer.ggml."
_TEMPLATE, _TEMPLATES = "tokenizer.chat_template", "tokenizer.chat_templates"
_LLAMA3_PRE = ("llama-bpe", "llama3", "llama-v3")  # names of one way to cut; llama.cpp begins each text with bos there
_LLAMA3_BOS = 128000
# Tokens that llama.cpp takes for the end of a text by what they are called, in all versions since 2024.
_ENDS_BY_NAME = {"<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|eom_id|>", "<EOT>"}
_WITHOUT = "--no-tokenizer goes on without one, --tokenizer takes another"


# -- reading


@dataclass(frozen=True)
class Read:
    """The tokenizer of a GGUF. problem: why it is not in `assets`, where it has one."""

    assets: dict[str, Path | bytes] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)
    problem: str = ""


def read_tokenizer(values: Mapping[str, Any], path: Path) -> Read:
    """The tokenizer as tokenizer.json and the files beside it, where it is a byte-level BPE that cuts as Llama 3's does."""
    about = _about(values)
    tokens = values.get(f"{_KEY}tokens")
    if not tokens:
        return Read(about=about)
    problem = _problem(values)
    if problem:
        return Read(about=about, problem=f"{path}: {problem}")
    types = values[f"{_KEY}token_type"]
    vocabulary = {token: i for i, (token, kind) in enumerate(zip(tokens, types, strict=True)) if kind == _NORMAL}
    special = [(i, tokens[i], kind == _CONTROL) for i, kind in enumerate(types) if kind in (_CONTROL, _USER_DEFINED)]
    bos, eos = (values.get(f"{_KEY}{key}_token_id") for key in ("bos", "eos"))
    content = tokenizer_json(
        vocabulary,
        values[f"{_KEY}merges"],
        special,
        bos if values.get(f"{_KEY}add_bos_token", True) else None,
        eos if values.get(f"{_KEY}add_eos_token", False) else None,
    )
    ids = {"bos_token": bos, "eos_token": eos, "pad_token": about.get("pad_token_id"), "unk_token": _unknown(values)}
    named = {key: None if i is None else tokens[i] for key, i in ids.items()}
    templates = {
        key.removeprefix(_TEMPLATE).removeprefix(".") or "default": value
        for key, value in values.items()
        if (key == _TEMPLATE or key.startswith(f"{_TEMPLATE}.")) and isinstance(value, str)
    }
    alone = list(templates) == ["default"]  # as a file of its own, which every version of transformers prefers
    assets: dict[str, Path | bytes] = {
        "tokenizer.json": content,
        **settings_of(named, about.get("context_length"), None if alone else templates),
    }
    if alone:
        assets["chat_template.jinja"] = templates["default"].encode()
    return Read(assets, about)


def _about(values: Mapping[str, Any]) -> dict[str, Any]:
    about: dict[str, Any] = {}
    for ours, theirs in (
        ("context_length", "llama.context_length"),
        ("bos_token_id", f"{_KEY}bos_token_id"),
        ("eos_token_id", f"{_KEY}eos_token_id"),
        ("pad_token_id", f"{_KEY}padding_token_id"),
    ):
        if type(values.get(theirs)) is int:
            about[ours] = values[theirs]
    ends = [values.get(f"{_KEY}{key}_token_id") for key in ("eos", "eot", "eom")]
    stops = list(dict.fromkeys(i for i in ends if type(i) is int))
    if len(stops) > 1:
        about["stop_token_ids"] = stops
    return about


def _unknown(values: Mapping[str, Any]) -> int | None:
    value = values.get(f"{_KEY}unknown_token_id")
    return value if type(value) is int else None


def _problem(values: Mapping[str, Any]) -> str:
    """Why can the tokenizer not become a tokenizer.json? Empty where it can."""
    tokens, types = values[f"{_KEY}tokens"], values.get(f"{_KEY}token_type")
    model, pre = values.get(f"{_KEY}model"), values.get(f"{_KEY}pre")
    if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
        return "its tokens are no list of texts"
    if model != "gpt2":
        return f"its tokenizer is of type {model!r}, not a byte-level BPE ('gpt2')"
    if pre not in _LLAMA3_PRE:
        return f"its tokenizer cuts text as {pre!r}, not as Llama 3's ('llama-bpe')"
    if not isinstance(types, list) or len(types) != len(tokens) or not isinstance(values.get(f"{_KEY}merges"), list):
        return "its tokenizer has no merges, or not a type for each token"
    strange = sorted({kind for kind in types if kind not in (_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED)})
    if strange:
        return f"its tokenizer has tokens of type {listed(map(str, strange))}, which no byte-level BPE has"
    for key in ("bos", "eos", "eot", "eom", "padding", "unknown"):
        value = values.get(f"{_KEY}{key}_token_id")
        if value is not None and not (type(value) is int and 0 <= value < len(tokens)):
            return f"its {key}_token_id is {value!r}, but it has {len(tokens)} tokens"
    for key, default in (("bos", True), ("eos", False)):
        value = values.get(f"{_KEY}{key}_token_id")
        if values.get(f"{_KEY}add_{key}_token", default) and value is not None and types[value] == _NORMAL:
            return f"its texts get a {key} token that is no special token"
    if values.get(f"{_KEY}add_sep_token"):
        return "its texts get a separator token"
    return ""


# -- writing


def tokenizer_values(assets: Mapping[str, Path | bytes], spec: LlamaSpec, about: Mapping[str, Any]) -> dict[str, Any]:
    """tokenizer.ggml.* from a tokenizer.json; nothing where there is no tokenizer.

    Raises DataError for a tokenizer that llama.cpp would read as another one, FormatError for a file that is no JSON.
    """
    content = asset_json(assets, "tokenizer.json")
    if content is None:
        if "tokenizer.model" in assets:
            raise _lost("tokenizer.model is no ranks of Llama 3's, and cannot be written into a GGUF yet")
        return {}
    model = content.get("model") or {}
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        raise _lost("the tokenizer is not a byte-level BPE: it cannot be written into a GGUF yet")
    settings = asset_json(assets, "tokenizer_config.json") or {}
    tokens, types = _tokens(content, spec)
    ids = {token: i for i, token in enumerate(tokens) if types[i] != _UNUSED}
    pre = _pre(content, ids)
    named = {key: _named(settings, f"{key}_token", ids) for key in ("bos", "eos", "pad", "unk")}
    first, last = _added(content)
    known = token_ids(about)
    bos = named["bos"] if named["bos"] is not None else _one_id(known.get("bos_token_id"), "bos_token_id", spec)
    if first is not None and (bos is None or "bos_token" not in settings):
        bos = ids.get(first)
    eos, more = _ends(assets, about, known, named["eos"], tokens, spec)
    for key, added, token in (("bos", first, bos), ("eos", last, eos)):
        if added is not None and (token is None or ids.get(added) != token):
            raise _lost(f"the tokenizer puts {added} around each text, but its {key}_token is another one")
        if type(said := settings.get(f"add_{key}_token")) is bool and said != (added is not None):
            log.warning("tokenizer_config.json says add_%s_token %s, tokenizer.json does not: it decides, as in transformers 5",
                        key, said)  # fmt: skip
    pad = named["pad"] if named["pad"] is not None else _one_id(known.get("pad_token_id"), "pad_token_id", spec)
    numbers = {"bos": bos, "eos": eos, "eom": more, "padding": pad, "unknown": named["unk"]}
    return {
        f"{_KEY}model": "gpt2",
        f"{_KEY}pre": pre,
        f"{_KEY}tokens": tokens,
        f"{_KEY}token_type": types,
        f"{_KEY}merges": _merges(model),
        **{f"{_KEY}{key}_token_id": value for key, value in numbers.items() if value is not None},
        f"{_KEY}add_bos_token": first is not None,  # said in any case: for Llama 3's way to cut, llama.cpp assumes it
        f"{_KEY}add_eos_token": last is not None,
        **_template_values(assets, settings),
    }


def _lost(problem: str) -> DataError:
    return DataError(problem, hint=_WITHOUT)


def _tokens(content: Mapping[str, Any], spec: LlamaSpec) -> tuple[list[str], list[int]]:
    """The text and type of each id; what the tokenizer does not use is padded up to the model's rows."""
    tokens = [f"[PAD{i}]" for i in range(spec.vocab_size)]
    types = [_UNUSED] * spec.vocab_size
    added = content.get("added_tokens") or []
    stripping = [t["content"] for t in added if t.get("lstrip") or t.get("rstrip") or t.get("single_word")]
    if stripping:
        raise _lost(f"the tokens {listed(stripping)} take spaces around them along, which a GGUF cannot say")
    entries = [(i, token, _NORMAL) for token, i in content["model"]["vocab"].items()]
    entries += [(t["id"], t["content"], _CONTROL if t.get("special") else _USER_DEFINED) for t in added]
    for i, token, kind in entries:
        if i >= spec.vocab_size:
            raise _lost(f"the tokenizer has a token {i}, the model has {spec.vocab_size} rows: llama.cpp wants as many")
        tokens[i], types[i] = token, kind
    return tokens, types


def _merges(model: Mapping[str, Any]) -> list[str]:
    merges = []
    for merge in model.get("merges") or []:
        if not isinstance(merge, str) and any(" " in part for part in merge):
            raise _lost(f"the tokenizer merges tokens with spaces in them ({merge!r}), which a GGUF cannot say")
        merges.append(merge if isinstance(merge, str) else " ".join(merge))
    return merges


def _pre(content: Mapping[str, Any], ids: Mapping[str, int]) -> str:
    """llama.cpp's name for how the text is cut before bytes are merged. Raises DataError where it has none."""
    model, normalizer = content["model"], content.get("normalizer")
    if normalizer and normalizer.get("normalizers") != []:
        raise _lost(f"the tokenizer normalises text ({normalizer.get('type')}), which a GGUF cannot say")
    if any(model.get(key) for key in ("continuing_subword_prefix", "end_of_word_suffix", "dropout")):
        raise _lost("the tokenizer marks the inside or end of words, or drops merges: a GGUF cannot say it")
    pre = content.get("pre_tokenizer") or {}
    steps: list[dict[str, Any]] = pre.get("pretokenizers", []) if pre.get("type") == "Sequence" else [pre]
    last = steps[-1] if steps else {}
    if last.get("type") == "ByteLevel" and not last.get("add_prefix_space", True):
        if len(steps) == 1 and last.get("use_regex", True) and not model.get("ignore_merges"):
            return "gpt-2"
        split = {"type": "Split", "pattern": {"Regex": LLAMA3_SPLIT}, "behavior": "Isolated", "invert": False}
        # The first files of Llama 3 itself lacked ignore_merges, which changes nothing of any text there.
        whole = model.get("ignore_merges") or ids.get("<|begin_of_text|>") == _LLAMA3_BOS
        if steps[:-1] == [split] and not last.get("use_regex", True) and whole:
            return "llama-bpe"
    raise _lost("the tokenizer cuts text in a way that no name of llama.cpp's that is known here stands for")


def _added(content: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """The tokens that are put before and behind each text. transformers 5 goes by the post_processor alone."""
    processor = content.get("post_processor") or {}
    first = last = None
    for step in processor.get("processors", [processor]) if processor else []:
        if step.get("type") == "ByteLevel":
            continue
        parts = (step.get("single") or []) if step.get("type") == "TemplateProcessing" else []
        where = [i for i, part in enumerate(parts) if "Sequence" in part]
        if len(where) != 1 or where[0] > 1 or len(parts) - where[0] > 2:
            raise _lost(
                "the tokenizer puts more around a text than a token before and one behind: a GGUF cannot say it"
            )
        first = parts[0]["SpecialToken"]["id"] if where[0] == 1 else first
        last = parts[-1]["SpecialToken"]["id"] if len(parts) - where[0] == 2 else last
    return first, last


def _named(settings: Mapping[str, Any], key: str, ids: Mapping[str, int]) -> int | None:
    """The id of a token that tokenizer_config.json names."""
    value = settings.get(key)
    value = value.get("content") if isinstance(value, dict) else value
    return ids.get(value) if isinstance(value, str) else None


def _one_id(value: Any, key: str, spec: LlamaSpec) -> int | None:
    value = value[0] if isinstance(value, list) and len(value) == 1 else value
    if value is None or (key == "pad_token_id" and value == -1):  # -1: none, in Llama 1's files
        return None
    if type(value) is not int or not 0 <= value < spec.vocab_size:
        raise _lost(f"{key} is {str(value)[:60]}, expected one of the model's {spec.vocab_size} tokens")
    return value


def _ends(
    assets: Mapping[str, Path | bytes],
    about: Mapping[str, Any],
    known: Mapping[str, Any],
    named: int | None,
    tokens: list[str],
    spec: LlamaSpec,
) -> tuple[int | None, int | None]:
    """The token that ends a text, and one more that does. llama.cpp has places for two, and knows others by their names.

    The first is the tokenizer's own, as in llama.cpp's converter; all are where transformers would stop.
    """
    stops = (asset_json(assets, GENERATION) or {}).get("eos_token_id")
    if stops is None:
        stops = about.get("stop_token_ids") or known.get("eos_token_id")
    said = stops if isinstance(stops, list) else [stops]
    ids = [i for i in (_one_id(value, "eos_token_id", spec) for value in said) if i is not None]
    first = named if named is not None else next(iter(ids), None)
    more = [i for i in dict.fromkeys(ids) if i != first and tokens[i] not in _ENDS_BY_NAME]
    if len(more) > 1:
        raise _lost(f"a text ends with any of the tokens {_texts([first, *more], tokens)}: a GGUF can say two of them")
    return first, more[0] if more else None


def _texts(ids: Iterable[int | None], tokens: list[str]) -> str:
    return listed([f"{i} ({tokens[i]})" for i in ids if i is not None])


def _template_values(assets: Mapping[str, Path | bytes], settings: Mapping[str, Any]) -> dict[str, Any]:
    """The chat templates. A file of its own goes before what tokenizer_config.json says, as in transformers."""
    said = settings.get("chat_template")
    templates: dict[str, str] = {}
    if isinstance(said, str):
        templates = {"default": said}
    elif isinstance(said, list):
        templates = {t["name"]: t["template"] for t in said if isinstance(t, dict) and {"name", "template"} <= t.keys()}
    alone = assets.get("chat_template.jinja")
    if alone is not None:
        templates = {"default": (alone if isinstance(alone, bytes) else alone.read_bytes()).decode()}
    others = {name: text for name, text in templates.items() if name != "default"}
    values: dict[str, Any] = {_TEMPLATE: templates["default"]} if "default" in templates else {}
    if others:
        values |= {_TEMPLATES: list(others), **{f"{_TEMPLATE}.{name}": text for name, text in others.items()}}
    return values


def asset_json(assets: Mapping[str, Path | bytes], name: str) -> dict[str, Any] | None:
    """A JSON file that travels with the weights. Raises FormatError where it is none."""
    content = assets.get(name)
    if content is None:
        return None
    try:
        data = json.loads(content if isinstance(content, bytes) else content.read_bytes())
    except (OSError, ValueError) as error:
        raise FormatError(f"{name} is not JSON: {error}", path=name) from None
    if not isinstance(data, dict):
        raise FormatError(f"{name} holds a {type(data).__name__}, expected a JSON object", path=name)
    return data
