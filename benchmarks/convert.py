"""How near to copying the bytes is a conversion? One command, one table, every contestant in every round.

    python benchmarks/convert.py                        300 MB, 3 rounds, in 1 and 8 shards
    python benchmarks/convert.py --size 1B --rounds 5   2.5 GB; --size 8B: an 8B's width, 5.6 GB
    ... --transformers venv/bin/python                  the converter of transformers 4.46.3 (5.x has none), with accelerate

The source is synthetic (Meta's files, bfloat16) and warm in the page cache before each run, and the rest of the memory
is page cache, too (memory.py says why). All times end when the
bytes are on the disk: ours fsync by themselves, `sync FILE...` follows the others. Contestants run as commands of their
own, one at a time, in an order that turns from round to round; ratios are of medians. Anonymous memory is sampled every
3 ms; bytes read and written are the system's own count (rchar, wchar), which for Python includes its modules.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from math import prod
from pathlib import Path

import numpy as np
from memory import FullCache
from numpy.typing import NDArray
from page import processor

from reshard.formats.meta_export import plan_meta
from reshard.formats.output import write_output
from reshard.formats.protocol import Ledger, Source
from reshard.model.spec import LlamaSpec, RopeScaling, parameter_shapes

PROJECT = Path(__file__).resolve().parents[1]
SIZES = {
    "small": LlamaSpec(dim=1024, n_layers=8, n_heads=16, n_kv_heads=8, ffn_dim=2816, vocab_size=32768),
    "1B": LlamaSpec(
        dim=2048, n_layers=16, n_heads=32, n_kv_heads=8, ffn_dim=8192, vocab_size=128256, tied=True,
        rope_scaling=RopeScaling(32.0),
    ),
    "8B": LlamaSpec(dim=4096, n_layers=8, n_heads=32, n_kv_heads=8, ffn_dim=14336, vocab_size=128256),
}  # fmt: skip
IMPORTS = {
    "start-up without torch": "import reshard.cli, reshard.commands.convert",
    "start-up with torch": "import reshard.cli, reshard.commands.convert, reshard.checkpoint.save",
    "start-up of torch's DCP": "import torch.distributed.checkpoint.format_utils",
}
BLOCK_NUMBERS = (1 << 19) - 1  # a prime: with a round number all KV heads would be equal, and taken for copies of one
_CONVERTER = "transformers.models.llama.convert_llama_weights_to_hf"
# Its own command asks for a tokenizer, which these files have none of; this is the function that it calls.
TRANSFORMERS = (
    f"import sys, json, {_CONVERTER} as c; p = json.load(open(sys.argv[1] + '/params.json')); "
    "c.write_model(sys.argv[2], sys.argv[1], llama_version='3.2', vocab_size=p['vocab_size'], num_shards=int(sys.argv[3]))"
)


@dataclass(frozen=True)
class Noise:
    """A tensor of bfloat16 numbers near 1 that nobody has to store: a block of about a megabyte, over and over."""

    name: str
    shape: tuple[int, ...]
    block: NDArray[np.uint8]
    dtype: str = "bfloat16"
    grain: int = 1

    @property
    def nbytes(self) -> int:
        """Of the whole tensor."""
        return 2 * prod(self.shape)

    def fill(self, buffer: NDArray[np.uint8], start: int, stop: int, ledger: Ledger | None = None) -> None:
        """Any rows."""
        first = start * (self.nbytes // self.shape[0]) % len(self.block)
        # Each tensor's are other ones: an embedding and an output that are equal would make a tied model.
        rolled = np.roll(self.block, -first - 2 * zlib.crc32(self.name.encode()))
        for at in range(0, len(buffer), len(rolled)):
            part = buffer[at : at + len(rolled)]
            part[:] = rolled[: len(part)]


def make_source(folder: Path, spec: LlamaSpec, shards: int) -> Path:
    """Meta's files of random numbers."""
    bits = np.random.default_rng(0).normal(size=BLOCK_NUMBERS).astype(np.float32).view(np.uint32)
    block = (bits >> 16).astype(np.uint16).view(np.uint8)
    tensors = {name: Noise(name, shape, block) for name, shape in parameter_shapes(spec).items()}
    source = Source(folder, spec, tensors, {})
    target = folder / f"meta-{shards}"
    write_output(plan_meta(source, spec, shards=shards), target, Ledger(), memory=256 << 20)
    return target


@dataclass(frozen=True)
class Run:
    """One run of one contestant."""

    wall_s: float
    cpu_s: float
    anonymous_mib: float
    read: int
    written: int


def measure(
    command: Sequence[str | Path], cache: FullCache, sync: Sequence[Path] = (), source: Path | None = None
) -> Run:
    """Run a command, then sync the files it made. Raises RuntimeError with its words where it fails."""
    cache.fill()
    if source is not None:
        for file in (p for p in source.rglob("*") if p.is_file()):
            with file.open("rb", buffering=0) as stream:
                while stream.readinto(bytearray(1 << 24)):
                    pass
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.perf_counter()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    child = subprocess.Popen(
        [str(word) for word in command], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert child.stdout is not None
    said: list[bytes] = []
    reader = threading.Thread(target=lambda: said.append(child.stdout.read() if child.stdout else b""))
    reader.start()
    peak = 0
    while os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None:
        with contextlib.suppress(OSError, StopIteration):  # it has just ended
            peak = max(peak, _field(f"/proc/{child.pid}/status", "RssAnon:"))
        time.sleep(0.003)
    # Ended, but not waited for yet: the system still has its count.
    read, written = (_field(f"/proc/{child.pid}/io", name) for name in ("rchar:", "wchar:"))
    child.wait()
    reader.join()
    if child.returncode:
        raise RuntimeError(b"".join(said).decode(errors="replace")[-400:])
    files = [
        file for path in sync for file in ([path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()])
    ]
    if files:
        subprocess.run(["sync", *map(str, files)], check=True)
    wall = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Run(wall, cpu, peak / 1024, read, written)


def _field(path: str, name: str) -> int:
    with open(path, encoding="ascii") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(name))


def contestants(
    meta: Path, dcp: Path, out: Path, shards: int, transformers: Path | None
) -> dict[str, tuple[list[str | Path], Path, list[Path]]]:
    """Name -> (command, what it reads, what has to be synced). Each writes `out`, which is removed afterwards."""
    convert = [sys.executable, "-m", "reshard", "convert"]
    to_torch = [sys.executable, "-m", "torch.distributed.checkpoint.format_utils", "dcp_to_torch", dcp, out]
    start_up: dict[str, tuple[list[str | Path], Path, list[Path]]] = {
        name: ([sys.executable, "-c", code], meta, []) for name, code in IMPORTS.items()
    }
    peer: dict[str, tuple[list[str | Path], Path, list[Path]]] = {}
    if transformers is not None:
        start_up["start-up of transformers"] = ([transformers, "-c", f"import {_CONVERTER}"], meta, [])
        peer["transformers' Meta -> Hugging Face"] = (
            [transformers, "-c", TRANSFORMERS, meta, out, str(shards)],
            meta,
            [out],
        )
    return (
        start_up
        | {
            "cp of Meta's files": (["cp", "-r", meta, out], meta, [out]),
            "reshard Meta -> DCP": ([*convert, meta, out, "--to", "dcp"], meta, []),
            "reshard Meta -> Hugging Face": ([*convert, meta, out, "--to", "hf"], meta, []),
            "cp of the DCP directory": (["cp", "-r", dcp, out], dcp, [out]),
            "reshard DCP -> .pt": ([*convert, dcp, out, "--to", "torch"], dcp, []),
            "torch's dcp_to_torch": (to_torch, dcp, [out]),
        }
        | peer
    )


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--shards", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where the files go; default: a new one in the checkout")
    parser.add_argument("--transformers", type=Path, help="a Python that has transformers 4.46.3 and accelerate")
    options = parser.parse_args()
    spec = SIZES[options.size]
    folder = Path(tempfile.mkdtemp(prefix=".benchmark-convert-", dir=options.folder or PROJECT))
    try:
        cache = FullCache(folder / "holes")
        lines = [f"# {options.size}, {options.rounds} rounds, {datetime.now(UTC):%Y-%m-%d %H:%M} UTC"]
        lines += [f"{os.cpu_count()} x {processor()}, torch {version('torch')}, load {os.getloadavg()[0]:.1f} before"]
        for shards in options.shards:
            lines += ["", *table(folder, cache, spec, shards, options.rounds, options.transformers)]
        print("\n".join(lines))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def table(
    folder: Path, cache: FullCache, spec: LlamaSpec, shards: int, rounds: int, transformers: Path | None
) -> list[str]:
    """Every contestant in every round."""
    meta, dcp, out = make_source(folder, spec, shards), folder / "dcp", folder / "out"
    measure([sys.executable, "-m", "reshard", "convert", meta, dcp], cache)
    runs: dict[str, list[Run]] = {}
    failed: dict[str, str] = {}
    ways = contestants(meta, dcp, out, shards, transformers)
    names = list(ways)
    for number in range(rounds):
        turn = number * 3 % len(names)
        for name in names[turn:] + names[:turn]:
            if name in failed:
                continue
            command, source, sync = ways[name]
            try:
                runs.setdefault(name, []).append(measure(command, cache, sync, source))
            except RuntimeError as error:
                failed[name] = str(error).strip().splitlines()[-1][:90]
            if out.is_dir():
                shutil.rmtree(out)
            out.unlink(missing_ok=True)
    size = sum(p.stat().st_size for p in meta.iterdir())
    lines = [
        f"## {shards} shard{'s' * (shards > 1)}, {size / 1e9:.2f} GB",
        "",
        "| contestant | wall s | beyond start-up s | x cp | CPU s | anonymous MiB | read / source | written / source |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in names:
        if name in failed:
            lines.append(f"| {name} | did not run: {failed[name]} | | | | | | |")
            continue
        middle = {key: statistics.median(getattr(run, key) for run in runs[name]) for key in Run.__dataclass_fields__}
        of_dcp = ways[name][1] == dcp
        limit = statistics.median(
            run.wall_s for run in runs["cp of the DCP directory" if of_dcp else "cp of Meta's files"]
        )
        if name.startswith("start-up"):
            lines.append(
                f"| {name} | {middle['wall_s']:.2f} | | | {middle['cpu_s']:.2f} | {middle['anonymous_mib']:.0f} | | |"
            )
            continue
        start_up = "start-up of torch's DCP" if name.startswith("torch") else ""
        if name.startswith("transformers"):
            start_up = "start-up of transformers"
        if name.startswith("reshard"):
            start_up = "start-up with torch" if "-> DCP" in name else "start-up without torch"
        beyond = middle["wall_s"] - (statistics.median(run.wall_s for run in runs[start_up]) if start_up else 0.0)
        whole = sum(p.stat().st_size for p in dcp.iterdir()) if of_dcp else size
        lines.append(
            f"| {name} | {middle['wall_s']:.2f} | {beyond:.2f} | {beyond / limit:.2f} | {middle['cpu_s']:.2f} | "
            f"{middle['anonymous_mib']:.0f} | {middle['read'] / whole:.3f} | {middle['written'] / whole:.3f} |"
        )
    shutil.rmtree(meta)
    shutil.rmtree(dcp)
    return lines


if __name__ == "__main__":
    main()
