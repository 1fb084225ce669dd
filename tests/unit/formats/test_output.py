"""Does an export appear whole or not at all, is every byte written once, and are slabs as small as was asked?"""

import errno
import os
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest

from reshard.errors import ConfigError, FormatError, StorageError
from reshard.formats.gguf import Constant
from reshard.formats.output import (
    Copy,
    DiskFile,
    OutFile,
    Output,
    Place,
    check_layout,
    slab_bytes,
    temporary,
    write_output,
)
from reshard.formats.protocol import Ledger

VALUES = np.arange(64 * 6, dtype=np.float32).reshape(64, 6)
HEAD = b"head1234"


def output(**changes):
    tensor = Constant("w", VALUES)
    file = OutFile("f", len(HEAD) + tensor.nbytes, ((0, HEAD),))
    copy = Copy(tensor, (Place("f", len(HEAD), 0, 64, 0, 24),))
    return replace(Output("x", (file,), (copy,)), **changes)


def write(made, target, **options):
    write_output(made, target, Ledger(), memory=1 << 26, **options)


@pytest.mark.parametrize("workers", [1, 4])
def test_written_where_it_belongs(tmp_path, workers):
    write(output(beside={"note": b"n", "copied": _file(tmp_path)}), tmp_path / "out", workers=workers, verify=True)
    assert (tmp_path / "out" / "f").read_bytes() == HEAD + VALUES.tobytes()
    assert (tmp_path / "out" / "note").read_bytes() == b"n"
    assert (tmp_path / "out" / "copied").read_bytes() == b"source"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "source"]


def _file(tmp_path):
    (tmp_path / "source").write_bytes(b"source")
    return tmp_path / "source"


def test_columns_and_rows_go_to_different_files(tmp_path):
    """As wo and w1 in Meta's files: the source is read once for all of them."""
    tensor = Constant("w", VALUES)
    places = (Place("a", 0, 0, 64, 0, 12), Place("b", 0, 0, 64, 12, 12), Place("c", 0, 16, 32, 0, 24))
    files = (OutFile("a", 768, ()), OutFile("b", 768, ()), OutFile("c", 768, ()))
    write(Output("x", files, (Copy(tensor, places),)), tmp_path / "out", verify=True)
    read = {name: np.frombuffer((tmp_path / "out" / name).read_bytes(), np.float32) for name in "abc"}
    assert np.array_equal(read["a"].reshape(64, 3), VALUES[:, :3])
    assert np.array_equal(read["b"].reshape(64, 3), VALUES[:, 3:])
    assert np.array_equal(read["c"].reshape(32, 6), VALUES[16:48])


@pytest.mark.parametrize(
    "wrong",
    [
        {"files": (OutFile("f", 8 + VALUES.nbytes + 1, ((0, HEAD),)),)},  # a byte that nobody writes
        {"files": (OutFile("f", 8 + VALUES.nbytes, ((0, HEAD + b"x"),)),)},  # a byte that two write
        {"copies": (Copy(Constant("w", VALUES), (Place("f", 8, 0, 63, 0, 24),)),)},  # a row that is lost
    ],
)
def test_a_layout_with_a_hole_or_an_overlap_is_a_bug(wrong):
    with pytest.raises(AssertionError):
        check_layout(output(**wrong))


class Failing:
    """A disk that refuses after some bytes."""

    def __init__(self, path, nbytes):
        self.inner = DiskFile(path, nbytes, drops=False)

    def write(self, offset, data):
        if offset > 8:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "f")
        self.inner.write(offset, data)

    def close(self):
        self.inner.close()


def test_a_full_disk_leaves_nothing(tmp_path):
    tensor = Constant("w", np.zeros((1 << 20, 1), np.float32))
    file = OutFile("f", 8 + tensor.nbytes, ((0, HEAD),))
    made = Output("x", (file,), (Copy(tensor, (Place("f", 8, 0, 1 << 20, 0, 4),)),))
    with pytest.raises(StorageError, match="no space left"):
        write_output(made, tmp_path / "a" / "b" / "out", Ledger(), memory=1 << 21, workers=2, open_file=Failing)
    assert list(tmp_path.iterdir()) == []


def test_what_exists_is_not_touched(tmp_path):
    (tmp_path / "empty").mkdir()
    write(output(), tmp_path / "empty")
    assert (tmp_path / "empty" / "f").exists()
    with pytest.raises(FormatError, match="exists already"):
        write(output(), tmp_path / "empty")
    (tmp_path / "file").write_text("mine")
    for made in (output(), output(alone=True)):
        with pytest.raises(FormatError, match="exists already"):
            write(made, tmp_path / "file")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(FormatError, match="exists already"):
        write(output(alone=True), tmp_path / "link")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_killed_conversion_leaves_nothing_that_looks_finished_and_the_next_one_cleans_up(tmp_path):
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom reshard.formats.output import temporary\n"
        "with temporary(Path(sys.argv[1])) as folder:\n"
        "    (folder / 'half').write_bytes(b'x')\n    print('ready', flush=True)\n    time.sleep(60)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", code, tmp_path / "out"], stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "ready\n"
    assert len(list(tmp_path.glob("out.tmp-*"))) == 1
    with temporary(tmp_path / "out"):  # the other one is alive: it is left alone
        assert len(list(tmp_path.glob("out.tmp-*"))) == 2
    child.kill()
    child.wait()
    assert not (tmp_path / "out").exists()
    deadline = time.monotonic() + 5
    while len(list(tmp_path.glob("out.tmp-*"))) == 0 and time.monotonic() < deadline:
        time.sleep(0.01)
    write(output(), tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_what_only_has_the_name_of_a_killed_conversion_stays(tmp_path, caplog):
    mine = tmp_path / "out.tmp-0123456789abcdef"
    mine.mkdir()
    (mine / "thesis.txt").write_text("mine")
    (tmp_path / "out.tmp-0123456789abcdee").symlink_to(mine)
    write(output(), tmp_path / "out")
    assert (mine / "thesis.txt").read_text() == "mine"
    assert len(list(tmp_path.iterdir())) == 3
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["f"]
    assert [str(mine) in r.getMessage() for r in caplog.records] == [False, True]


def test_memory_is_shared_among_the_workers():
    assert slab_bytes(1 << 40, 2) == 8 << 20
    assert slab_bytes(64 << 20, 4) == 4 << 20
    with pytest.raises(ConfigError, match="--max-memory"):
        slab_bytes(1 << 20, 8)


def test_a_disk_that_forgets_is_found_out(tmp_path):
    class Forgetful(DiskFile):
        def __init__(self, path, nbytes):
            super().__init__(path, nbytes, drops=False)

        def write(self, offset, data):
            super().write(offset, bytes(len(data)) if offset >= 8 else data)

    with pytest.raises(FormatError, match="not written right"):
        write(output(), tmp_path / "out", verify=True, open_file=Forgetful)
    assert list(tmp_path.iterdir()) == []
