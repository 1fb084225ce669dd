"""Is this a file, or only git-lfs's pointer to it? What a clone without git-lfs has in the place of every large file.

Three lines of text: version, oid sha256:<hex>, size <bytes>. Source: git-lfs's docs/spec.md.
"""

from __future__ import annotations

_START = b"version https://git-lfs.github.com/spec/v1\n"
MOST_BYTES = 1024  # a pointer's, says the specification


def pointer(data: bytes) -> str | None:
    """What to say of a file that begins so; None where it is no pointer."""
    if not data.startswith(_START):
        return None
    size = next((line[5:] for line in data[:MOST_BYTES].splitlines() if line.startswith(b"size ")), b"")
    what = f"the file of {int(size):,} bytes" if size.isdigit() else "the file itself"
    return f"is a Git LFS pointer, {what} was not downloaded"


PULL_HINT = "`git lfs pull` in its folder fetches the files themselves"
