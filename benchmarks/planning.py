"""What does planning cost for Llama 3.1 405B on a thousand ranks? Their parts are real, the ranks are all in one process.

    python benchmarks/planning.py                   256, 512 and 1024 ranks, FSDP x TP 8: writes docs/benchmarks/checkpoint.md
    python benchmarks/planning.py --ranks 64 --out -

Every rank offers what FSDP2 over tensor parallel would leave it of weights, moments and step counts. What one rank has to
do is timed once, with everybody's offers at hand; sending them is not, but their bytes are counted.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from checkpoint import PROJECT, row, status_bytes, table
from page import put_between_marks

from reshard.checkpoint import exchange
from reshard.checkpoint.collector import collector_at_rest
from reshard.checkpoint.index import read_index
from reshard.checkpoint.manifest import TensorEntry
from reshard.checkpoint.metadata import write_metadata
from reshard.checkpoint.offers import Offer
from reshard.checkpoint.parcel import packed
from reshard.checkpoint.plan import SavePlan, make_plan
from reshard.checkpoint.state import Box
from reshard.checkpoint.writer import Places
from reshard.model.spec import flavor, parameter_shapes

TP = 8
SPEC = flavor("llama3_1", "405B")
COLUMNS = ("attention.wo.weight", "feed_forward.w2.weight")  # what tensor parallel cuts along its second dim


def part(extent: int, ranks: int, rank: int) -> tuple[int, int]:
    """Start and size of a rank's share, as torch.chunk deals it."""
    size = -(-extent // ranks)
    start = min(rank * size, extent)
    return start, min(size, extent - start)


def box_of(name: str, shape: tuple[int, ...], rank: int, tp: int, dp: int) -> Box:
    """What FSDP2 over TP leaves a rank of a parameter. Ranks count TP fastest."""
    dp_rank, tp_rank = divmod(rank, tp)
    if name.endswith(COLUMNS):
        (row, rows), (column, columns) = part(shape[0], dp, dp_rank), part(shape[1], tp, tp_rank)
        return Box((row, column), (rows, columns))
    start, size = (0, shape[0]) if name.endswith("norm.weight") else part(shape[0], tp, tp_rank)
    row, rows = part(size, dp, dp_rank)
    return Box((start + row, *(0 for _ in shape[1:])), (rows, *shape[1:]))


def state_of(rank: int, tp: int, dp: int) -> Iterator[tuple[str, TensorEntry, Box]]:
    """Weights, moments and step counts of one rank."""
    for name, shape in parameter_shapes(SPEC).items():
        box, entry = box_of(name, shape, rank, tp, dp), TensorEntry(shape, "float32")
        if box.volume:
            yield f"model.{name}", entry, box
            yield f"optimizer.state.{name}.exp_avg", entry, box
            yield f"optimizer.state.{name}.exp_avg_sq", entry, box
        yield f"optimizer.state.{name}.step", TensorEntry((), "float32"), Box((), ())


def offers_of(ranks: int, tp: int) -> list[Offer]:
    """Everybody's, through the bytes that would travel."""
    return [
        pickle.loads(pickle.dumps(Offer.of(state_of(r, tp, ranks // tp), {}), protocol=5))  # noqa: S301
        for r in range(ranks)
    ]


class Clock:
    """CPU seconds and rise of memory of named pieces of work; all of it runs on one core and waits for nothing."""

    def __init__(self) -> None:
        self.seen: dict[str, Any] = {}

    def __call__(self, name: str, work: Callable[[], Any]) -> Any:
        """Do it, note what it took."""
        Path("/proc/self/clear_refs").write_text("5")
        memory, begin = status_bytes("VmRSS"), time.process_time()
        with collector_at_rest():
            result = work()
        self.seen[name] = {"s": time.process_time() - begin, "bytes": status_bytes("VmHWM") - memory}
        return result


def index_of(plan: SavePlan, ranks: int) -> bytes:
    """Rank 0's part of the commit: the index of what all ranks have written."""
    files = [(rank, Places(f"__{rank}_0.distcp")) for rank in range(ranks)]
    stored = [places.place(n, entry.dtype, box) for rank, places in files for n, entry, box in plan.written_by(rank)]
    with tempfile.TemporaryDirectory(dir=PROJECT / "outputs", prefix="benchmark-") as folder:
        return write_metadata(Path(folder), plan.tensors, plan.paths, stored, {})


def measure(ranks: int) -> dict[str, Any]:
    """All for one number of ranks. Rank 0 is looked at: it does what every rank does, and writes the index besides."""
    clock = Clock()
    offer = clock("offer", lambda: Offer.of(state_of(0, TP, ranks // TP), {}))
    offers = offers_of(ranks, TP)
    plan = clock("save plan", lambda: make_plan(offers, 0))
    clock("own part", lambda: plan.mine)
    content = clock("index written", lambda: index_of(plan, ranks))
    folder = Path("step-1")
    read = clock("index read", lambda: read_index(content, folder))
    parcel = clock("index packed", lambda index=read: pickle.dumps(packed(index), protocol=5))
    del read
    found = clock("index unpacked", lambda: pickle.loads(parcel))  # noqa: S301
    for name, tp in (("load plan", TP), ("load plan, TP halved", TP // 2)):
        wants = offers_of(ranks, tp)
        own, slabs = clock(name, lambda w=wants: exchange.plan(folder, found, w, 0, whole_chunks=False))
        assert sum(job.nbytes for job in own) + sum(slab.nbytes for slab in slabs) > 0
    return {
        "ranks": ranks,
        "tensors": len(plan.tensors),
        "chunks": sum(len(tensor.chunks) for tensor in found.tensors.values()),
        "offer": len(pickle.dumps(offer, protocol=5)),
        "offers": sum(len(pickle.dumps(o, protocol=5)) for o in offers),
        "index": len(content),
        "parcel": len(parcel),
        "clock": clock.seen,
    }


def tell(results: list[dict[str, Any]]) -> list[str]:
    """The table: one column for each number of ranks."""
    rows = [
        row(name, *(f"{result[key]:,}" for result in results))
        for name, key in (
            ("tensors", "tensors"), ("chunks on disk", "chunks"), ("bytes of one offer", "offer"),
            ("bytes of all offers", "offers"), ("bytes of .metadata", "index"), ("bytes of the index as it is sent", "parcel"),
        )
    ]  # fmt: skip
    said = {
        "offer": "a rank's offer",
        "save plan": "plan of the save, every rank",
        "own part": "what this rank writes, every rank",
        "index written": "index written, rank 0",
        "index read": "index read and checked, rank 0",
        "index packed": "index packed to be sent, rank 0",
        "index unpacked": "index received, every rank",
        "load plan": "plan of a load, same layout, every rank",
        "load plan, TP halved": "plan of a load, TP 4 from TP 8, every rank",
    }
    for key, words in said.items():
        cells = (result["clock"][key] for result in results)
        rows.append(row(words, *(f"{cell['s']:.2f} s, {cell['bytes'] / 2**20:,.0f} MiB" for cell in cells)))
    return table([f"405B, FSDP x TP {TP}", *(f"{result['ranks']} ranks" for result in results)], rows)


def main() -> None:
    """One process for each number of ranks, so that each begins with the same memory."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("--ranks", type=int, nargs="+", default=[256, 512, 1024])
    parser.add_argument("--out", default=str(PROJECT / "docs/benchmarks/checkpoint.md"), help="file, - for stdout only")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one)))
        return
    results = []
    for ranks in options.ranks:
        print(f"{ranks} ranks ...", file=sys.stderr)
        done = subprocess.run([sys.executable, __file__, "--one", str(ranks)], stdout=subprocess.PIPE, check=True)
        results.append(json.loads(done.stdout))
    text = "\n".join(tell(results))
    print(text)
    if options.out != "-":
        put_between_marks(Path(options.out), text, "planning")


if __name__ == "__main__":
    main()
