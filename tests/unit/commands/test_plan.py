"""`reshard plan` counts what a real run then has: parameters, activations, bytes of a checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from reshard.checkpoint.ranks import Ranks
from reshard.checkpoint.save import About, save
from reshard.commands.plan import fsdp_numbers, run
from reshard.config import load_config
from reshard.errors import LayoutError
from reshard.model.build import spec_of
from reshard.model.llama import Llama, cross_entropy_sum

SMALL = ["--model.dim", "64", "--model.n_layers", "4", "--model.n_heads", "4", "--model.n_kv_heads", "2",
         "--training.seq_len", "64", "--training.batch_size", "4"]  # fmt: skip


def kept_by(model: Llama, tokens_BS: torch.Tensor) -> int:
    """Bytes that autograd keeps of a real forward on the CPU, and the gradient of the logits."""
    known = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, tuple[int, torch.Tensor]] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        logits = model(tokens_BS)
        cross_entropy_sum(logits, tokens_BS)
    return sum(n for n, _ in kept.values()) + logits.numel() * 4


@pytest.mark.parametrize("tied", ["true", "false"])
def test_activations_are_within_a_tenth_of_a_real_forward(tied: str) -> None:
    config, _ = load_config(None, [*SMALL, "--model.tied_embeddings", tied, "--activation_checkpoint.mode", "none"])
    model = Llama(spec_of(config))
    model.init_rope(torch.arange(64))
    real = kept_by(model, torch.zeros(4, 64, dtype=torch.int64))
    planned = run(config, 1)["ranks"][0]["activations_bytes"]
    assert planned == pytest.approx(real, rel=0.1)


def test_recomputed_layers_keep_only_their_input() -> None:
    none, _ = load_config(None, [*SMALL, "--activation_checkpoint.mode", "none"])
    full, _ = load_config(None, [*SMALL, "--activation_checkpoint.mode", "full"])
    less, more = (run(c, 1)["ranks"][0]["activations_bytes"] for c in (full, none))
    assert less < 0.6 * more


def test_weights_and_checkpoint_are_those_of_a_real_save(tmp_path: Path) -> None:
    config, _ = load_config(None, SMALL)
    model = Llama(spec_of(config))
    numbers = sum(p.numel() for p in model.parameters())
    report = run(config, 1)
    assert report["ranks"][0]["parameters"] == report["parameters"] == numbers
    assert report["ranks"][0]["weights_bytes"] == 4 * numbers
    save(tmp_path / "step-1", dict(model.named_parameters()), About(1, "model", {}), Ranks())
    real = (tmp_path / "step-1" / "__0_0.distcp").stat().st_size
    assert report["checkpoint"]["weights_only_bytes"] == pytest.approx(real, rel=0.01)


@pytest.mark.parametrize("rows", [1, 2, 5, 7, 8, 37])
@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_the_fullest_rank_has_what_torch_deals_out(rows: int, ranks: int) -> None:
    # FSDP2 shards dim 0 as torch.chunk does.
    assert fsdp_numbers((rows, 3), ranks) == max(len(c) for c in torch.arange(rows).chunk(ranks)) * 3


def test_405b_on_1024_ranks_adds_up() -> None:
    config, _ = load_config(None, ["--model.flavor", "405B", "--parallelism.tensor_parallel_degree", "8",
        "--parallelism.pipeline_parallel_degree", "16", "--training.seq_len", "8192", "--training.batch_size", "1",
        "--training.global_batch_size", "256"])  # fmt: skip
    report = run(config, 1024)
    held = sum(r["parameters"] for r in report["ranks"]) * 8 * 8  # tp 8 x dp_shard 8
    norms = 126 * 2 * 16384 + 16384  # whole on every tensor-parallel rank
    assert held == report["parameters"] + 7 * norms
    assert report["checkpoint"]["full_bytes"] == pytest.approx(3 * 4 * 405_853_388_800, rel=0.001)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--parallelism.tensor_parallel_degree", "3"],
        ["--parallelism.pipeline_parallel_degree", "2", "--model.n_layers", "1"],
    ],
)
def test_it_refuses_what_train_would(arguments: list[str]) -> None:
    config, _ = load_config(None, arguments)
    with pytest.raises(LayoutError):
        run(config, 6)
