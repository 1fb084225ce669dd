"""Does the index find in a file what torch.load finds, and does it refuse what it cannot promise?"""

import io
import zipfile
from collections import OrderedDict

import pytest
import torch
from torch.serialization import set_crc32_options

from reshard.errors import FormatError
from reshard.formats.torch_pt import check_records, open_pt


def save(value, path):
    torch.save(value, path)
    return path


def repack(source, target, change=lambda name, data: data, **options):
    """The same records in a zip by Python's zipfile."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for entry in old.infolist():
            data = change(entry.filename, old.read(entry))
            if data is not None:
                new.writestr(entry.filename, data, **options)
    return target


DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.complex128, torch.int64,
    torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16,
]  # fmt: skip


def test_equal_to_torch_load(tmp_path):
    base = torch.randn(40)
    content = OrderedDict({str(dtype): (torch.randn(3, 5) * 10).to(dtype) for dtype in DTYPES})
    content |= {
        "scalar": torch.tensor(1.5),
        "empty": torch.empty(0, 4),
        "view": base[7:19].view(3, 4),
        "other view": base[19:],
        "tied": base[7:19].view(3, 4),
        "parameter": torch.nn.Parameter(torch.randn(2, 2)),
        "one column of many": torch.randn(4, 1).expand(4, 1),
        "three dims": torch.randn(2, 3, 4),
    }
    file = open_pt(save(content, tmp_path / "x.pth"))
    expected = torch.load(tmp_path / "x.pth", weights_only=True)
    assert list(file.tensors) == list(expected)
    for name, tensor in file.tensors.items():
        want, got = expected[name].detach(), tensor.read()
        assert (got.dtype, got.shape) == (want.dtype, want.shape), name
        assert torch.equal(got.view(torch.uint8) if got.ndim else got, want.view(torch.uint8) if want.ndim else want), (
            name
        )
    assert file.tensors["view"].same_place(file.tensors["tied"])
    assert not file.tensors["view"].same_place(file.tensors["other view"])
    assert file.tensors["view"].blocks[0].region == file.tensors["other view"].blocks[0].region
    check_records(file)


def test_a_module_state_dict_and_a_stream(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    with (tmp_path / "stream.pt").open("wb") as stream:  # the records then lie in archive/
        torch.save(model.state_dict(), stream)
    file = open_pt(tmp_path / "stream.pt")
    assert {n: t.read().tolist() for n, t in file.tensors.items()} == {
        n: t.tolist() for n, t in model.state_dict().items()
    }
    assert file.nbytes == (tmp_path / "stream.pt").stat().st_size


def test_only_the_model_part_of_a_nested_file(tmp_path):
    weights = {"a": torch.randn(2), "b": torch.randn(3)}
    content = {"model": weights, "optimizer": {"state": {"a": torch.zeros(2)}}, "step": 3}
    file = open_pt(save(content, tmp_path / "x.pt"))
    assert list(file.tensors) == ["a", "b"]
    assert torch.equal(file.tensors["b"].read(), weights["b"])


def test_what_is_not_a_tensor_is_named(tmp_path):
    file = open_pt(save({"a": torch.zeros(1), "step": 3, "args": {"x": "y"}}, tmp_path / "x.pt"))
    assert list(file.tensors) == ["a"]
    assert file.others == {"step": "int", "args": "dict"}


def test_other_zip_writers(tmp_path):
    """Another padding in front of the records: only the local headers know."""
    weights = {"a": torch.randn(20, 3), "b": torch.randn(7)}
    file = open_pt(repack(save(weights, tmp_path / "x.pt"), tmp_path / "y.pt"))
    assert all(torch.equal(file.tensors[name].read(), weights[name]) for name in weights)
    check_records(file)


def test_stored_crcs(tmp_path):
    weights = {"a": torch.randn(1000), "b": torch.randn(1000)}
    path = save(weights, tmp_path / "x.pth")
    region = open_pt(path).tensors["b"].blocks[0].region
    data = bytearray(path.read_bytes())
    data[region.offset + 1234] ^= 4
    path.write_bytes(data)
    assert not torch.equal(torch.load(path, weights_only=True)["b"], weights["b"])  # torch does not look
    with pytest.raises(FormatError, match=r"x\.pth is damaged.*CRC32"):
        check_records(open_pt(path))


def test_a_file_without_crcs(tmp_path):
    set_crc32_options(False)
    try:
        path = save({"a": torch.randn(10)}, tmp_path / "x.pt")
    finally:
        set_crc32_options(True)
    file = open_pt(path)
    assert file.tensors["a"].blocks[0].region.crc32 is None
    check_records(file)


def test_a_flipped_byte_in_the_pickle_is_seen(tmp_path):
    path = save({"abcdef": torch.randn(10)}, tmp_path / "x.pt")
    path.write_bytes(path.read_bytes().replace(b"abcdef", b"abcdeg"))
    with pytest.raises(FormatError, match="damaged"):
        open_pt(path)


def test_bad_files(tmp_path):
    good = save({"a": torch.randn(100, 10), "b": torch.randn(3)}, tmp_path / "good.pth")
    data = good.read_bytes()

    def refused(name, content, match):
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(FormatError, match=match) as raised:
            open_pt(path)
        assert name in raised.value.message
        assert raised.value.path == str(path)
        return raised.value

    refused("absent.pth", None, "cannot be read: No such file")
    refused("empty.pth", b"", r"not a file of torch\.save.*got 0 bytes")
    refused("page.pth", b"<html>404</html>", r"not a file of torch\.save")
    for part in (30, len(data) // 2, len(data) - 1, len(data) - 100):
        assert "again" in refused("short.pth", data[:part], "truncated").hint
    refused("other.pth", zip_of({"readme": b"x"}), "not one of torch.save")
    refused("twice.pth", zip_of({"a/data.pkl": b"x", "b/data.pkl": b"x"}), "got 2")
    (tmp_path / "folder.pth").mkdir()
    refused("folder.pth", None, "cannot be read: Is a directory")

    torch.save({"a": torch.zeros(2)}, tmp_path / "legacy.pth", _use_new_zipfile_serialization=False)
    assert "weights_only=True" in refused("legacy.pth", None, "old format").hint

    repack(good, tmp_path / "deflated.pth", compress_type=zipfile.ZIP_DEFLATED)
    refused("deflated.pth", None, "compressed")
    repack(good, tmp_path / "big.pth", lambda name, data: b"big" if name.endswith("byteorder") else data)
    refused("big.pth", None, "byte order b'big', expected little")
    repack(good, tmp_path / "hole.pth", lambda name, data: None if name.endswith("data/1") else data)
    refused("hole.pth", None, r"b lies in record data/1, which is not there")
    repack(good, tmp_path / "small.pth", lambda name, data: data[:-1] if name.endswith("data/0") else data)
    refused(
        "small.pth", None, r"a \[100, 10\] float32 needs bytes 0 to 4,000 of a storage of 4,000, in a record of 3,999"
    )

    save({"a": torch.randn(3, 4).t()}, tmp_path / "strided.pth")
    assert ".contiguous()" in refused("strided.pth", None, r"a \[4, 3\] is stored with strides \[1, 4\]").hint
    save({"a": torch.zeros(1).expand(3)}, tmp_path / "expanded.pth")
    refused("expanded.pth", None, r"strides \[0\]")
    save(torch.zeros(3), tmp_path / "bare.pth")
    refused("bare.pth", None, "holds a tensor, expected a dict")
    save({"a": 1}, tmp_path / "none.pth")
    refused("none.pth", None, "a dict without tensors, with the keys a")
    save([torch.zeros(1)], tmp_path / "list.pth")
    refused("list.pth", None, "holds a list")
    save({0: torch.zeros(1)}, tmp_path / "numbers.pth")
    refused("numbers.pth", None, "expected a dict of named tensors")
    save(torch.nn.Linear(2, 2), tmp_path / "module.pth")
    refused("module.pth", None, r"torch\.nn\.modules\.linear\.Linear")


def zip_of(records):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, data in records.items():
            archive.writestr(name, data)
    return stream.getvalue()


def test_a_sparse_record_beyond_4_gib(tmp_path):
    """Sizes and places that need zip64; the file takes no room on the disk."""
    from torch._subclasses.fake_tensor import FakeTensorMode  # private: torch's own way to lay out a sparse file

    with FakeTensorMode():
        content = {"huge": torch.empty(3, 2**30, dtype=torch.bfloat16), "after": torch.empty(4, dtype=torch.float32)}
        with torch.serialization.skip_data(materialize_fake_tensors=True):
            torch.save(content, tmp_path / "sparse.pth")
    file = open_pt(tmp_path / "sparse.pth")
    after = file.tensors["after"].blocks[0]
    assert after.region.offset > 6 * 2**30
    with (tmp_path / "sparse.pth").open("r+b") as stream:
        stream.seek(after.region.offset)
        stream.write(torch.arange(4, dtype=torch.float32).numpy().tobytes())
    assert file.tensors["after"].read().tolist() == [0, 1, 2, 3]
    assert file.tensors["huge"].nbytes == 6 * 2**30
