"""Is a reshard exact? A checkpoint saved on any layout, loaded on any other: every tensor bit-equal, the text goes on."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest

from reshard.config import Config
from reshard.text import TrainingText, prepare

LAYOUTS = ["1", "fsdp2", "fsdp4", "hsdp2x2", "tp2", "fsdp2xtp2"]
MODELS: dict[str, dict[str, Any]] = {
    "even": {},
    # Rows that neither 4 ranks nor 2 x 2 share evenly, one tensor for embedding and output, bfloat16 throughout.
    "ragged": {"ffn_dim": 130, "vocab_size": 518, "tied_embeddings": True},
}
DTYPES = {"even": "float32", "ragged": "bfloat16"}
SAVED, SEQ_LEN, GLOBAL_BATCH = 3, 32, 8


def config_of(tiny: Any, folder: Path, layout: str, model: str, stop_after: int) -> Any:
    training = {"steps": 20, "stop_after": stop_after, "dtype": DTYPES[model]}
    return tiny(folder, layout, model=MODELS[model], training=training)


@pytest.fixture(scope="module")
def sources(launch: Any, tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Any]:
    """(model, layout) -> folder of a run of three steps, and its ranks."""
    folder = tmp_path_factory.mktemp("sources")
    made = {}
    for layout in LAYOUTS:
        configs = [config_of(tiny, folder / model / layout, layout, model, SAVED) for model in MODELS]
        for model, ranks in zip(MODELS, launch.each(configs, tensors=True), strict=True):
            made[model, layout] = folder / model / layout, ranks
    return made


@pytest.fixture(scope="module")
def loaded(
    sources: dict[tuple[str, str], Any], launch: Any, tiny: Any, copied: Any, tmp_path_factory: pytest.TempPathFactory
) -> Any:
    """(model, source, target) -> folder and ranks of a run that took the source's checkpoint one step further."""
    folder = tmp_path_factory.mktemp("loaded")

    def make(target: str) -> dict[tuple[str, str], tuple[Path, list[Any]]]:
        places = {(m, s): folder / m / f"{s}-to-{target}" for m in MODELS for s in LAYOUTS}
        configs = []
        for (model, source), place in places.items():
            copied(sources[model, source][0] / "checkpoint", place / "checkpoint")
            configs.append(config_of(tiny, place, target, model, SAVED + 1))
        results = launch.each(configs, sequences=True, tensors=True)
        return {case: (place, ranks) for (case, place), ranks in zip(places.items(), results, strict=True)}

    get = launch.shared(make)
    return lambda model, source, target: get(target, (model, source))


PAIRS = [pytest.param(m, a, b, id=f"{m}-{a}-to-{b}") for m in MODELS for b in LAYOUTS for a in LAYOUTS]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_checkpoint_holds_what_its_ranks_held(layout: str, model: str, sources: Any, stored: Any) -> None:
    folder, ranks = sources[model, layout]
    on_disk = stored(folder / "checkpoint" / f"step-{SAVED}")
    names = {name for name in on_disk if name.startswith(("model.", "optimizer.state."))}
    for rank in ranks:
        assert set(rank.after) == names
        assert {name: on_disk[name] for name in names} == rank.after


@pytest.mark.parametrize(("model", "source", "target"), PAIRS)
def test_every_tensor_is_bit_equal_on_the_other_layout(
    model: str, source: str, target: str, sources: Any, loaded: Any, stored: Any, plain: Any
) -> None:
    folder, ranks = loaded(model, source, target)
    saved = sources[model, source][0] / "checkpoint" / f"step-{SAVED}"
    on_disk = stored(saved)
    for name, tensor in plain(saved).items():
        assert float(tensor.double().abs().sum()) > 0 or name in ("train_state.rng_seed",), name
    for rank in ranks:
        assert rank.error is None
        assert {name for name in on_disk if name.startswith(("model.", "optimizer.state."))} == set(rank.before)
        assert {name: on_disk[name] for name in rank.before} == rank.before
    # And what this layout then saves is again what it held: load and save cannot hide each other's mistakes.
    again = stored(folder / "checkpoint" / f"step-{SAVED + 1}")
    assert {name: again[name] for name in ranks[0].after} == ranks[0].after
    assert ranks[0].after != ranks[0].before


@pytest.mark.parametrize(("model", "source", "target"), PAIRS)
def test_the_text_goes_on_and_the_loss_with_it(
    model: str, source: str, target: str, loaded: Any, tiny: Any, plain: Any
) -> None:
    folder, ranks = loaded(model, source, target)
    data, _ = prepare(Config().with_values(**config_of(tiny, folder, "1", model, 0)), 518, progress=False)
    text = TrainingText(data.train, SEQ_LEN, 0)
    expected = range(SAVED * GLOBAL_BATCH, (SAVED + 1) * GLOBAL_BATCH)
    read = sorted({sequence for rank in ranks for batch in rank.fed for sequence in batch})
    assert read == sorted(hashlib.blake2b(text[i][:-1].tobytes(), digest_size=8).hexdigest() for i in expected)
    # The same weights on the same text: only the order of sums may differ.
    _, reference = loaded(model, "1", "1")
    assert ranks[0].loss == pytest.approx(reference[0].loss, rel=1e-5 if DTYPES[model] == "float32" else 3e-2)
    numbers = {
        n: int(t) for n, t in plain(folder / "checkpoint" / f"step-{SAVED + 1}").items() if n.startswith("train_state.")
    }
    assert numbers == {
        "train_state.step": SAVED + 1,
        "train_state.tokens_seen": (SAVED + 1) * GLOBAL_BATCH * SEQ_LEN,
        "train_state.next_sequence": (SAVED + 1) * GLOBAL_BATCH,
        "train_state.global_batch_size": GLOBAL_BATCH,
        "train_state.rng_seed": 0,
    }


def test_a_run_that_changes_layout_all_the_time_is_the_run_of_one_process(
    launch: Any, tiny: Any, metrics: Any, tmp_path: Path
) -> None:
    way = ["1", "fsdp2xtp2", "fsdp2", "tp2", "hsdp2x2", "fsdp4", "1"]
    training = {"steps": 2 * len(way), "dtype": "float64"}
    launch(tiny(tmp_path / "straight", training=training))
    for i, layout in enumerate(way):
        # Another batch_size on each leg, too: the global batch is the checkpoint's, whatever the ranks hold.
        own = {"batch_size": 1 + i % 2, "global_batch_size": GLOBAL_BATCH if i == 0 else -1, "stop_after": 2 * (i + 1)}
        ranks = launch(tiny(tmp_path / "wandering", layout, training={**training, **own}))
        assert ranks[0].step == 2 * (i + 1)
    straight, wandering = metrics(tmp_path / "straight"), metrics(tmp_path / "wandering")
    assert [step for step, _, _ in wandering] == list(range(1, 2 * len(way) + 1))
    for (_, loss, norm), (_, other_loss, other_norm) in zip(straight, wandering, strict=True):
        assert other_loss == pytest.approx(loss, rel=1e-11, abs=0)
        assert other_norm == pytest.approx(norm, rel=1e-11, abs=0)
