"""How does a table get into its page of docs/benchmarks? Imports no torch."""

from __future__ import annotations

import platform
from pathlib import Path


def processor() -> str:
    """The CPU's name."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(": ")[2]
    return platform.machine()


def put_between_marks(path: Path, text: str, what: str) -> None:
    """Replace what stands between the two marks of a page; the words around it are for people to write."""
    begin, end = f"<!-- {what}: made by benchmarks/{what}.py -->", f"<!-- end of {what} -->"
    page = path.read_text() if path.exists() else ""
    if begin not in page:
        page += f"\n{begin}\n{end}\n"
    before, _, rest = page.partition(begin)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{before}{begin}\n{text}\n{end}{rest.partition(end)[2]}")
