"""Does the engine serve somebody else's training loop? FSDP2 with reshard.save and load, and torch's own save and load.

torchrun --nproc-per-node 2 test_engine_api.py CASE FOLDER          what the ranks of these tests do
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PROJECT = Path(__file__).resolve().parents[2]


def torchrun(ranks: int, *arguments: object) -> str:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    done = subprocess.run(
        [*command, *map(str, arguments)], check=False, capture_output=True, text=True, timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def on_ranks(ranks: int, case: str, folder: Path) -> list[Any]:
    """What each rank returned."""
    torchrun(ranks, __file__, case, folder)
    return [json.loads((folder / f"{case}-{rank}.json").read_text()) for rank in range(ranks)]


@pytest.mark.slow
def test_the_example_runs_and_goes_on_with_another_number_of_ranks(tmp_path: Path) -> None:
    first = torchrun(2, PROJECT / "examples/fsdp2_loop.py", tmp_path / "c").splitlines()
    assert [line.split()[1] for line in first] == [str(step) for step in range(1, 21)]
    names = {path.name for path in (tmp_path / "c").iterdir()}
    assert names == {"step-5", "step-10", "step-15", "step-20"}
    # The run dies after step 12, say: what it saved later is not there, and something torn is.
    for name in ("step-15", "step-20"):
        (tmp_path / "c" / name / "manifest.json").unlink()
    again = torchrun(2, PROJECT / "examples/fsdp2_loop.py", tmp_path / "c").splitlines()
    assert again == first[10:]  # to the last digit that it prints
    for name in ("step-15", "step-20"):
        (tmp_path / "c" / name / "manifest.json").unlink()
    other = torchrun(1, PROJECT / "examples/fsdp2_loop.py", tmp_path / "c").splitlines()
    assert [line.split()[1] for line in other] == [str(step) for step in range(11, 21)]


@pytest.mark.slow
def test_a_state_of_two_ranks_loads_bit_for_bit_on_other_numbers(tmp_path: Path) -> None:
    on_ranks(2, "save", tmp_path)
    for ranks in (1, 2, 3):
        assert on_ranks(ranks, "load", tmp_path) == ["same"] * ranks


@pytest.mark.slow
def test_torchs_save_and_load_through_the_adapters(tmp_path: Path) -> None:
    assert on_ranks(2, "adapters", tmp_path) == ["same", "same"]


@pytest.mark.slow
def test_background_saves_whose_parts_change_on_one_rank(tmp_path: Path) -> None:
    """What the other one had staged by the old plan is not what it has to write."""
    assert on_ranks(2, "news", tmp_path) == ["same", "same"]


@pytest.mark.slow
def test_mistakes_are_the_same_error_on_all_ranks(tmp_path: Path) -> None:
    seen = on_ranks(2, "mistakes", tmp_path)
    assert seen[0] == seen[1]
    words = [["`seen`", "rank 1"], ["`odd`", "a set"], ["missing", "absent"], ["`loader`"], ["step-7", "CRC32"]]
    words += [["step-9", "holds notes.txt"]] * 2  # at once, and in the background
    words += [["`model`", "model.1"]]
    assert len(seen[0]) == len(words)
    for message, expected in zip(seen[0], words, strict=True):
        assert all(word in message for word in expected), message


# -- on a rank


def model_and_optimizer(seed: int) -> Any:
    import torch
    from torch import nn
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(seed)
    model = fully_shard(nn.Sequential(nn.Linear(33, 70), nn.GELU(), nn.Linear(70, 5)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01 * (1 + seed))
    for step in range(2):
        x = torch.randn(8, 33, generator=torch.Generator().manual_seed(step))
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def state_of(model: Any, optimizer: Any, step: int) -> dict[str, Any]:
    from torch.distributed.checkpoint.state_dict import get_state_dict

    weights, moments = get_state_dict(model, optimizer)
    return {"model": weights, "optimizer": moments, "step": step, "tags": ["a", 1]}


def digests(state: Any, prefix: str = "") -> dict[str, str]:
    """Name -> digest of the whole tensor, put together by DTensor, or the value itself."""
    import hashlib

    from torch import Tensor
    from torch.distributed.tensor import DTensor

    found: dict[str, str] = {}
    for key, value in state.items() if isinstance(state, dict) else enumerate(state):
        name = f"{prefix}{key}"
        if isinstance(value, Tensor):
            whole = (value.full_tensor() if isinstance(value, DTensor) else value).detach().contiguous()
            found[name] = hashlib.blake2b(whole.numpy().tobytes(), digest_size=8).hexdigest()
        elif isinstance(value, dict | list):
            found |= digests(value, f"{name}.")
        else:
            found[name] = repr(value)
    return found


def case_save(folder: Path) -> Any:
    import torch.distributed as dist

    import reshard

    state = state_of(*model_and_optimizer(0), step=11)
    reshard.save(folder / "step-11", state)
    whole = digests(state)
    if dist.get_rank() == 0:
        (folder / "digests.json").write_text(json.dumps(whole))
    return "saved"


def case_load(folder: Path) -> Any:
    import torch.distributed as dist

    import reshard
    import reshard.checkpoint.load

    model, optimizer = model_and_optimizer(1)
    state = state_of(model, optimizer, step=0)
    before = digests(state)
    expected = json.loads((folder / "digests.json").read_text())
    assert before.keys() == expected.keys()
    assert before != expected
    if dist.get_rank() > 0:  # one rank reads the index, for all

        def refuse(*_: Any) -> Any:
            raise AssertionError("a second rank has read the index")

        reshard.checkpoint.load.open_index = refuse
    reshard.load(reshard.newest(folder), state)
    return "same" if digests(state) == expected else "different"


def case_adapters(folder: Path) -> Any:
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp

    from reshard.checkpoint.adapters import ReshardReader, ReshardWriter
    from reshard.checkpoint.verify import verify_checkpoint

    state = state_of(*model_and_optimizer(0), step=3)
    expected = digests(state)
    dcp.save(state, storage_writer=ReshardWriter(folder / "sync"))
    future: Any = dcp.async_save(state, storage_writer=ReshardWriter(folder / "async"))
    future.result()
    dcp.save(state, checkpoint_id=str(folder / "plain"))
    dist.barrier()
    assert verify_checkpoint(folder / "sync").whole
    assert verify_checkpoint(folder / "async").whole
    for name, reader in (
        ("sync", ReshardReader), ("async", ReshardReader), ("plain", ReshardReader), ("sync", dcp.FileSystemReader),
    ):  # fmt: skip
        other = state_of(*model_and_optimizer(1), step=0)
        dcp.load(other, storage_reader=reader(folder / name))
        if digests(other) != expected:
            return f"different: {name} by {reader.__name__}"
    return "same"


def case_news(folder: Path) -> Any:
    import torch
    import torch.distributed as dist

    from reshard.checkpoint.load import load
    from reshard.checkpoint.ranks import Ranks
    from reshard.checkpoint.save import About
    from reshard.checkpoint.saver import Saver

    rank = dist.get_rank()
    ranks, background = (Ranks(dist.new_group(backend="gloo")) for _ in range(2))
    by_rank_0 = []
    with Saver(ranks, background) as saver:
        for step in (1, 2, 3, 4):
            replicas = {f"w{i}": torch.full((50_000,), 100.0 * step + i) for i in range(8)}
            state = {**replicas, **({"extra": torch.ones(400_000)} if rank == 1 and step > 2 else {})}
            directory = folder / f"news-{step}"
            saver.start(directory, state, About(step=step, kind="full", source={"kind": "test"}))
            for tensor in state.values():
                tensor.fill_(-1)  # training goes on
            saver.collect()
            by_rank_0.append((directory / "__0_0.distcp").stat().st_size)
            found = {name: torch.zeros(50_000) for name in replicas}
            load(directory, found, ranks)
            for i, tensor in enumerate(found.values()):
                if not torch.equal(tensor, torch.full_like(tensor, 100.0 * step + i)):
                    return f"different: w{i} of step {step}"
    assert by_rank_0[0] == by_rank_0[1] < 900_000  # half of them; then rank 1 is busy with what it has got
    assert by_rank_0[2] == by_rank_0[3] > 1_600_000
    return "same"


def case_mistakes(folder: Path) -> Any:
    """What went wrong, in words."""
    import torch
    import torch.distributed as dist

    import reshard

    rank, seen = dist.get_rank(), []

    def trying(work: Any) -> None:
        try:
            work()
        except reshard.ReshardError as error:
            seen.append(error.message)

    a = torch.arange(300_000.0)
    trying(lambda: reshard.save(folder / "step-1", {"a": a, "seen": rank}))
    trying(lambda: reshard.save(folder / "step-1", {"a": a, "odd": {1} if rank == 1 else 1}))
    reshard.save(folder / "step-7", {"a": a, "ours": 1, f"of rank {rank}": rank})
    trying(lambda: reshard.load(folder / "step-7", {"a": a, "absent" if rank else "ours": 0}))
    trying(lambda: reshard.save(folder / "step-1", {"a": a, "loader": iter([]) if rank == 0 else 0}))
    if rank == 0:
        for path in (folder / "step-7").glob("*.distcp"):
            content = bytearray(path.read_bytes())
            content[len(content) // 2] ^= 1
            path.write_bytes(content)
    dist.barrier()
    trying(lambda: reshard.load(folder / "step-7", {"a": a}))
    if rank == 0:
        (folder / "step-9").mkdir()
        (folder / "step-9" / "notes.txt").write_text("somebody's")
    dist.barrier()
    trying(lambda: reshard.save(folder / "step-9", {"a": a}))
    with reshard.AsyncSaver() as saver:
        trying(lambda: saver.save(folder / "step-9", {"a": a}))
    assert [path.name for path in folder.glob("step-9*")] == ["step-9"]
    assert [path.name for path in (folder / "step-9").iterdir()] == ["notes.txt"]
    # Each rank has a stage of the model, and all of it is taken if each takes its own.
    stages = [{"model": {str(stage): torch.full((9,), 1.0 + stage)}} for stage in range(2)]
    reshard.save(folder / "step-8", {**stages[rank], "step": 8})
    mine = {"model": {str(rank): torch.zeros(9)}}
    assert reshard.load(folder / "step-8", mine) == ["step"]
    assert torch.equal(mine["model"][str(rank)], stages[rank]["model"][str(rank)])
    trying(lambda: reshard.load(folder / "step-8", {"model": {"0": torch.zeros(9)}} if rank == 0 else {"step": 0}))
    assert reshard.load(folder / "step-8", {"step": 0} if rank else {}) == ["model.0", "model.1"]
    assert not (folder / "step-1").exists()
    return seen


if __name__ == "__main__":
    import torch.distributed as dist

    dist.init_process_group("gloo")
    where = Path(sys.argv[2])
    result = globals()[f"case_{sys.argv[1]}"](where)
    (where / f"{sys.argv[1]}-{dist.get_rank()}.json").write_text(json.dumps(result))
    dist.destroy_process_group()
    os._exit(0)  # see examples/fsdp2_loop.py
