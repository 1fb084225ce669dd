"""Is what ranks hold under one name the same, and what happens where it is not? On four forked gloo ranks.

python test_engine_replicas.py FOLDER          what the ranks of these tests do: all cases, one after the other
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest

RANKS = 4
Answers = dict[str, list[Any]]


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Answers:
    """What each case returned on each rank."""
    folder = tmp_path_factory.mktemp("replicas")
    done = subprocess.run(
        [sys.executable, __file__, str(folder)], check=False, capture_output=True, text=True, timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    of_ranks = [json.loads((folder / f"answers-{rank}.json").read_text()) for rank in range(RANKS)]
    return {case: [of_rank[case] for of_rank in of_ranks] for case in of_ranks[0]}


def refused(answer: dict[str, Any], *words: str) -> None:
    """One error on every rank that says what, and nothing on the disk."""
    assert answer["error"] == "CheckpointError", answer
    for word in words:
        assert word in answer["message"], answer["message"]
    assert 'differ="first"' in answer["hint"]
    assert not answer["left"]


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("one element", ["`w`", "rank 2 not as rank 0"]),
        ("the sign of a zero", ["`zero`", "rank 2 not as rank 0"]),
        ("another NaN", ["`nan`", "rank 3 not as rank 0"]),
        ("a scalar in bfloat16", ["`scalar`", "ranks 1, 3 not as rank 0"]),
        ("columns", ["`columns`", "rank 3 not as rank 0"]),
        ("among those that have it", ["`some`", "rank 3 not as rank 1"]),
        ("two names", ["`a` (rank 1 not as rank 0)", "`b` (rank 3 not as rank 2)"]),
        ("one of many", ["`many.777`", "rank 1 not as rank 0"]),
        ("stages", ["`layers.0.w`", "ranks 2, 3 not as rank 0"]),
        ("plain and DTensor", ["`w`", "rank 3 not as rank 0"]),
        ("values", ["`rate`", "ranks 1, 2, 3 not as rank 0"]),
        ("values and kinds", ["`step`", "rank 3 not as rank 0"]),
    ],
)
def test_what_differs_is_refused_on_all_ranks_by_name_and_rank(answers: Answers, case: str, words: list[str]) -> None:
    for answer in answers["differ"]:
        refused(answer[case], *words)


@pytest.mark.parametrize("case", ["equal", "views, equal", "two meshes, equal", "own names"])
def test_what_is_equal_is_saved(answers: Answers, case: str) -> None:
    for answer in answers["differ"]:
        assert answer[case]["error"] is None, answer[case]


def test_beyond_64_mib_the_small_ones_are_compared_in_full_and_the_log_says_that_not_all_was(answers: Answers) -> None:
    for rank, answer in enumerate(answers["large"]):
        refused(answer["small one"], "`small` (rank 1 not as rank 0)")
        refused(answer["large one"], "`large` (rank 3 not as rank 0)")
        assert answer["equal"]["error"] is None
        said = [line for line in answer["log"] if "not all was compared" in line]
        assert len(said) == (1 if rank == 0 else 0)


def test_first_stores_what_the_lowest_rank_has_and_names_it(answers: Answers) -> None:
    for rank, answer in enumerate(answers["first"]):
        assert answer["stored"] == {"w": 0.0, "some": 1.0, "same": 7.0, "b0": 0.0, "b1": 0.0, "b2": 0.0, "b3": 0.0}
        assert answer["value"] == "of 0"
        assert answer["own"] == [0, 1, 2, 3]
        log = "\n".join(answer["log"])
        for name in ("`w`", "`some`", "`b3`", "`tag`"):
            assert (name in log) == (rank == 0)
        assert "same" not in log


def test_each_save_of_an_async_saver_is_compared_before_it_returns(answers: Answers) -> None:
    for answer in answers["background"]:
        assert answer["equal"] is None
        assert "`w` (rank 1 not as rank 0)" in answer["other"]
        assert answer["equal again"] is None
        assert answer["left"] == ["step-1", "step-3"]
        assert answer["first"] == [[5.0, 0.0], [6.0, 6.0]]


def test_batch_norm_under_ddp(answers: Answers) -> None:
    for answer in answers["batch_norm"]:
        refused(answer["refused"], "`model.1.running_mean`", "`model.1.running_var`", "ranks 1, 2, 3 not as rank 0")
        assert "num_batches_tracked" not in answer["refused"]["message"]
        assert "weight" not in answer["refused"]["message"]
        assert answer["stored"] == [True, True]


def test_ranks_that_do_not_agree_on_what_is_asked_for(answers: Answers) -> None:
    for answer in answers["asked"]:
        assert "differ" in answer["one"]["message"]
        assert answer["wrong"]["error"] == "ConfigError"


@pytest.mark.parametrize("case", ["rows", "attributes", "parameter", "local part"])
def test_tensors_that_say_they_are_parts_are_refused_by_name(answers: Answers, case: str) -> None:
    for answer in answers["parts"]:
        for verb in ("save", "load", "background"):
            error = answer[case][verb]
            # The whole of a DTensor has another shape than what is stored, which is seen first.
            expected = "TensorMismatch" if (case, verb) == ("local part", "load") else "CheckpointError"
            assert error["error"] == expected, error
            assert "`model.w`" in error["message"] or expected == "TensorMismatch"
        assert not answer[case]["background"]["left"]
        assert answer[case]["untouched"]


def test_torchs_own_save_through_the_adapter(answers: Answers) -> None:
    for answer in answers["adapter"]:
        for case, words in {
            "tensor": "`model.w` (rank 2 not as rank 0)",
            "value": "`note` (ranks 1, 2, 3 not as rank 0)",
            "large": "`large` (rank 1 not as rank 0)",
            "not the lowest": "the lowest that has it",
            "part": "it is a part of a tensor, as its",
            "attributes": "it is a part of a tensor, as its",
        }.items():
            assert words in answer[case], answer[case]
        assert answer["left"] == ["equal", "first"]
        assert answer["first"] == [0.0, 0.0]
        assert "it is a part of a tensor, as its" in answer["load"]


# -- on a rank


def trying(folder: Path, work: Callable[[], Any]) -> dict[str, Any]:
    """What went wrong, and what lies in the folder then. Collective."""
    import torch.distributed as dist

    import reshard

    said: dict[str, Any] = {"error": None}
    try:
        work()
    except reshard.ReshardError as error:
        said = {"error": type(error).__name__, "message": error.message, "hint": error.hint or ""}
    dist.barrier()
    said["left"] = sorted(str(path) for path in folder.rglob("*"))
    dist.barrier()
    return said


def plain(directory: Path) -> dict[str, Any]:
    """All tensors of a checkpoint, read by plain torch."""
    import torch
    import torch.distributed.checkpoint as dcp

    reader = dcp.FileSystemReader(directory)
    entries: Any = reader.read_metadata().state_dict_metadata
    tensors = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in entries.items()}
    dcp.load(tensors, storage_reader=dcp.FileSystemReader(directory), no_dist=True)
    return tensors


class Log(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        logging.getLogger("reshard").addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def case_differ(folder: Path, rank: int) -> Any:
    import torch
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Replicate, Shard

    import reshard

    def changed(on: int, tensor: Any, at: Any, to: Any) -> Any:
        if rank == on:
            tensor[at] = to
        return tensor

    base = torch.arange(40_000.0)
    quiet = torch.tensor([0x7FC00000, 0], dtype=torch.int32).view(torch.float32)
    other = torch.tensor([0x7FC00001, 0], dtype=torch.int32).view(torch.float32)
    pairs = DeviceMesh("cpu", [0, 1]), DeviceMesh("cpu", [2, 3])
    mesh, whole = pairs[rank // 2], DeviceMesh("cpu", [0, 1, 2])

    def stage(fill: float) -> Any:
        return DTensor.from_local(torch.full((2, 3), fill), mesh, [Shard(0)], run_check=False)

    replica = torch.full((5,), 2.0 + (rank == 3))
    states: dict[str, dict[str, Any]] = {
        "one element": {"w": changed(2, base.clone(), 39_999, 1.0)},
        "the sign of a zero": {"zero": torch.tensor([1.0, -0.0 if rank == 2 else 0.0])},
        "another NaN": {"nan": other if rank == 3 else quiet},
        "a scalar in bfloat16": {"scalar": torch.tensor(float(rank % 2), dtype=torch.bfloat16)},
        "columns": {"columns": changed(3, base.view(200, 200).clone(), (7, 9), -1.0).t()[3:]},
        "among those that have it": {"same": base, **({"some": torch.tensor([rank == 3])} if rank else {})},
        "two names": {
            **({"a": torch.tensor(rank)} if rank < 2 else {"b": torch.tensor(rank == 2)}), "c": torch.tensor(9),
        },
        "one of many": {"many": [torch.full((3, 2), float(i + (i == 777 and rank == 1))) for i in range(1_000)]},
        "stages": {"layers": [{"w": stage(float(rank // 2))}]},
        "plain and DTensor": {
            "w": replica if rank == 3 else DTensor.from_local(replica, whole, [Replicate()], run_check=False)
        },
        "values": {"rate": 0.5 if rank == 0 else 0.25, "same": [1, "x"]},
        "values and kinds": {"step": 1.0 if rank == 3 else 1},
        "equal": {"w": base, "nan": quiet.clone(), "columns": base.view(200, 200).t(), "step": 1, "none": None},
        "views, equal": {name: torch.full((n,), 1 + 2j).conj() for name, n in (("a", 3), ("b", 3), ("c", 9000))},
        "two meshes, equal": {"layers": [{"w": stage(3.0)}]},
        "own names": {f"of rank {rank}": torch.tensor(rank), f"value {rank}": rank},
    }  # fmt: skip
    return {
        case: trying(folder / case, partial(reshard.save, folder / case / "step-1", state))
        for case, state in states.items()
    }


def case_large(folder: Path, rank: int) -> Any:
    import torch

    import reshard

    log = Log()
    state = {"large": torch.zeros(17 << 20), "small": torch.zeros(5_000)}  # 68 MiB
    result: dict[str, Any] = {"equal": trying(folder, lambda: reshard.save(folder / "equal/step-1", state))}
    state["small"][4_321] = float(rank == 1)
    result["small one"] = trying(folder / "none", lambda: reshard.save(folder / "none/step-1", state))
    state["small"].zero_()
    state["large"].fill_(float(rank == 3))
    result["large one"] = trying(folder / "none", lambda: reshard.save(folder / "none/step-1", state))
    return result | {"log": log.lines}


def case_first(folder: Path, rank: int) -> Any:
    import torch
    import torch.distributed as dist

    import reshard

    log = Log()
    state: dict[str, Any] = {
        "w": torch.full((3,), float(rank)), "same": torch.full((900,), 7.0), "tag": f"of {rank}", f"own {rank}": rank,
        **{f"b{i}": torch.full((50 * i + 1,), float(rank)) for i in range(4)},
    }  # fmt: skip
    if rank:
        state["some"] = torch.full((2,), float(rank))
    reshard.save(folder / "step-1", state, differ="first")
    dist.barrier()
    stored = {
        name: float(tensor[-1]) for name, tensor in plain(folder / "step-1").items() if not name.startswith("reshard")
    }
    values: dict[str, Any] = {"tag": "", **{f"own {r}": -1 for r in range(RANKS)}}
    reshard.load(folder / "step-1", values)
    own = [values[f"own {r}"] for r in range(RANKS)]
    return {"stored": stored, "value": values["tag"], "own": own, "log": log.lines}


def case_background(folder: Path, rank: int) -> Any:
    import torch

    import reshard

    result: dict[str, Any] = {}
    w = torch.zeros(70_000)
    with reshard.AsyncSaver() as saver:
        for step, case in enumerate(("equal", "other", "equal again"), 1):
            w.fill_(float(rank == 1 and case == "other"))
            try:
                saver.save(folder / f"all/step-{step}", {"w": w})
                result[case] = None
            except reshard.ReshardError as error:
                result[case] = error.message
    result["left"] = sorted(path.name for path in (folder / "all").iterdir())
    found = []
    with reshard.AsyncSaver(differ="first") as saver:
        for step, others in ((5, 0.0), (6, 6.0)):  # by a plan that is known: in the second all are equal again
            state = {"a": torch.full((9,), float(step)), "b": torch.full((9,), others if rank == 0 else 6.0)}
            saver.save(folder / f"first/step-{step}", state)
            for tensor in state.values():
                tensor.fill_(-1)
            saver.wait()
            stored = plain(folder / f"first/step-{step}")
            found.append([float(stored["a"][0]), float(stored["b"][0])])
    return result | {"first": found}


def case_batch_norm(folder: Path, rank: int) -> Any:
    import torch
    import torch.distributed as dist
    from torch import nn
    from torch.nn.parallel import DistributedDataParallel

    import reshard

    torch.manual_seed(0)
    model: Any = DistributedDataParallel(nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for step in range(3):
        x = torch.randn(16, 4, generator=torch.Generator().manual_seed(10 * step + rank))
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    state = {"model": model.module.state_dict(), "optimizer": optimizer.state_dict()}
    result: dict[str, Any] = {
        "refused": trying(folder / "no", lambda: reshard.save(folder / "no/step-3", state)), "stored": []
    }  # fmt: skip
    reshard.save(folder / "step-3", state, differ="first")
    with reshard.AsyncSaver(differ="first") as saver:
        saver.save(folder / "step-4", state)
    dist.barrier()
    mine: Any = {name: tensor.clone() for name, tensor in model.module.state_dict().items()}
    for tensor in mine.values():
        dist.broadcast(tensor, 0)  # what rank 0 has, by torch
    for step in (3, 4):
        stored = plain(folder / f"step-{step}")
        result["stored"].append(all(torch.equal(stored[f"model.{name}"], tensor) for name, tensor in mine.items()))
    return result


def case_asked(folder: Path, rank: int) -> Any:
    import torch

    import reshard

    state, wrong = {"w": torch.ones(2)}, "last"
    one: Any = "first" if rank == 2 else "refuse"
    return {
        "one": trying(folder, lambda: reshard.save(folder / "step-1", state, differ=one)),
        "wrong": trying(folder, lambda: reshard.save(folder / "step-1", state, differ=wrong)),  # type: ignore[arg-type]
    }


def parts(rank: int, fill: float) -> dict[str, Any]:
    import torch
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Shard

    class Rows(torch.Tensor):
        def __create_chunk_list__(self) -> Any:
            return [ChunkStorageMetadata(torch.Size([2 * rank, 0]), torch.Size([2, 3]))]

    def with_attributes(tensor: Any) -> Any:
        tensor.global_shape, tensor.global_offsets = (2 * RANKS, 3), ((2 * rank, 0),)
        tensor.local_offsets, tensor.local_sizes = ((0, 0),), ((2, 3),)
        return tensor

    rows = torch.full((2, 3), fill).as_subclass(Rows)
    local = DTensor.from_local(
        torch.full((2, 3), fill), DeviceMesh("cpu", list(range(RANKS))), [Shard(0)], run_check=False
    )
    local._local_tensor = rows
    return {
        "rows": rows,
        "attributes": with_attributes(torch.full((2, 3), fill)),
        "parameter": with_attributes(torch.nn.Parameter(torch.full((2, 3), fill))),
        "local part": local,
    }


def case_parts(folder: Path, rank: int) -> Any:
    import torch

    import reshard

    reshard.save(folder / "whole", {"model": {"w": torch.ones(2, 3)}, "before": torch.ones(2)})
    saver, none, result = reshard.AsyncSaver(), folder / "none", {}
    for (case, part), target in zip(parts(rank, 1.0).items(), parts(rank, -1.0).values(), strict=True):
        state, into = {"model": {"w": part}}, {"before": torch.zeros(2), "model": {"w": target}}
        result[case] = {
            "save": trying(none, partial(reshard.save, none / "step-1", state)),
            "load": trying(folder, partial(reshard.load, folder / "whole", into)),
            "background": trying(none, partial(saver.save, none / "step-2", state)),
            "untouched": not into["before"].any(),
        }
    return result


def case_adapter(folder: Path, rank: int) -> Any:
    import torch
    import torch.distributed.checkpoint as dcp

    from reshard.checkpoint.adapters import ReshardReader, ReshardWriter

    def save(name: str, state: dict[str, Any], **options: Any) -> str:
        differ = options.pop("differ", "refuse")
        try:
            dcp.save(state, storage_writer=ReshardWriter(folder / name, differ=differ), **options)
        except BaseException as error:  # torch's CheckpointException is none of Exception
            return str(error)
        return "saved"

    w, odd = torch.ones(40, 3), torch.full((40, 3), float(rank))
    state = {"model": {"w": w}, "note": "x", "groups": [{"lr": 0.1, "betas": (0.9, 0.95)}], "set": {1, 2}}
    result: dict[str, Any] = {"equal": save("equal", state)}
    result["tensor"] = save("no", {"model": {"w": w + float(rank == 2)}, "note": "x"})
    result["value"] = save("no", {"model": {"w": w}, "note": f"x{min(rank, 1)}"})
    result["large"] = save("no", {"large": torch.full((17 << 20,), float(rank == 1))})
    lowest = dcp.DefaultSavePlanner(dedup_save_to_lowest_rank=True)
    result["said"] = save("first", {"a": odd, "b": odd}, differ="first", planner=lowest)
    result["not the lowest"] = save("no", {"a": odd, "b": odd}, differ="first")
    own = parts(rank, 1.0)
    result["part"], result["attributes"] = (save("no", {"w": own[kind]}) for kind in ("rows", "attributes"))
    result["left"] = sorted(path.name for path in folder.iterdir() if ".tmp-" not in path.name)
    stored = plain(folder / "first")
    result["first"] = [float(stored[name][0, 0]) for name in ("a", "b")]
    dcp.save({"w": torch.ones(2, 3)}, storage_writer=ReshardWriter(folder / "small"))
    try:
        dcp.load({"w": own["attributes"]}, storage_reader=ReshardReader(folder / "small"))
    except BaseException as error:
        result["load"] = str(error)
    return result


def be_rank(folder: Path, rank: int) -> None:
    """The life of a forked rank. Never returns."""
    import torch.distributed as dist

    status = 1
    try:
        store = dist.FileStore(str(folder / "store"), RANKS)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS, timeout=timedelta(seconds=60))
        results = {}
        for name, case in sorted(globals().items()):
            if name.startswith("case_"):
                place = folder / name
                place.mkdir(exist_ok=True)
                results[name.removeprefix("case_")] = case(place, rank)
                dist.barrier()
        (folder / f"answers-{rank}.json").write_text(json.dumps(results))
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    importlib.import_module("reshard.checkpoint.adapters")  # once, before the ranks are forked
    where = Path(sys.argv[1])
    living = set()
    for number in range(RANKS):
        child = os.fork()
        if child == 0:
            be_rank(where, number)
        living.add(child)
    while living:
        child, status = os.wait()
        living.discard(child)
        if status:  # the others would wait for it
            for other in living:
                os.kill(other, signal.SIGKILL)
            sys.exit(1)
