"""Where does the text come from? The standard library's source, local files, or Hugging Face `datasets`.

Text is taken as it is: what is not UTF-8 is refused with its place, never replaced, or else a wrong encoding would
train a model on question marks without a word. Documents come in a fixed order, in pieces of bounded size.
"""

from __future__ import annotations

import codecs
import glob
import hashlib
import json
import logging
import os
import platform
import re
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from reshard.config import Training
from reshard.errors import DataError, listed, nearest

logger = logging.getLogger(__name__)

PIECE_CHARACTERS = 1 << 20
_READ_BYTES = 1 << 20
_BYTE_ORDER_MARK = "\ufeff"

# fmt: off
TEXT_SUFFIXES = frozenset((
    ".txt", ".text", ".md", ".markdown", ".rst", ".org", ".tex", ".log", ".html", ".htm", ".xml", ".toml", ".yaml",
    ".yml", ".ini", ".cfg", ".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".rs", ".go", ".java", ".kt",
    ".js", ".jsx", ".ts", ".tsx", ".rb", ".php", ".pl", ".lua", ".sh", ".sql", ".r", ".jl", ".scala", ".swift", ".hs",
    ".ml",
))
# fmt: on
LINE_SUFFIXES = frozenset((".jsonl", ".ndjson", ".json"))
PARQUET_SUFFIXES = frozenset((".parquet",))
_COMPRESSED = {".gz": "gunzip -k", ".zst": "zstd -d", ".xz": "xz -dk", ".bz2": "bunzip2 -k", ".zip": "unzip"}

# What torchtitan calls its two datasets, and where they are.
_TORCHTITAN = {"c4": "allenai/c4:en", "c4_test": "tests/assets/c4_test"}
_HUB_NAME = re.compile(r"[\w.-]+(?:/[\w.-]+)?")

# Other people's tests, among them files that are deliberately broken, and what differs from one build to the next.
_NOT_LIBRARY = frozenset(("test", "tests", "idle_test", "__pycache__", "site-packages", "dist-packages"))
_BUILD_FILE = re.compile(r"_sysconfig(data|_vars)_|config-\d|sitecustomize\.py$")

_EXTRA = "pip install 'reshard[data]'"


class Piece(NamedTuple):
    """A part of a document, at most PIECE_CHARACTERS long; most documents are one piece.

    last: the document ends here. source_bytes: bytes of the source that were read for it, for a progress bar.
    """

    text: str
    last: bool
    source_bytes: int


class Source(Protocol):
    """Documents in a fixed order. Blank ones (only white space) are left out.

    name: for people and for the checkpoint's fingerprint. identity: what a cache of the tokens depends on, cheap to
    compute: no text is read for it. total_bytes: as Piece.source_bytes counts them, None where it is not known.
    """

    name: str
    identity: str
    total_bytes: int | None

    def pieces(self) -> Iterator[Piece]:
        """All documents, in pieces. Raises DataError (not UTF-8, broken records, no text at all)."""
        ...

    def documents(self) -> Iterator[str]:
        """All documents, each as one string. Raises as pieces() does."""
        ...


def open_source(training: Training) -> Source:
    """The source that `training.dataset` and `training.dataset_path` mean. Raises DataError where there is none."""
    name, place = training.dataset, training.dataset_path
    if name == "stdlib":
        return _standard_library(Path(place).expanduser() if place else None)
    if place is not None:
        return _local(name, Path(place).expanduser(), training)
    if name == "c4_test" and not Path(_TORCHTITAN[name]).is_dir():
        raise DataError(
            f"dataset `c4_test` is the folder {_TORCHTITAN[name]}, which does not exist here ({Path.cwd()})",
            path=_TORCHTITAN[name],
            hint="run where torchtitan's tests/assets is, or name its place: --training.dataset_path PATH",
        )
    if name == "c4_test":
        return _local(name, Path(_TORCHTITAN[name]), training)
    path = Path(name).expanduser()
    if path.exists():
        return _local(name, path, training)
    if glob.has_magic(name):
        return _globbed(name, training)
    target = _TORCHTITAN.get(name, name)
    if _looks_like_a_path(name) or not _HUB_NAME.fullmatch(target.partition(":")[0]):
        raise _missing(path)
    hub_name, _, config = target.partition(":")
    return HubDataset(name, hub_name, config or None, training.dataset_split, training.text_column)


class LocalFiles:
    """Text files (a document each) and record files (a document per record), one after the other.

    The identity holds absolute paths, sizes and times of change, and the column that is read.
    """

    def __init__(self, name: str, files: Sequence[Path], text_column: str) -> None:
        self.name, self.files, self.text_column = name, list(files), text_column
        facts = [_file_facts(file) for file in self.files]
        self.total_bytes: int | None = sum(size for _, size, _ in facts)
        self.identity = _identity("files", facts, text_column)

    def pieces(self) -> Iterator[Piece]:
        """See Source."""
        return _not_empty(self.name, (piece for file in self.files for piece in self._pieces_of(file)))

    def documents(self) -> Iterator[str]:
        """See Source."""
        return _joined(self.pieces())

    def _pieces_of(self, file: Path) -> Iterator[Piece]:
        suffix = file.suffix.lower()
        try:
            if suffix in LINE_SUFFIXES:
                yield from _of_json_lines(file, self.text_column)
            elif suffix in PARQUET_SUFFIXES:
                yield from _of_parquet(file, self.text_column)
            else:
                yield from _without_blank(_of_text_file(file))
        except OSError as error:
            raise DataError(f"{file} cannot be read: {error.strerror or error}", path=file) from None


class StandardLibrary:
    """The source of the Python that runs us: some 12 MB of real text on every machine. A document is a .py file.

    The identity holds the Python version, names and sizes, but no path: machines with the same Python agree.
    """

    def __init__(self, name: str, root: Path, files: Sequence[Path]) -> None:
        self.name, self.root, self.files = name, root, list(files)
        sizes = [_stat(file).st_size for file in self.files]
        self.total_bytes: int | None = sum(sizes)
        names = [file.relative_to(root).as_posix() for file in self.files]
        self.identity = _identity("stdlib", platform.python_version(), list(zip(names, sizes, strict=True)))

    def pieces(self) -> Iterator[Piece]:
        """See Source. Files that are not UTF-8 are left out: a few declare another encoding."""
        return _not_empty(self.name, (piece for file in self.files for piece in self._pieces_of(file)))

    def documents(self) -> Iterator[str]:
        """See Source."""
        return _joined(self.pieces())

    def _pieces_of(self, file: Path) -> Iterator[Piece]:
        try:
            data = file.read_bytes()
            text = data.decode("utf-8").removeprefix(_BYTE_ORDER_MARK)
        except UnicodeDecodeError:
            return
        except OSError as error:
            raise DataError(f"{file} cannot be read: {error.strerror or error}", path=file) from None
        yield from _of_record(text, len(data))


class HubDataset:
    """A dataset that the Hugging Face `datasets` library reads, from the hub or from a local folder.

    It is streamed, in the order of its files. split: `train`, or a part of it as `train[1000:5000]` (records).
    The identity is its name, configuration, split and column, so that a node without a network can use its cache; of
    a local folder, files, sizes and times too.
    """

    def __init__(self, name: str, path: str, config: str | None, split: str, text_column: str) -> None:
        self.name, self.path, self.config, self.split, self.text_column = name, path, config, split, text_column
        self.total_bytes: int | None = None
        self._part = _split_part(split)
        self._folder = Path(path) if Path(path).is_dir() else None
        place = path if self._folder is None else [_file_facts(file) for file in sorted(_walk(self._folder))]
        self.identity = _identity("datasets", place, config, split, text_column)

    def pieces(self) -> Iterator[Piece]:
        """See Source."""
        return _not_empty(f"{self.name} ({self.split})", self._pieces())

    def documents(self) -> Iterator[str]:
        """See Source."""
        return _joined(self.pieces())

    def _pieces(self) -> Iterator[Piece]:
        records = iter(self._records())
        number = 0
        while True:
            try:
                record = next(records)
            except StopIteration:
                return
            except Exception as error:  # a network, a parser, anything below `datasets`
                raise DataError(
                    f"dataset `{self.path}` cannot be read after {number} records: {_first_line(error)}", path=self.path
                ) from error
            number += 1
            text = _text_of(record, self.text_column, f"record {number} of dataset `{self.path}`", self.path)
            yield from _of_record(text, len(text))

    def _records(self) -> Iterable[Any]:
        try:
            import datasets
        except ImportError:
            raise DataError(
                f"dataset `{self.name}` is read by the `datasets` library, which is not installed",
                path=self.path,
                hint=_EXTRA,
            ) from None
        base, part = self._part
        try:
            if self._folder is not None and _is_saved_to_disk(self._folder):
                loaded: Any = datasets.load_from_disk(self.path)
                if isinstance(loaded, dict):
                    if base not in loaded:
                        raise ValueError(f"split `{base}` is not one of {', '.join(map(str, loaded))}")
                    loaded = loaded[base]
                stream = loaded.to_iterable_dataset()
            else:
                stream = datasets.load_dataset(self.path, self.config, split=base, streaming=True)
        except Exception as error:  # the library raises whatever its readers and the network raise
            raise self._cannot_open(error) from error
        if part is None:
            if self._folder is None:
                logger.info(
                    "reading all of `%s`; a part is named as --training.dataset_split '%s[:100000]'", self.path, base
                )
            return stream  # type: ignore[no-any-return]
        start, stop = part
        stream = stream.skip(start) if start else stream
        return stream if stop is None else stream.take(max(0, stop - start))  # type: ignore[no-any-return]

    def _cannot_open(self, error: Exception) -> DataError:
        if self._folder is not None:
            message = f"dataset {self.path} cannot be opened by `datasets`: {_first_line(error)}"
            hint = "--training.dataset_split NAME names the split" if "split" in str(error) else None
            return DataError(message, path=self.path, hint=hint)
        message = f"dataset `{self.name}` is neither a file here nor can `datasets` open it: {_first_line(error)}"
        known = nearest(self.name, ("stdlib", *_TORCHTITAN))
        hint = (
            f"did you mean `{known}`?"
            if known and known != self.name
            else "`--training.dataset stdlib` is always there"
        )
        return DataError(message, path=self.path, hint=hint)


def _standard_library(place: Path | None) -> StandardLibrary:
    root = place or Path(sysconfig.get_path("stdlib"))
    files = []
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(f for f in folders if f not in _NOT_LIBRARY and not _BUILD_FILE.match(f))
        files += [Path(folder, n) for n in names if n.endswith(".py") and not _BUILD_FILE.match(n)]
    if not files:
        raise DataError(
            f"dataset `stdlib`: there are no .py files in {root}",
            path=root,
            hint="this Python comes without its source; name a text: --training.dataset PATH",
        )
    files.sort(key=lambda file: file.relative_to(root).as_posix())
    name = f"stdlib of Python {platform.python_version()}" if place is None else f"stdlib in {place}"
    return StandardLibrary(name, root, files)


def _local(name: str, path: Path, training: Training) -> Source:
    """A file or a folder. Folders that were made by or for `datasets` are read by it, so that their splits count."""
    if not path.exists():
        raise _missing(path)
    if path.is_file():
        _refuse_compressed(path)
        return LocalFiles(name, [path], training.text_column)
    if name == "c4" and (path / "en").is_dir():
        path = path / "en"  # a clone of allenai/c4 holds every language
    if _is_saved_to_disk(path) or _has_dataset_card(path):
        return HubDataset(name, str(path), name.partition(":")[2] or None, training.dataset_split, training.text_column)
    everything = list(_walk(path))
    files = sorted(f for f in everything if f.suffix.lower() in TEXT_SUFFIXES | LINE_SUFFIXES | PARQUET_SUFFIXES)
    others = sorted({"".join(f.suffixes[-2:]) or f.name for f in everything if f not in set(files)})
    if files:
        if others:
            logger.info("%s: %d files are read, files of these kinds are not: %s", path, len(files), listed(others))
        return LocalFiles(name, files, training.text_column)
    if any(kind.endswith((".arrow", ".json.gz", ".jsonl.gz", ".json.zst", ".jsonl.zst", ".csv.gz")) for kind in others):
        return HubDataset(name, str(path), None, training.dataset_split, training.text_column)
    found = f"only {listed(others)}" if others else "no files at all"
    raise DataError(
        f"folder {path} holds no text: {found}",
        path=path,
        hint=".jsonl, .parquet and text files (.txt, .md, .py, ...) are read; other text files are named by a glob",
    )


def _globbed(pattern: str, training: Training) -> LocalFiles:
    matches = glob.glob(str(Path(pattern).expanduser()), recursive=True)  # noqa: PTH207 (Path.glob takes no absolute pattern)
    files = sorted(file for file in map(Path, matches) if file.is_file())
    if not files:
        raise DataError(f"no file matches `{pattern}`", path=pattern)
    for file in files:
        _refuse_compressed(file)
    return LocalFiles(pattern, files, training.text_column)


def _walk(folder: Path) -> Iterator[Path]:
    """All files below a folder, hidden ones left out; links to folders are followed, each folder once."""
    seen: set[str] = set()

    def refuse(error: OSError) -> None:
        raise DataError(f"folder {error.filename} cannot be read: {error.strerror}", path=folder) from None

    for here, folders, names in os.walk(folder, followlinks=True, onerror=refuse):
        real = os.path.realpath(here)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(f for f in folders if not f.startswith(".") and f != "__pycache__")
        yield from (Path(here, name) for name in names if not name.startswith("."))


def _is_saved_to_disk(folder: Path) -> bool:
    return (folder / "dataset_dict.json").is_file() or all(
        (folder / name).is_file() for name in ("dataset_info.json", "state.json")
    )


def _has_dataset_card(folder: Path) -> bool:
    """Is this a copy of a hub repository? Its README begins with YAML about the dataset."""
    try:
        with open(folder / "README.md", "rb") as file:
            head = file.read(1 << 16)
    except OSError:
        return False
    front, marker, _ = head.removeprefix(b"---\n").partition(b"\n---")
    keys = re.findall(rb"^(\w+):", front, flags=re.MULTILINE)
    return (
        head.startswith(b"---\n")
        and bool(marker)
        and bool({b"configs", b"dataset_info", b"task_categories"} & set(keys))
    )


def _of_text_file(file: Path) -> Iterator[Piece]:
    """One document in pieces, cut at ends of lines; never more than a few MB in memory. Raises DataError, OSError."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    text, offset, source_bytes = "", 0, 0
    with open(file, "rb") as stream:
        while True:
            data = stream.read(_READ_BYTES)
            if data.count(0) * 8 > len(data):
                raise DataError(
                    f"{file} is not UTF-8 text: {data.count(0)} zero bytes from byte {offset + data.index(0)} on",
                    path=file,
                    hint=f"if it is UTF-16: iconv -f UTF-16 -t UTF-8 {file.name} > utf8-{file.name}",
                )
            waiting = len(decoder.getstate()[0])  # bytes of a character that the last block cut in two
            try:
                decoded = decoder.decode(data, final=not data)
            except UnicodeDecodeError as error:
                raise _not_utf8(file, offset - waiting + error.start, error) from None
            text += decoded.removeprefix(_BYTE_ORDER_MARK) if offset == 0 else decoded
            offset += len(data)
            source_bytes += len(data)
            while len(text) > PIECE_CHARACTERS:
                cut = _cut(text)
                yield Piece(text[:cut], False, source_bytes)
                text, source_bytes = text[cut:], 0
            if not data:
                yield Piece(text, True, source_bytes)
                return


def _of_record(text: str, source_bytes: int) -> Iterator[Piece]:
    """A document that is in memory already, in pieces; nothing of a blank one."""
    if not text or text.isspace():
        return
    start = 0
    while len(text) - start > PIECE_CHARACTERS:
        block = text[start : start + PIECE_CHARACTERS + 1]
        cut = _cut(block)
        yield Piece(block[:cut], False, source_bytes)
        start, source_bytes = start + cut, 0
    yield Piece(text[start:] if start else text, True, source_bytes)


def _of_json_lines(file: Path, column: str) -> Iterator[Piece]:
    offset = 0
    with open(file, "rb") as stream:
        for number, line in enumerate(stream, start=1):
            where = f"{file}, line {number}"
            try:
                content = line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise _not_utf8(file, offset + error.start, error) from None
            offset += len(line)
            content = content.removeprefix(_BYTE_ORDER_MARK) if number == 1 else content
            if not content.strip():
                continue
            one_per_line = (
                f"one record per line is expected; jq -c '.[]' {file.name} makes it of an array, jq -c . of others"
            )
            try:
                record = json.loads(content)
            except (ValueError, RecursionError) as error:
                spread = content.strip() == "{" or content.lstrip().startswith("[")
                raise DataError(
                    f"{where}: not a JSON record: {error}", path=file, hint=one_per_line if spread else None
                ) from None
            if not isinstance(record, dict):
                raise DataError(
                    f"{where}: expected a JSON object, got {type(record).__name__}", path=file, hint=one_per_line
                )
            yield from _of_record(_text_of(record, column, where, file), len(line))


def _of_parquet(file: Path, column: str) -> Iterator[Piece]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise DataError(
            f"{file} is Parquet, which needs pyarrow; it is not installed", path=file, hint=_EXTRA
        ) from None
    try:
        with pyarrow.parquet.ParquetFile(file) as parquet:
            names = parquet.schema_arrow.names
            if column not in names:
                raise _no_column(str(file), file, column, names)
            kind = parquet.schema_arrow.field(column).type
            kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
            if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
                raise DataError(f"{file}: column `{column}` holds {kind}, expected string", path=file)
            rows, size = parquet.metadata.num_rows, _stat(file).st_size
            row = 0
            for batch in parquet.iter_batches(batch_size=256, columns=[column]):
                for value in batch.column(0):
                    try:
                        text = value.as_py() or ""
                    except UnicodeDecodeError as error:
                        raise DataError(
                            f"{file}, row {row}: not UTF-8 at byte {error.start} of the text: {error.reason}", path=file
                        ) from None
                    row += 1
                    yield from _of_record(text, size // rows)
    except pyarrow.ArrowException as error:
        raise DataError(f"{file} cannot be read as Parquet: {_first_line(error)}", path=file) from None


def _text_of(record: Any, column: str, where: str, path: Path | str) -> str:
    """The text of one record; null is blank. Raises DataError naming the keys that are there."""
    if column not in record:
        raise _no_column(where, path, column, list(record))
    text = record[column]
    if text is None:
        return ""
    if not isinstance(text, str):
        raise DataError(f"{where}: `{column}` is {type(text).__name__}, expected a string", path=path)
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair, which no tokenizer can encode
            half = ord(text[error.start])
            raise DataError(
                f"{where}: character {error.start} of `{column}` is half of a surrogate pair (0x{half:x})",
                path=path,
            ) from None
    return text


def _no_column(where: str, path: Path | str, column: str, names: Sequence[str]) -> DataError:
    close = nearest(column, names) or (names[0] if len(names) == 1 else None)
    return DataError(
        f"{where}: no `{column}`, only {listed(names) or 'an empty record'}",
        path=path,
        hint=f"--training.text_column {close or 'NAME'} names the field that holds the text",
    )


def _cut(text: str) -> int:
    """Where to cut a text that is too long for one piece: 0 < place <= PIECE_CHARACTERS.

    After the end of a line, before what is not white space, for there no tokenizer of ours joins letters across; in a
    text without lines before a space; in one without spaces anywhere.
    """
    lowest = PIECE_CHARACTERS // 2
    place = text.rfind("\n", lowest, PIECE_CHARACTERS)
    while place > 0 and text[place + 1].isspace():
        place = text.rfind("\n", lowest, place)
    if place > 0:
        return place + 1
    place = text.rfind(" ", lowest, PIECE_CHARACTERS)
    return place if place > 0 else PIECE_CHARACTERS


def _without_blank(pieces: Iterable[Piece]) -> Iterator[Piece]:
    """One document's pieces, or nothing where all of it is white space."""
    held: list[Piece] | None = []  # blank so far
    for piece in pieces:
        if held is None:
            yield piece
        else:
            held.append(piece)
            if piece.text and not piece.text.isspace():
                yield from held
                held = None


def _not_empty(name: str, pieces: Iterable[Piece]) -> Iterator[Piece]:
    empty = True
    for piece in pieces:
        empty = False
        yield piece
    if empty:
        raise DataError(f"dataset `{name}` is empty: it has no document with any text in it")


def _joined(pieces: Iterable[Piece]) -> Iterator[str]:
    parts: list[str] = []
    for piece in pieces:
        parts.append(piece.text)
        if piece.last:
            yield "".join(parts)
            parts = []


def _split_part(split: str) -> tuple[str, tuple[int, int | None] | None]:
    """`train[10:50]` -> ("train", (10, 50)). Streams know no percentages, and no ends to count from."""
    base, bracket, part = split.partition("[")
    if not bracket:
        return base, None
    match = re.fullmatch(r"(\d*):(\d*)\]", part)
    if match is None:
        raise DataError(
            f"split `{split}`: expected a name, or a name and a range of records",
            hint=f"--training.dataset_split '{base}[:100000]'",
        )
    return base, (int(match[1] or 0), int(match[2]) if match[2] else None)


def _looks_like_a_path(name: str) -> bool:
    suffixes = TEXT_SUFFIXES | LINE_SUFFIXES | PARQUET_SUFFIXES | set(_COMPRESSED)
    return (
        name.startswith((".", "/", "~"))
        or name.endswith("/")
        or name.count("/") > 1
        or Path(name).suffix.lower() in suffixes
    )


def _missing(path: Path) -> DataError:
    try:
        close = nearest(path.name, [entry.name for entry in path.parent.iterdir()])
    except OSError:
        close = None
    return DataError(
        f"dataset {path} does not exist",
        path=path,
        hint=f"did you mean {path.parent / close}?" if close else "`--training.dataset stdlib` is always there",
    )


def _refuse_compressed(path: Path) -> None:
    command = _COMPRESSED.get(path.suffix.lower())
    if command:
        raise DataError(f"{path} is compressed, which is not read", path=path, hint=f"{command} {path}")


def _not_utf8(file: Path, offset: int, error: UnicodeDecodeError) -> DataError:
    return DataError(
        f"{file} is not UTF-8 at byte {offset} (0x{error.object[error.start]:02x}: {error.reason})",
        path=file,
        hint=f"if it is Latin-1: iconv -f LATIN1 -t UTF-8 {file.name} > utf8-{file.name}",
    )


def _stat(file: Path) -> os.stat_result:
    try:
        return file.stat()
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror or error}", path=file) from None


def _file_facts(file: Path) -> tuple[str, int, int]:
    """What tells that a file is the one that was read: where, bytes, time of change in ns."""
    stat = _stat(file)
    return str(file.absolute()), stat.st_size, stat.st_mtime_ns


def _identity(*facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
