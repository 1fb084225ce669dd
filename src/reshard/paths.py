"""Is this a path of a file system that is mounted here? An address such as s3://bucket/step-1 looks like one and is none.

Taken for a path it would make the folder `s3:` in the working directory, and a checkpoint in it that nobody finds.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from reshard.errors import CheckpointError

# Also what is left of one in a pathlib.Path, `s3:/bucket`, and dbfs:/mnt; fsspec joins several by `::`.
_ADDRESS = re.compile(r"://|(^|::)[A-Za-z][A-Za-z0-9+.-]+:/")
HINT = (
    "save to a folder and copy it there, or mount the store; a folder whose name ends in a colon: by its absolute path"
)


def is_address(path: str | os.PathLike[str]) -> bool:
    """Is it a URL, and so nothing that this system could open?"""
    return _ADDRESS.search(os.fspath(path)) is not None


def local_path(path: str | os.PathLike[str]) -> Path:
    """The path. Raises CheckpointError for a URL, of whatever scheme, `file://` too."""
    if is_address(path):
        raise CheckpointError(
            f"`{os.fspath(path)}` is an address, expected a path on a file system of this machine",
            path=os.fspath(path),
            hint=HINT,
        )
    return Path(path)
