"""Which states can a crash leave a folder in? Rebuilt from the system calls that a real run made.

strace records every call of every rank that changes a file or a directory. `History` knows from it what was written
when, and what had been made durable by fsync. From there, the folder as it would be found is put together for a death
after any call: of the processes alone (nothing is lost), or of the whole machine (whatever was not fsynced may be lost,
all of it or any part; data may be torn, or of the right length and zero).

What is assumed of the file system: a rename, also one that exchanges, happens as a whole or not at all, and fsync of a
file or directory makes durable what was done to it before. Nothing else: not that the order of two calls is kept, and
not that fsync of a file makes its name durable.
"""

from __future__ import annotations

import random
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CALLS = (
    "openat,open,creat,write,writev,pwrite64,pwritev,pwritev2,fsync,fdatasync,rename,renameat,renameat2,mkdir,mkdirat,"
    "unlink,unlinkat,rmdir,truncate,ftruncate,fallocate,link,linkat,symlink,symlinkat,copy_file_range,sendfile"
)
MISSING = "strace is not installed: apt-get install strace"


def can_trace() -> str:
    """Why can no calls be recorded here? Empty where they can."""
    if not shutil.which("strace"):
        return MISSING
    with subprocess.Popen(["sleep", "60"]) as sleeper:
        try:
            with traced(sleeper.pid):
                return ""
        except AssertionError as error:
            return str(error)
        finally:
            sleeper.kill()


@contextmanager
def traced(process: int, *options: str) -> Iterator[None]:
    """Have strace at a process, and at all that it starts meanwhile, until the block ends. Needs the right to do so."""
    assert shutil.which("strace"), MISSING
    # What it says goes to a file: nobody reads a pipe meanwhile, and a full one would stop strace and all that it traces.
    with tempfile.TemporaryFile("w+") as said:
        tracer = subprocess.Popen(["strace", "-f", "-p", str(process), *options], stderr=said)
        status = Path(f"/proc/{process}/status")
        try:
            for _ in range(10_000):
                if f"TracerPid:\t{tracer.pid}\n" in status.read_text():
                    break
                if tracer.poll() is not None:
                    said.seek(0)
                    raise AssertionError(f"strace cannot attach here: {said.read()[-500:]}")
                time.sleep(0.001)
            yield
        finally:
            tracer.send_signal(signal.SIGINT)  # it lets go of all processes, which go on
            tracer.wait(timeout=60)


def recording(process: int, place: Path, *options: str) -> AbstractContextManager[None]:
    """Record every call that changes files, in `place/calls.<pid>`, for `calls_in`."""
    place.mkdir()
    words = ["-ff", "-ttt", "-T", "-y", "-xx", "-s", "16777216", "-o", f"{place}/calls", "-e", f"trace={CALLS}"]
    return traced(process, *words, *options)


@dataclass(frozen=True)
class Call:
    """One system call that changed something. process: its pid."""

    end: float
    process: int
    name: str
    arguments: str
    result: str


_LINE = re.compile(r"^(\d+\.\d+) (\w+)\((.*)\)\s+= (-?\d+|\?)(.*?)(?: <(\d+\.\d+)>)?$")
_TEXT = re.compile(r'"((?:\\x[0-9a-f]{2})*)"')
_FD = re.compile(r"^(?:\d+|AT_FDCWD)<([^>]*)>")


def _decoded(hexed: str) -> bytes:
    return bytes.fromhex(hexed.replace("\\x", ""))


def calls_in(place: Path) -> list[Call]:
    """All successful calls in the order in which they ended."""
    found = []
    for path in place.glob("calls.*"):
        process = int(path.suffix[1:])
        for line in path.read_text().splitlines():
            match = _LINE.match(line)
            if match is None or match[4] == "?" or match[4].startswith("-"):
                continue
            end = float(match[1]) + float(match[6] or 0)
            found.append(Call(end, process, match[2], match[3], match[4] + match[5]))
    return sorted(found, key=lambda call: call.end)


@dataclass
class Op:
    """What one call did to the folder. what: for people; process: its pid; path: of what it was done to."""

    what: str
    process: int
    path: str


@dataclass
class History:
    """All changes below a root, by inode, since it was `base`.

    A directory's changes are {name: inode or None}; a file's are (offset, bytes), or (0, None) where it is cut to nothing.
    """

    root: str
    ops: list[Op] = field(default_factory=list)
    directories: dict[int, list[tuple[int, dict[str, int | None]]]] = field(default_factory=dict)
    files: dict[int, list[tuple[int, int, bytes | None]]] = field(default_factory=dict)
    synced: dict[int, list[int]] = field(default_factory=dict)
    _now: dict[int, dict[str, int]] = field(default_factory=dict)
    _sizes: dict[int, int] = field(default_factory=dict)
    _count: int = 0

    @classmethod
    def of(cls, root: Path) -> History:
        """Begin with what lies below a directory, all of it durable."""
        history = cls(str(root))
        history._take(root)
        return history

    def _take(self, path: Path) -> int:
        inode = self._new(is_directory=path.is_dir())
        if path.is_dir():
            for child in sorted(path.iterdir()):
                self._now[inode][child.name] = self._take(child)
            self.directories[inode].append((-1, dict(self._now[inode])))
        else:
            content = path.read_bytes()
            self.files[inode].append((-1, 0, content))
            self._sizes[inode] = len(content)
        self.synced[inode] = [-1]
        return inode

    def _new(self, *, is_directory: bool) -> int:
        inode, self._count = self._count, self._count + 1
        if is_directory:
            self.directories[inode], self._now[inode] = [], {}
        else:
            self.files[inode], self._sizes[inode] = [], 0
        self.synced[inode] = []
        return inode

    def until(self, call: int) -> History:
        """The same, as if nothing had happened after this call."""
        kept: dict[int, Any] = {
            inode: [c for c in changes if c[0] <= call] for inode, changes in self.directories.items()
        }
        files = {inode: [w for w in writes if w[0] <= call] for inode, writes in self.files.items()}
        now: dict[int, dict[str, int]] = {}
        for inode, changes in kept.items():
            now[inode] = {}
            for _, change in changes:
                _put(now[inode], change)
        return History(
            self.root, self.ops[: call + 1], kept, files,
            {inode: [i for i in numbers if i <= call] for inode, numbers in self.synced.items()}, now,
            {inode: len(_written(b"", [write[1:] for write in writes])) for inode, writes in files.items()},
            self._count,
        )  # fmt: skip

    # -- taking calls in

    def add(self, calls: Sequence[Call]) -> None:
        for call in calls:
            self._add(call)

    def _add(self, call: Call) -> None:
        texts = [_decoded(t).decode() for t in _TEXT.findall(call.arguments)] if "write" not in call.name else []
        at = _FD.match(call.arguments)
        fd_path = _decoded(at[1]).decode() if at else ""
        match call.name:
            case "open" | "openat" | "creat":
                path = self._absolute(texts[0], fd_path)
                if self._inside(path) and ("O_CREAT" in call.arguments or call.name == "creat"):
                    parent, name = self._parent(path)
                    if name not in self._now[parent]:
                        inode = self._new(is_directory=False)
                        self._change(call, f"create {self._short(path)}", path, parent, {name: inode})
                    elif "O_TRUNC" in call.arguments or call.name == "creat":
                        inode = self._now[parent][name]
                        self.files[inode].append((len(self.ops), 0, None))
                        self._sizes[inode] = 0
                        self._op(call, f"cut {self._short(path)} to nothing", path)
            case "mkdir" | "mkdirat":
                path = self._absolute(texts[0], fd_path)
                if self._inside(path):
                    parent, name = self._parent(path)
                    self._change(call, f"mkdir {self._short(path)}", path, parent, {name: self._new(is_directory=True)})
            case "write" | "writev":
                inode = self._find(fd_path) if self._inside(fd_path) else None
                if inode is not None:
                    data = b"".join(_decoded(t) for t in _TEXT.findall(call.arguments))[: int(call.result.split()[0])]
                    self.files[inode].append((len(self.ops), self._sizes[inode], data))
                    self._sizes[inode] += len(data)
                    self._op(call, f"write {len(data)} bytes of {self._short(fd_path)}", fd_path)
            case "fsync" | "fdatasync":
                inode = self._find(fd_path) if self._inside(fd_path) or fd_path == self.root else None
                if inode is not None:
                    self.synced[inode].append(len(self.ops))
                    self._op(call, f"fsync {self._short(fd_path)}", fd_path)
            case "rename" | "renameat" | "renameat2":
                source, target = (self._absolute(text, "") for text in texts)
                if self._inside(source) or self._inside(target):
                    self._rename(call, source, target)
            case "unlink" | "rmdir" | "unlinkat":
                path = self._absolute(texts[0], fd_path)
                if self._inside(path):
                    parent, name = self._parent(path)
                    self._change(call, f"remove {self._short(path)}", path, parent, {name: None})
            case _:
                paths = [fd_path, *texts]
                assert not any(self._inside(path) for path in paths), f"{call.name} is not understood: {paths}"

    def _rename(self, call: Call, source: str, target: str) -> None:
        (parent, old), (other, new) = self._parent(source), self._parent(target)
        assert parent == other, "a rename from one directory to another"
        exchange = "RENAME_EXCHANGE" in call.arguments
        there = self._now[parent].get(new)
        assert exchange or there is None or there in self.files, "a rename over a directory"
        change = {old: there if exchange else None, new: self._now[parent][old]}
        verb = "exchange" if exchange else "rename"
        self._change(call, f"{verb} {self._short(source)} -> {new}", target, parent, change)

    def _change(self, call: Call, what: str, path: str, parent: int, change: dict[str, int | None]) -> None:
        self.directories[parent].append((len(self.ops), change))
        _put(self._now[parent], change)
        self._op(call, what, path)

    def _op(self, call: Call, what: str, path: str) -> None:
        self.ops.append(Op(what, call.process, self._short(path)))

    def _absolute(self, text: str, base: str) -> str:
        return text if text.startswith("/") else f"{base}/{text}"

    def _inside(self, path: str) -> bool:
        return path.startswith(self.root + "/")

    def _short(self, path: str) -> str:
        return path.removeprefix(self.root).removeprefix("/") or "the root"

    def _parent(self, path: str) -> tuple[int, str]:
        head, _, name = path.rpartition("/")
        inode = self._find(head)
        assert inode is not None, path
        return inode, name

    def _find(self, path: str) -> int | None:
        inode: int | None = 0
        for name in filter(None, path.removeprefix(self.root).split("/")):
            inode = self._now[inode].get(name) if inode is not None and inode in self._now else None
        return inode


def _put(names: dict[str, Any], change: dict[str, int | None]) -> None:
    for name, inode in change.items():
        if inode is None:
            names.pop(name, None)
        else:
            names[name] = inode


# -- what is found after a crash

Tree = dict[str, "Tree | bytes"]
Write = tuple[int, bytes | None]


class Loss:
    """What a crash takes: this one takes nothing, as when only the processes die.

    A change is kept for sure if an fsync of the same inode came after it; `names` and `content` decide on the rest.
    """

    def names(self, pending: list[dict[str, int | None]]) -> list[bool]:
        """Which of a directory's pending changes are kept?"""
        return [True] * len(pending)

    def content(self, sure: bytes, pending: list[Write]) -> bytes:
        """What is in a file, of which `sure` is durable?"""
        return _written(sure, pending)


class AllLost(Loss):
    """Everything that was not made durable."""

    def names(self, pending: list[dict[str, int | None]]) -> list[bool]:
        return [False] * len(pending)

    def content(self, sure: bytes, pending: list[Write]) -> bytes:
        return sure


class DataLost(Loss):
    """Names and lengths are there, the data is not. zeros: it reads as zeros, else the file is shorter."""

    def __init__(self, *, zeros: bool) -> None:
        self._zeros = zeros

    def content(self, sure: bytes, pending: list[Write]) -> bytes:
        return _written(sure, _zeros(pending)) if self._zeros else sure


class NamesLost(AllLost):
    """The data is there, the names are not."""

    def content(self, sure: bytes, pending: list[Write]) -> bytes:
        return _written(sure, pending)


class Torn(Loss):
    """Nothing is lost but a part of the last write, as when a process dies in it."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng

    def content(self, sure: bytes, pending: list[Write]) -> bytes:
        if not pending:
            return sure
        at, data = pending[-1]
        return _written(sure, [*pending[:-1], (at, data[: self._rng.randrange(len(data))] if data else b"")])


class AnyLost(Loss):
    """Of each file and directory some of it, in no order."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng

    def names(self, pending: list[dict[str, int | None]]) -> list[bool]:
        if self._rng.random() < 0.5:
            kept = self._rng.randrange(len(pending) + 1)
            return [i < kept for i in range(len(pending))]
        return [self._rng.random() < 0.5 for _ in pending]

    def content(self, sure: bytes, pending: list[Write]) -> bytes:
        match self._rng.randrange(5):
            case 0:
                return sure
            case 1:
                return _written(sure, pending)
            case 2:
                return Torn(self._rng).content(sure, pending)
            case 3:
                return _written(sure, _zeros(pending[: self._rng.randrange(len(pending) + 1)]))
        whole = bytearray(_written(sure, pending))  # longer than any of its parts, unless it was cut
        for at, data in pending:  # some sectors reached the disk, the others are zero
            if data is None:
                continue
            for sector in range(at, at + len(data), 512):
                if self._rng.random() < 0.5:
                    end = min(sector + 512, at + len(data), len(whole))
                    whole[sector:end] = bytes(max(0, end - sector))
        return bytes(whole)


def _written(content: bytes, pending: list[Write]) -> bytes:
    result = bytearray(content)
    for at, data in pending:
        if data is None:
            result.clear()
            continue
        result.extend(bytes(max(0, at + len(data) - len(result))))
        result[at : at + len(data)] = data
    return bytes(result)


def _zeros(pending: list[Write]) -> list[Write]:
    return [(at, bytes(len(data)) if data is not None else None) for at, data in pending]


def found_after(history: History, happened: Callable[[int], bool], loss: Loss) -> Tree:
    """The tree below the root when the calls that `happened` (by number) had, and `loss` took its part."""

    def directory(inode: int) -> Tree:
        changes = [(i, change) for i, change in history.directories[inode] if i < 0 or happened(i)]
        sure = _last_sync(inode)
        names: dict[str, int] = {}
        pending = [change for i, change in changes if i > sure]
        kept = loss.names(pending)
        for _, change in changes[: len(changes) - len(pending)]:
            _put(names, change)
        for change, keep in zip(pending, kept, strict=True):
            if keep:
                _put(names, change)
        return {n: directory(i) if i in history.directories else content(i) for n, i in sorted(names.items())}

    def content(inode: int) -> bytes:
        writes = [write for write in history.files[inode] if write[0] < 0 or happened(write[0])]
        sure = _last_sync(inode)
        durable = _written(b"", [(at, data) for i, at, data in writes if i <= sure])
        return loss.content(durable, [(at, data) for i, at, data in writes if i > sure])

    def _last_sync(inode: int) -> int:
        return max((i for i in history.synced[inode] if i < 0 or happened(i)), default=-2)

    return directory(0)


def at(tree: Tree, path: str) -> Tree | bytes | None:
    """What lies at a path of a tree? None: nothing."""
    found: Tree | bytes | None = tree
    for name in filter(None, path.split("/")):
        found = found.get(name) if isinstance(found, dict) else None
    return found


def put(tree: Tree, place: Path) -> None:
    """Make a tree real, in a new directory."""
    place.mkdir()
    for name, found in tree.items():
        if isinstance(found, bytes):
            (place / name).write_bytes(found)
        else:
            put(found, place / name)


def losses(rng: random.Random, count: int) -> Iterator[tuple[str, Loss]]:
    """Ways to die at one place, by name; `count` of them by chance."""
    yield "processes killed", Loss()
    yield "killed in the write", Torn(rng)
    yield "power lost, all that was not fsynced with it", AllLost()
    yield "power lost, the data with it", DataLost(zeros=False)
    yield "power lost, the data is zeros", DataLost(zeros=True)
    yield "power lost, the names with it", NamesLost()
    for _ in range(count):
        yield "power lost, anything with it", AnyLost(rng)
