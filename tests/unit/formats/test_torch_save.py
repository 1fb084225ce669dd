"""Are files that were laid out beforehand files of torch.save? Read by torch and by Python's zipfile, which checks CRCs."""

import zipfile

import numpy as np
import pytest
import torch

from reshard.formats.gguf import Constant
from reshard.formats.output import Copy, Output, Place, whole, write_output
from reshard.formats.protocol import Ledger
from reshard.formats.torch_pt import check_records, open_pt
from reshard.formats.torch_save import Saved, lay_out


class Sparse:
    """An OpenFile that writes a file with holes."""

    def __init__(self, path, nbytes):
        self.file = path.open("xb")
        self.file.truncate(nbytes)

    def write(self, offset, data):
        if not isinstance(data, bytes) and not data.any():
            return
        self.file.seek(offset)
        self.file.write(data)

    def close(self):
        self.file.close()


def test_read_by_torch_and_by_zipfile(tmp_path):
    values = {f"layers.{i}.w": np.random.default_rng(i).normal(size=(3 + i, 7)).astype(np.float32) for i in range(4)}
    values["scalar-ish"] = np.ones(1, np.float32)
    tensors = {name: Constant(name, v) for name, v in values.items()}
    saved = [Saved(n, t.shape, t.dtype, t.nbytes, n) for n, t in tensors.items()]
    saved.append(Saved("twin", (3, 7), "float32", 84, "layers.0.w"))
    file, offsets = lay_out("m.pt", saved)
    copies = tuple(Copy(t, (whole("m.pt", offsets[n], t),)) for n, t in tensors.items())
    write_output(Output("torch", (file,), copies, alone=True), tmp_path / "m.pt", Ledger(), memory=1 << 26)
    assert zipfile.ZipFile(tmp_path / "m.pt").testzip() is None
    for mmap in (False, True):
        found = torch.load(tmp_path / "m.pt", weights_only=True, mmap=mmap)
        assert list(found) == [*values, "twin"]
        for name, value in values.items():
            assert np.array_equal(found[name].numpy(), value)
        assert found["twin"].untyped_storage().data_ptr() == found["layers.0.w"].untyped_storage().data_ptr()
    index = open_pt(tmp_path / "m.pt")
    check_records(index)
    for tensor in index.tensors.values():
        assert tensor.blocks[0].region.offset % 64 == 0


@pytest.mark.slow
def test_beyond_four_gigabytes(tmp_path):
    """One record above 4 GiB and one that begins above: zip64 in all its places. The file has holes, not gigabytes."""
    big = Saved("big", (1 << 16, 1 << 15), "bfloat16", 1 << 32, "big")
    small = Saved("small", (4,), "bfloat16", 8, "small")
    file, offsets = lay_out("m.pt", [big, small])
    last = np.arange(4, dtype=np.uint8).repeat(2)
    # The CRC of 4 GiB of zeros, put together as the workers do it.
    from isal import isal_zlib

    zeros = isal_zlib.crc32(bytes(1 << 20))
    crc = 0
    for _ in range(1 << 12):
        crc = isal_zlib.crc32_combine(crc, zeros, 1 << 20)
    place = Place("m.pt", offsets["big"], 0, 1 << 16, 0, 1 << 16)
    sums = {place: crc, Place("m.pt", offsets["small"], 0, 4, 0, 2): isal_zlib.crc32(last)}
    out = Sparse(tmp_path / "m.pt", file.nbytes)
    for offset, data in (*file.known, *file.later(sums), (offsets["small"], last)):
        out.write(offset, data)
    out.close()
    found = torch.load(tmp_path / "m.pt", weights_only=True, mmap=True)
    assert found["big"].shape == (1 << 16, 1 << 15)
    assert not found["big"][-1].any()
    assert found["small"].view(torch.uint8).tolist() == last.tolist()
    with zipfile.ZipFile(tmp_path / "m.pt") as archive:
        assert [i.file_size for i in archive.infolist() if "/data/" in i.filename] == [1 << 32, 8]
        assert archive.read("archive/data/1") == last.tobytes()  # checks its CRC
    assert open_pt(tmp_path / "m.pt").tensors["big"].nbytes == 1 << 32
