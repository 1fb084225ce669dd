"""Is the text tokenised already? A folder of memory-mapped tokens that is built once, by one process, or not at all.

    <token_folder>/<key>/train.bin, validation.bin     little-endian uint16 or uint32
    <token_folder>/<key>/meta.json                     written last: no cache without it, or where sizes differ
    <token_folder>/tokenizers/<key>/bpe-N/tokenizer.json

The key is a digest of everything that decides the tokens, so a folder is never out of date: it is used or ignored.
Works before any process group exists, with neither torch nor the whole text in memory.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Any

import numpy as np

from reshard.config import Config, Training
from reshard.errors import DataError
from reshard.text.once import CACHE_HINT, cannot_write, once, sync_folder
from reshard.text.order import Tokens, count_sequences, too_short
from reshard.text.sources import Piece, Source, open_source
from reshard.text.tokenizers import BPE_RULE, BPE_SAMPLE_BYTES, Tokenizer, check_vocabulary, load_tokenizer

logger = logging.getLogger(__name__)

FORMAT = 1  # of the files and of how tokens become a stream; a new number makes every old cache be ignored
_BATCH_CHARACTERS = 1 << 21
_BATCH_PIECES = 4096
_COPY_BYTES = 1 << 23
CHECKED_WHOLE_BYTES = 64 << 20  # a cache up to this size is hashed at every opening, which takes a tenth of a second


@dataclass(frozen=True)
class TokenData:
    """The tokens of one dataset, and what they are.

    train, validation: (n,) uint16 or uint32, read-only memory maps; validation may be empty.
    documents: in both together. fingerprint: what a checkpoint remembers, see full_fingerprint.
    folder: where the cache is. reused: it was there already.
    """

    train: Tokens
    validation: Tokens
    documents: int
    fingerprint: dict[str, str | int]
    folder: Path = Path()
    reused: bool = False


def prepare(
    config: Config,
    spec_vocab_size: int,
    *,
    progress: bool = True,
    tokenizer: Tokenizer | None = None,
    build_in: Path | None = None,
) -> tuple[TokenData, Tokenizer]:
    """The tokens of `training.dataset`, from the cache or made now, and their tokenizer.

    spec_vocab_size: rows of the model's embedding. progress: a bar on stderr, where that is a terminal.
    tokenizer: use this one instead of `model.tokenizer_path`, e.g. to read other text with the tokenizer of a run.
    build_in: make what is not there in this folder; the config's own is then only read. For a config that a file says.
    Any number of processes may call this at once: one builds, the others wait.
    Raises DataError (the source, the tokenizer or the cache folder cannot be used; too few tokens for one sequence),
    ConfigError (a tokenizer that is too large for the model).
    """
    source = open_source(config.training)
    if tokenizer is None:
        tokenizer = tokenizer_for(config, spec_vocab_size, source, progress=progress, build_in=build_in)
    check_vocabulary(tokenizer, spec_vocab_size)
    fraction = config.validation.fraction
    dtype = "<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4"
    key = _key(FORMAT, source.identity, tokenizer.identity, dtype, repr(fraction))
    folder = (build_in or config.token_folder) / key

    def build() -> TokenData:
        _build(folder, config.training, source, tokenizer, dtype=dtype, fraction=fraction, progress=progress)
        data = _opened(folder)
        if data is None:
            raise DataError(f"token cache {folder} cannot be read back after it was written", path=folder)
        return data

    def ready() -> TokenData | None:
        data = _opened(config.token_folder / key)
        if data is None and build_in is not None:
            data = _opened(folder)
        return None if data is None else replace(data, reused=True)

    data = once(folder, ready, build)
    _check_length(data, config)
    return data, tokenizer


def tokenizer_for(
    config: Config,
    spec_vocab_size: int,
    source: Source | None = None,
    *,
    progress: bool = True,
    build_in: Path | None = None,
) -> Tokenizer:
    """The tokenizer of a run; `bpe` is trained on the run's own training documents if the cache does not have it.

    source: the run's, where it is open already. build_in: as prepare has it. Raises as prepare does.
    """
    path, cache_folder = config.model.tokenizer_path, config.token_folder
    if path != "bpe":
        return load_tokenizer(path, vocab_size=spec_vocab_size, cache_folder=cache_folder)
    source = source or open_source(config.training)
    fraction = config.validation.fraction
    key = Path("tokenizers") / _key(BPE_RULE, BPE_SAMPLE_BYTES, source.identity, repr(fraction))
    return load_tokenizer(
        path,
        vocab_size=spec_vocab_size,
        cache_folder=cache_folder / key,
        build_in=build_in / key if build_in is not None else None,
        training_texts=lambda: (piece.text for number, piece in _numbered(source) if not is_held_out(number, fraction)),
        progress=progress,
    )


def fingerprint_of(tokenizer: Tokenizer) -> str:
    """What a checkpoint records of its run's tokenizer."""
    return f"{tokenizer.identity[:16]} ({tokenizer.vocab_size} tokens)"


@contextmanager
def folder_for_one_question(named: Path | None = None) -> Iterator[Path]:
    """Where a command that only asks something may build a cache: `named`, else a temporary folder, gone afterwards.

    Never what a config out of an opened file names: whoever made the file would decide where we write.
    Raises DataError where it cannot be written.
    """
    hint = (
        "another --cache-folder"
        if named is not None
        else "TMPDIR=PATH in front of the command names a folder with room"
    )
    try:
        made = TemporaryDirectory(prefix="reshard-", ignore_cleanup_errors=True) if named is None else None
    except OSError as error:
        raise DataError(f"no temporary folder can be made: {error.strerror or error}", hint=hint) from None
    with made or nullcontext(str(named)) as folder:
        try:
            yield Path(folder)
        except DataError as error:
            if error.hint != CACHE_HINT:
                raise
            raise DataError(error.message, path=error.path, hint=hint) from None


def is_held_out(number: int, fraction: float) -> bool:
    """Is document `number` for validation? Depends on nothing else, so growing a dataset moves no document.

    The hash of the number decides, but the first document is always trained on and the second always held out:
    each side has one as soon as there are two, without knowing how many will come.
    """
    if fraction <= 0 or number < 2:
        return fraction > 0 and number == 1
    digest = hashlib.blake2b(number.to_bytes(8, "little"), digest_size=8, person=b"reshard held out").digest()
    return int.from_bytes(digest, "little") < fraction * 2.0**64


def full_fingerprint(data: TokenData, config: Config) -> dict[str, str | int]:
    """Everything that decides which tokens sequence number i has: what a checkpoint stores and a resume compares."""
    return {**data.fingerprint, "seq_len": config.training.seq_len, "rng_seed": config.training.rng_seed}


def fingerprint_difference(saved: dict[str, Any], now: dict[str, Any]) -> str | None:
    """What has changed since `saved`? None where the stream of sequences is the same one.

    The digest of the tokens decides about the text: a moved or renamed dataset is still the same text. Where it
    differs, the facts that explain it are named, e.g. "seq_len was 512, is 256; dataset was `a`, is `b`".
    """
    keys = ["seq_len", "rng_seed"]
    if saved.get("digest") != now.get("digest"):
        keys += ["dataset", "tokenizer", "validation_fraction", "documents", "train_tokens"]
    changed = [_was_is(key, saved, now) for key in keys if saved.get(key) != now.get(key)]
    if not changed and saved.get("digest") != now.get("digest"):
        changed = [f"the text itself, {_was_is('digest', saved, now)}"]
    return "; ".join(changed) or None


def _was_is(key: str, saved: dict[str, Any], now: dict[str, Any]) -> str:
    was, now_is = saved.get(key, "not recorded"), now.get(key, "not known")
    return f"{key} was {was}, is {now_is}"


def _check_length(data: TokenData, config: Config) -> None:
    seq_len = config.training.seq_len
    if count_sequences(len(data.train), seq_len) == 0:
        raise too_short("training text", len(data.train), seq_len)
    if config.validation.freq > 0 and count_sequences(len(data.validation), seq_len) == 0:
        error = too_short("held-out text", len(data.validation), seq_len)
        raise DataError(
            error.message,
            hint="hold out more (--validation.fraction 0.1), or do not validate (--validation.freq 0)",
        )


def _key(*facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:24]


def _numbered(source: Source) -> Iterator[tuple[int, Piece]]:
    """Each piece with the number of its document."""
    number = 0
    for piece in source.pieces():
        yield number, piece
        number += piece.last


def _opened(folder: Path) -> TokenData | None:
    """The cache in `folder`, or None where there is none or it is torn (no meta.json, other sizes, other content)."""
    try:
        meta = json.loads((folder / "meta.json").read_bytes())
        dtype = np.dtype(meta["dtype"])
        train = _mapped(folder / "train.bin", dtype, meta["train_tokens"])
        validation = _mapped(folder / "validation.bin", dtype, meta["validation_tokens"])
        if train is None or validation is None:
            raise ValueError("the files do not have the sizes that meta.json says")
        if train.nbytes + validation.nbytes <= CHECKED_WHOLE_BYTES and _digest(folder) != meta["digest"]:
            raise ValueError("the files do not have the digest that meta.json says")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("token cache %s is damaged and not used: %s", folder, error)
        return None
    fingerprint = {key: meta[key] for key in _FINGERPRINT}
    return TokenData(train, validation, meta["documents"], fingerprint, folder)


_FINGERPRINT = (
    "dataset",
    "tokenizer",
    "documents",
    "train_tokens",
    "validation_tokens",
    "validation_fraction",
    "digest",
)


def _mapped(file: Path, dtype: np.dtype[Any], count: int) -> Tokens | None:
    if file.stat().st_size != count * dtype.itemsize:
        return None
    if count == 0:
        return np.empty(0, dtype=dtype)  # the system maps no empty file
    return np.memmap(file, dtype=dtype, mode="r", shape=(count,))


def _build(
    folder: Path,
    training: Training,
    source: Source,
    tokenizer: Tokenizer,
    *,
    dtype: str,
    fraction: float,
    progress: bool,
) -> None:
    """Tokenise everything into a temporary folder and rename it to `folder`. Called by one process at a time."""
    for leftover in (*folder.parent.glob(f"{folder.name}.tmp-*"), *folder.parent.glob(f"{folder.name}.torn-*")):
        _discard(leftover)  # of a process that was killed: we hold its lock
    suffix = f"{os.getpid()}-{secrets.token_hex(4)}"
    temporary = folder.with_name(f"{folder.name}.tmp-{suffix}")
    started = time.monotonic()
    logger.info("tokenising %s with %s into %s", source.name, tokenizer.name, folder)
    try:
        temporary.mkdir()
        documents = _write_tokens(
            temporary, source, tokenizer, dtype=np.dtype(dtype), fraction=fraction, progress=progress
        )
        sizes = [
            (temporary / name).stat().st_size // np.dtype(dtype).itemsize for name in ("train.bin", "validation.bin")
        ]
        meta = {
            "format": FORMAT,
            "dtype": dtype,
            "dataset": source.name,
            "tokenizer": fingerprint_of(tokenizer),
            "documents": documents,
            "train_tokens": sizes[0],
            "validation_tokens": sizes[1],
            "validation_fraction": repr(fraction),
            "digest": _digest(temporary),
        }
        with open(temporary / "meta.json", "w", encoding="utf-8") as file:
            json.dump(meta, file, indent=1, sort_keys=True)
            _sync(file)
        sync_folder(temporary)
        if open_source(training).identity != source.identity:
            raise DataError(
                f"dataset {source.name} changed while it was tokenised", hint="run again when it is at rest"
            )
        if folder.exists():
            folder.rename(folder.with_name(f"{folder.name}.torn-{suffix}"))
        temporary.rename(folder)
        sync_folder(folder.parent)
        _discard(folder.with_name(f"{folder.name}.torn-{suffix}"))
    except OSError as error:
        raise cannot_write(folder.parent, error) from error
    finally:
        _discard(temporary)
    logger.info(
        "%d documents, %d training tokens, %d held out, in %.1f s", documents, *sizes, time.monotonic() - started
    )


def _write_tokens(
    folder: Path, source: Source, tokenizer: Tokenizer, *, dtype: np.dtype[Any], fraction: float, progress: bool
) -> int:
    """Write train.bin and validation.bin; the number of documents."""
    begin = np.array([i for i in (tokenizer.bos_id,) if i is not None], dtype=dtype)
    end = np.array([i for i in (tokenizer.eos_id,) if i is not None], dtype=dtype)
    begins, documents = True, 0  # the next piece begins a document; documents that have ended
    with (
        open(folder / "train.bin", "w+b") as train,
        open(folder / "validation.bin", "w+b") as validation,
        _progress_bar(f"tokenising {source.name}", source.total_bytes, progress) as advance,
    ):
        for batch in _batches(source):
            encoded = tokenizer.encode_batch([piece.text for _, piece in batch])
            for (number, piece), ids in zip(batch, encoded, strict=True):
                if len(ids) and not 0 <= ids.min() <= ids.max() < tokenizer.vocab_size:
                    raise DataError(
                        f"{tokenizer.name} gave token {ids.max()}, but it has {tokenizer.vocab_size} tokens"
                    )
                parts = [begin] if begins else []
                parts += [ids.astype(dtype), end] if piece.last else [ids.astype(dtype)]
                file = validation if is_held_out(number, fraction) else train
                file.write(np.concatenate(parts).tobytes())
                begins = piece.last
                documents += piece.last
            advance(sum(piece.source_bytes for _, piece in batch))
        if documents == 1 and fraction > 0:
            _hold_out_the_end(train, validation, dtype.itemsize, fraction)
        _sync(train)
        _sync(validation)
    return documents


def _batches(source: Source) -> Iterator[list[tuple[int, Piece]]]:
    """Enough pieces at once to keep a tokenizer's threads busy, few enough to need little memory."""
    batch: list[tuple[int, Piece]] = []
    characters = 0
    for number, piece in _numbered(source):
        batch.append((number, piece))
        characters += len(piece.text)
        if characters >= _BATCH_CHARACTERS or len(batch) >= _BATCH_PIECES:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _hold_out_the_end(train: IO[bytes], validation: IO[bytes], itemsize: int, fraction: float) -> None:
    """Move the last `fraction` of a single document's tokens over to validation: at least one, never all."""
    tokens = train.tell() // itemsize
    start = (tokens - min(max(1, math.floor(tokens * fraction)), tokens - 1)) * itemsize
    train.seek(start)
    shutil.copyfileobj(train, validation, _COPY_BYTES)
    train.truncate(start)


def _digest(folder: Path) -> str:
    """Of the content of both files: (blake2b of train, blake2b of validation), hashed again."""
    both = hashlib.blake2b(digest_size=16)
    for name in ("train.bin", "validation.bin"):
        with open(folder / name, "rb") as file:
            both.update(hashlib.file_digest(file, hashlib.blake2b).digest())
    return both.hexdigest()


def _discard(path: Path) -> None:
    """Remove a folder of ours, or whatever else stands under its name; what cannot be removed only costs room."""
    shutil.rmtree(path, ignore_errors=True)
    if path.is_file():
        path.unlink(missing_ok=True)


def _sync(file: IO[Any]) -> None:
    file.flush()
    os.fsync(file.fileno())


@contextmanager
def _progress_bar(title: str, total: int | None, progress: bool) -> Iterator[Callable[[int], object]]:
    """Yields what to call with the number of bytes that are done. Silent where stderr is not a terminal."""
    if not (progress and sys.stderr.isatty()):
        yield lambda done: None
        return
    from rich import progress as bar
    from rich.console import Console

    columns = (
        bar.TextColumn("{task.description}"),
        bar.BarColumn(),
        bar.DownloadColumn(),
        bar.TransferSpeedColumn(),
        bar.TimeRemainingColumn(),
    )
    with bar.Progress(*columns, console=Console(stderr=True)) as shown:
        task = shown.add_task(title, total=total)
        yield lambda done: shown.advance(task, done)
