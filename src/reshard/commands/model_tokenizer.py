"""Which tokenizer reads and writes a model's text? Its own, or the one that is named; never one that is guessed.

Other ids than those of the training make any text a wrong one: a loss that means nothing, a continuation of nonsense.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from reshard.checkpoint.layout import is_foreign
from reshard.checkpoint.manifest import MANIFEST, read_manifest
from reshard.config import Config
from reshard.errors import DataError
from reshard.formats.protocol import Source
from reshard.text.cache import fingerprint_of, folder_for_one_question, tokenizer_for
from reshard.text.tokenizers import Tokenizer, check_vocabulary, load_tokenizer

logger = logging.getLogger(__name__)

_NAME_ONE = (
    "--tokenizer PATH, a tokenizer.json or tokenizer.model; --tokenizer bytes for a model that was trained on bytes"
)


def model_tokenizer(source: Source, config: Config, *, named: str | None, config_names_it: bool) -> Tokenizer:
    """The tokenizer to read text with, for the weights of `source`.

    In this order: the one that is named on the command line; the one that a run of ours has recorded with the weights;
    the one that lies beside them; `model.tokenizer_path` of a config file that sets it (config_names_it).
    config: where a BPE that a run has trained on the spot may be trained once more.
    Raises DataError where there is none, or where it is not the one that the run has recorded; ConfigError where the
    model has no embedding for some of its tokens.
    """
    assert source.spec is not None
    vocab_size = source.spec.vocab_size
    run, recorded = _of_run(source.path)
    if named is not None:
        tokenizer = _load(named, config, vocab_size)
        if recorded not in (None, fingerprint_of(tokenizer)):
            logger.warning("%s was trained with tokenizer %s, not with %s", source.path, recorded, named)
    elif run is not None and (run.model.tokenizer_path in ("bytes", "bpe") or Path(run.model.tokenizer_path).exists()):
        path = run.model.tokenizer_path
        tokenizer = _load(path, run.with_values(training={"cache_folder": str(config.token_folder)}), vocab_size)
        _check_recorded(source.path, f"`{path}`", tokenizer, recorded)
    elif (beside := _beside(source, config, vocab_size)) is not None:
        tokenizer = beside
    elif config_names_it:
        tokenizer = _load(config.model.tokenizer_path, config, vocab_size)
        _check_recorded(source.path, f"`{config.model.tokenizer_path}`", tokenizer, recorded)
    else:
        lost = f", and the one that it was trained with, `{run.model.tokenizer_path}`, is not there" if run else ""
        raise DataError(f"`{source.path}` has no tokenizer beside its weights{lost}", path=source.path, hint=_NAME_ONE)
    check_vocabulary(tokenizer, vocab_size)
    return tokenizer


def _load(path: str, config: Config, vocab_size: int) -> Tokenizer:
    with folder_for_one_question() as build_in:  # whoever wrote the config is not to say where we write
        return tokenizer_for(config.with_values(model={"tokenizer_path": path}), vocab_size, build_in=build_in)


def _of_run(path: Path) -> tuple[Config | None, str | None]:
    """The config of the run that has saved these weights, and what it says of its tokenizer; None for what is not said."""
    if is_foreign(path) or not (path / MANIFEST).exists():
        return None, None
    manifest = read_manifest(path)
    recorded = (manifest.data or {}).get("tokenizer")
    config = Config.model_validate(manifest.config, strict=True) if manifest.config else None
    return config, recorded if isinstance(recorded, str) else None


def _check_recorded(path: Path, name: str, tokenizer: Tokenizer, recorded: str | None) -> None:
    now = fingerprint_of(tokenizer)
    if recorded not in (None, now):
        raise DataError(
            f"`{path}` was trained with tokenizer {recorded}; {name} is {now} now",
            path=path,
            hint=f"restore the tokenizer, or the text that it was trained on; or name another one: {_NAME_ONE}",
        )


def _beside(source: Source, config: Config, vocab_size: int) -> Tokenizer | None:
    """The tokenizer among the files that belong to the weights; a GGUF has it inside."""
    files: Mapping[str, Any] = source.assets
    name = next((name for name in ("tokenizer.json", "tokenizer.model") if name in files), None)
    if name is None:
        return None
    if isinstance(files[name], Path):
        return load_tokenizer(str(files[name]), vocab_size=vocab_size, cache_folder=config.token_folder)
    with tempfile.TemporaryDirectory() as folder:
        for file, content in files.items():  # its settings, too: they say which tokens begin and end a text
            if isinstance(content, bytes) and Path(file).name == file:
                (Path(folder) / file).write_bytes(content)
        return load_tokenizer(str(Path(folder) / name), vocab_size=vocab_size, cache_folder=config.token_folder)
