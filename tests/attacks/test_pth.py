"""Can a .pth make us run something, take memory, or read elsewhere? Hostile files, made by hand."""

import os
import pickle
import struct
import subprocess
import sys
import time
import zipfile

import pytest
import torch

from reshard.errors import FormatError
from reshard.formats.torch_pt import open_pt
from reshard.safe_pickle import loads

PROTO = b"\x80\x02"


def text(value):
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def number(value):
    return b"\x8a\x09" + value.to_bytes(9, "little", signed=True)


def tensor(storage_class="torch FloatStorage", key="0", items=4, offset=0, shape=(4,), stride=(1,), function=None):
    """The opcodes of one tensor, as torch.save writes them."""
    pid = (
        b"("
        + text("storage")
        + f"c{storage_class}\n".replace(" ", "\n").encode()
        + text(key)
        + text("cpu")
        + number(items)
    )
    dims = [b"(" + b"".join(map(number, dims)) + b"t" for dims in (shape, stride)]
    name = function or "torch._utils\n_rebuild_tensor_v2"
    return f"c{name}\n".encode() + b"((" + pid[1:] + b"tQ" + number(offset) + dims[0] + dims[1] + b"\x89" + b"}" + b"tR"


def archive(path, pickled, records=None):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("x/data.pkl", pickled)
        for name, data in (records or {"x/version": b"3\n", "x/byteorder": b"little", "x/data/0": bytes(16)}).items():
            file.writestr(name, data)
    return path


def state_dict(*items):
    return PROTO + b"}(" + b"".join(items) + b"u."


class Shell:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def test_the_hand_made_file_is_read_when_it_is_honest(tmp_path):
    """Otherwise the refusals below would prove nothing."""
    path = archive(tmp_path / "a.pth", state_dict(text("w"), tensor()))
    assert open_pt(path).tensors["w"].read().tolist() == [0, 0, 0, 0]
    assert torch.load(path, weights_only=True)["w"].tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("protocol", [2, 4])
def test_no_command_is_run(tmp_path, protocol):
    marker = tmp_path / "marker"
    path = tmp_path / "a.pth"
    torch.save({"w": torch.zeros(2), "x": Shell(f"touch {marker}")}, path, pickle_protocol=protocol)
    with pytest.raises(FormatError, match=r"`posix\.system`, which is not part of a plain checkpoint"):
        open_pt(path)
    assert not marker.exists()
    # The file is a live one: the usual reader does run it.
    subprocess.run([sys.executable, "-c", f"import torch; torch.load({str(path)!r}, weights_only=False)"], check=True)
    assert marker.exists()


@pytest.mark.parametrize(
    "name",
    [
        "builtins\neval", "builtins\ngetattr", "builtins\nexec", "os\nsystem", "subprocess\nPopen", "torch\nload",
        "torch.serialization\nload", "torch._utils\n_rebuild_tensor", "importlib\nimport_module", "collections\ndeque",
        "torch\nTensor", "torch.hub\nload", "reshard.safe_pickle\nloads", "torch._utils\n_rebuild_tensor_v2.__globals__",
        "collections\nOrderedDict.__init__.__globals__", "__main__\nx", "torch\n__dict__",
    ],
)  # fmt: skip
def test_no_other_name_is_found(tmp_path, name):
    module, attribute = name.split("\n")
    short = lambda value: b"\x8c" + bytes([len(value)]) + value.encode()  # noqa: E731
    for data in (f"c{name}\n".encode() + b")R", short(module) + short(attribute) + b"\x93)R"):
        with pytest.raises(FormatError, match=rf"`{module}\.{attribute}`"):
            open_pt(archive(tmp_path / "a.pth", PROTO + data + b"."))


@pytest.mark.parametrize(
    "data",
    [
        b"ctorch\nFloatStorage\n)R.",  # a constant is not callable
        b"ctorch\nFloatStorage\n)\x81.",
        b"ctorch\nSize\n}b.",  # a state for a function
        b"ccollections\nOrderedDict\n}X\x05\x00\x00\x00clear}sb.",  # a state for a class
        b"ccollections\nOrderedDict\n(((K\x01tK\x02ttR.",  # a key hidden in arguments
        b"ccollections\nOrderedDict\n)RN}X\x01\x00\x00\x00ax\x86b.",  # slots
        b"}]]s.",  # a list as a key
        b"}" + b")\x85" * 50 + b"Ns.",  # a deep tuple as a key
        b"]]\x94.", b"a.", b"u.", b"t.", b"R.", b"Q.", b"b.", b"\x93.", b".", b"h\x00.", b"K", b"c", b"cos", b"", b"0.", b"2.",
        b"(i\nos\nsystem\n.", b"(cos\nsystem\no.", b"\x82\x01.", b"I1\n.", b"S'x'\n.", b"\x97.", b"P1\n.", b"\x8f.",
    ],
)  # fmt: skip
def test_opcodes_that_do_not_fit(tmp_path, data):
    with pytest.raises(FormatError):
        open_pt(archive(tmp_path / "a.pth", PROTO + data))
    assert not hasattr(__import__("collections").OrderedDict, "a")


@pytest.mark.parametrize(
    "data",
    [
        b"Nr\xff\xff\xff\xff.",  # memo 2^32-1: CPython's reader takes 64 GiB for it
        b"j\xff\xff\xff\xff.",
        b"\x8e" + b"\xff" * 7 + b"\x7f.",  # bytes of 2^63
        b"\x8d" + b"\xff" * 8 + b".",
        b"X\xff\xff\xff\xff.",
        b"B\xff\xff\xff\xff.",
        b"\x8b\xff\xff\xff\x7f.",  # a number of 2 GiB
        b"\x96" + b"\xff" * 7 + b"\x00.",  # a bytearray
        b"\x95" + b"\xff" * 8 + b"N",
        b"(" * 100_000 + b".",
        b"]" + b"]a" * 3 + b"]" * 100_000 + b".",
        # The hash of a tuple of tuples of tuples: 2^60 steps
        b"}" + b")" + b"".join(b"\x94h" + bytes([i]) + b"\x86" for i in range(60)) + b"Ns.",
    ],
)
def test_no_memory_and_no_time_is_taken(tmp_path, data):
    import resource

    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    with pytest.raises(FormatError):
        open_pt(archive(tmp_path / "a.pth", PROTO + data))
    assert time.monotonic() - start < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB


def test_deep_nesting_does_not_overflow_the_stack(tmp_path):
    depth = 300_000
    data = PROTO + b"]" * depth + b"a" * (depth - 1) + b"."
    with pytest.raises(FormatError, match="holds a list"):
        open_pt(archive(tmp_path / "a.pth", data))


@pytest.mark.parametrize(
    "changes",
    [
        {"key": "../../etc/passwd"},
        {"key": "1"},
        {"key": ""},
        {"items": 5},
        {"items": 2**62},
        {"items": -1},
        {"offset": 1},
        {"offset": -1},
        {"offset": 2**62},
        {"shape": (5,)},
        {"shape": (2**61, 2**61)},
        {"shape": (2**61, 2**61), "stride": (0, 0)},
        {"shape": (2**31, 2**33), "stride": (2**33, 1)},  # 2^64 numbers: zero, where they are counted in 64 bits
        {"shape": (-4,)},
        {"shape": (4,), "stride": (0,)},
        {"shape": (4,), "stride": (-1,)},
        {"shape": (4,), "stride": (1, 1)},
        {"shape": (1,) * 1000, "stride": (1,) * 1000},
        {"storage_class": "torch QInt8Storage"},
        {"storage_class": "torch.storage UntypedStorage", "items": 16},  # v2 does not say the dtype
        {"storage_class": "torch float32"},
        {"function": "torch._utils\n_rebuild_parameter"},
    ],
)
def test_tensors_that_do_not_lie_in_their_record(tmp_path, changes):
    with pytest.raises(FormatError):
        open_pt(archive(tmp_path / "a.pth", state_dict(text("w"), tensor(**changes))))


def test_a_storage_that_is_a_tensor_of_itself(tmp_path):
    for pid in (b"N", b"(t", b"(" + text("storage") + b"NNNNt", b"(" + text("module") + b"ctorch\nFloatStorage\nNNNt"):
        with pytest.raises(FormatError):
            open_pt(archive(tmp_path / "a.pth", PROTO + pid + b"Q."))


def test_two_records_of_one_name(tmp_path):
    """Whoever checks the first and reads the second is fooled."""
    path = archive(tmp_path / "a.pth", state_dict(text("w"), tensor()))
    with pytest.warns(UserWarning, match="Duplicate name"), zipfile.ZipFile(path, "a") as file:
        file.writestr("x/data/0", bytes(range(16)))
    with pytest.raises(FormatError, match=r"two records `x/data/0`"):
        open_pt(path)


def test_a_directory_that_points_beyond_the_file(tmp_path):
    path = archive(tmp_path / "a.pth", state_dict(text("w"), tensor()))
    good = path.read_bytes()
    directory = good.index(b"PK\x01\x02")
    entries = [i for i in range(directory, len(good)) if good.startswith(b"PK\x01\x02", i)]
    for entry in entries:
        for at, value in ((20, 2**31), (24, 2**31), (42, 2**31), (42, 3)):  # sizes, place of the local header
            data = bytearray(good)
            data[entry + at : entry + at + 4] = struct.pack("<I", value)
            path.write_bytes(data)
            with pytest.raises(FormatError):
                open_pt(path)


def test_flipped_bytes_never_escape_as_another_error(tmp_path):
    """Every byte of a small file, four ways: read, or refused by name."""
    path = tmp_path / "a.pth"
    torch.save({"w": torch.arange(4.0), "v": torch.arange(3)}, path)
    good = path.read_bytes()
    refused = 0
    for at in range(0, len(good)):
        for value in {0, 0xFF, good[at] ^ 1, good[at] ^ 0x80} - {good[at]}:
            path.write_bytes(good[:at] + bytes([value]) + good[at + 1 :])
            try:
                for found in open_pt(path).tensors.values():
                    found.read()
            except FormatError:
                refused += 1
    assert refused > len(good)


def test_python_pickles_the_same_bomb(tmp_path):
    """The reason for a machine of our own: with an allow-list alone, BUILD changes classes for everybody."""

    class Victim:
        harmless = True

    class OnlyVictim(pickle.Unpickler):
        def find_class(self, module, name):
            return Victim

    data = PROTO + b"cx\ny\nN}" + text("harmless") + b"\x89s\x86b."
    import io

    OnlyVictim(io.BytesIO(data)).load()
    assert Victim.harmless is False
    Victim.harmless = True
    with pytest.raises(FormatError):
        loads(data, {("x", "y"): Victim})
    assert Victim.harmless is True
