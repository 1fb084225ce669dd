"""Are the bytes on disk what torch would write, and is every byte checked that is read? Archives, blocks, data files."""

from __future__ import annotations

import io
import os
import random
import time
import zipfile
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from reshard.checkpoint import archive, blocks
from reshard.checkpoint.blocks import BLOCK_BYTES, BlockSummer, BlockWriter, CheckedFile, Throttle, read_sums
from reshard.checkpoint.manifest import TensorEntry
from reshard.checkpoint.state import Box, bytes_of, pieces_of
from reshard.checkpoint.writer import ALIGNED_BYTES, Places, write_pieces
from reshard.errors import IntegrityError
from reshard.torch_zip import ITEM_BYTES

SIZES = [(), (1,), (7,), (3, 5), (2, 3, 4), (128, 300)]


def random_bits(dtype: torch.dtype, sizes: tuple[int, ...]) -> torch.Tensor:
    count = 1
    for size in sizes:
        count *= size
    bits = torch.randint(0, 2, (count * dtype.itemsize,), dtype=torch.uint8)
    return bits.view(dtype).reshape(sizes)


# -- one archive


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("name", ITEM_BYTES)
def test_torch_load_reads_our_archive(name: str, sizes: tuple[int, ...]) -> None:
    tensor = random_bits(getattr(torch, name), sizes)
    raw = bytes(bytes_of(tensor))
    head = archive.head(tensor.dtype, sizes)
    content = head + raw + archive.tail(tensor.dtype, sizes, zlib.crc32(raw))
    assert len(content) == len(raw) + archive.overhead(tensor.dtype, sizes)
    assert len(head) % archive.ALIGNMENT == 0
    found = torch.load(io.BytesIO(content), weights_only=True)
    assert (found.dtype, tuple(found.shape)) == (tensor.dtype, sizes)
    assert bytes(bytes_of(found)) == raw
    with zipfile.ZipFile(io.BytesIO(content)) as zipped:
        assert zipped.testzip() is None  # all CRCs are right, ours and those of what we made up


def test_the_archive_has_the_records_of_torchs_own() -> None:
    tensor = torch.randn(6, 4)
    theirs = io.BytesIO()
    torch.save(tensor, theirs)
    ours = archive.head(tensor.dtype, (6, 4)) + bytes(bytes_of(tensor)) + archive.tail(tensor.dtype, (6, 4), 0)

    def records(content: bytes) -> dict[str, bytes]:
        with zipfile.ZipFile(io.BytesIO(content)) as zipped:
            return {
                entry.filename.partition("/")[2]: content[entry.header_offset : entry.header_offset + 4]
                for entry in zipped.infolist()
            }

    # torch adds records about itself that nothing needs: .format_version, .storage_alignment, .data/serialization_id
    assert records(ours).keys() <= records(theirs.getvalue()).keys()
    assert {"data.pkl", "byteorder", "data/0", "version"} == records(ours).keys()


# -- blocks


def written(path: Path, parts: list[bytes]) -> tuple[bytes, CheckedFile, int]:
    """A file of these parts; its content, a checked reader of it, and its descriptor."""
    out = BlockWriter(path)
    for part in parts:
        assert out.append(part) == zlib.crc32(part)
    entries = out.close()
    content = b"".join(parts)
    assert path.read_bytes() == content
    assert entries[path.name].crc32 == f"{zlib.crc32(content):08x}"
    sums = read_sums(path.parent, f"{path.name}.crc", entries[f"{path.name}.crc"], len(content))
    fd = os.open(path, os.O_RDONLY)
    return content, CheckedFile(fd, sums), fd


def fail(block: int) -> IntegrityError:
    return IntegrityError(f"block {block}")


def some_parts(seed: int) -> list[bytes]:
    """Many small parts, some that end with a block, some of many blocks; four megabytes."""
    rng = random.Random(seed)
    parts = [
        rng.randbytes(rng.choice([0, 1, 63, 1000, BLOCK_BYTES - 1, BLOCK_BYTES, 3 * BLOCK_BYTES + 5]))
        for _ in range(60)
    ]
    return [*parts, rng.randbytes(2_500_000), *(rng.randbytes(17) for _ in range(700))]


def cut(content: bytes, rng: random.Random) -> list[tuple[int, bytes]]:
    """The content in parts of any sizes, in any order: (offset, bytes)."""
    parts, at = [], 0
    while at < len(content):
        size = rng.choice([1, 64, 1000, BLOCK_BYTES - 1, BLOCK_BYTES, 5 * BLOCK_BYTES + 3])
        parts.append((at, content[at : at + size]))
        at += size
    rng.shuffle(parts)
    return parts


@pytest.mark.parametrize("seed", range(3))
def test_the_sums_are_the_same_in_whatever_order_the_bytes_come(seed: int, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    content = written(tmp_path / "a" / "x", some_parts(seed))[0]
    sums = BlockSummer(len(content))
    with ThreadPoolExecutor(4) as threads:
        parts = cut(content, random.Random(seed))
        found = threads.map(lambda part: sums.add(part[0], memoryview(part[1])), parts)
        assert list(found) == [zlib.crc32(part) for _, part in parts]
    entries = sums.write_sidecar(tmp_path / "b" / "x")
    assert entries["x"].crc32 == f"{zlib.crc32(content):08x}"
    assert (tmp_path / "b" / "x.crc").read_bytes() == (tmp_path / "a" / "x.crc").read_bytes()


@pytest.mark.parametrize("change", ["lost", "twice", "short"])
def test_a_sum_of_bytes_that_do_not_tile_the_file_is_a_bug(change: str, tmp_path: Path) -> None:
    content = bytes(range(256)) * 1000
    parts = [(at, content[at : at + 1000]) for at in range(0, len(content), 1000)]
    if change == "lost":
        del parts[100]
    elif change == "twice":
        parts[7] = (6500, content[6500:8000])
    sums = BlockSummer(len(content) + (change == "short"))
    for at, part in parts:
        sums.add(at, memoryview(part))
    with pytest.raises(AssertionError):
        sums.write_sidecar(tmp_path / "x")


@pytest.mark.parametrize("seed", range(3))
def test_any_range_is_read_as_it_was_written(seed: int, tmp_path: Path) -> None:
    content, file, fd = written(tmp_path / "x", some_parts(seed))
    rng = random.Random(seed)
    ranges = [(0, len(content)), (0, 0), (len(content), 0), (len(content) - 1, 1), (BLOCK_BYTES, BLOCK_BYTES)]
    ranges += [(start := rng.randrange(len(content)), rng.randrange(len(content) - start + 1)) for _ in range(60)]
    for start, size in ranges:
        out = bytearray(size)
        count = file.read(start, memoryview(out), fail)
        assert bytes(out) == content[start : start + size]
        assert count <= size + 2 * BLOCK_BYTES
    os.close(fd)


def test_small_reads_in_order_read_each_block_once(tmp_path: Path) -> None:
    content, file, fd = written(tmp_path / "x", some_parts(0))
    count = sum(
        file.read(at, memoryview(bytearray(min(900, len(content) - at))), fail) for at in range(0, len(content), 900)
    )
    assert count == len(content)
    os.close(fd)


@pytest.mark.parametrize("where", ["first", "middle", "last"])
def test_a_flipped_bit_in_any_block_that_is_touched_is_found(where: str, tmp_path: Path) -> None:
    content, file, fd = written(tmp_path / "x", some_parts(1))
    block = {"first": 0, "middle": 20, "last": (len(content) - 1) // BLOCK_BYTES}[where]
    begin, end = block * BLOCK_BYTES, min((block + 1) * BLOCK_BYTES, len(content))
    for at in (begin, (begin + end) // 2, end - 1):
        damaged = bytearray(content)
        damaged[at] ^= 16
        (tmp_path / "x").write_bytes(damaged)
        # Also when the byte itself is not asked for: a block is taken as a whole or not at all.
        for start, stop in ((begin, end), (begin + 1, begin + 2), (end - 2, end - 1), (max(0, begin - 5), end)):
            with pytest.raises(IntegrityError, match=f"block {block}"):
                CheckedFile(fd, _sums_of(file)).read(start, memoryview(bytearray(stop - start)), fail)
    os.close(fd)


def _sums_of(file: CheckedFile) -> blocks.BlockSums:
    import numpy as np

    return blocks.BlockSums(file._bytes, file.block_bytes, np.array(file._crcs, dtype=np.uint32))


def test_a_file_that_ends_early_is_no_endless_loop(tmp_path: Path) -> None:
    content, file, fd = written(tmp_path / "x", some_parts(2))
    os.truncate(tmp_path / "x", len(content) // 2)
    with pytest.raises(EOFError):
        file.read(0, memoryview(bytearray(len(content))), fail)
    os.close(fd)


def test_a_throttle_keeps_its_rate(tmp_path: Path) -> None:
    out = BlockWriter(tmp_path / "x", Throttle(20e6))
    begin = time.monotonic()
    out.append(bytes(6_000_000))
    out.close()
    assert 0.25 < time.monotonic() - begin < 3  # 0.3 s at this rate; the first bytes are free


# -- a data file


def entries_of(state: dict[str, torch.Tensor]) -> list[tuple[str, TensorEntry, Box]]:
    return [
        (p.fqn, TensorEntry(p.shape, p.dtype), p.box) for name, tensor in state.items() for p in pieces_of(name, tensor)
    ]


STATE = {
    "small": torch.randn(5, 3), "large": torch.randn(1100, 1024), "scalar": torch.tensor(2.5), "half": torch.randn(77).half(),
    "cut": torch.zeros(20_000, 1000), "last": torch.randn(1),
}  # fmt: skip


@pytest.fixture(scope="module")
def data_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    pieces = [piece for name, tensor in STATE.items() for piece in pieces_of(name, tensor)]
    result = write_pieces(folder, "__0_0.distcp", pieces)
    places = Places("__0_0.distcp")
    stored = [places.place(name, entry.dtype, box) for name, entry, box in entries_of(STATE)]
    assert (places.seal, places.end) == (result.seal, result.files["__0_0.distcp"].bytes)
    assert len(stored) == len(pieces)
    return folder / "__0_0.distcp"


def test_every_piece_lies_where_its_place_is(data_file: Path) -> None:
    places = Places(data_file.name)
    content = data_file.read_bytes()
    for name, entry, box in entries_of(STATE):
        place = places.place(name, entry.dtype, box)
        found = torch.load(io.BytesIO(content[place.offset : place.offset + place.length]), weights_only=True)
        part = STATE[name][box.slices_in(Box((0,) * len(entry.shape), entry.shape))] if entry.shape else STATE[name]
        assert torch.equal(found, part)


def test_the_numbers_of_large_pieces_begin_with_a_block(data_file: Path) -> None:
    places = Places(data_file.name)
    gaps = 0
    for name, entry, box in entries_of(STATE):
        end = places.end
        place = places.place(name, entry.dtype, box)
        gaps += place.offset - end
        dtype = getattr(torch, entry.dtype)
        numbers = place.offset + len(archive.head(dtype, box.sizes))
        nbytes = box.volume * dtype.itemsize
        assert numbers % (BLOCK_BYTES if nbytes >= ALIGNED_BYTES else archive.ALIGNMENT) == 0
    assert gaps < data_file.stat().st_size / 32


@pytest.mark.parametrize(
    "change",
    [
        lambda parts: parts[::-1],
        lambda parts: parts[:-1],
        lambda parts: [(f"{name}x", entry, box) for name, entry, box in parts],
        lambda parts: [(name, TensorEntry(entry.shape, "int32"), box) for name, entry, box in parts],
    ],
    ids=["order", "one less", "names", "dtypes"],
)
def test_a_seal_tells_any_other_set_of_pieces(change: Callable[[list], list]) -> None:
    def seal(parts: list[tuple[str, TensorEntry, Box]]) -> int:
        places = Places("x")
        for name, entry, box in parts:
            places.place(name, entry.dtype, box)
        return places.seal

    parts = [(n, TensorEntry((4,), "float32"), Box((0,), (4,))) for n in "abc"]
    assert seal(change(parts)) != seal(parts)


def test_no_pieces_no_file(tmp_path: Path) -> None:
    assert write_pieces(tmp_path, "x", []).files == {}
    assert list(tmp_path.iterdir()) == []
