"""Which token is this text? Byte-level, a BPE trained here, Hugging Face's tokenizer.json, Meta's tokenizer.model.

Text never becomes a special token: a document that contains "<|end_of_text|>" is encoded letter by letter like any
other, or else whoever writes a web page could end our documents. Only the cache puts bos and eos, by number.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import logging
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from reshard.errors import ConfigError, DataError, nearest
from reshard.text.once import once, write_whole
from reshard.text.sentencepiece import is_sentencepiece

if TYPE_CHECKING:
    import tiktoken
    import tokenizers

logger = logging.getLogger(__name__)

Ids = NDArray[np.int32]

BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"

# How Llama 3 cuts text before it merges bytes: a fact of the format, tokenizer.model itself does not hold it.
# Source: meta-llama/llama3, llama/tokenizer.py, `pat_str`; the released tokenizer.json files have the same one.
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# The 256 special tokens that follow the ranks, in order; Llama 3.1 renamed reserved ones, no id moved. Same source.
LLAMA3_SPECIALS = (
    BOS,
    EOS,
    *(f"<|reserved_special_token_{i}|>" for i in range(4)),
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|reserved_special_token_4|>",
    "<|eot_id|>",
    *(f"<|reserved_special_token_{i}|>" for i in range(5, 251)),
)
# Meta's tokenizer cuts longer runs of white space, or of anything else; a million spaces crash tiktoken's regex.
LONGEST_RUN = 25_000
_LONG_RUN = re.compile(rf"\s{{{LONGEST_RUN + 1},}}|\S{{{LONGEST_RUN + 1},}}")

BPE_SAMPLE_BYTES = 16 << 20
BPE_SMALLEST = 258  # 256 bytes, bos, eos
# What decides a trained BPE besides its text and size; a new number makes old files in a cache stale.
BPE_RULE = "llama3-split/byte-level/1"

_BOS_NAMES = (BOS, "<s>", "<bos>", "<|startoftext|>", "[BOS]")
_EOS_NAMES = (EOS, "</s>", "<eos>", "<|endoftext|>", "[EOS]")


class Tokenizer(Protocol):
    """Text to ids and back.

    name: for people. vocab_size: every id, specials included, is below it. bos_id, eos_id: None where there is none.
    identity: sha256 of what decides the ids; two files that encode alike by construction share it.
    """

    name: str
    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    identity: str

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        """The ids of each text, without specials. Text that looks like a special token is ordinary text."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """Text for people: bytes that are not UTF-8 and ids that no token has become U+FFFD."""
        ...


def load_tokenizer(
    path: str,
    *,
    vocab_size: int,
    cache_folder: Path,
    build_in: Path | None = None,
    training_texts: Callable[[], Iterable[str]] | None = None,
    progress: bool = False,
) -> Tokenizer:
    """The tokenizer that `model.tokenizer_path` means.

    path: "bytes", "bpe", a tokenizer.json or tokenizer.model, or a folder that holds one.
    vocab_size: only "bpe" uses it, as the size to train to.
    cache_folder: where "bpe" keeps its file, <cache_folder>/bpe-<vocab_size>/tokenizer.json. It belongs to one text:
        what is found there is used as it is.
    build_in: where a "bpe" that is not in cache_folder is kept instead; nothing is then written into cache_folder.
    training_texts: the text to train "bpe" on; only called when there is no file yet.
    progress: show that training is at work, where stderr is a terminal.
    Raises DataError (missing, not a tokenizer), ConfigError (a vocabulary too small for any BPE).
    """
    if path == "bytes":
        return ByteTokenizer()
    if path == "bpe":
        folders = [cache_folder, *([build_in] if build_in is not None else [])]
        return _load_bpe(vocab_size, folders, training_texts, progress)
    file = _tokenizer_file(path)
    try:
        data = file.read_bytes()
    except OSError as error:
        raise DataError(f"tokenizer `{path}` cannot be read: {error}", path=file) from None
    if not data.strip():
        raise DataError(f"tokenizer {file} is empty", path=file)
    if data.startswith(b"version https://git-lfs"):
        raise DataError(
            f"tokenizer {file} is a Git LFS pointer ({len(data)} bytes), not the file itself",
            path=file,
            hint=f"fetch it: git lfs pull --include {file.name}",
        )
    if file.suffix == ".json" or data.lstrip()[:1] == b"{":
        return _load_json(file.name, file, data)
    return TiktokenTokenizer(file.name, tiktoken_ranks(file, data))


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Does the model have an embedding for every token? Raises ConfigError with both numbers."""
    if tokenizer.vocab_size > vocab_size:
        raise ConfigError(
            f"tokenizer {tokenizer.name} has {tokenizer.vocab_size} tokens, but the model's vocabulary {vocab_size}",
            key="model.vocab_size",
            hint=f"--model.vocab_size {tokenizer.vocab_size} makes room, or take another --model.tokenizer_path",
        )
    if isinstance(tokenizer, TiktokenTokenizer) and (lost := lacking_tokens(tokenizer.vocab_size, vocab_size)):
        logger.warning(
            "tokenizer %s has %d tokens, the model's vocabulary %d: the other %d are more than padding or reserved tokens; "
            "was the file cut at the end of a line?",
            tokenizer.name, tokenizer.vocab_size, vocab_size, lost,
        )  # fmt: skip


def lacking_tokens(tokens: int, vocab_size: int) -> int:
    """How many tokens does a tiktoken file lack for a model? 0 where padding or reserved tokens explain the difference.

    A line of the file is a token, and nothing in it says how many lines there were. A model's vocabulary may be larger:
    rounded up to a multiple of a power of two, or by some tokens of its own.
    """
    lost = vocab_size - tokens
    return lost if lost > max(len(LLAMA3_SPECIALS), (vocab_size & -vocab_size) - 1) else 0


def check_tokenizer(path: str, vocab_size: int) -> None:
    """Will `model.tokenizer_path` work with this model? Reads no text, so it can be asked before anything starts.

    A BPE that is yet to be trained fits by construction if there is room for the 256 bytes. Raises as load_tokenizer
    and check_vocabulary do.
    """
    if path == "bpe":
        _check_bpe_size(vocab_size)
    else:
        check_vocabulary(load_tokenizer(path, vocab_size=vocab_size, cache_folder=Path()), vocab_size)


class ByteTokenizer:
    """A token is a byte of UTF-8; bos is 256, eos is 257."""

    name = "bytes"
    vocab_size = 258
    bos_id: int | None = 256
    eos_id: int | None = 257
    identity = hashlib.sha256(b"reshard bytes: 256 bos 257 eos").hexdigest()

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        """See Tokenizer."""
        return [np.frombuffer(text.encode("utf-8"), dtype=np.uint8).astype(np.int32) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """See Tokenizer."""
        names = {256: BOS.encode(), 257: EOS.encode()}
        parts = (bytes((i,)) if 0 <= i < 256 else names.get(i, "\ufffd".encode()) for i in map(int, ids))
        return b"".join(parts).decode("utf-8", errors="replace")


class JsonTokenizer:
    """Hugging Face's tokenizer.json, by the `tokenizers` library. Also what "bpe" trains."""

    def __init__(
        self, name: str, inner: tokenizers.Tokenizer, bos_id: int | None, eos_id: int | None, identity: str
    ) -> None:
        self.name, self.bos_id, self.eos_id, self.identity = name, bos_id, eos_id, identity
        self.vocab_size = max(inner.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self._inner = inner
        self._inner.encode_special_tokens = True  # the library's name for: specials in the text are ordinary text

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        """See Tokenizer. Raises DataError where the vocabulary can only spell some text as bos or eos."""
        encodings = self._inner.encode_batch_fast(list(texts), add_special_tokens=False)
        batch = [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]
        for special in (self.bos_id, self.eos_id):
            # A word-level vocabulary can hold "</s>" as a plain word. Then the text cannot be told from the end of it.
            if special is not None and any((ids == special).any() for ids in batch):
                raise DataError(
                    f"the text contains {self._inner.id_to_token(special)!r}, which the tokenizer {self.name} "
                    f"cannot encode as anything but its special token {special}",
                    hint="take a byte-level tokenizer, or remove it from the text",
                )
        return batch

    def decode(self, ids: Iterable[int]) -> str:
        """See Tokenizer."""
        runs = _known_runs(ids, lambda i: self._inner.id_to_token(i) is not None)
        return "".join("\ufffd" if run is None else self._inner.decode(run, skip_special_tokens=False) for run in runs)


class TiktokenTokenizer:
    """Meta's tokenizer.model of Llama 3: tokens in base64 with their ranks, then 256 specials; by `tiktoken`."""

    def __init__(self, name: str, ranks: dict[bytes, int]) -> None:
        import tiktoken

        specials = {special: len(ranks) + i for i, special in enumerate(LLAMA3_SPECIALS)}
        self.name = name
        self.vocab_size = len(ranks) + len(specials)
        self.bos_id: int | None = specials[BOS]
        self.eos_id: int | None = specials[EOS]
        digest = hashlib.sha256(f"tiktoken {LLAMA3_SPLIT} {self.bos_id} {self.eos_id}\n".encode())
        for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
            digest.update(b"%d %s\n" % (rank, token.hex().encode()))
        self.identity = digest.hexdigest()
        self._inner: tiktoken.Encoding = tiktoken.Encoding(
            name, pat_str=LLAMA3_SPLIT, mergeable_ranks=ranks, special_tokens=specials
        )

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        """See Tokenizer."""
        parts = [_without_long_runs(text) for text in texts]
        encoded = iter(
            self._inner.encode_ordinary_batch([p for ps in parts for p in ps], num_threads=os.cpu_count() or 1)
        )
        return [np.array(list(chain.from_iterable(islice(encoded, len(ps)))), dtype=np.int32) for ps in parts]

    def decode(self, ids: Iterable[int]) -> str:
        """See Tokenizer."""
        runs = _known_runs(ids, lambda i: 0 <= i < self.vocab_size)
        return "".join("\ufffd" if run is None else self._inner.decode(run, errors="replace") for run in runs)


def _without_long_runs(text: str) -> list[str]:
    """Cut where a run of spaces, or of non-spaces, passes LONGEST_RUN characters, as Meta's tokenizer does."""
    cuts = [
        cut
        for run in _LONG_RUN.finditer(text)
        for cut in range(run.start() + LONGEST_RUN, run.end(), LONGEST_RUN)
    ]  # fmt: skip
    return [text[start:stop] for start, stop in zip([0, *cuts], [*cuts, len(text)], strict=True)]


def _known_runs(ids: Iterable[int], known: Callable[[int], bool]) -> list[list[int] | None]:
    """Group ids for decoding: known ones in lists, None for each that is none (a model's vocabulary may be larger)."""
    runs: list[list[int] | None] = []
    for i in map(int, ids):
        if not known(i):
            runs.append(None)
        elif runs and runs[-1] is not None:
            runs[-1].append(i)
        else:
            runs.append([i])
    return runs


def _tokenizer_file(path: str) -> Path:
    place = Path(path).expanduser()
    if place.is_dir():
        for name in ("tokenizer.json", "tokenizer.model", "original/tokenizer.model"):
            if (place / name).is_file():
                return place / name
        raise DataError(f"folder {place} holds neither tokenizer.json nor tokenizer.model", path=place)
    if not place.exists():
        close = nearest(path, ("bytes", "bpe"))
        raise DataError(
            f"tokenizer `{path}` does not exist; expected bytes, bpe, a tokenizer.json or a tokenizer.model",
            path=place,
            hint=f"did you mean `{close}`?"
            if close
            else "tokenizer.model comes with Meta's weights, tokenizer.json with Hugging Face's",
        )
    return place


def tiktoken_ranks(file: Path, data: bytes) -> dict[bytes, int]:
    """Token -> rank of a tokenizer.model of Llama 3's kind. Raises DataError where a line or a rank is not as it should be."""
    ranks: dict[bytes, int] = {}
    lines = data.splitlines()
    try:
        for line in lines:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
    except (ValueError, binascii.Error):
        if is_sentencepiece(data):
            raise DataError(
                f"tokenizer {file} is a SentencePiece model (Llama 2 or older), expected Llama 3's tiktoken ranks",
                path=file,
                hint="for a SentencePiece model give the tokenizer.json of the same release",
            ) from None
        raise DataError(
            f"tokenizer {file} is not a tiktoken file: line {len(ranks) + 1} is not `<base64> <rank>`", path=file
        ) from None
    if len(ranks) != len(lines) or sorted(ranks.values()) != list(range(len(lines))):
        raise DataError(
            f"tokenizer {file} is damaged: its {len(lines)} ranks are not 0 to {len(lines) - 1}, once each", path=file
        )
    absent = [i for i in range(256) if bytes((i,)) not in ranks]
    if absent:
        raise DataError(
            f"tokenizer {file} is not whole: {len(absent)} of the 256 bytes have no rank, the first is {absent[0]}",
            path=file,
        )
    return ranks


def _load_json(name: str, file: Path, data: bytes) -> JsonTokenizer:
    """Read a tokenizer.json without the parts that would change or cut what is encoded."""
    content = _json_content(file, data)
    content["truncation"] = content["padding"] = None  # files saved after a training often carry a length limit
    content["model"].pop("dropout", None)  # it would draw other ids each time
    bos, eos = _bos_and_eos(file, content)
    for token in content.get("added_tokens") or []:
        token["special"] = token.get("special", False) or token["content"] in (bos, eos)
    inner = _inner_tokenizer(file, content)
    bos_id = inner.token_to_id(bos) if bos else None
    eos_id = inner.token_to_id(eos) if eos else None
    if eos_id is None:
        logger.warning("tokenizer %s names no end-of-text token: documents follow one another unmarked", file)
    if bos_id == eos_id:
        bos_id = None  # GPT-2's family: one token between documents is enough
    parts = {key: content.get(key) for key in ("model", "added_tokens", "normalizer", "pre_tokenizer")}
    parts |= {"bos": bos_id, "eos": eos_id}
    identity = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    return JsonTokenizer(name, inner, bos_id, eos_id, identity)


def check_tokenizer_json(file: Path, data: bytes) -> None:
    """Does the `tokenizers` library take this tokenizer.json? Raises DataError."""
    _inner_tokenizer(file, _json_content(file, data))


def _json_content(file: Path, data: bytes) -> dict[str, Any]:
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DataError(f"tokenizer {file} is not JSON: {error}", path=file) from None
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise DataError(f"tokenizer {file} is not a tokenizer.json: it has no `model`", path=file)
    added = content.get("added_tokens") or []
    if not isinstance(added, list) or not all(
        isinstance(token, dict) and isinstance(token.get("content"), str) for token in added
    ):
        raise DataError(f"tokenizer {file} is not a tokenizer.json: its `added_tokens` are not tokens", path=file)
    return content


def _inner_tokenizer(file: Path, content: dict[str, Any]) -> tokenizers.Tokenizer:
    import tokenizers

    try:
        return tokenizers.Tokenizer.from_str(json.dumps(content))
    except BaseException as error:
        # The library raises a bare Exception, or where its Rust code gives up, a PanicException, which is none.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise DataError(f"tokenizer {file} cannot be read as a tokenizer.json: {error}", path=file) from None


def _bos_and_eos(file: Path, content: dict[str, Any]) -> tuple[str | None, str | None]:
    """Which tokens begin and end a document?

    Llama 3's pair where the vocabulary has both, since an instruct release's config names <|eot_id|>, which ends a
    turn; then what the files beside say; then the usual names.
    """
    added = {token["content"] for token in content.get("added_tokens") or []}
    if {BOS, EOS} <= added:
        return BOS, EOS
    for beside in ("tokenizer_config.json", "special_tokens_map.json"):
        try:
            said = json.loads((file.parent / beside).read_bytes())
        except OSError:
            continue
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{file.parent / beside}, which belongs to the tokenizer {file}, is not JSON: {error}",
                path=file.parent / beside,
                hint="copy or download this file again",
            ) from None
        bos, eos = _token_name(said, "bos_token"), _token_name(said, "eos_token")
        if eos:
            return bos, eos
    vocab = content["model"].get("vocab")
    known = added | set(vocab if isinstance(vocab, dict) else ())
    return next((n for n in _BOS_NAMES if n in known), None), next((n for n in _EOS_NAMES if n in known), None)


def _token_name(said: Any, key: str) -> str | None:
    value = said.get(key) if isinstance(said, dict) else None
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) else None


def _check_bpe_size(vocab_size: int) -> None:
    if vocab_size < BPE_SMALLEST:
        raise ConfigError(
            f"a byte-level BPE needs at least {BPE_SMALLEST} tokens (256 bytes, bos, eos), "
            f"but the model's vocabulary has {vocab_size}",
            key="model.vocab_size",
            hint=f"--model.vocab_size {BPE_SMALLEST} or more",
        )


def _load_bpe(
    vocab_size: int,
    folders: Sequence[Path],
    training_texts: Callable[[], Iterable[str]] | None,
    progress: bool,
) -> JsonTokenizer:
    """folders: where it may be; in the last one it is trained."""
    _check_bpe_size(vocab_size)
    files = [folder / f"bpe-{vocab_size}" / "tokenizer.json" for folder in folders]
    file = files[-1]

    def ready() -> JsonTokenizer | None:
        for place in files:
            try:
                return _load_json("bpe", place, place.read_bytes())
            except OSError:
                continue
            except DataError as error:
                logger.warning("%s; it is trained again", error.message)
        return None

    def build() -> JsonTokenizer:
        if training_texts is None:
            raise DataError(
                f"the BPE tokenizer is not trained yet: {file} does not exist",
                path=file,
                hint="`reshard tokenize CONFIG.toml` trains it",
            )
        write_whole(file, _train_bpe(training_texts(), vocab_size, progress).encode())
        return _load_json("bpe", file, file.read_bytes())

    return once(file, ready, build)


def _train_bpe(texts: Iterable[str], vocab_size: int, progress: bool) -> str:
    """Train on the first BPE_SAMPLE_BYTES of text; the content of a tokenizer.json.

    The same texts give the same bytes, whatever the number of threads: counts are summed and ties are broken by id.
    """
    import tokenizers
    from rich.console import Console
    from tokenizers import decoders, models, pre_tokenizers, trainers

    sample: list[str] = []
    room = BPE_SAMPLE_BYTES
    for text in texts:
        data = text.encode("utf-8")
        sample.append(text if len(data) <= room else data[:room].decode("utf-8", errors="ignore"))
        room -= len(data)
        if room <= 0:
            break
    split = pre_tokenizers.Split(tokenizers.Regex(LLAMA3_SPLIT), behavior="isolated")
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    say = f"training a BPE tokenizer of {vocab_size} tokens on {sum(map(len, sample)) / 1e6:.1f} MB of text"
    logger.info(say)
    if progress and sys.stderr.isatty():
        with Console(stderr=True).status(say):
            inner.train_from_iterator(sample, trainer)
    else:
        inner.train_from_iterator(sample, trainer)
    if inner.get_vocab_size() < vocab_size:
        logger.info("the text has only enough to merge for %d tokens", inner.get_vocab_size())
    return str(inner.to_str(pretty=False))
