"""Are foreign weights whole, as far as they say it themselves? A file by its header, a folder by what names its files.

safetensors and GGUF hold no checksum of their numbers: of those, "whole" means that sizes, index and headers fit, so no
download that stopped is whole. A file of torch.save holds a CRC32 of each record. Imports no torch.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from reshard.checkpoint.verify import Advance, Finding, Level, Verdict
from reshard.errors import FormatError, listed
from reshard.formats.gguf_file import GgufFile, check_places, read_gguf
from reshard.formats.lfs import MOST_BYTES, pointer
from reshard.formats.safetensors import read_header
from reshard.torch_zip import OtherArchive, TensorView, crc_of, open_archive, place

TORCH = (".pt", ".pth", ".bin", ".ckpt")
NO_CHECKSUMS = "stores no checksums: its size and its header were checked"
_READ_BYTES = 1 << 20
# How programs call what they have not finished; curl and wget leave no such name, the size tells then.
_UNFINISHED = re.compile(
    r"(?P<file>.+)\.(incomplete|part|partial|crdownload|download|aria2|aria2__temp|!qB|tmp(-[^.]*)?)|\.(?P<rsync>.+)\.\w{6}",
    re.ASCII,
)


@dataclass(frozen=True)
class Look:
    """What a file says of itself. shapes: of its tensors by name, None where it could not be asked. gguf: its header."""

    verdict: Verdict
    shapes: Mapping[str, tuple[int, ...]] | None = None
    gguf: GgufFile | None = None


@dataclass
class Answer:
    """What is found in a file. problems: it is not whole. doubts: it cannot be told."""

    what: str
    problems: list[Finding] = field(default_factory=list)
    doubts: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    checked: int = 0
    shapes: Mapping[str, tuple[int, ...]] | None = None
    gguf: GgufFile | None = None


def kind_of(path: Path) -> str | None:
    """safetensors, gguf or torch, by its name; a GGUF by its first bytes too. None: no file of weights."""
    if path.suffix in (".safetensors", ".gguf"):
        return path.suffix[1:]
    if path.suffix in TORCH:
        return "torch"
    try:
        return "gguf" if _first_bytes(path, 4) == b"GGUF" else None
    except OSError:
        return None


def unfinished(name: str) -> str | None:
    """The name that a file would have, if its own says that it is not finished yet."""
    found = _UNFINISHED.fullmatch(name)
    if found is None or (found["rsync"] and not Path(found["rsync"]).suffix):
        return None
    return found["file"] or found["rsync"]


def look_at(path: Path, level: Level, advance: Advance) -> Look:
    """Ask one file. Raises nothing of ours; a disk that fails says nothing of the file."""
    answer = Answer(kind_of(path) or "file")
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            answer.doubts.append(f"`{path}` is no file")
        elif (problem := nothing_in(path)) is not None:
            answer.problems.append(Finding(path.name, problem))
        else:
            ask = _ASK.get(answer.what)
            if ask is None:
                answer.doubts.append(f"`{path}` is of no format that is known")
            else:
                ask(path, level, advance, answer)
        if path.with_name(f"{path.name}.aria2").exists():
            answer.problems.append(Finding(path.name, f"was not finished by aria2: {path.name}.aria2 lies beside it"))
    except FileNotFoundError:
        answer.what = "nothing"
        answer.doubts.append(f"`{path}` cannot be read: it does not exist")
    except EOFError:
        answer.problems.append(Finding(path.name, "became shorter while it was read"))
    except OSError as error:
        answer.doubts.append(f"`{path}` cannot be read: {error.strerror or error}")
    return Look(verdict_of(path, answer), answer.shapes, answer.gguf)


def verdict_of(path: Path, answer: Answer) -> Verdict:
    """Damage is certain also where something else could not be told."""
    whole = False if answer.problems else None if answer.doubts else True
    notes = [*answer.notes, *(answer.doubts if answer.problems else [])]
    problem = "; ".join(answer.doubts) if whole is None else ""
    return Verdict(
        str(path), answer.what, whole, tuple(answer.problems), answer.checked, problem=problem, notes=tuple(notes)
    )


def _first_bytes(path: Path, size: int) -> bytes:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe's other end may never come
    with open(fd, "rb") as file:
        return file.read(size) if stat.S_ISREG(os.fstat(fd).st_mode) else b""


def nothing_in(path: Path) -> str | None:
    """Why there are no weights in a file, whatever its kind; None where there may be."""
    if not path.stat().st_size:
        return "is empty"
    return pointer(_first_bytes(path, MOST_BYTES))


def _refused(path: Path, error: FormatError, answer: Answer) -> None:
    """A reader says no. Raises OSError where it was the disk that did."""
    if isinstance(error.__context__, OSError):
        raise error.__context__
    answer.problems.append(Finding(path.name, error.message))


def _ask_safetensors(path: Path, level: Level, advance: Advance, answer: Answer) -> None:
    answer.notes.append(f"safetensors {NO_CHECKSUMS}")
    try:
        base, entries = read_header(path)
    except FormatError as error:
        _refused(path, error, answer)
        return
    answer.what = f"safetensors ({len(entries)} tensors)"
    answer.shapes = {name: shape for name, _, shape, _, _ in entries}
    filled = [(name, begin, end) for name, _, _, begin, end in entries if end > begin]
    if filled and _zeros(path, base + filled[-1][1], base + filled[-1][2]):
        answer.doubts.append(_only_zeros(path, filled[-1][0]))
    advance(path.stat().st_size)


def _ask_gguf(path: Path, level: Level, advance: Advance, answer: Answer) -> None:
    answer.notes.append(f"GGUF {NO_CHECKSUMS}")
    start = _first_bytes(path, 8)
    if start[:4] == b"GGUF" and len(start) == 8 and start[4:] not in (b"\2\0\0\0", b"\3\0\0\0"):
        answer.doubts.append(f"`{path}` has a GGUF version that is not known, expected 2 or 3 in little-endian order")
        return
    try:
        file = read_gguf(path)
        unknown = check_places(file)
    except FormatError as error:
        _refused(path, error, answer)
        return
    answer.what, answer.gguf = f"GGUF ({len(file.tensors)} tensors)", file
    answer.shapes = {name: info.shape for name, info in file.tensors.items()}
    if unknown:
        kinds = sorted({info.ggml_type for info in unknown})
        answer.doubts.append(
            f"`{path}`: how many bytes {unknown[0].name} takes is not known (ggml type {listed(map(str, kinds))})"
        )
    filled = [info for info in file.tensors.values() if info.nbytes]
    last = max(filled, key=lambda info: info.offset, default=None)
    if last is not None and _zeros(path, last.offset, last.offset + (last.nbytes or 0)):
        answer.doubts.append(_only_zeros(path, last.name))
    advance(path.stat().st_size)


def _zeros(path: Path, begin: int, end: int) -> bool:
    """Is there nothing but zeros between two bytes of a file? Read from its end, where a download comes last."""
    with open(path, "rb", buffering=0) as file:
        while begin < end:
            at = max(begin, end - _READ_BYTES)
            if os.pread(file.fileno(), end - at, at).strip(b"\0"):
                return False
            end = at
    return True


def _only_zeros(path: Path, name: str) -> str:
    return f"`{path}` ends in nothing but zeros ({name}, its last tensor): the room may have been taken before the download"


def _ask_torch(path: Path, level: Level, advance: Advance, answer: Answer) -> None:
    answer.what = "torch.save file"
    with open(path, "rb") as file:
        fd = file.fileno()
        try:
            archive = open_archive(fd, path, opened=False)
        except OtherArchive as error:
            answer.doubts.append(error.message)
            return
        except FormatError as error:
            _refused(path, error, answer)
            return
        summed = {name: record for name, record in archive.records.items() if record.crc32 is not None}
        if level == "bytes":
            for name, record in summed.items():
                if crc_of(fd, record) != record.crc32:
                    answer.problems.append(Finding(path.name, f"record {name} does not have its stored CRC32"))
                answer.checked += record.nbytes
            if len(summed) < len(archive.records):
                answer.notes.append("was saved without checksums: its size and its directory were checked")
        advance(os.fstat(fd).st_size)
        try:
            archive = open_archive(fd, path)
            views = list(_views(archive.content))
            for name, view in views:
                place(name, view, archive)
        except OtherArchive as error:
            answer.doubts.append(error.message)
            return
        except FormatError as error:
            if not answer.problems:
                answer.problems.append(Finding(path.name, error.message))
            return
    answer.shapes = {name: view.shape for name, view in views}
    answer.what = f"torch.save file ({len(views)} tensors)"


def _views(content: Any) -> Iterator[tuple[str, TensorView]]:
    """Every tensor in what an archive holds, by the keys that lead to it."""
    seen: set[int] = set()
    left: list[tuple[str, Any]] = [("", content)]
    while left:
        name, value = left.pop()
        if isinstance(value, TensorView):
            yield name, value
        elif isinstance(value, dict | list | tuple) and id(value) not in seen:
            seen.add(id(value))  # a pickle may hold itself
            inner = value.items() if isinstance(value, dict) else enumerate(value)
            left += [(f"{name}.{key}" if name else str(key), item) for key, item in inner]


_ASK = {"safetensors": _ask_safetensors, "gguf": _ask_gguf, "torch": _ask_torch}
