"""Does each rank save and fill what it holds, and does what is wrong on one rank become an error on all of them?

python -O test_engine_parts.py FOLDER        what the ranks of these tests do: forked from one process, without asserts
"""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import subprocess
import sys
import traceback
from collections import UserDict
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest

Seen = dict[str, list[Any]]  # situation -> what each rank returned, or how it ended: "class: message"

# -- what is expected --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    folder = tmp_path_factory.mktemp("parts")
    with open(folder / "log", "w") as log:
        command = [sys.executable, "-O", "-W", "ignore", __file__, str(folder)]
        done = subprocess.run(
            command, check=False, stdout=log, stderr=log, timeout=240, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
    assert done.returncode == 0, (folder / "log").read_text()[-4000:]
    found: Seen = json.loads((folder / "seen.json").read_text())
    return found


def refused(said: list[Any], *words: str) -> bool:
    """A CheckpointError that says this, on every rank."""
    kinds = ("CheckpointError: ", "RankFailed: ", "CheckpointException: ")
    return all(str(s).startswith(kinds) and all(word in s for word in words) for s in said)


def test_ranks_that_meet_again_in_another_order_get_their_own_rows(seen: Seen) -> None:
    assert seen["meet again"] == [["right"] * 3, ["right"] * 3]
    assert refused([said[0] for said in seen["old saver"]], "set up anew", "reshard.AsyncSaver()")


def test_plans_are_taken_only_where_all_ranks_mean_the_same_one(seen: Seen) -> None:
    """One rank's part is what it was two saves ago, the other's what it was one save ago."""
    assert seen["plans in turns"] == ["right", "right"]


def test_a_group_for_cpu_tensors_is_that_of_the_default_group_of_now(seen: Seen) -> None:
    assert seen["group anew"] == ["right", "right"]


DOORS = ("save", "AsyncSaver", "ReshardWriter", "load", "ReshardReader")


@pytest.mark.parametrize("door", DOORS)
def test_fsdp_over_tensor_parallel_whose_rows_do_not_divide_is_refused_on_all_ranks(door: str, seen: Seen) -> None:
    for rows in (7, 13):
        words = (
            ["0.bias"] if (rows, door) == (13, "ReshardWriter") else ["`0.bias`", f"{rows} rows"]
        )  # torch's own words
        assert refused(seen[f"fsdp x tp {rows} {door}"], *words), seen[f"fsdp x tp {rows} {door}"]


@pytest.mark.parametrize("door", DOORS)
def test_and_where_they_divide_it_is_right(door: str, seen: Seen) -> None:
    assert seen[f"fsdp x tp 10 {door}"] == ["right"] * 6


def test_interleaved_rows_are_refused_where_sizes_agree(seen: Seen) -> None:
    for door in ("save", "load", "ReshardReader"):
        assert refused(seen[f"interleaved {door}"], "`w`", "_StridedShard"), seen[f"interleaved {door}"]
    assert refused(seen["interleaved ReshardWriter"], "key:w has overlapping chunks")  # torch's own words


def test_a_part_of_another_size_or_dtype_than_it_claims_is_refused_with_its_rank(seen: Seen) -> None:
    for door in ("save", "load", "ReshardReader", "ReshardWriter"):
        assert refused(seen[f"larger part {door}"], "`w`", "[3]"), seen[f"larger part {door}"]
    assert refused(seen["larger part save"], "on rank 1")
    assert refused(seen["other dtype"], "`w`", "float64", "on rank 1")
    assert refused(seen["subclass part"], "`w`", "Odd")


def test_what_users_do_wrong_is_said_with_tensor_and_ranks(seen: Seen) -> None:
    assert refused(seen["hole"], "`w`", "2 numbers of 4", "rank 1: [2] at [2]")
    assert refused(seen["shapes"], "`w`", "[4] float32 on rank 0", "[5] float32 on rank 1")
    assert refused(seen["partial"], "`w`", "Partial", "on rank 1")
    assert refused(seen["expanded"], "`w`", "strides (0, 1)", "on rank 0")
    assert refused(seen["step"], "step 8", "expected 3", "on rank 1")
    assert refused(seen["address"], "s3://bucket/x")
    assert seen["nothing left"] == [[], []]


@pytest.mark.parametrize("door", ["save", "AsyncSaver", "load"])
def test_an_error_of_any_class_reaches_all_ranks_with_its_rank(door: str, seen: Seen) -> None:
    for kind in ("ValueError", "Unpicklable", "Unreadable"):
        said = seen[f"{kind} {door}"]
        assert refused(said, "rank 1 failed", kind), said
    said = seen[f"KeyboardInterrupt {door}"]  # goes on on its own rank
    assert said[1].startswith("KeyboardInterrupt"), said
    assert refused(said[:1], "rank 1 failed: KeyboardInterrupt"), said


def test_the_traceback_is_kept(seen: Seen) -> None:
    assert all("in items" in said and "no such thing" in said for said in seen["traceback"])
    assert seen["cause"] == ["None", "ValueError"]


def test_a_copy_that_fails_on_one_rank_is_everybodys_error(seen: Seen) -> None:
    said = seen["no memory"]
    assert refused(said, "rank 1 failed"), said
    assert all("memory" in s.lower() for s in said), said


def test_parts_without_elements_are_read_by_plain_torch(seen: Seen) -> None:
    assert seen["no elements"] == ["right", "right"]
    assert seen["outside of the mesh"] == ["right", "right"]


# -- on a rank ---------------------------------------------------------------------------------------------------------


def situation(ranks: int) -> Callable[[Callable[[int, Path], Any]], Callable[[int, Path], Any]]:
    """Register what so many ranks do: it returns, or yields a name and a work of each of its situations."""

    def keep(do: Callable[[int, Path], Any]) -> Callable[[int, Path], Any]:
        SITUATIONS.setdefault(ranks, []).append(do)
        return do

    return keep


SITUATIONS: dict[int, list[Callable[[int, Path], Any]]] = {}


def meet(rank: int, ranks: int, file: Path, backend: str = "gloo") -> None:
    import torch.distributed as dist

    dist.init_process_group(
        backend, init_method=f"file://{file}", rank=rank, world_size=ranks, timeout=timedelta(seconds=20)
    )


def sharded(tensor: Any, ranks: int | tuple[int, ...] = 2) -> Any:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    shape = ranks if isinstance(ranks, tuple) else (ranks,)
    return distribute_tensor(
        tensor, init_device_mesh("cpu", shape), [Shard(0), *[Replicate()] * (len(shape) - 1)], src_data_rank=None
    )


def plain(path: Path, state: dict[str, Any]) -> dict[str, Any]:
    """Filled by plain torch, on this rank alone."""
    import torch.distributed.checkpoint as dcp

    dcp.load(state, checkpoint_id=str(path), no_dist=True)
    return state


def equal(a: Any, b: Any) -> str:
    return "right" if a.tolist() == b.tolist() else f"{a.tolist()}, expected {b.tolist()}"


@situation(2)
def again(rank: int, folder: Path) -> Iterator[tuple[str, Callable[[], Any]]]:
    """The first of all: these ranks meet twice, the second time the other way round."""
    import torch
    import torch.distributed as dist

    import reshard

    whole = torch.arange(8.0)
    old = sharded(whole)
    mine = old.to_local().clone()
    reshard.save(folder / "first", {"w": old})
    reshard.load(folder / "first", {"w": sharded(whole * 0)})
    saver = reshard.AsyncSaver()
    saver.save(folder / "by-saver", {"w": old})
    saver.wait()
    dist.barrier()
    dist.destroy_process_group()
    meet(1 - rank, 2, folder / "meeting-2")

    def load() -> str:
        new, reference = sharded(whole * 0), sharded(whole)
        reshard.load(folder / "first", {"w": new})
        return equal(new.to_local(), reference.to_local())

    def save() -> str:
        reshard.save(folder / "second", {"w": sharded(whole)})
        return equal(plain(folder / "second", {"w": torch.zeros(8)})["w"], whole)

    def both() -> str:
        """A tensor of the first meeting beside one of the second: each rank holds of it what it held."""
        old.to_local().copy_(mine)
        reshard.save(folder / "third", {"old": old, "new": sharded(whole)})
        found = plain(folder / "third", {"old": torch.zeros(8), "new": torch.zeros(8)})
        return equal(torch.cat([found["old"], found["new"]]), torch.cat([whole, whole]))

    yield "meet again", lambda: [load(), save(), both()]
    yield "old saver", lambda: [ended(lambda: saver.save(folder / "fourth", {"w": sharded(whole)}))]

    def group_anew() -> str:
        dist.barrier()
        for name, order in (("a", rank), ("b", 1 - rank)):
            dist.destroy_process_group()
            meet(order, 2, folder / f"no-cpu-{name}", "cuda:gloo")  # a default group that moves no CPU tensors
            reshard.save(folder / name, {"w": whole, "by": "all"})
            reshard.load(folder / name, {"w": torch.zeros(8)})
        dist.destroy_process_group()
        meet(rank, 2, folder / "meeting-3")
        return equal(plain(folder / "b", {"w": torch.zeros(8)})["w"], whole)

    yield "group anew", group_anew


@situation(2)
def turns(rank: int, folder: Path) -> Iterator[tuple[str, Callable[[], Any]]]:
    import torch

    import reshard

    def work() -> str:
        with reshard.AsyncSaver() as saver:
            for step, extra in enumerate((0, 1, 0, 1, 0)):  # of rank 1 alone, large enough to change who writes what
                state = {f"w{i}": torch.full((1000,), float(step + i)) for i in range(4)}
                if rank == 1 and extra:
                    state["extra"] = torch.full((5000,), float(step))
                elif rank == 1:
                    state["other"] = torch.full((20,), float(step))
                saver.save(folder / f"turn-{step}", state)
                saver.wait()
                found = plain(folder / f"turn-{step}", {f"w{i}": torch.zeros(1000) for i in range(4)})
                for i in range(4):
                    if equal(found[f"w{i}"], torch.full((1000,), float(step + i))) != "right":
                        return f"w{i} of step {step}"
        return "right"

    yield "plans in turns", work


class Raises(UserDict[str, Any]):
    """A state whose reading raises."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error = error

    def items(self) -> Any:
        raise self.error


def errors() -> dict[str, BaseException]:
    class Unpicklable(Exception):
        """Of a class that no other process can find."""

    class Unreadable(Exception):
        def __str__(self) -> str:
            raise TypeError("has no words")

    return {
        "ValueError": ValueError("no such thing"), "Unpicklable": Unpicklable(), "Unreadable": Unreadable(),
        "KeyboardInterrupt": KeyboardInterrupt(),
    }  # fmt: skip


@situation(2)
def one_rank(rank: int, folder: Path) -> Iterator[tuple[str, Callable[[], Any]]]:
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial, Shard

    import reshard

    mesh = init_device_mesh("cpu", (2,))
    ones = torch.ones(2)

    def part(local: Any, placement: Any = None, rows: int = 4) -> Any:
        return DTensor.from_local(
            local, mesh, [placement or Shard(0)], run_check=False, shape=torch.Size([rows]), stride=(1,)
        )

    reshard.save(folder / "good", {"w": torch.ones(3, 4), "a": 1})
    for kind, error in errors().items():
        state = {"part": Raises(error)} if rank else {"part": {}}
        yield f"{kind} save", lambda state=state: reshard.save(folder / "bad", state)
        yield f"{kind} AsyncSaver", lambda state=state: reshard.AsyncSaver().save(folder / "bad", state)
        yield f"{kind} load", lambda state=state: reshard.load(folder / "good", state)

    def caught() -> BaseException:
        try:
            reshard.save(folder / "bad", {"part": Raises(ValueError("no such thing"))} if rank else {})
        except reshard.ReshardError as error:
            return error
        return KeyError()

    yield "traceback", lambda: getattr(caught(), "traceback", "")
    yield "cause", lambda: type(caught().__cause__).__name__.replace("NoneType", "None")

    yield "hole", lambda: reshard.save(folder / "bad", {"w": part(ones)} if rank else {"x": 1})
    yield "shapes", lambda: reshard.save(folder / "bad", {"w": torch.ones(4 + rank)})
    yield "partial", lambda: reshard.save(folder / "bad", {"w": part(ones, Partial(), 2) if rank else ones})
    target = torch.zeros(3, 4) if rank else torch.zeros(1, 4).expand(3, 4)
    yield "expanded", lambda: reshard.load(folder / "good", {"w": target})
    yield "step", lambda: reshard.save(folder / "step-3", {"w": ones}, step=8 if rank else 3)
    yield "address", lambda: reshard.save("s3://bucket/x", {"w": ones})

    larger = torch.ones(3) if rank else torch.ones(2)
    for door, work in doors(folder, "bad", part(larger)):
        yield f"larger part {door}", work
    other = part(ones)
    if rank:
        other._local_tensor = ones.double()
    yield "other dtype", lambda: reshard.save(folder / "bad", {"w": other})
    odd = part(ones)
    if rank:
        odd._local_tensor = ones.as_subclass(type("Odd", (torch.Tensor,), {"copy_": lambda self, _: self}))
    yield "subclass part", lambda: reshard.save(folder / "bad", {"w": odd})

    def no_memory() -> Any:
        saver = reshard.AsyncSaver()
        state = {"w": torch.ones(1)}
        before = resource.getrlimit(resource.RLIMIT_AS)
        if rank:
            state["large"] = torch.zeros(1, dtype=torch.int8).expand(32, 1 << 26)
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 28), before[1]))
        try:
            saver.save(folder / "bad", state)
            saver.wait()
        finally:
            resource.setrlimit(resource.RLIMIT_AS, before)

    yield "no memory", no_memory
    yield (
        "nothing left",
        lambda: [path.name for path in folder.iterdir() if path.name.startswith(("bad", "s3", "step-3"))],
    )

    def no_elements() -> str:
        empty = {"a": sharded(torch.zeros(0, 3)), "b": torch.zeros(2, 0), "c": sharded(torch.arange(1.0))}
        reshard.save(folder / "empty", empty)
        found = plain(folder / "empty", {"a": torch.zeros(0, 3), "b": torch.zeros(2, 0), "c": torch.ones(1)})
        reshard.load(folder / "empty", {"a": sharded(torch.zeros(0, 3)), "b": torch.zeros(2, 0)})
        return equal(found["c"], torch.zeros(1))

    yield "no elements", no_elements

    def outside() -> str:
        """A tensor whose mesh has one of the two ranks."""
        from torch.distributed.device_mesh import DeviceMesh
        from torch.distributed.tensor import Replicate, distribute_tensor

        alone = DeviceMesh("cpu", [0])
        for name, whole in (("scalar", torch.tensor(5.0)), ("rows", torch.arange(3.0))):
            placements = [Shard(0)] if whole.ndim else [Replicate()]
            state, target = (distribute_tensor(t, alone, placements, src_data_rank=None) for t in (whole, whole * 0))
            reshard.save(folder / name, {"w": state, "all": torch.ones(1)})
            reshard.load(folder / name, {"w": target})
            if rank == 0 and equal(target.to_local(), whole) != "right":
                return f"{name}: {target.to_local()}"
            if equal(plain(folder / name, {"w": torch.zeros_like(whole)})["w"], whole) != "right":
                return name
        return "right"

    yield "outside of the mesh", outside


def doors(folder: Path, name: str, tensor: Any) -> Iterator[tuple[str, Callable[[], Any]]]:
    """The ways to save and to fill a tensor."""
    import torch
    import torch.distributed.checkpoint as dcp

    import reshard
    from reshard.checkpoint.adapters import ReshardReader, ReshardWriter

    good = folder / f"good-for-{name}"
    reshard.save(good, {"w": torch.arange(float(tensor.numel())).reshape(tensor.shape)})
    yield "save", lambda: reshard.save(folder / name, {"w": tensor})
    yield "load", lambda: reshard.load(good, {"w": tensor})
    yield "ReshardWriter", lambda: dcp.save({"w": tensor}, storage_writer=ReshardWriter(folder / "w"))
    yield "ReshardReader", lambda: dcp.load({"w": tensor}, storage_reader=ReshardReader(good))


@situation(6)
def fsdp_over_tp(rank: int, folder: Path) -> Iterator[tuple[str, Callable[[], Any]]]:
    import torch
    import torch.distributed.checkpoint as dcp
    from torch import nn
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Replicate, distribute_tensor
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
    from torch.distributed.tensor.placement_types import _StridedShard

    import reshard
    from reshard.checkpoint.adapters import ReshardReader, ReshardWriter

    mesh = init_device_mesh("cpu", (3, 2), mesh_dim_names=("dp", "tp"))

    def model(rows: int) -> dict[str, Any]:
        net = nn.Sequential(nn.Linear(1, rows))
        with torch.no_grad():
            net[0].bias.copy_(torch.arange(float(rows)))
        parallelize_module(net, mesh["tp"], {"0": ColwiseParallel()})
        fully_shard(net, mesh=mesh["dp"])
        return {"0.bias": net.state_dict()["0.bias"]}

    def save(path: Path, state: dict[str, Any], door: str) -> str:
        if door == "save":
            reshard.save(path, state)
        elif door == "ReshardWriter":
            dcp.save(state, storage_writer=ReshardWriter(path))
        else:
            with reshard.AsyncSaver() as saver:
                saver.save(path, state)
        rows = len(state["0.bias"])
        return (
            "right" if rank else equal(plain(path, {"0.bias": torch.zeros(rows)})["0.bias"], torch.arange(float(rows)))
        )

    def fill(path: Path, state: dict[str, Any], door: str) -> str:
        local = state["0.bias"].to_local()
        wanted = local.clone()
        local.fill_(-1)
        if door == "load":
            reshard.load(path, state)
        else:
            dcp.load(state, storage_reader=ReshardReader(path))
        return equal(local, wanted)

    for rows in (7, 13, 10):
        state, good = model(rows), folder / f"good-{rows}"
        reshard.save(good, {"0.bias": torch.arange(float(rows))})
        for door in ("save", "AsyncSaver", "ReshardWriter"):
            yield f"fsdp x tp {rows} {door}", partial(save, folder / f"c-{rows}-{door}", state, door)
        for door in ("load", "ReshardReader"):
            yield f"fsdp x tp {rows} {door}", partial(fill, good, state, door)

    rows = torch.arange(24.0).view(12, 2)
    interleaved = distribute_tensor(rows, mesh, [_StridedShard(0, split_factor=2), Replicate()], src_data_rank=None)
    for door, work in doors(folder, "interleaved", interleaved):
        yield f"interleaved {door}", work


def ended(work: Callable[[], Any]) -> Any:
    try:
        return work()
    except BaseException as error:
        text = str(error) if "Unreadable" not in type(error).__name__ else ""
        return f"{type(error).__name__}: {text}"


def be_rank(rank: int, ranks: int, folder: Path) -> None:
    """Writes what this rank has seen. Never returns: see examples/fsdp2_loop.py."""
    try:
        meet(rank, ranks, folder / f"meeting-of-{ranks}")
        seen = {name: ended(work) for do in SITUATIONS[ranks] for name, work in do(rank, folder)}
        (folder / f"seen-{ranks}-{rank}.json").write_text(json.dumps(seen))
        sys.stderr.flush()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


def main(folder: Path) -> None:
    import torch._dynamo
    import torch.distributed.checkpoint
    import torch.distributed.fsdp  # all of it before the ranks are forked, which would each take a second for it

    import reshard.checkpoint.adapters
    import reshard.checkpoint.api  # noqa: F401

    torch.set_num_threads(1)
    found: Seen = {}
    for ranks in SITUATIONS:
        fork = multiprocessing.get_context("fork")
        processes = [fork.Process(target=be_rank, args=(rank, ranks, folder)) for rank in range(ranks)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        if any(process.exitcode for process in processes):
            sys.exit(1)
        for rank in range(ranks):
            for name, said in json.loads((folder / f"seen-{ranks}-{rank}.json").read_text()).items():
                found.setdefault(name, []).append(said)
    (folder / "seen.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
