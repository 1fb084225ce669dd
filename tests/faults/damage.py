"""What can happen to the bytes of a checkpoint? Thousands of faults, over every region of every file."""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from reshard.checkpoint.index import Index, read_index
from reshard.torch_zip import open_archive

PAGE = 4096

Bytes = Mapping[str, bytes]  # file name -> content


@dataclass(frozen=True)
class Fault:
    """One way to damage a directory. change: what the touched files become; None: the file is gone."""

    kind: str
    what: str
    change: Mapping[str, bytes | None]


@dataclass(frozen=True)
class Region:
    """Bytes [start, stop) of a data file that mean the same thing."""

    kind: str
    start: int
    stop: int


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def is_data(name: str) -> bool:
    return name.endswith(".distcp")


def regions_of(directory: Path, name: str) -> list[Region]:
    """What lies where in a data file: headers, pickles, numbers, directories of the archives, padding between them."""
    index: Index = read_index((directory / ".metadata").read_bytes(), directory)
    size, found, at = (directory / name).stat().st_size, [], 0
    items = [c for t in index.tensors.values() for c in t.chunks if c.file == name]
    fd = os.open(directory / name, os.O_RDONLY)
    try:
        for item in sorted(items, key=lambda c: c.offset):
            found.append(Region("padding", at, item.offset))
            at = item.offset
            archive = open_archive(fd, directory / name, start=item.offset, nbytes=item.length)
            for record_name, record in sorted(archive.records.items(), key=lambda r: r[1].offset):
                kind = record_name.removeprefix(archive.root)
                found.append(Region("record header", at, record.offset))
                kind = "pickle" if kind == "data.pkl" else "numbers" if kind.startswith("data/") else "small record"
                at = record.offset + record.nbytes
                found.append(Region(kind, record.offset, at))
            found.append(Region("zip directory", at, item.offset + item.length))
            at = item.offset + item.length
    finally:
        os.close(fd)
    found.append(Region("padding", at, size))
    return [region for region in found if region.stop > region.start]


def faults(directory: Path, stale: Path, *, flips: int, others: int, seed: int = 0) -> Iterator[Fault]:
    """Every kind of fault, many times. stale: a checkpoint of the same layout that was saved before.

    flips: of single bits, for each file and, within data files, for each kind of region. others: for each other kind
    and file.
    """
    good, old, rng = contents(directory), contents(stale), random.Random(seed)
    yield from _flips(directory, good, flips, rng)
    for name, content in good.items():
        yield from _cut(name, content, others, rng)
        yield from _overwritten(name, content, old.get(name, b""), others, rng)
    yield from _names(good, old)


def _flip(content: bytes, position: int, bit: int) -> bytes:
    return content[:position] + bytes([content[position] ^ (1 << bit)]) + content[position + 1 :]


def _flips(directory: Path, good: Bytes, count: int, rng: random.Random) -> Iterator[Fault]:
    for name, content in good.items():
        regions = regions_of(directory, name) if is_data(name) else [Region("any", 0, len(content))]
        by_kind: dict[str, list[Region]] = {}
        for region in regions:
            by_kind.setdefault(region.kind, []).append(region)
        for kind, places in by_kind.items():
            for _ in range(count):
                region = rng.choice(places)
                position, bit = rng.randrange(region.start, region.stop), rng.randrange(8)
                what = f"bit {bit} of byte {position} of {name}" + (f", {kind}" if kind != "any" else "")
                yield Fault("flipped bit", what, {name: _flip(content, position, bit)})


def _cut(name: str, content: bytes, count: int, rng: random.Random) -> Iterator[Fault]:
    size = len(content)
    for length in {0, 1, size // 2, size - 1, max(0, size - PAGE), *(rng.randrange(size) for _ in range(count))}:
        if length < size:
            kind = "truncated" if length else "empty"
            yield Fault(kind, f"{name} cut to {length} of {size} bytes", {name: content[:length]})
    for more in (b"\0", b"\n", bytes(PAGE), content, rng.randbytes(100)):
        yield Fault("extended", f"{name} with {len(more)} bytes more", {name: content + more})
    yield Fault("extended", f"{name} with a byte more in front", {name: b"\0" + content})


def _overwritten(name: str, content: bytes, old: bytes, count: int, rng: random.Random) -> Iterator[Fault]:
    """Parts that became zero, garbage, or never reached the disk and are what lay there before."""
    size = len(content)

    def put(start: int, part: bytes) -> bytes:
        return content[:start] + part + content[start + len(part) :]

    def damaged(kind: str, start: int, part: bytes) -> Iterator[Fault]:
        new = put(start, part[: size - start])
        if new != content:
            yield Fault(kind, f"{len(part)} bytes at {start} of {name}", {name: new})

    for _ in range(count):
        start = rng.randrange(0, size, PAGE) if size > PAGE else 0
        yield from damaged("zeroed page", start, bytes(PAGE))
        sector = rng.randrange(0, size, 512) if size > 512 else 0
        yield from damaged("zeroed page", sector, bytes(512))
        yield from damaged("garbage", rng.randrange(size), rng.randbytes(rng.choice((2, 8, 64, PAGE))))
        yield from damaged("stale page", start, old[start : start + PAGE])
        if size > 2 * PAGE:
            other = rng.randrange(0, size - PAGE, PAGE)
            a, b = content[start : start + PAGE], content[other : other + PAGE]
            if len(a) == len(b) and a != b:
                swapped = put(start, b)
                swapped = swapped[:other] + a + swapped[other + PAGE :]
                yield Fault("swapped pages", f"pages at {start} and {other} of {name}", {name: swapped})
    yield Fault("zeroed page", f"all of {name}", {name: bytes(size)})


def _names(good: Bytes, old: Bytes) -> Iterator[Fault]:
    """Files that are missing, exchanged, copied over each other, or those of another save."""
    names = sorted(good)
    data = [name for name in names if is_data(name)]
    for name in names:
        yield Fault("missing", name, {name: None})
        if old.get(name) not in (None, good[name]):
            yield Fault("stale file", name, {name: old[name]})
    for a, b in combinations(names, 2):
        yield Fault("missing", f"{a} and {b}", {a: None, b: None})
        if good[a] != good[b]:
            yield Fault("swapped files", f"{a} and {b}", {a: good[b], b: good[a]})
            yield Fault("duplicated file", f"{a} over {b}", {b: good[a]})
            yield Fault("duplicated file", f"{b} over {a}", {a: good[b]})
        if a in old and b in old and (old[a], old[b]) != (good[a], good[b]):
            yield Fault("stale file", f"{a} and {b}", {a: old[a], b: old[b]})
    for a, b in combinations(data, 2):  # with what belongs to them
        pair = {x + s: good[y + s] for x, y in ((a, b), (b, a)) for s in ("", ".crc") if y + s in good}
        yield Fault("swapped files", f"{a} and {b} with their sidecars", pair)
    together = [{n: old[n] for n in names if n != kept and n in old} for kept in ("manifest.json", ".metadata")]
    for change in (
        *together,
        {n: old[n] for n in names if n.startswith("__")},
        {n: old[n] for n in names if n in data},
    ):
        yield Fault("stale file", f"{len(change)} files of another save", change)
    for name in names:
        yield Fault("extra file", f"a copy of {name}", {name + ".copy": good[name]})
        yield Fault("extra file", f"{name} of another save", {"old-" + name.lstrip("."): old.get(name, b"")})


class Case:
    """A directory that is damaged and put right again, over and over: what is whole is a link to the good files.

    It has the good one's name, and nothing beside it.
    """

    def __init__(self, good: Path, place: Path) -> None:
        self._good, self.directory = good, place / good.name
        self.directory.mkdir(parents=True)
        for path in good.iterdir():
            os.link(path, self.directory / path.name)

    def damage(self, fault: Fault) -> None:
        for name, content in fault.change.items():
            path = self.directory / name
            path.unlink(missing_ok=True)
            if content is not None:
                path.write_bytes(content)

    def repair(self, fault: Fault) -> None:
        for name in fault.change:
            path = self.directory / name
            path.unlink(missing_ok=True)
            if (self._good / name).exists():
                os.link(self._good / name, path)


def count(found: list[Fault]) -> Counter[str]:
    return Counter(fault.kind for fault in found)
