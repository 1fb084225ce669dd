"""Do others open what we save? The last, weights-only step and the full ones, by torch alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from reshard.model.spec import LlamaSpec, parameter_shapes

SPEC = LlamaSpec(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=128, vocab_size=512)
NAMES = set(parameter_shapes(SPEC))
META_NAMES = {  # spelled out: the table above is ours, this is what torchtune and Meta's code look for
    "tok_embeddings.weight", "norm.weight", "output.weight",
    *(f"layers.{i}.{part}.weight" for i in (0, 1) for part in (
        "attention_norm", "attention.wq", "attention.wk", "attention.wv", "attention.wo",
        "ffn_norm", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3",
    )),
}  # fmt: skip

# Reads a checkpoint with nothing but torch, in a process of its own; prints name -> digest.
PLAIN_READER = """
import hashlib, json, sys
import torch, torch.distributed.checkpoint as dcp
assert "reshard" not in sys.modules
metadata = dcp.FileSystemReader(sys.argv[1]).read_metadata()
state = {n: torch.empty(m.size, dtype=m.properties.dtype) for n, m in metadata.state_dict_metadata.items()}
dcp.load(state, checkpoint_id=sys.argv[1], no_dist=True)
print(json.dumps({n: hashlib.blake2b(f"{t.dtype} {tuple(t.shape)} ".encode()
    + t.reshape(-1).view(torch.uint8).numpy().tobytes(), digest_size=16).hexdigest() for n, t in state.items()}))
"""


def python(*arguments: str | Path) -> str:
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def dcp_to_torch(directory: Path, target: Path) -> Any:
    python("-m", "torch.distributed.checkpoint.format_utils", "dcp_to_torch", directory, target)
    return torch.load(target, weights_only=True)


@pytest.fixture(scope="module")
def runs(launch: Any, tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs of four steps on FSDP 2 x TP 2 that save step 2 in full and step 4 by its weights; one that saves all in full."""
    folder = tmp_path_factory.mktemp("exports")
    alone = {"interval": 2, "model_weights_only": True}
    parts: dict[str, dict[str, Any]] = {
        "full": {"checkpoint": {"interval": 2}},
        "bfloat16": {"checkpoint": {**alone, "export_dtype": "bfloat16"}},
        "float16": {"checkpoint": {**alone, "export_dtype": "float16"}},
        "float32": {"checkpoint": alone},
        "tied": {"checkpoint": {**alone, "export_dtype": "bfloat16"}, "model": {"tied_embeddings": True}},
    }
    for ranks in launch.each([tiny(folder / name, "fsdp2xtp2", **changes) for name, changes in parts.items()]):
        assert ranks[0].error is None
    return {name: folder / name / "checkpoint" for name in parts}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_the_last_step_is_the_weights_in_the_export_dtype(dtype: str, runs: dict[str, Path], plain: Any) -> None:
    full, weights = plain(runs["full"] / "step-4"), plain(runs[dtype] / "step-4")
    assert set(weights) == META_NAMES == NAMES
    for name, tensor in weights.items():
        assert tensor.dtype == getattr(torch, dtype)
        assert torch.equal(tensor, full[f"model.{name}"].to(tensor.dtype)), name


def test_dcp_to_torch_of_the_last_step_opens_with_exactly_the_meta_names(
    runs: dict[str, Path], plain: Any, tmp_path: Path
) -> None:
    found = dcp_to_torch(runs["bfloat16"] / "step-4", tmp_path / "checkpoint.pt")
    assert set(found) == META_NAMES
    stored = plain(runs["bfloat16"] / "step-4")
    for name, tensor in found.items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, stored[name])


def test_dcp_to_torch_of_a_full_checkpoint_is_nested(runs: dict[str, Path], plain: Any, tmp_path: Path) -> None:
    found = dcp_to_torch(runs["full"] / "step-2", tmp_path / "checkpoint.pt")
    assert set(found) == {"model", "optimizer", "train_state"}
    assert set(found["model"]) == META_NAMES
    assert {name for name in found["optimizer"] if name.startswith("state.")} == {
        f"state.{name}.{key}" for name in META_NAMES for key in ("step", "exp_avg", "exp_avg_sq")
    }
    assert int(found["train_state"]["step"]) == 2
    stored = plain(runs["full"] / "step-2")
    for part, values in found.items():
        for name, tensor in values.items():
            assert torch.equal(tensor, stored[f"{part}.{name}"])


def test_a_tied_model_is_written_under_both_names(runs: dict[str, Path], tmp_path: Path) -> None:
    found = dcp_to_torch(runs["tied"] / "step-4", tmp_path / "checkpoint.pt")
    assert set(found) == META_NAMES
    assert torch.equal(found["output.weight"], found["tok_embeddings.weight"])
    full = dcp_to_torch(runs["tied"] / "step-2", tmp_path / "full.pt")
    assert set(full["model"]) == META_NAMES - {"output.weight"}


@pytest.mark.parametrize("which", ["full/step-2", "bfloat16/step-4"])
def test_plain_torch_reads_ours_in_a_process_of_its_own(which: str, runs: dict[str, Path], stored: Any) -> None:
    name, step = which.split("/")
    found = json.loads(python("-c", PLAIN_READER, runs[name] / step))
    manifest = json.loads((runs[name] / step / "manifest.json").read_text())
    assert set(found) == set(manifest["tensors"])
    assert found == stored(runs[name] / step)


def test_plain_torch_loads_ours_into_a_module_and_an_optimizer(runs: dict[str, Path], plain: Any) -> None:
    """A user's own code, with torch's state dict functions: the nested names are those that it expects."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_model_state_dict,
        get_optimizer_state_dict,
        set_model_state_dict,
    )

    from reshard.model.llama import Llama

    model = Llama(SPEC)
    optimizer = torch.optim.AdamW(model.parameters())
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    moments = get_optimizer_state_dict(model, optimizer, options=options)
    wanted = {
        "model": get_model_state_dict(model),
        "optimizer": {n: t for n, t in moments.items() if n.startswith("state.")},
    }
    dcp.load(wanted, checkpoint_id=str(runs["full"] / "step-2"), no_dist=True)
    set_model_state_dict(model, wanted["model"])
    stored = plain(runs["full"] / "step-2")
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, stored[f"model.{name}"])
        assert torch.equal(wanted["optimizer"][f"state.{name}.exp_avg"], stored[f"optimizer.state.{name}.exp_avg"])


def test_export_dtype_alone_warns_that_it_has_no_effect(launch: Any, tiny: Any, tmp_path: Path, plain: Any) -> None:
    (rank,) = launch(tiny(tmp_path, training={"steps": 1}, checkpoint={"export_dtype": "bfloat16"}))
    assert any("export_dtype" in line and "model_weights_only" in line for line in rank.log)
    assert plain(tmp_path / "checkpoint/step-1")["model.norm.weight"].dtype == torch.float32
