"""Is a step whole at every instant? Each state that a death can leave is built by real renames, then put in order."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from reshard.checkpoint.commit import commit, fsync_directory, recover, temporary_directory
from reshard.checkpoint.layout import entries
from reshard.checkpoint.manifest import MANIFEST, read_manifest
from reshard.checkpoint.ranks import Ranks
from reshard.checkpoint.save import About, save
from reshard.errors import StorageError

ID = "0123456789abcdef"


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.fixture
def new_half(folder: Path, make: Any, number_in: Any, tmp_path: Path) -> Path:
    """step-5 of number 1, and beside it the whole, not yet renamed, step-5 of number 2."""
    make(5, number=2)
    os.rename(folder / "step-5", tmp_path / "aside")
    make(5, number=1)
    os.rename(tmp_path / "aside", folder / f"step-5.tmp-{ID}")
    assert number_in(5) == 1
    return folder / f"step-5.tmp-{ID}"


# -- the commit -------------------------------------------------------------------------------------------------------


def test_a_save_leaves_the_step_and_nothing_else(folder: Path, make: Any) -> None:
    make(5)
    assert names(folder) == {"step-5"}
    assert {MANIFEST, ".metadata", "__0_0.distcp"} <= names(folder / "step-5")


def test_a_step_that_is_saved_again_is_replaced(folder: Path, make: Any, number_in: Any) -> None:
    first = make(5, number=1)
    second = make(5, number=2)
    assert names(folder) == {"step-5"}
    assert number_in(5) == 2
    assert read_manifest(folder / "step-5").save_id == second.save_id != first.save_id


# Runs in a process whose kernel says ENOSYS to renameat2(..., RENAME_EXCHANGE), as older ones and some file systems do.
WITHOUT_EXCHANGE = """
import ctypes, os, platform, struct, sys
from pathlib import Path
RENAMEAT2 = {"x86_64": 316, "aarch64": 276}[platform.machine()]
def op(code, jt, jf, k): return struct.pack("HBBI", code, jt, jf, k)
program = b"".join([
    op(0x20, 0, 0, 0), op(0x15, 0, 3, RENAMEAT2),          # the system call's number
    op(0x20, 0, 0, 16 + 8 * 4), op(0x15, 0, 1, 2),         # its flags: RENAME_EXCHANGE
    op(0x06, 0, 0, 0x00050000 | 38), op(0x06, 0, 0, 0x7FFF0000),  # ENOSYS, or go on
])
filters = ctypes.create_string_buffer(program)
class Program(ctypes.Structure):
    _fields_ = [("len", ctypes.c_ushort), ("filter", ctypes.c_void_p)]
libc = ctypes.CDLL(None, use_errno=True)
if libc.prctl(38, 1, 0, 0, 0) or libc.prctl(22, 2, ctypes.byref(Program(6, ctypes.addressof(filters))), 0, 0):
    print("no seccomp"); sys.exit(0)
from reshard.checkpoint.commit import commit
from reshard.checkpoint.manifest import read_manifest
temporary, directory = map(Path, sys.argv[1:])
for name in ("a", "b"):
    os.makedirs(directory.parent / name)
result = libc.renameat2(-100, bytes(directory.parent / "a"), -100, bytes(directory.parent / "b"), 2)
assert result == -1 and ctypes.get_errno() in (22, 38), "the exchange is still there"  # glibc makes EINVAL of it
manifest = read_manifest(temporary)
os.unlink(temporary / "manifest.json")
commit(temporary, directory, manifest)
print("done")
"""


def test_without_an_exchange_two_renames_do_it(folder: Path, new_half: Path, number_in: Any, tmp_path: Path) -> None:
    arguments = [sys.executable, "-c", WITHOUT_EXCHANGE, str(new_half), str(folder / "step-5")]
    done = subprocess.run(arguments, check=False, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    if done.stdout.strip() == "no seccomp":
        pytest.skip("seccomp is not available here, so the kernel's exchange cannot be taken away")
    assert done.stdout.strip() == "done"
    assert names(folder) == {"step-5", "a", "b"}
    assert number_in(5) == 2


def test_what_is_torn_under_our_name_is_moved_aside_not_deleted(folder: Path, make: Any, number_in: Any) -> None:
    make(5, number=1)
    (folder / "step-5" / MANIFEST).unlink()
    make(5, number=2)
    assert number_in(5) == 2
    (aside,) = names(folder) - {"step-5"}
    assert aside.startswith("step-5.damaged")
    assert (folder / aside / "__0_0.distcp").exists()
    (folder / "step-5" / MANIFEST).unlink()
    make(5, number=3)
    assert len(names(folder)) == 3  # and the next one gets a name of its own


def test_a_manifest_is_never_written_twice(folder: Path, new_half: Path) -> None:
    with pytest.raises(FileExistsError):
        commit(new_half, folder / "step-5", read_manifest(new_half))


def test_two_saves_never_share_a_temporary_directory(folder: Path) -> None:
    temporary_directory(folder / "step-5", ID)
    with pytest.raises(FileExistsError):
        temporary_directory(folder / "step-5", ID)


def test_a_save_that_fails_leaves_the_old_step_and_no_trace(
    folder: Path, make: Any, number_in: Any, small_files: Any
) -> None:
    make(5, number=1)
    big = {"model": {"a.weight": torch.zeros(100_000)}}
    with small_files(50_000), pytest.raises(StorageError) as caught:
        save(folder / "step-5", big, About(step=5, kind="full", source={}), Ranks())
    assert "step-5" in caught.value.message
    assert names(folder) == {"step-5"}
    assert number_in(5) == 1
    with small_files(50_000), pytest.raises(StorageError):
        save(folder / "step-6", big, About(step=6, kind="full", source={}), Ranks())
    assert names(folder) == {"step-5"}


@pytest.fixture
def small_files() -> Any:
    """No file of this process grows beyond so many bytes: the kernel says EFBIG."""
    import resource
    from contextlib import contextmanager

    @contextmanager
    def limit(nbytes: int) -> Any:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limit


# -- recovery: the states in which a death can leave a folder ---------------------------------------------------------


def test_nothing_to_recover(folder: Path, make: Any) -> None:
    assert recover(folder) == []
    make(5)
    assert recover(folder) == []
    assert names(folder) == {"step-5"}


@pytest.mark.parametrize("committed", [False, True], ids=["first save", "over an older one"])
@pytest.mark.parametrize("state", ["empty", "data", "data and index", "half a manifest"])
def test_died_while_writing(
    state: str, committed: bool, folder: Path, make: Any, number_in: Any, tmp_path: Path
) -> None:
    make(4, number=4)
    make(5, number=2)
    half = folder / f"step-5.tmp-{ID}"
    os.rename(folder / "step-5", half)
    for path in half.iterdir():
        keep = {"empty": (), "data": ("__0_0.distcp",), "data and index": ("__0_0.distcp", ".metadata")}
        if path.name not in keep.get(state, names(half)):
            path.unlink()
    if state == "half a manifest":
        (half / MANIFEST).write_bytes((half / MANIFEST).read_bytes()[:100])
    if committed:
        make(5, number=1)
    (said,) = recover(folder)
    assert half.name in said
    assert names(folder) == {"step-4", "step-5"} if committed else {"step-4"}
    assert number_in(4) == 4
    if committed:
        assert number_in(5) == 1


def test_died_before_the_exchange(folder: Path, new_half: Path, number_in: Any) -> None:
    # Whole, but never under its name: it was not committed, and the old one is.
    recover(folder)
    assert names(folder) == {"step-5"}
    assert number_in(5) == 1


def test_died_after_the_exchange(folder: Path, new_half: Path, number_in: Any, tmp_path: Path) -> None:
    os.rename(folder / "step-5", tmp_path / "old")
    os.rename(new_half, folder / "step-5")
    os.rename(tmp_path / "old", new_half)  # as RENAME_EXCHANGE leaves them
    recover(folder)
    assert names(folder) == {"step-5"}
    assert number_in(5) == 2


def test_died_between_the_two_renames(folder: Path, new_half: Path, number_in: Any) -> None:
    os.rename(folder / "step-5", folder / f"step-5.old-{ID}")
    (said,) = recover(folder)
    assert "finished" in said
    assert names(folder) == {"step-5"}
    assert number_in(5) == 2


@pytest.mark.parametrize("damage", ["manifest gone", "manifest cut", "file gone", "file cut", "all gone"])
def test_died_between_the_two_renames_and_the_new_half_is_not_whole(
    damage: str, folder: Path, new_half: Path, number_in: Any
) -> None:
    os.rename(folder / "step-5", folder / f"step-5.old-{ID}")
    match damage:
        case "manifest gone":
            (new_half / MANIFEST).unlink()
        case "manifest cut":
            (new_half / MANIFEST).write_bytes((new_half / MANIFEST).read_bytes()[:-40])
        case "file gone":
            (new_half / "__0_0.distcp").unlink()
        case "file cut":
            os.truncate(new_half / "__0_0.distcp", 10)
        case "all gone":
            shutil.rmtree(new_half)
    said = recover(folder)
    assert "put step-5 back" in said[0]
    assert names(folder) == {"step-5"}
    assert number_in(5) == 1


def test_died_after_the_two_renames(folder: Path, new_half: Path, number_in: Any) -> None:
    os.rename(folder / "step-5", folder / f"step-5.old-{ID}")
    os.rename(new_half, folder / "step-5")
    recover(folder)
    assert names(folder) == {"step-5"}
    assert number_in(5) == 2


def test_died_while_the_old_one_was_deleted(folder: Path, new_half: Path, number_in: Any) -> None:
    os.rename(folder / "step-5", folder / f"step-5.old-{ID}")
    os.rename(new_half, folder / "step-5")
    (folder / f"step-5.old-{ID}" / MANIFEST).unlink()
    recover(folder)
    assert names(folder) == {"step-5"}
    assert number_in(5) == 2


def test_died_while_recovering(folder: Path, new_half: Path, number_in: Any) -> None:
    # Recovery of the state between the renames, itself stopped after its first rename, and started again.
    os.rename(folder / "step-5", folder / f"step-5.old-{ID}")
    os.rename(new_half, folder / "step-5")
    recover(folder)
    assert recover(folder) == []
    assert number_in(5) == 2


def test_two_old_halves_of_one_step(folder: Path, make: Any, number_in: Any) -> None:
    make(5, number=1)
    os.rename(folder / "step-5", folder / f"step-5.old-{ID}")
    make(5, number=2)
    os.rename(folder / "step-5", folder / "step-5.old-fedcba9876543210")
    recover(folder)
    assert names(folder) == {"step-5"}
    assert number_in(5) in (1, 2)  # one of them, whole
    assert entries(folder)[0].committed


def test_died_while_deleting_by_retention(folder: Path, make: Any, number_in: Any) -> None:
    # Retention takes the name away first.
    make(5)
    make(6)
    os.rename(folder / "step-5", folder / f"step-5.tmp-{ID}")
    (folder / f"step-5.tmp-{ID}" / MANIFEST).unlink()
    recover(folder)
    assert names(folder) == {"step-6"}


def test_what_is_not_ours_is_not_touched(folder: Path, make: Any) -> None:
    make(5)
    others = {"notes.tmp-0123456789abcdef", "step-5.tmp-mine", "step-5.damaged", "old-step-5", "x.old-0123456789abcdef"}
    for name in others:
        (folder / name).mkdir()
    assert recover(folder) == []
    assert names(folder) == {"step-5", *others}


def test_the_names_of_a_directory_can_be_made_durable(folder: Path, make: Any) -> None:
    make(5)
    fsync_directory(folder)
    with pytest.raises(OSError, match="absent"):
        fsync_directory(folder / "absent")
