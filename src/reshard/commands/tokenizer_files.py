"""Which tokenizer goes with the weights, and in which files? Carried along, converted, or taken from the run's config.

Joins `text`, which knows what a run was trained with, and `formats`, which knows the files that others want.
"""

from __future__ import annotations

import base64
import json
import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from reshard.checkpoint.manifest import MANIFEST, read_manifest
from reshard.errors import DataError, FormatError, ReshardError, listed
from reshard.formats.gguf_tokenizer import asset_json
from reshard.formats.hf import ASSETS
from reshard.formats.hf_config import GENERATION, LLAMA3_VOCAB, TOKEN_IDS, context_length, llama3_ids, token_ids
from reshard.formats.lfs import PULL_HINT, pointer
from reshard.formats.protocol import Source
from reshard.formats.tokenizer_json import byte_letters, from_ranks, llama3_specials, settings_of, tokenizer_json
from reshard.model.spec import LlamaSpec

logger = logging.getLogger(__name__)

Assets = dict[str, Path | bytes]
_CONVERTED = ("hf", "gguf")  # formats that want a tokenizer.json
_KEEPING = ("hf", "gguf", "meta")  # formats that take any tokenizer along


def with_tokenizer(
    source: Source, spec: LlamaSpec, target: str, tokenizer: Path | None, *, without: bool = False
) -> Source:
    """The source with the tokenizer files that the target format wants; as it is, and a warning, where there are none.

    tokenizer: a tokenizer.model, a tokenizer.json or a folder with one; instead of the source's own. without: none at all.
    Raises DataError for a tokenizer that is none, and where the source has one that would be lost.
    """
    if target in ("dcp", "torch"):
        return source
    assets: Assets = dict(source.assets)
    if without or tokenizer is not None:
        assets = {n: c for n, c in assets.items() if "token" not in n and (n != "chat_template.jinja" or not without)}
    if tokenizer is not None:
        assets |= _files_at(tokenizer)
    elif not without and source.tokenizer_problem and target in _KEEPING:
        raise DataError(
            f"{source.tokenizer_problem}: it cannot be handed on",
            path=source.path,
            hint="--no-tokenizer goes on without one, --tokenizer takes another",
        )
    elif not without and not _has_tokenizer(assets):
        assets |= _of_run(source, spec)
    about = dict(source.about)
    _check_whole(assets, spec)
    if not _has_tokenizer(assets):
        if not without:
            logger.warning("%s has no tokenizer: the export goes without one (--tokenizer gives it one)", source.path)
        if spec.vocab_size == LLAMA3_VOCAB and not token_ids(about).keys() & {"bos_token_id", "eos_token_id"}:
            logger.info("%s: taking the token ids of Llama 3's own tokenizer, which has as many", source.path)
            about = {**llama3_ids(spec), **about}
        return replace(source, assets=assets, about=about)
    if target in _CONVERTED and "tokenizer.json" not in assets:
        assets |= _converted(assets["tokenizer.model"], spec, target)
    content = asset_json(assets, "tokenizer.json")
    if content is not None:
        bos, eos = _ends(content, assets)
        ids = _ids(content)
        if about.get("eos_token_id") is None and eos == "<|end_of_text|>" and spec.vocab_size == LLAMA3_VOCAB:
            about.setdefault("stop_token_ids", llama3_ids(spec)["stop_token_ids"])
        for key, token in (("bos_token_id", bos), ("eos_token_id", eos)):
            if about.get(key) is None and token is not None and token in ids:
                about[key] = ids[token]
        if target == "hf" and "tokenizer_config.json" not in assets:
            assets |= settings_of({"bos_token": bos, "eos_token": eos}, context_length(spec, about))
    elif target == "torchtune" and "tokenizer.model" not in assets:
        logger.warning("torchtune wants Meta's tokenizer.model, %s has none", source.path)
    return replace(source, assets=assets, about=about)


def say_left_out(source: Source, spec: LlamaSpec, target: str) -> None:
    """One line for what others want to be told, and a format has no place for, or nobody knows."""
    tokenizer = [n for n in source.assets if n != GENERATION] or source.tokenizer_problem
    if target in ("hf", "gguf"):
        unknown = [key for key in TOKEN_IDS[:2] if source.about.get(key) is None]
        unknown += ["max_position_embeddings"] if target == "hf" and context_length(spec, source.about) is None else []
        if unknown:
            logger.info("%s does not say %s: left out", source.path, listed(unknown))
        return
    lost = ["tokenizer"] if target in ("dcp", "torch") and tokenizer else []
    lost += [key for key in (*TOKEN_IDS, "context_length") if source.about.get(key) is not None]
    if lost:
        logger.info("%s: a %s export keeps no %s", source.path, target, listed(lost))


def _check_whole(assets: Assets, spec: LlamaSpec) -> None:
    """Is everything that would be handed on what its name says, and all of it? Raises DataError naming the file."""
    from reshard.text.whole import NAMES, check_whole

    for name, content in assets.items():
        if name not in NAMES:
            continue
        file = content if isinstance(content, Path) else Path(name)
        beside = "copy or download this file again"
        hint = f"{beside}; --no-tokenizer goes on without a tokenizer" if name != GENERATION else beside
        try:
            data = content if isinstance(content, bytes) else content.read_bytes()
            if what := pointer(data):
                raise DataError(f"{file} {what}", path=file, hint=PULL_HINT)
            check_whole(name, file, data, spec.vocab_size)
        except OSError as error:
            raise DataError(f"{file} cannot be read: {error.strerror or error}", path=file, hint=hint) from None
        except DataError as error:
            raise DataError(error.message, path=file, hint=error.hint or hint) from None


def _has_tokenizer(assets: Mapping[str, Any]) -> bool:
    return "tokenizer.json" in assets or "tokenizer.model" in assets


def _files_at(path: Path) -> Assets:
    if path.is_file():
        name = "tokenizer.json" if path.suffix == ".json" else "tokenizer.model"
        return {name: path}
    found: Assets = {Path(name).name: path / name for name in reversed(ASSETS) if (path / name).is_file()}
    found.pop("generation_config.json", None)
    if not _has_tokenizer(found):
        raise DataError(f"`{path}` holds neither tokenizer.json nor tokenizer.model", path=path)
    return found


def _of_run(source: Source, spec: LlamaSpec) -> Assets:
    """The tokenizer that a checkpoint of ours was trained with, if it can still be had."""
    if source.provenance.get("format") != "dcp" or not (source.path / MANIFEST).exists():
        return {}
    said = read_manifest(source.path).config
    if not said:
        return {}
    from reshard.config import Config
    from reshard.text.cache import folder_for_one_question, tokenizer_for
    from reshard.text.tokenizers import BOS, EOS, ByteTokenizer, JsonTokenizer

    try:
        config = Config.model_validate(said, strict=True)
        path = Path(config.model.tokenizer_path)
        if path.exists():
            return _files_at(path)
        with folder_for_one_question() as build_in:
            tokenizer = tokenizer_for(config, spec.vocab_size, progress=False, build_in=build_in)
    except (ReshardError, ValueError) as error:
        logger.warning("the tokenizer of %s cannot be had: %s", source.path, error)
        return {}
    if isinstance(tokenizer, ByteTokenizer):
        vocabulary = {letter: byte for byte, letter in enumerate(byte_letters())}
        return {"tokenizer.json": tokenizer_json(vocabulary, [], [(256, BOS, True), (257, EOS, True)], 256)}
    if not isinstance(tokenizer, JsonTokenizer):
        return {}
    # Trained on the spot: as it is, but a text begins with bos, as the documents of the training did.
    content = json.loads(tokenizer._inner.to_str())
    special = [(token["id"], token["content"], True) for token in content["added_tokens"]]
    names = {text for _, text, _ in special}
    vocabulary = {token: i for token, i in content["model"]["vocab"].items() if token not in names}
    merges = [m if isinstance(m, str) else " ".join(m) for m in content["model"]["merges"]]
    return {"tokenizer.json": tokenizer_json(vocabulary, merges, special, tokenizer.bos_id)}


def _converted(model: Path | bytes, spec: LlamaSpec, target: str) -> Assets:
    """tokenizer.json from Meta's tokenizer.model. Of one that is not Llama 3's nothing, and a warning; for a GGUF DataError."""
    from reshard.text.tokenizers import LLAMA3_SPECIALS, load_tokenizer

    if isinstance(model, bytes):
        raise FormatError("a tokenizer.model cannot come from inside of another file")
    try:
        load_tokenizer(str(model), vocab_size=spec.vocab_size, cache_folder=Path())
    except DataError as error:
        if target == "gguf":
            raise DataError(
                f"{error.message}: it cannot be written into a GGUF yet",
                path=model,
                hint="--no-tokenizer goes on without one, --tokenizer takes another",
            ) from None
        logger.warning("%s: carried along as it is, no tokenizer.json is made of it", error.message)
        return {}
    lines = (line.split() for line in model.read_bytes().splitlines())
    ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    special = llama3_specials(len(ranks), LLAMA3_SPECIALS, newer=spec.rope_scaling is not None)
    return {"tokenizer.json": from_ranks(ranks, special, bos_id=len(ranks))}


def _ids(content: Mapping[str, Any]) -> dict[str, int]:
    vocab = content.get("model", {}).get("vocab")
    ids = dict(vocab) if isinstance(vocab, dict) else {}
    return ids | {token["content"]: token["id"] for token in content.get("added_tokens") or []}


def _ends(content: Mapping[str, Any], assets: Mapping[str, Path | bytes]) -> tuple[str | None, str | None]:
    """The tokens that begin and end a text: what tokenizer_config.json says, else Llama 3's names."""
    said = asset_json(assets, "tokenizer_config.json") or {}
    found = []
    for key, usual in (("bos_token", "<|begin_of_text|>"), ("eos_token", "<|end_of_text|>")):
        value = said.get(key)
        value = value.get("content") if isinstance(value, dict) else value
        found.append(value if isinstance(value, str) else usual if usual in _ids(content) else None)
    return found[0], found[1]
