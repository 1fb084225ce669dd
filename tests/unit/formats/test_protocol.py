"""Are rows read from where they lie, and only those?"""

import threading
import zlib

import numpy as np
import pytest
import torch

from reshard.errors import FormatError
from reshard.formats.protocol import Block, Ledger, Region, StoredTensor, check_region, same_bytes, slabs


@pytest.fixture
def matrix():
    return torch.arange(12 * 8, dtype=torch.int16).view(12, 8)


def stored(tmp_path, parts, shape, places, name="w"):
    """One file per part, 5 bytes before each; places: (row, column in numbers)."""
    blocks = []
    for i, (part, (row, column)) in enumerate(zip(parts, places, strict=True)):
        data = part.contiguous().numpy().tobytes()
        file = tmp_path / f"{name}{i}"
        file.write_bytes(b"?????" + data)
        region = Region(file, 5, len(data), zlib.crc32(data))
        blocks.append(Block(region, 0, row, part.shape[0], column * 2, part.shape[1] * 2))
    return StoredTensor(name, shape, "int16", tuple(blocks))


@pytest.mark.parametrize("rows", [(0, 12), (0, 1), (11, 12), (2, 7), (5, 5), (3, 9)])
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_rows_of_a_tensor_in_parts(tmp_path, matrix, rows, dim, count):
    step = (12, 8)[dim] // count
    places = [(i * step, 0) if dim == 0 else (0, i * step) for i in range(count)]
    tensor = stored(tmp_path, torch.chunk(matrix, count, dim), (12, 8), places)
    got = tensor.read(*rows)
    assert got.is_contiguous()
    assert torch.equal(got, matrix[rows[0] : rows[1]])
    assert bytes(tensor.read_bytes(*rows)) == matrix[rows[0] : rows[1]].numpy().tobytes()
    assert tensor.nbytes == 12 * 8 * 2


def test_blocks_in_a_grid(tmp_path, matrix):
    parts = [matrix[:4, :3], matrix[:4, 3:], matrix[4:, :6], matrix[4:, 6:]]
    tensor = stored(tmp_path, parts, (12, 8), [(0, 0), (0, 3), (4, 0), (4, 6)])
    for start, stop in [(0, 12), (3, 5), (1, 2), (4, 12)]:
        assert torch.equal(tensor.read(start, stop), matrix[start:stop])


@pytest.mark.parametrize("shape", [(), (0,), (3,), (0, 4), (4, 0), (2, 3, 4)])
def test_other_numbers_of_dims(tmp_path, shape):
    value = torch.randn(shape)
    (tmp_path / "f").write_bytes(value.numpy().tobytes())
    rows = shape[0] if shape else 1
    region = Region(tmp_path / "f", 0, value.nbytes)
    tensor = StoredTensor("t", shape, "float32", (Block(region, 0, 0, rows, 0, value.nbytes // rows if rows else 0),))
    assert torch.equal(tensor.read(), value)
    assert tensor.read().shape == shape


def test_rows_out_of_range_are_a_programmers_mistake(tmp_path, matrix):
    tensor = stored(tmp_path, [matrix], (12, 8), [(0, 0)])
    for rows in [(0, 13), (-1, 2), (5, 4)]:
        with pytest.raises(IndexError):
            tensor.read(*rows)
    with pytest.raises(AssertionError):
        stored(tmp_path, [matrix[:6]], (12, 8), [(0, 0)])  # half of it is nowhere


def test_a_read_touches_only_its_bytes(tmp_path, matrix):
    """Everything but the wanted rows is cut off the file: the read must not miss it."""
    tensor = stored(tmp_path, [matrix], (12, 8), [(0, 0)])
    with (tmp_path / "w0").open("r+b") as file:
        file.truncate(5 + 3 * 16)
    assert torch.equal(tensor.read(1, 3), matrix[1:3])
    with pytest.raises(FormatError, match=r"w0 ends at byte 53, expected 16 more"):
        tensor.read(2, 4)
    (tmp_path / "w0").unlink()
    with pytest.raises(FormatError, match="w0 cannot be read"):
        tensor.read(0, 1)


def test_slabs_tile_the_rows():
    assert list(slabs((10, 4), 2, 24)) == [(0, 3), (3, 6), (6, 9), (9, 10)]
    assert list(slabs((10, 4), 2, 80)) == [(0, 10)]
    assert list(slabs((2, 100), 4, 10)) == [(0, 1), (1, 2)]  # at least a row
    assert list(slabs((), 4, 1)) == [(0, 1)]
    assert list(slabs((0, 5), 4, 1)) == [(0, 0)]
    assert list(slabs((5, 0), 4, 1)) == [(0, 5)]


def test_same_bytes(tmp_path, matrix):
    whole = stored(tmp_path, [matrix], (12, 8), [(0, 0)], "a")
    halves = stored(tmp_path, torch.chunk(matrix, 2, 1), (12, 8), [(0, 0), (0, 4)], "b")
    other = stored(tmp_path, [matrix + 1], (12, 8), [(0, 0)], "c")
    assert same_bytes(whole, halves)
    assert not same_bytes(whole, other)
    assert whole.same_place(whole)
    assert not whole.same_place(halves)


def damage(file, at):
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


def test_check_region(tmp_path):
    data = np.random.default_rng(0).bytes(1000)
    (tmp_path / "f").write_bytes(b"ab" + data)
    region = Region(tmp_path / "f", 2, 1000, zlib.crc32(data))
    check_region(region)
    damage(tmp_path / "f", 900)
    with pytest.raises(FormatError, match=r"f is damaged: the 1,000 bytes from byte 2 have CRC32"):
        check_region(region)
    check_region(Region(tmp_path / "f", 2, 1000))  # nothing to compare with


@pytest.mark.parametrize(
    "ranges",
    [
        [(0, 12)],
        [(6, 12), (0, 6)],
        [(0, 6), (0, 6), (6, 12)],
        [(0, 7), (5, 12)],  # overlapping
        [(2, 4), (8, 9)],  # gaps
        [(0, 3), (0, 5), (4, 6)],
    ],
)
def test_the_ledger_sees_damage_wherever_it_is(tmp_path, matrix, ranges):
    tensor = stored(tmp_path, torch.chunk(matrix, 2, 1), (12, 8), [(0, 0), (0, 4)])

    def read_all():
        ledger = Ledger()
        for start, stop in ranges:
            tensor.read(start, stop, ledger)
        return ledger

    read_all().check()
    for at in range(5, 5 + 12 * 8, 7):
        damage(tmp_path / "w1", at)
        with pytest.raises(FormatError, match="w1 is damaged"):
            read_all().check()
        damage(tmp_path / "w1", at)


def test_threads_share_a_ledger(tmp_path):
    value = torch.arange(64 * 1024, dtype=torch.int16).view(1024, 64)
    tensor = stored(tmp_path, [value], (1024, 64), [(0, 0)])
    ledger = Ledger()
    threads = [
        threading.Thread(target=lambda i=i: [tensor.read(j, j + 1, ledger) for j in range(i, 1024, 4)])
        for i in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (tmp_path / "w0").unlink()  # nothing is left to read
    ledger.check()
