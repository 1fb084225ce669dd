"""How near to the machine's limit is the checkpoint engine? One command, one page of tables.

    python benchmarks/checkpoint.py                                  everything: 1 GiB, 7 rounds, 1, 2 and 4 ranks
    python benchmarks/checkpoint.py --gib 0.25 --rounds 3 --only save load --out -
    python benchmarks/checkpoint.py --against ../before/src          now and before, in turns: only a table of their ratios

Every round runs all contestants of a part once, in an order that turns from round to round, so that what else happens
on the machine hits all alike. A time is that of the slowest rank, from one barrier to its own end. Ratios are taken
within a round. Plain torch.distributed.checkpoint and the bare system calls run beside us, under the same fsync policy.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import logging
import os
import platform
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # one thread for each rank, as in training on a shared machine

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from memory import FullCache
from page import processor, put_between_marks
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

import reshard
from reshard.checkpoint import blocks, manifest
from reshard.checkpoint.load import load
from reshard.checkpoint.plan import Planner
from reshard.checkpoint.ranks import Ranks
from reshard.checkpoint.save import About, save
from reshard.checkpoint.saver import FINISHED, Saver
from reshard.checkpoint.state import bytes_of, local_part

PROJECT = Path(__file__).resolve().parents[1]
PARTS = ("save", "load", "reading", "memory", "small", "async")
COMPARABLE = ("save", "load", "small")  # parts that `--against` can do
FOREIGN = ("raw", "dcp", "readinto", "memcpy", "ours, no checksums")  # contestants that it leaves out
ABOUT = About(step=1, kind="full", source={"kind": "benchmark"})
WIDTH, FFN = 1024, 2816  # of the layers that make up the state; seven of them are 1 GiB with their moments
SMALL_TENSORS = 10_000
Times = dict[str, list[float]]


# -- what is saved and loaded ------------------------------------------------------------------------------------------


def full_tensors(gib: float) -> dict[str, Tensor]:
    """Weights and moments of a Llama's layers, fp32, and the step counts of Adam: the same numbers on every rank."""
    torch.manual_seed(0)
    tensors: dict[str, Tensor] = {}
    for layer in range(max(1, round(gib * 7))):
        shapes = dict.fromkeys(("wq", "wk", "wv", "wo"), (WIDTH, WIDTH)) | {"norm": (WIDTH,)}
        shapes |= {"w1": (FFN, WIDTH), "w2": (WIDTH, FFN), "w3": (FFN, WIDTH)}
        for name, shape in shapes.items():
            fqn = f"layers.{layer}.{name}.weight"
            tensors[f"model.{fqn}"] = torch.randn(shape)
            tensors[f"optimizer.state.{fqn}.exp_avg"] = torch.randn(shape)
            tensors[f"optimizer.state.{fqn}.exp_avg_sq"] = torch.rand(shape)
            tensors[f"optimizer.state.{fqn}.step"] = torch.tensor(7.0)
    return tensors


def small_tensors() -> dict[str, Tensor]:
    """Ten thousand tensors of 1 KiB."""
    return {f"part.{i // 100}.tensor.{i}": torch.full((16, 16), float(i)) for i in range(SMALL_TENSORS)}


def placed(tensors: dict[str, Tensor], placement: str, world: int) -> dict[str, Tensor]:
    """This rank's part: `replica` (plain, the tensors themselves), `dtensor` (replicas by their placement), `dim0` or
    `dim1` shards (vectors are cut along their only dim, scalars never).
    """
    if placement == "replica":
        return tensors
    mesh = init_device_mesh("cpu", (world,))
    if placement == "dtensor":
        return {n: DTensor.from_local(t, mesh, [Replicate()], run_check=False) for n, t in tensors.items()}
    result = {}
    for name, tensor in tensors.items():
        dim = min(int(placement[-1]), tensor.ndim - 1)
        if dim < 0:
            result[name] = tensor.clone()
            continue
        part = tensor.chunk(world, dim)[mesh.get_local_rank()].contiguous().clone()
        result[name] = DTensor.from_local(part, mesh, [Shard(dim)], run_check=False)
    return result


def emptied(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Destinations of the same layout, their memory touched."""
    return {name: torch.full_like(tensor, -1) for name, tensor in state.items()}


def local_bytes(state: dict[str, Tensor]) -> int:
    """Bytes of this rank's parts."""
    return sum(local_part(tensor)[0].nbytes for tensor in state.values())


# -- one rank ----------------------------------------------------------------------------------------------------------


class Bench:
    """What a rank needs to take part: its group, its place on the disk, its rounds."""

    def __init__(self, rank: int, world: int, port: int, place: Path, gib: float, rounds: int, turns: bool) -> None:
        store = dist.TCPStore("127.0.0.1", port, world, rank == 0, timedelta(minutes=10))
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(minutes=10))
        self.rank, self.world, self.place, self.gib, self.rounds, self.turns = rank, world, place, gib, rounds, turns
        self.group = dist.new_group(backend="gloo")
        self.background = dist.new_group(backend="gloo")
        self.ranks = Ranks(self.group if world > 1 else None)
        if rank == 0:
            self.cache = FullCache(place / "kept-holes")

    def barrier(self) -> None:
        """Until all ranks are here."""
        dist.barrier(self.group)

    def gathered(self, value: float) -> list[float]:
        """Every rank's value."""
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value, group=self.group)
        return values

    def await_turn(self) -> None:
        """Where other ranks run another version: until they rest. What starts us all says so, see `take_turns`."""
        if self.turns and self.rank == 0:
            print("ready", flush=True)
            sys.stdin.readline()
        self.barrier()

    def timed(self, work: Callable[[], object]) -> float:
        """Seconds of the slowest rank."""
        self.barrier()
        begin = time.perf_counter()
        work()
        return max(self.gathered(time.perf_counter() - begin))

    def play(self, contestants: dict[str, Callable[[], object]], rounds: int, tidy: Callable[[], None]) -> Times:
        """Run all in each round, in turning order; one unmeasured round first. The CPU seconds are under `cpu <name>`."""
        names: list[str] = [n for n in contestants if not (self.turns and n.startswith(FOREIGN))]
        times: Times = {}
        for number in range(-1, rounds if names else -1):
            shift = number % len(names)
            for name in names[shift:] + names[:shift]:
                self.await_turn()
                gc.collect()
                cpu = time.process_time()
                seconds = self.timed(contestants[name])
                cpu_seconds = sum(self.gathered(time.process_time() - cpu))
                if number >= 0:
                    times.setdefault(name, []).append(seconds)
                    times.setdefault(f"cpu {name}", []).append(cpu_seconds)
                self.barrier()
                tidy()
        return times

    def fresh(self, name: str) -> Path:
        """A name for a directory that does not exist."""
        return self.place / name

    def sweep(self) -> None:
        """Remove what a save has left, let the disk come to rest, and fill the memory that was freed (memory.py says why)."""
        if self.rank == 0:
            for path in self.place.iterdir():
                if not path.name.startswith("kept"):
                    shutil.rmtree(path)
            os.sync()
            self.cache.fill()
        self.barrier()


def raw_write(directory: Path, rank: int, state: dict[str, Tensor], *, sync: bool) -> None:
    """The limit of a save: this rank's bytes into one file, tensor by tensor, from their memory."""
    directory.mkdir(parents=True, exist_ok=True)
    fd = os.open(directory / f"raw-{rank}", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    for tensor in state.values():
        view = bytes_of(local_part(tensor)[0])
        while view:
            view = view[os.write(fd, view) :]
    if sync:
        os.fsync(fd)
    os.close(fd)


def raw_read(path: Path, state: dict[str, Tensor]) -> None:
    """The limit of a load: this rank's bytes from one file into memory that is there."""
    with open(path, "rb", buffering=0) as file:
        for tensor in state.values():
            view = bytes_of(local_part(tensor)[0])
            while view:
                view = view[file.readinto(view) :]


def dcp_save(bench: Bench, directory: Path, state: dict[str, Tensor], *, sync: bool) -> None:
    """Plain DCP."""
    writer = dcp.FileSystemWriter(directory, sync_files=sync)
    dcp.save(state, storage_writer=writer, process_group=bench.group)


def dcp_load(bench: Bench, directory: Path, state: dict[str, Tensor]) -> None:
    """Plain DCP."""
    dcp.load(state, storage_reader=dcp.FileSystemReader(directory), process_group=bench.group)


@contextlib.contextmanager
def without(what: str) -> Iterator[None]:
    """The engine without its checksums, or without fsync. For comparison only: the product has no such switch."""
    if what == "crc":
        nothing = types.SimpleNamespace(crc32=lambda data, crc=0: 0, crc32_combine=lambda a, b, length: 0)
        before = blocks.isal_zlib, manifest.isal_zlib
        blocks.isal_zlib = manifest.isal_zlib = nothing
        try:
            yield
        finally:
            blocks.isal_zlib, manifest.isal_zlib = before
    else:
        real = os.fsync
        os.fsync = lambda fd: None
        try:
            yield
        finally:
            os.fsync = real


def measure_save(bench: Bench) -> dict[str, Any]:
    """Raw writes, ours and DCP's, with fsync and without; ours without its checksums."""
    tensors = full_tensors(bench.gib)
    replicas, dtensors, state = (placed(tensors, kind, bench.world) for kind in ("replica", "dtensor", "dim0"))
    planner = Planner(bench.ranks)
    nested = {"state": state}

    def ours(name: str) -> Callable[[], object]:
        return lambda: save(bench.fresh(name), nested, ABOUT, bench.ranks, planner=planner)

    def ours_without(what: str) -> None:
        with without(what):
            ours(f"ours-{what}")()

    contestants: dict[str, Callable[[], object]] = {
        "raw": lambda: raw_write(bench.fresh("raw"), bench.rank, state, sync=True),
        "ours": ours("ours"),
        "ours, no checksums": lambda: ours_without("crc"),
        "dcp": lambda: dcp_save(bench, bench.fresh("dcp"), state, sync=True),
        "raw, no fsync": lambda: raw_write(bench.fresh("raw"), bench.rank, state, sync=False),
        "ours, no fsync": lambda: ours_without("fsync"),
        "dcp, no fsync": lambda: dcp_save(bench, bench.fresh("dcp"), state, sync=False),
        "reshard.save, dim-0 shards": lambda: reshard.save(bench.fresh("shards"), nested),
        "reshard.save, plain replicas": lambda: reshard.save(bench.fresh("replicas"), {"state": replicas}),
        "reshard.save, DTensor replicas": lambda: reshard.save(bench.fresh("dtensors"), {"state": dtensors}),
    }
    times = bench.play(contestants, bench.rounds, bench.sweep)
    return {"bytes": sum(bench.gathered(local_bytes(state))), "times": times}


def kept_checkpoints(bench: Bench, tensors: dict[str, Tensor]) -> tuple[Path, Path]:
    """The state as one rank saves it, ours and DCP's; made once for each place."""
    ours, theirs = bench.place / "kept-ours", bench.place / "kept-dcp"
    if bench.rank == 0 and not ours.exists():
        save(ours, tensors, ABOUT, Ranks(None))
        dcp.save(tensors, storage_writer=dcp.FileSystemWriter(theirs), no_dist=True)
    bench.barrier()
    return ours, theirs


def measure_load(bench: Bench) -> dict[str, Any]:
    """readinto, memcpy, ours and DCP's, from what one rank has saved, for three ways to hold it; all from the cache."""
    tensors = full_tensors(bench.gib)
    ours, theirs = kept_checkpoints(bench, tensors)
    result: dict[str, Any] = {"bytes": sum(t.nbytes for t in tensors.values()), "times": {}}
    for placement in ("dim0", "dim1", "replica") if bench.world > 1 else ("dim0",):
        state = placed(tensors, placement, bench.world)
        target = emptied(state)
        raw_write(bench.place / f"kept-raw-{placement}", bench.rank, state, sync=True)
        raw = bench.place / f"kept-raw-{placement}" / f"raw-{bench.rank}"

        def copy(source: dict[str, Tensor] = state, into: dict[str, Tensor] = target) -> None:
            for name, tensor in source.items():
                local_part(into[name])[0].copy_(local_part(tensor)[0])

        contestants: dict[str, Callable[[], object]] = {
            "readinto": lambda raw=raw, target=target: raw_read(raw, target),
            "memcpy": copy,
            "ours": lambda target=target: load(ours, target, bench.ranks),
            "reshard.load": lambda target=target: reshard.load(ours, target),
            "dcp": lambda target=target: dcp_load(bench, theirs, target),
        }
        result["times"][placement] = bench.play(contestants, bench.rounds, lambda: None)
        for name, tensor in target.items():
            assert torch.equal(local_part(tensor)[0], local_part(state[name])[0]), f"{name} is not what was saved"
        bench.barrier()
        raw.unlink()
    return result


def measure_reading(bench: Bench) -> dict[str, Any]:
    """How many bytes do all ranks together read, by the kernel's count (rchar)?"""
    tensors = full_tensors(bench.gib)
    ours, theirs = kept_checkpoints(bench, tensors)
    result: dict[str, Any] = {"bytes": sum(t.nbytes for t in tensors.values()), "read": {}}
    for placement in ("dim0", "dim1", "replica"):
        target = emptied(placed(tensors, placement, bench.world))
        works = {
            "ours": lambda t=target: load(ours, t, bench.ranks),
            "dcp": lambda t=target: dcp_load(bench, theirs, t),
        }
        for name, work in works.items():
            before = read_so_far()
            work()
            result["read"].setdefault(placement, {})[name] = sum(bench.gathered(read_so_far() - before))
    return result


def read_so_far() -> int:
    """Bytes that this process has asked the kernel to read."""
    return int(Path("/proc/self/io").read_text().split("rchar:")[1].split()[0])


def measure_memory(bench: Bench) -> dict[str, Any]:
    """How far does a rank's resident memory rise above where it was? VmHWM, set back by /proc/self/clear_refs."""
    tensors = full_tensors(bench.gib)
    ours, theirs = kept_checkpoints(bench, tensors)
    result: dict[str, Any] = {}
    for placement in ("dim0", "dim1", "replica") if bench.world > 1 else ("dim0",):
        state = placed(tensors, placement, bench.world)
        works: dict[str, Callable[[], object]] = {
            "save, ours": lambda state=state: save(bench.fresh("ours"), {"state": state}, ABOUT, bench.ranks),
            "save, dcp": lambda state=state: dcp_save(bench, bench.fresh("dcp"), state, sync=True),
            "load, ours": lambda state=state: load(ours, state, bench.ranks),
            "load, dcp": lambda state=state: dcp_load(bench, theirs, state),
        }
        for name, work in works.items():
            rises = []
            for _ in range(3):
                gc.collect()
                bench.barrier()
                Path("/proc/self/clear_refs").write_text("5")
                before = status_bytes("VmRSS")
                work()
                rises.append(max(bench.gathered(status_bytes("VmHWM") - before)))
                bench.barrier()
                bench.sweep()
            result[f"{placement} {name}"] = max(rises[1:])  # the first call also imports and allocates for good
    return result


def status_bytes(field: str) -> int:
    """A field of /proc/self/status, in bytes."""
    return int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0]) * 1024


def measure_small(bench: Bench) -> dict[str, Any]:
    """Ten thousand small tensors: here it is planning that costs."""
    replicas = small_tensors()
    state = placed(replicas, "dim0", bench.world)
    target = emptied(state)
    planner = Planner(bench.ranks)
    ours, theirs = bench.place / "kept-small", bench.place / "kept-small-dcp"
    save(ours, {"state": state}, ABOUT, bench.ranks)
    named = {f"state.{name}": tensor for name, tensor in target.items()}
    dcp_save(bench, theirs, target, sync=True)
    contestants: dict[str, Callable[[], object]] = {
        "save, first": lambda: save(bench.fresh("ours"), {"state": state}, ABOUT, bench.ranks),
        "save, again": lambda: save(bench.fresh("ours"), {"state": state}, ABOUT, bench.ranks, planner=planner),
        "load": lambda: load(ours, named, bench.ranks),
        "reshard.save": lambda: reshard.save(bench.fresh("ours"), {"state": state}),
        "reshard.save, plain replicas": lambda: reshard.save(bench.fresh("ours"), {"state": replicas}),
        "reshard.load": lambda: reshard.load(ours, named),
    }
    times = bench.play(contestants, bench.rounds, bench.sweep)
    slow: dict[str, Callable[[], object]] = {
        "dcp save": lambda: dcp_save(bench, bench.fresh("dcp"), state, sync=True),
        "dcp load": lambda: dcp_load(bench, theirs, target),
    }
    times |= bench.play(slow, min(3, bench.rounds), bench.sweep)
    return {"times": times}


def measure_async(bench: Bench) -> dict[str, Any]:
    """How long does training wait, and how much slower are the steps that a background save overlaps?"""
    state = placed(full_tensors(bench.gib), "dim0", bench.world)
    copy = {name: local_part(tensor)[0].clone() for name, tensor in state.items()}
    a, b = torch.randn(768, 768), torch.randn(768, 768)
    result: dict[str, Any] = {"bytes": local_bytes(state), "rounds": []}
    limit = 200e6 / bench.world
    savers = {
        "ours": Saver(bench.ranks, Ranks(bench.background)),
        "ours, limited": Saver(bench.ranks, Ranks(bench.background), limit),
    }

    def compute_step() -> float:
        begin = time.perf_counter()
        for _ in range(4):
            torch.mm(a, b)
        return time.perf_counter() - begin

    def memcpy() -> None:
        for name, tensor in state.items():
            copy[name].copy_(local_part(tensor)[0])

    def ours(name: str) -> Callable[[], Callable[[], bool]]:
        def start() -> Callable[[], bool]:
            savers[name].start(bench.fresh(name.replace(", ", "-")), {"state": state}, ABOUT)
            return lambda: savers[name].status() == FINISHED

        return start

    def theirs() -> Callable[[], bool]:
        writer = dcp.FileSystemWriter(bench.fresh("dcp"), sync_files=True)
        future: Any = dcp.async_save(state, storage_writer=writer, process_group=bench.background)
        return future.done

    for number in range(-1, bench.rounds):
        seen: dict[str, Any] = {"memcpy": bench.timed(memcpy)}
        kinds: dict[str, Callable[[], Callable[[], bool]]] = {
            "ours": ours("ours"),
            "ours, limited": ours("ours, limited"),
            "dcp": theirs,
        }
        names = list(kinds)
        for name in names[number % 3 :] + names[: number % 3]:
            bench.barrier()
            cpu = time.process_time()
            alone = [compute_step() for _ in range(40)]
            cpu_step = (time.process_time() - cpu) / len(alone)
            bench.barrier()
            cpu, begin = time.process_time(), time.perf_counter()
            done = kinds[name]()
            stall = time.perf_counter() - begin
            steps = []
            while not done():
                steps.append(compute_step())
            wall = time.perf_counter() - begin
            extra_cpu = time.process_time() - cpu - cpu_step * len(steps)
            if name in savers:
                savers[name].collect()
            slow = statistics.mean(steps) / statistics.median(alone) if steps else 1.0
            seen[name] = {
                "stall": max(bench.gathered(stall)),
                "slow": max(bench.gathered(slow)),
                "wall": max(bench.gathered(wall)),
                "cpu": sum(bench.gathered(extra_cpu)),
                "lost": max(bench.gathered(stall + sum(steps) - statistics.median(alone) * len(steps))),
            }
            bench.barrier()
            bench.sweep()
        if number >= 0:
            result["rounds"].append(seen)
    return result


MEASURES: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "save": measure_save,
    "load": measure_load,
    "reading": measure_reading,
    "memory": measure_memory,
    "small": measure_small,
    "async": measure_async,
}


def be_rank(task: dict[str, Any]) -> None:
    """Take part in one measure; rank 0 writes down what came out."""
    logging.getLogger("reshard").setLevel(logging.ERROR)  # that not all was compared is said at every save
    numbers = task["rank"], task["world"], task["port"], Path(task["place"]), task["gib"], task["rounds"]
    bench = Bench(*numbers, turns=task["turns"])
    result = MEASURES[task["part"]](bench)
    if bench.rank == 0:
        Path(task["answer"]).write_text(json.dumps(result))
    bench.barrier()
    dist.destroy_process_group()


# -- the whole -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def started(
    part: str, world: int, place: Path, gib: float, rounds: int, source: Path | None = None
) -> Iterator[tuple[list[subprocess.Popen[str]], Callable[[], dict[str, Any]]]]:
    """Start the ranks of one measure; with them, what waits for them and brings back the result.

    source: of reshard, for ranks that take turns with others.
    """
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    answer = place.with_name(f"{place.name}.json")
    place.mkdir(exist_ok=True)
    task = {"part": part, "world": world, "port": port, "place": str(place), "gib": gib, "rounds": rounds}
    task |= {"answer": str(answer), "turns": source is not None}
    pipe = None if source is None else subprocess.PIPE
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, "--as-rank", json.dumps({**task, "rank": r})],
            stdin=pipe, stdout=pipe if r == 0 else None, text=True,
            env={**os.environ, **({"PYTHONPATH": str(source)} if source else {})},
        )
        for r in range(world)
    ]  # fmt: skip

    def result() -> dict[str, Any]:
        if max(process.wait() for process in ranks) != 0 or not answer.exists():
            raise SystemExit(f"{part} on {world} ranks failed")
        return json.loads(answer.read_text())

    try:
        yield ranks, result
    finally:
        for process in ranks:
            process.kill()
        shutil.rmtree(place)


def run(part: str, world: int, place: Path, gib: float, rounds: int) -> dict[str, Any]:
    """One measure, from beginning to end."""
    with started(part, world, place, gib, rounds) as (_, result):
        return result()


def run_both(
    part: str, world: int, place: Path, gib: float, rounds: int, sources: tuple[Path, Path]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The same measure by two versions of the source, in turns: one rests while the other works."""
    places = [place.with_name(f"{place.name}-{name}") for name in ("now", "before")]
    with (
        started(part, world, places[0], gib, rounds, sources[0]) as (now, now_result),
        started(part, world, places[1], gib, rounds, sources[1]) as (before, before_result),
    ):
        take_turns(now[0], before[0])
        return now_result(), before_result()


def take_turns(a: subprocess.Popen[str], b: subprocess.Popen[str]) -> None:
    """Let each work until it is ready for its next turn, or has ended; who goes first changes from turn to turn."""

    def until_ready(process: subprocess.Popen[str]) -> bool:
        assert process.stdout is not None
        return any(line == "ready\n" for line in process.stdout)

    def let_work(process: subprocess.Popen[str]) -> bool:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
        return until_ready(process)

    order = [process for process in (a, b) if until_ready(process)]
    while order:
        order = [process for process in reversed(order) if let_work(process)]


def spread(values: list[float], digits: int = 2) -> str:
    """Median (best to worst), smaller is better."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def ratio(limit: list[float], ours: list[float]) -> str:
    """limit / ours within each round: median (worst to best)."""
    return spread([a / b for a, b in zip(limit, ours, strict=True)])


def row(*cells: object) -> str:
    """One line of a Markdown table."""
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def table(header: list[str], rows: list[str]) -> list[str]:
    """A Markdown table."""
    return [row(*header), "|" + "---|" * len(header), *rows, ""]


def tell_save(results: dict[int, dict[str, Any]]) -> list[str]:
    """The save table."""
    rows, cost = [], []
    for world, result in results.items():
        times, gib = result["times"], result["bytes"] / 2**30
        for name in (
            "raw", "ours", "dcp", "raw, no fsync", "ours, no fsync", "dcp, no fsync", "reshard.save, dim-0 shards",
            "reshard.save, plain replicas", "reshard.save, DTensor replicas",
        ):  # fmt: skip
            limit = times["raw, no fsync" if "no fsync" in name else "raw"]
            rate, cpu = f"{gib / statistics.median(times[name]):.2f}", statistics.median(times[f"cpu {name}"])
            rows.append(row(world, name, spread(times[name]), rate, ratio(limit, times[name]), f"{cpu:.2f}"))
        with_, without_ = times["ours"], times["ours, no checksums"]
        share = [100 * (a - b) / b for a, b in zip(with_, without_, strict=True)]
        extra = statistics.median(times["cpu ours"]) - statistics.median(times["cpu ours, no checksums"])
        cost.append(row(world, spread(with_), spread(without_), spread(share, 1), f"{extra:.2f}"))
    return [
        f"## Save, {gib:.2f} GiB", "",
        "R_save = raw / save, in one round. `no fsync`: os.fsync replaced by nothing in ours, sync_files=False in DCP.", "",
        *table(["ranks", "", "seconds: median (best to worst)", "GiB/s", "R_save", "CPU s"], rows),
        "What the checksums cost, in a save with fsync:", "",
        *table(["ranks", "with, s", "without, s", "cost, %", "CPU s more"], cost),
    ]  # fmt: skip


def tell_load(results: dict[int, dict[str, Any]]) -> list[str]:
    """The load table."""
    rows = []
    for world, result in results.items():
        for placement, times in result["times"].items():
            for name in ("memcpy", "readinto", "ours", "reshard.load", "dcp"):
                cpu = statistics.median(times[f"cpu {name}"])
                share = ratio(times["readinto"], times[name])
                rows.append(row(world, placement, name, spread(times[name], 3), share, f"{cpu:.2f}"))
    return [
        f"## Load, {result['bytes'] / 2**30:.2f} GiB that one rank has saved, from the page cache", "",
        "R_load = readinto / load, in one round. readinto: each rank reads its bytes from one file of its own.", "",
        *table(["ranks", "held as", "", "seconds: median (best to worst)", "R_load", "CPU s"], rows),
    ]  # fmt: skip


def tell_reading(results: dict[int, dict[str, Any]]) -> list[str]:
    """The table of bytes read."""
    rows = []
    for world, result in results.items():
        for placement, read in result["read"].items():
            rows.append(row(world, placement, *(f"{read[name] / result['bytes']:.3f}" for name in ("ours", "dcp"))))
    return [
        "## Bytes read by all ranks together / bytes stored (A_read), from what one rank has saved", "",
        "8 ranks: of a quarter of the state, so that eight replicas fit the memory.", "",
        *table(["ranks", "held as", "ours", "dcp"], rows),
    ]  # fmt: skip


def tell_memory(results: dict[int, dict[str, Any]]) -> list[str]:
    """The memory table."""
    rows = []
    for world, result in results.items():
        for key in sorted({key.rpartition(", ")[0] for key in result}):
            placement, _, verb = key.partition(" ")
            rows.append(row(world, placement, verb, *(f"{result[f'{key}, {n}'] / 2**20:.0f}" for n in ("ours", "dcp"))))
    return [
        "## Memory beside the tensors, MiB, of the rank that needs most", "",
        "Peak resident memory (VmHWM, set back by /proc/self/clear_refs before) less what was resident before.", "",
        *table(["ranks", "held as", "", "ours", "dcp"], rows),
    ]  # fmt: skip


def tell_small(results: dict[int, dict[str, Any]]) -> list[str]:
    """The table of small tensors."""
    rows = []
    for world, result in results.items():
        times = result["times"]
        names = (
            "save, first", "save, again", "reshard.save", "reshard.save, plain replicas", "dcp save",
            "load", "reshard.load", "dcp load",
        )  # fmt: skip
        rows += [row(world, n, spread(times[n], 3)) for n in names]
    return [
        f"## {SMALL_TENSORS:,} tensors of 1 KiB", "",
        "`again`: the plan is known. DCP in at most 3 rounds.", "",
        *table(["ranks", "", "seconds: median (best to worst)"], rows),
    ]  # fmt: skip


def tell_async(results: dict[int, dict[str, Any]]) -> list[str]:
    """The table of background saves."""
    rows = []
    for world, result in results.items():
        rounds = result["rounds"]
        memcpy = [r["memcpy"] for r in rounds]
        for name in ("ours", "ours, limited", "dcp"):
            stall = [r[name]["stall"] for r in rounds]
            share = spread([a / b for a, b in zip(stall, memcpy, strict=True)])
            slow = spread([100 * (r[name]["slow"] - 1) for r in rounds], 1)
            others = [spread([r[name][key] for r in rounds]) for key in ("lost", "wall", "cpu")]
            rows.append(row(world, name, spread(stall, 3), share, slow, *others))
        rows.append(row(world, "memcpy", spread(memcpy, 3), "1", "", "", "", ""))
    return [
        "## In the background", "",
        "stall: how long training waits. slower: mean step while the save runs against the median step before, on cores "
        f"that number {os.cpu_count()}, one computing thread for each rank. lost: seconds that training loses to a save in "
        "all. limited: 200 MB/s for all ranks together.", "",
        *table(["ranks", "", "stall, s", "stall / memcpy", "slower, %", "lost, s", "until committed, s", "CPU s more"], rows),
    ]  # fmt: skip


def tell_against(results: dict[tuple[str, int], tuple[dict[str, Any], dict[str, Any]]]) -> list[str]:
    """The table of two versions."""
    rows = []
    for (part, world), (now, before) in results.items():
        nested = now["times"] if part == "load" else {"": now["times"]}
        for placement, times in nested.items():
            old = before["times"][placement] if placement else before["times"]
            for name in (name for name in times if not name.startswith("cpu ")):
                cpu, old_cpu = times[f"cpu {name}"], old[f"cpu {name}"]
                seconds = (f"{statistics.median(values):.3f}" for values in (old_cpu, cpu))
                rows.append(
                    row(
                        part,
                        world,
                        placement,
                        name,
                        *seconds,
                        ratio(cpu, old_cpu),
                        f"{min(cpu) / min(old_cpu):.2f}",
                        ratio(times[name], old[name]),
                    )
                )
    return [
        "## Now and before, in turns", "",
        "CPU seconds of all ranks together; ratios are those of one round, now / before, and the best of all rounds against "
        "the best.", "",
        *table(
            ["part", "ranks", "held as", "", "CPU s before", "CPU s now", "ratio: median (best to worst)", "best / best",
             "of seconds"],
            rows,
        ),
    ]  # fmt: skip


TELL: dict[str, Callable[[dict[int, dict[str, Any]]], list[str]]] = {
    "save": tell_save,
    "load": tell_load,
    "reading": tell_reading,
    "memory": tell_memory,
    "small": tell_small,
    "async": tell_async,
}


def compare(options: argparse.Namespace) -> list[str]:
    """This version and another one, in turns."""
    if not (options.against / "reshard/__init__.py").exists():
        raise SystemExit(f"{options.against} has no reshard/__init__.py, expected the src folder of another version")
    sources = PROJECT / "src", options.against.resolve()
    results = {}
    with tempfile.TemporaryDirectory(dir=options.place, prefix="benchmark-") as folder:
        for part in (part for part in options.only if part in COMPARABLE):
            for world in options.ranks:
                print(f"{part}, {world} rank(s), two versions ...", file=sys.stderr)
                place = Path(folder) / f"{part}-{world}"
                results[part, world] = run_both(part, world, place, options.gib, options.rounds, sources)
    return tell_against(results)


def main() -> None:
    """Run what was asked for, print it, and write it down."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("--gib", type=float, default=1.0, help="size of the state, default 1")
    parser.add_argument("--rounds", type=int, default=7, help="measured rounds, default 7")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4], help="default 1 2 4")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="parts, default all")
    parser.add_argument(
        "--place", type=Path, default=PROJECT / "outputs", help="where to write meanwhile: on the disk to measure"
    )
    parser.add_argument("--out", default=str(PROJECT / "docs/benchmarks/checkpoint.md"), help="file, - for stdout only")
    parser.add_argument(
        "--against",
        type=Path,
        metavar="SRC",
        help="another version's src folder: ratios of the two, of save, load and small",
    )
    parser.add_argument("--as-rank", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.as_rank:
        be_rank(json.loads(options.as_rank))
        return
    lines: list[str] = []
    load = os.getloadavg()[0]
    options.place.mkdir(exist_ok=True)
    if options.against is not None:
        print("\n".join(compare(options)))
        return
    with tempfile.TemporaryDirectory(dir=options.place, prefix="benchmark-") as folder:
        for part in options.only:
            worlds = sorted({*options.ranks, 8}) if part == "reading" else options.ranks
            results = {}
            for world in worlds:
                print(f"{part}, {world} rank(s) ...", file=sys.stderr)
                gib = options.gib / 4 if world > 4 else options.gib  # each rank holds a whole replica, twice
                results[world] = run(part, world, Path(folder) / f"{part}-{world}", gib, options.rounds)
            told = TELL[part](results)
            print("\n".join(told), flush=True)
            lines += told
    head = [
        f"{datetime.now(UTC):%Y-%m-%d}, {options.rounds} rounds, {os.cpu_count()} x {processor()}, Linux "
        f"{platform.release()}, torch {torch.__version__}, {shutil.disk_usage(options.place).total / 2**30:.0f} GiB disk, "
        f"load {load:.1f} before.", "",
        f"    python benchmarks/checkpoint.py {' '.join(sys.argv[1:])}".rstrip(), "",
    ]  # fmt: skip
    text = "\n".join([*head, *lines])
    if options.out != "-":
        put_between_marks(Path(options.out), text, "checkpoint")


if __name__ == "__main__":
    main()
