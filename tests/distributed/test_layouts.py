"""Does every layout compute the same thing? In float64, where a sum's order costs 1e-16 and a mistake costs all.

All runs begin at one seed checkpoint. A loss, a gradient norm and the weights after some steps are compared with those
of one process: a gradient that is missing, counted twice or scaled changes them by far more than 1e-11.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from reshard.config import Config
from reshard.model.llama import Llama
from reshard.model.spec import LlamaSpec
from reshard.text import TrainingText, prepare

STEPS = 4
LOSS, WEIGHTS = 1e-11, 1e-9  # relative, and relative to the largest value of each tensor

PLAIN: dict[str, dict[str, Any]] = {}
TIED = {"model": {"tied_embeddings": True}}
RECOMPUTE_2 = {"activation_checkpoint": {"mode": "selective", "selective_ac_option": "2"}}
RECOMPUTE_1 = {"activation_checkpoint": {"mode": "selective", "selective_ac_option": "1"}}
RECOMPUTE_OP = {"activation_checkpoint": {"mode": "selective", "selective_ac_option": "op"}}
RECOMPUTE_FULL = {"activation_checkpoint": {"mode": "full"}}
WHOLE_LOGITS = {"parallelism": {"disable_loss_parallel": True}}
KEEP_GATHERED = {"parallelism": {"fsdp_reshard_after_forward": "never"}}
RAGGED = {"model": {"ffn_dim": 130, "vocab_size": 518}}  # rows that neither 4 ranks nor 2 x 2 share evenly
SIX = {"training": {"global_batch_size": 6}}  # sequences, which 4 ranks cannot share without padding
ONE_BY_ONE = {"training": {"batch_size": 1}}  # twice as many micro-steps


def both(*parts: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    merged: dict[str, dict[str, Any]] = {}
    for part in parts:
        for section, values in part.items():
            merged[section] = merged.get(section, {}) | values
    return merged


# layout -> title -> what is different from the plain run
VARIANTS: dict[str, dict[str, dict[str, dict[str, Any]]]] = {
    "1": {
        "plain": PLAIN,
        "tied": TIED,
        "recompute 2": RECOMPUTE_2,
        "recompute op": RECOMPUTE_OP,
        "recompute full": RECOMPUTE_FULL,
        "one by one": ONE_BY_ONE,
        "all at once": {"training": {"batch_size": 8}},
        "ragged": RAGGED,
        "six": SIX,
    },
    "fsdp2": {
        "plain": PLAIN,
        "tied": TIED,
        "recompute 2": RECOMPUTE_2,
        "recompute op": RECOMPUTE_OP,
        "recompute full": RECOMPUTE_FULL,
        "one by one": ONE_BY_ONE,
        "keep gathered": KEEP_GATHERED,
        "keep gathered, one by one": both(KEEP_GATHERED, ONE_BY_ONE),
        "tied, recompute full": both(TIED, RECOMPUTE_FULL),
    },
    "fsdp4": {"plain": PLAIN, "tied": TIED, "one by one": ONE_BY_ONE, "ragged": RAGGED, "six": SIX},
    "hsdp2x2": {
        "plain": PLAIN,
        "tied": TIED,
        "one by one": ONE_BY_ONE,
        "keep gathered": KEEP_GATHERED,
        "recompute op": RECOMPUTE_OP,
        "six": SIX,
    },
    "rep2": {"plain": PLAIN, "one by one": ONE_BY_ONE},
    "tp2": {
        "plain": PLAIN,
        "tied": TIED,
        "whole logits": WHOLE_LOGITS,
        "tied, whole logits": both(TIED, WHOLE_LOGITS),
        "recompute 1": RECOMPUTE_1,
        "recompute op": RECOMPUTE_OP,
        "recompute full": RECOMPUTE_FULL,
        "one by one": ONE_BY_ONE,
    },
    "fsdp2xtp2": {
        "plain": PLAIN,
        "tied": TIED,
        "whole logits": WHOLE_LOGITS,
        "tied, whole logits": both(TIED, WHOLE_LOGITS),
        "recompute op": RECOMPUTE_OP,
        "recompute full": RECOMPUTE_FULL,
        "one by one": ONE_BY_ONE,
        "keep gathered": KEEP_GATHERED,
        "ragged": RAGGED,
    },
}
CASES = [pytest.param(layout, title, id=f"{layout}-{title}") for layout, titles in VARIANTS.items() for title in titles]


MODELS = {"plain": PLAIN, "tied": TIED, "ragged": RAGGED}


def model_of(title: str) -> str:
    return next((name for name in ("tied", "ragged") if name in title), "plain")


def reference_of(title: str) -> str:
    """Which run of one process is a variant's run compared with?"""
    return "six" if title == "six" else model_of(title)


@pytest.fixture(scope="module")
def seeds(launch: Any, tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A seed checkpoint of each model, as `reshard seed` makes them."""
    folder = tmp_path_factory.mktemp("seeds")
    configs = [tiny(folder / name, **both({"training": {"dtype": "float64"}}, model)) for name, model in MODELS.items()]
    made = launch.each(configs, verb="seed")
    return {name: Path(rank.checkpoint) for name, (rank,) in zip(MODELS, made, strict=True)}


@pytest.fixture(scope="module")
def runs(launch: Any, tiny: Any, seeds: dict[str, Path], copied: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(layout, title) -> folder and ranks of its run; a layout's runs share one launch, made when first asked for."""
    folder = tmp_path_factory.mktemp("runs")

    def make(layout: str) -> dict[str, tuple[Path, list[Any]]]:
        configs = []
        for name, changes in VARIANTS[layout].items():
            place = folder / layout / name
            configs.append(tiny(place, layout, **both({"training": {"dtype": "float64", "steps": STEPS}}, changes)))
            copied(seeds[model_of(name)], place / "checkpoint" / "step-0")
        return {
            name: (folder / layout / name, ranks)
            for name, ranks in zip(VARIANTS[layout], launch.each(configs), strict=True)
        }

    return launch.shared(make)


@pytest.mark.parametrize(("layout", "title"), CASES)
def test_every_layout_computes_what_one_process_computes(
    layout: str, title: str, runs: Any, metrics: Any, events: Any, plain: Any
) -> None:
    (one, _), (other, ranks) = runs("1", reference_of(title)), runs(layout, title)
    assert all(rank.error is None and rank.step == STEPS for rank in ranks)
    assert len({rank.loss for rank in ranks}) == 1  # every rank knows the loss of all
    assert events(other)[0]["loaded"].endswith("step-0")
    expected, found = metrics(one), metrics(other)
    assert [step for step, _, _ in found] == list(range(1, STEPS + 1))
    assert len({loss for _, loss, _ in expected}) == STEPS  # it does move
    for (_, loss, norm), (_, other_loss, other_norm) in zip(expected, found, strict=True):
        assert other_loss == pytest.approx(loss, rel=LOSS, abs=0)
        assert other_norm == pytest.approx(norm, rel=LOSS, abs=0)
    ours, theirs = (plain(folder / "checkpoint" / f"step-{STEPS}") for folder in (one, other))
    assert set(ours) == set(theirs)
    for name, tensor in ours.items():
        assert float((tensor - theirs[name]).abs().max()) <= WEIGHTS * float(tensor.abs().max()), name


@pytest.mark.parametrize(
    ("layout", "title"),
    [(layout, title) for layout, titles in VARIANTS.items() for title in titles if "recompute" in title],
)
def test_recomputing_layers_do_recompute(layout: str, title: str, runs: Any) -> None:
    # Or else the cases above would compare a run with itself. The model has two layers.
    (_, (plain_rank, *_)), (_, (rank, *_)) = runs(layout, "plain"), runs(layout, title)
    extra = {"recompute 2": 1.5, "recompute 1": 2, "recompute op": 2, "recompute full": 2, "tied, recompute full": 2}
    assert rank.attentions == extra[title] * plain_rank.attentions > 0


def test_one_process_is_a_plain_training_loop(
    runs: Any, seeds: dict[str, Path], metrics: Any, plain: Any, tiny: Any
) -> None:
    """The run that all others are compared with, against twenty lines of plain torch: mean loss, clipping, AdamW, warm-up."""
    folder, _ = runs("1", "plain")
    config = Config().with_values(**both(tiny(folder, "1"), {"training": {"steps": STEPS}}))
    data, _ = prepare(config, 512, progress=False)
    text = TrainingText(data.train, 32, 0)
    model = Llama(LlamaSpec(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=128, vocab_size=512)).double()
    model.load_state_dict(plain(seeds["plain"]))
    model.init_rope(torch.arange(32))
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    rates = [
        1e-3,
        2e-3,
        2e-3 * 2 / 3,
        2e-3 / 3,
    ]  # two steps of warm-up to 2e-3, then linearly to what step 5 would not have
    for step, lr in enumerate(rates):
        batch = torch.stack([torch.from_numpy(text[i]) for i in range(8 * step, 8 * step + 8)])
        loss = torch.nn.functional.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        found = metrics(folder)[step]
        assert found[0] == step + 1
        assert found[1] == pytest.approx(loss.item(), rel=LOSS, abs=0)
        assert found[2] == pytest.approx(norm.item(), rel=LOSS, abs=0)
        assert norm > 0.5  # so that clipping has something to do
    for name, tensor in plain(folder / "checkpoint" / f"step-{STEPS}").items():
        if name.startswith("model."):
            wanted = model.state_dict()[name.removeprefix("model.")]
            assert float((tensor - wanted).abs().max()) <= WEIGHTS * float(wanted.abs().max()), name
