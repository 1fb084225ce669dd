"""Do the examples do what they say? Run as their first lines say; fsdp2_loop.py by tests/distributed/test_engine_api.py."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from reshard.model.spec import LlamaSpec, parameter_shapes

PROJECT = Path(__file__).resolve().parents[2]
EXAMPLES = PROJECT / "examples"
SPEC = LlamaSpec(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=128, vocab_size=512)


def test_every_example_is_run_by_a_test() -> None:
    elsewhere = (PROJECT / "tests/distributed/test_engine_api.py").read_text()
    others = {path.name for path in EXAMPLES.glob("*.py")} - {"transformers_loop.py", "read_torchtitan.py"}
    assert others == {name for name in others if f'"examples/{name}"' in elsewhere} != set()


@pytest.mark.slow
def test_a_transformers_model_goes_on_as_if_it_had_not_stopped(typed: Any, tmp_path: Path) -> None:
    def loop(folder: str, steps: int) -> list[str]:
        done = typed(["python", str(EXAMPLES / "transformers_loop.py"), folder, str(steps)], tmp_path)
        assert done.code == 0, done.err
        return [line for line in done.out.splitlines() if line.startswith(("step", "resumed"))]

    through = loop("through", 10)
    assert [line.split()[1] for line in through] == [str(step) for step in range(1, 11)]
    assert float(through[-1].split()[3]) < float(through[0].split()[3]) - 0.5  # it learns
    assert loop("stopped", 7) == through[:7]
    again = loop("stopped", 10)
    assert again[0] == "resumed from stopped/step-7"
    assert again[1:] == through[7:]


@pytest.fixture(scope="module")
def titan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A full step of early 2025, written by plain torch; beside it the params.json that says what it is."""
    folder = tmp_path_factory.mktemp("titan")
    generator = torch.Generator().manual_seed(3)
    weights = {n: torch.randn(s, generator=generator) * 0.05 for n, s in parameter_shapes(SPEC).items()}
    state = {
        "model": {**weights, "freqs_cis": torch.polar(torch.ones(64, 8), torch.ones(64, 8))},
        "optimizer": {f"state.{n}.exp_avg": torch.ones_like(w) for n, w in weights.items()},
        "lr_scheduler": {"last_epoch": 7, "base_lrs": [3e-4]},
        "dataloader": {"dp_rank_0": b"a pickle of its own", "world_size": 1},
        "train_state": {"step": torch.tensor(7), "global_avg_losses": [1.5, 1.25]},
    }
    dcp.save(state, checkpoint_id=str(folder / "step-7"), no_dist=True)
    torch.save(weights, folder / "weights.pt")
    params = {"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 512, "norm_eps": 1e-5,
              "rope_theta": 500000.0, "multiple_of": 128, "ffn_dim_multiplier": 0.75}  # fmt: skip
    (folder / "params.json").write_text(json.dumps(params))
    return folder


def answer(titan: Path) -> str:
    """What a model with the weights themselves says."""
    from reshard.model.llama import Llama

    model = Llama(SPEC)
    model.load_state_dict(torch.load(titan / "weights.pt", weights_only=True))
    model.init_rope(torch.arange(8))
    with torch.no_grad():
        logits = model(torch.tensor([[1, 2, 3]]))[0, -1]
    return f"{int(logits.argmax())}, logit {float(logits.max()):.4f}"


@pytest.mark.slow
def test_a_step_of_torchtitan_is_read(typed: Any, titan: Path, tmp_path: Path) -> None:
    from reshard import diff
    from reshard.model.spec import parameter_count

    words = ["python", str(EXAMPLES / "read_torchtitan.py")]
    done = typed([*words, str(titan / "step-7"), str(titan / "params.json"), "--to", "hf"], tmp_path)
    assert done.code == 0, done.err
    assert f"{parameter_count(SPEC):,} parameters" in done.out
    assert "whole: True" in done.out
    assert f"after the tokens 1, 2, 3: token {answer(titan)}\n" in done.out
    assert diff(tmp_path / "hf", titan / "weights.pt", model=str(tmp_path / "hf")).same()

    wrong = typed([*words, str(titan / "step-7"), "8B"], tmp_path)
    assert wrong.code == 1
    assert wrong.err.startswith(f"error: {titan / 'step-7'} has not the tensors of the model that it is said to be")

    damaged = tmp_path / "step-7"
    shutil.copytree(titan / "step-7", damaged)
    data = damaged / "__0_0.distcp"
    content = bytearray(data.read_bytes())
    content[content.index(torch.load(titan / "weights.pt", weights_only=True)["norm.weight"].numpy().tobytes())] ^= 1
    data.write_bytes(content)
    done = typed([*words, str(damaged), str(titan / "params.json")], tmp_path)
    assert done.code == 1
    assert "whole: False" in done.out
    assert "norm.weight" in done.err
