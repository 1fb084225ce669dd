"""Is a folder owned by one run at a time, and free again when that run is gone, however it went?"""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from reshard.checkpoint.lock import check_shared, own_folder
from reshard.checkpoint.ranks import Ranks
from reshard.errors import FolderInUse, StorageError

OWNER = """
import sys, time
from pathlib import Path
from reshard.checkpoint.lock import own_folder
from reshard.checkpoint.ranks import Ranks
with own_folder(Path(sys.argv[1]), Ranks()):
    print("owned", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def owner(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that owns the folder."""
    process = subprocess.Popen([sys.executable, "-c", OWNER, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline().strip() == "owned"
    yield process
    process.kill()
    process.wait()


def test_a_second_run_is_refused_and_told_who_has_it(folder: Path, owner: subprocess.Popen[str]) -> None:
    with pytest.raises(FolderInUse) as caught, own_folder(folder, Ranks()):
        pass
    assert str(folder) in caught.value.message
    assert f"process {owner.pid}" in caught.value.message
    assert socket.gethostname() in caught.value.message
    assert "dump_folder" in (caught.value.hint or "")


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_the_kernel_frees_the_folder_of_a_dead_run(
    folder: Path, owner: subprocess.Popen[str], how: signal.Signals
) -> None:
    owner.send_signal(how)
    owner.wait()
    with own_folder(folder, Ranks()):
        pass


def test_it_is_free_again_after_the_run_also_after_an_error(folder: Path) -> None:
    with pytest.raises(ValueError, match="the run broke"), own_folder(folder, Ranks()):
        raise ValueError("the run broke")
    with own_folder(folder, Ranks()):
        pass


def test_the_folder_is_made_where_there_is_none(tmp_path: Path) -> None:
    with own_folder(tmp_path / "a/b/checkpoint", Ranks()):
        assert (tmp_path / "a/b/checkpoint").is_dir()


def test_two_folders_are_two_locks(tmp_path: Path, owner: subprocess.Popen[str]) -> None:
    with own_folder(tmp_path / "another", Ranks()):
        pass


def test_a_folder_that_cannot_be_made_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError), own_folder(tmp_path / "file/checkpoint", Ranks()):
        pass


def test_a_folder_that_may_not_be_written_is_a_storage_error(tmp_path: Path, unprivileged: Any) -> None:
    (tmp_path / "sealed").mkdir(mode=0o555)
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    with unprivileged(), own_folder(tmp_path / "open/checkpoint", Ranks()):
        pass
    with unprivileged(), pytest.raises(StorageError), own_folder(tmp_path / "sealed/checkpoint", Ranks()):
        pass


def test_one_rank_shares_with_itself_and_leaves_no_file(tmp_path: Path) -> None:
    check_shared(tmp_path, Ranks())
    assert list(tmp_path.iterdir()) == []
