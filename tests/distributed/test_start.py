"""Does a run begin where it should? The rules of the last step, load_step, step-0, initial_load_path and what is refused."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import reshard
from reshard.commands.convert import run as convert
from reshard.config import Config, load_config
from reshard.train.loop import train

CONSTANT = {"lr_scheduler": {"decay_type": "constant"}}  # a longer run then takes the same first steps
STEPS = 6


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file with its size and time of change: equal trees have not been written to."""
    return {
        str(path.relative_to(folder)): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in (".lock", ".owner.json")
    }


def steps_in(folder: Path) -> set[str]:
    return {path.name for path in (folder / "checkpoint").iterdir() if not path.name.startswith(".")}


@pytest.fixture(scope="module")
def config(tiny: Any) -> Callable[..., Any]:
    """A run of six steps that saves every second one; the last holds weights only, in bfloat16."""

    def make(folder: Path, layout: str = "1", **sections: dict[str, Any]) -> Any:
        checkpoint = {"interval": 2, "model_weights_only": True, "export_dtype": "bfloat16"}
        base: dict[str, dict[str, Any]] = {"checkpoint": checkpoint, "training": {"steps": STEPS}, **CONSTANT}
        for section, values in sections.items():
            base[section] = base.get(section, {}) | values
        return tiny(folder, layout, **base)

    return make


@pytest.fixture(scope="module")
def finished(launch: Any, config: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "run"
    (rank,) = launch(config(folder))
    assert rank.step == STEPS
    return folder


@pytest.fixture(scope="module")
def longer(launch: Any, config: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that was meant to take ten steps from the beginning."""
    folder = tmp_path_factory.mktemp("longer") / "run"
    launch(config(folder, training={"steps": 10}))
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, to go on with."""
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture(scope="module")
def seed(launch: Any, tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    (rank,) = launch(tiny(tmp_path_factory.mktemp("seed"), training={"rng_seed": 5}), verb="seed")
    return Path(rank.checkpoint)


def refused(launch: Any, config: Any, kind: str, **options: Any) -> dict[str, Any]:
    """The error that every rank got."""
    ranks = launch(config, **options)
    assert {rank.error["type"] if rank.error else None for rank in ranks} == {kind}
    assert len({rank.error["message"] for rank in ranks}) == 1
    return ranks[0].error


# -- the last step ----------------------------------------------------------------------------------------------------


def test_the_steps_before_the_last_are_full_and_the_last_holds_weights(finished: Path, events: Any) -> None:
    saves = [(e["step"], e["kind"]) for e in events(finished) if e["event"] == "save"]
    assert saves == [(2, "full"), (4, "full"), (6, "model")]
    assert steps_in(finished) == {"step-2", "step-4", "step-6"}


@pytest.mark.parametrize("layout", ["1", "fsdp2"])
def test_a_run_that_has_reached_its_steps_has_nothing_to_do(launch: Any, config: Any, run: Path, layout: str) -> None:
    before = tree(run)
    for rank in launch(config(run, layout)):
        assert rank.error is None
        assert (rank.step, rank.loss) == (STEPS, None)
        assert Path(rank.checkpoint).name == "step-6"
        assert any("nothing to do" in line for line in rank.log)
    assert tree(run) == before


def test_fewer_steps_than_it_has_taken_is_also_nothing_to_do(launch: Any, config: Any, run: Path) -> None:
    before = tree(run)
    (rank,) = launch(config(run, training={"steps": 3}))
    assert (rank.error, rank.loss) == (None, None)
    assert tree(run) == before


@pytest.mark.parametrize("layout", ["1", "fsdp2"])
def test_more_steps_resume_from_the_newest_full_one_and_say_so(
    launch: Any, config: Any, run: Path, longer: Path, layout: str, metrics: Any, events: Any, stored: Any
) -> None:
    rank = launch(config(run, layout, training={"steps": 10}))[0]
    assert (rank.error, rank.step) == (None, 10)
    assert any("step-6 holds weights only" in line and "step-4" in line for line in rank.log)
    start = [e for e in events(run) if e["event"] == "start"][-1]
    assert (start["step"], start["resumed"]) == (4, True)
    assert start["loaded"].endswith("step-4")
    if layout == "1":  # bit for bit what ten steps would have been from the start
        last = {step: values for step, *values in metrics(run)}
        assert last == {step: values for step, *values in metrics(longer)}
        for step in (8, 10):
            name = f"checkpoint/step-{step}"
            assert stored(run / name) == stored(longer / name)


def bytes_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_what_was_handed_over_stays_when_the_run_is_made_longer(
    launch: Any, config: Any, run: Path, tmp_path: Path, events: Any, longer: Path, metrics: Any
) -> None:
    handed_over = bytes_of(run / "checkpoint/step-6")
    other = tmp_path / "other"
    shutil.copytree(run, other)
    full = {"model_weights_only": False, "keep_latest_k": 1}
    there = {"steps": 10, "stop_after": 6}
    (kept,), (refused_at_6,), (refused_at_its_end,) = launch.each(
        [
            config(run, training={"steps": 10}, checkpoint=full),
            config(other, training=there),
            config(other, checkpoint={"model_weights_only": False, "load_step": 2}),
        ]
    )
    assert (kept.error, kept.step) == (None, 10)
    assert [line for line in kept.log if "step 6 is not saved" in line and "handed over" in line]
    assert steps_in(run) == {"step-4", "step-6", "step-10"}  # step-4: where it resumed
    assert [e["step"] for e in events(run) if e["event"] == "save"] == [2, 4, 6, 8, 10]
    assert metrics(run)[-6:] == metrics(longer)[-6:]
    for rank, option in ((refused_at_6, "--training.stop_after 7"), (refused_at_its_end, "--training.steps 7")):
        assert rank.error is not None
        assert "step-6` holds weights only" in rank.error["message"]
        assert option in rank.error["hint"]
    assert bytes_of(run / "checkpoint/step-6") == bytes_of(other / "checkpoint/step-6") == handed_over
    (rank,) = launch(config(other, training=there | {"stop_after": 7}))  # as the hint says
    assert (rank.error, rank.step) == (None, 7)
    assert steps_in(other) == {"step-2", "step-4", "step-6", "step-7"}
    assert bytes_of(other / "checkpoint/step-6") == handed_over


def test_a_stop_at_a_step_that_was_handed_over_loses_nothing(
    config: Any, run: Path, longer: Path, metrics: Any, stored: Any
) -> None:
    from torch.optim.optimizer import register_optimizer_step_post_hook

    handed_over, taken = bytes_of(run / "checkpoint/step-6"), []

    def stop_at_6(*_: Any) -> None:  # it resumes after step 4
        taken.append(None)
        if len(taken) == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    hook = register_optimizer_step_post_hook(stop_at_6)
    try:
        outcome = train(Config().with_values(**config(run, training={"steps": 10}, checkpoint={"interval": 100})))
    finally:
        hook.remove()
    assert (outcome.step, outcome.checkpoint) == (7, run / "checkpoint/step-7")
    assert metrics(run)[-1] == metrics(longer)[6]
    assert bytes_of(run / "checkpoint/step-6") == handed_over


def test_weights_only_and_nothing_full_cannot_be_resumed(launch: Any, config: Any, run: Path) -> None:
    for step in (2, 4):
        shutil.rmtree(run / f"checkpoint/step-{step}")
    before = tree(run)
    error = refused(launch, config(run, training={"steps": 10}), "NotACheckpoint")
    assert "step-6" in error["message"]
    assert "initial_load_path" in error["hint"]
    assert tree(run) == before


# -- load_step --------------------------------------------------------------------------------------------------------


def test_a_named_step_is_loaded(launch: Any, config: Any, run: Path, events: Any, metrics: Any, finished: Path) -> None:
    (rank,) = launch(config(run, checkpoint={"load_step": 2}))
    assert rank.step == STEPS
    assert [e for e in events(run) if e["event"] == "start"][-1]["step"] == 2
    steps = [step for step, _, _ in metrics(run)]
    assert steps == [1, 2, 3, 4, 5, 6, 3, 4, 5, 6]  # appended; the last line of a step counts
    assert metrics(run)[6:] == metrics(finished)[2:]  # the same steps again, bit for bit


@pytest.mark.parametrize("layout", ["1", "fsdp2"])
def test_a_named_step_that_is_missing_is_an_error(launch: Any, config: Any, run: Path, layout: str) -> None:
    before = tree(run)
    error = refused(launch, config(run, layout, checkpoint={"load_step": 3}), "NotACheckpoint")
    assert "load_step is 3" in error["message"]
    assert "2, 4, 6" in error["hint"]
    assert tree(run) == before


def test_a_named_step_in_an_empty_folder_is_an_error(launch: Any, config: Any, tmp_path: Path) -> None:
    error = refused(launch, config(tmp_path / "new", checkpoint={"load_step": 5}), "NotACheckpoint")
    assert "holds no checkpoint" in error["hint"]


def test_a_named_step_that_holds_weights_only_is_an_error(launch: Any, config: Any, run: Path) -> None:
    error = refused(launch, config(run, training={"steps": 10}, checkpoint={"load_step": 6}), "NotACheckpoint")
    assert "weights only" in error["message"]
    assert "initial_load_path" in error["hint"]


def test_a_named_step_that_is_damaged_is_an_error_never_a_fresh_start(launch: Any, config: Any, run: Path) -> None:
    data = run / "checkpoint/step-2/__0_0.distcp"
    data.write_bytes(data.read_bytes()[:-1])
    error = refused(launch, config(run, checkpoint={"load_step": 2}), "IntegrityError")
    assert "__0_0.distcp" in error["message"]
    assert "4" in error["hint"]


def test_a_named_step_applies_once(
    launch: Any, config: Any, run: Path, events: Any, finished: Path, stored: Any
) -> None:
    # A scheduler restarts a job with the very same command line: it must not go back to step 2 for ever.
    same = config(run, training={"steps": 10}, checkpoint={"load_step": 2})
    stopped = config(run, training={"steps": 10, "stop_after": 5}, checkpoint={"load_step": 2})
    assert launch(stopped)[0].step == 5
    (rank,) = launch(same)
    assert (rank.error, rank.step) == (None, 10)
    assert any("applied before" in line and "step-5" in line for line in rank.log)
    assert [e["step"] for e in events(run) if e["event"] == "start"] == [0, 2, 5]
    (again,) = launch(same)
    assert (again.loss, again.step) == (None, 10)


def test_a_rollback_goes_on_from_its_own_saves_not_from_the_higher_numbers(
    launch: Any, config: Any, run: Path, events: Any
) -> None:
    launch(config(run, training={"stop_after": 3}, checkpoint={"load_step": 2, "interval": 100}))
    assert steps_in(run) >= {"step-2", "step-3"}
    launch(config(run, training={"stop_after": 5}, checkpoint={"interval": 100}))  # load_step -1 again
    assert [e["step"] for e in events(run) if e["event"] == "start"] == [0, 2, 3]


def test_a_rollback_replaces_the_steps_that_it_takes_again(
    launch: Any, config: Any, run: Path, stored: Any, events: Any
) -> None:
    # Another learning rate, so that the new step-4 differs from the old one.
    before = stored(run / "checkpoint/step-4")
    launch(config(run, optimizer={"lr": 5e-3}, checkpoint={"load_step": 2}))
    after = stored(run / "checkpoint/step-4")
    assert set(after) == set(before)
    assert after["model.output.weight"] != before["model.output.weight"]
    assert not [p.name for p in (run / "checkpoint").iterdir() if ".tmp-" in p.name or ".old-" in p.name]
    assert [e["step"] for e in events(run) if e["event"] == "save"] == [2, 4, 6, 4, 6]


# -- step-0 and initial_load_path -------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["1", "fsdp2xtp2"])
def test_step_0_brings_the_model_only(
    launch: Any, tiny: Any, seed: Path, tmp_path: Path, layout: str, stored: Any, events: Any
) -> None:
    shutil.copytree(seed, tmp_path / "checkpoint/step-0")
    rank = launch(tiny(tmp_path, layout, training={"steps": 1}), tensors=True)[0]  # rng_seed 0, the seed's is 5
    weights = stored(seed)
    assert {name: rank.before[f"model.{name}"] for name in weights} == weights
    (start,) = [e for e in events(tmp_path) if e["event"] == "start"]
    assert (start["step"], start["resumed"]) == (0, False)
    assert start["loaded"].endswith("step-0")


def test_initial_load_path_is_for_empty_folders(
    launch: Any, config: Any, seed: Path, run: Path, tmp_path: Path, stored: Any, events: Any
) -> None:
    named = {"initial_load_path": str(seed)}
    (rank,) = launch(config(tmp_path / "new", training={"steps": 1}, checkpoint=named), tensors=True)
    weights = stored(seed)
    assert {name: rank.before[f"model.{name}"] for name in weights} == weights
    assert events(tmp_path / "new")[0]["step"] == 0
    # In a folder that has checkpoints of its own, the run goes on from those.
    launch(config(run, training={"steps": 8}, checkpoint=named))
    assert [e for e in events(run) if e["event"] == "start"][-1]["loaded"].endswith("run/checkpoint/step-4")


@pytest.mark.parametrize("step", [4, 6], ids=["full", "weights only in bfloat16"])
@pytest.mark.parametrize("layout", ["1", "fsdp2"])
def test_initial_load_path_takes_the_weights_of_any_checkpoint(
    launch: Any, config: Any, finished: Path, tmp_path: Path, plain: Any, step: int, layout: str, events: Any
) -> None:
    named = {"initial_load_path": str(finished / f"checkpoint/step-{step}")}
    ranks = launch(config(tmp_path / "new", layout, optimizer={"lr": 0.0}, training={"steps": 3}, checkpoint=named))
    assert ranks[0].error is None
    assert events(tmp_path / "new")[0]["step"] == 0
    source = plain(finished / f"checkpoint/step-{step}")
    result = plain(tmp_path / "new/checkpoint/step-2")  # full, and a learning rate of 0 has moved nothing
    prefix = "model." if step == 4 else ""
    for name in [name for name in result if name.startswith("model.")]:
        wanted = source[prefix + name.removeprefix("model.")]
        assert torch.equal(result[name], wanted.float()), name
    said = [line for line in ranks[0].log if "casting" in line]
    assert len(said) == (1 if step == 6 else 0)
    assert all("bfloat16" in line and "float32" in line for line in said)


def test_an_initial_load_path_that_is_nothing_is_an_error(launch: Any, config: Any, tmp_path: Path) -> None:
    named = {"initial_load_path": str(tmp_path / "nowhere")}
    error = refused(launch, config(tmp_path / "new", checkpoint=named), "NotACheckpoint")
    assert "nowhere" in error["message"]


# -- what does not fit ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["1", "fsdp2"])
def test_another_dtype_is_refused_unless_asked_for(
    launch: Any, config: Any, run: Path, layout: str, plain: Any
) -> None:
    double = {"steps": 8, "dtype": "float64"}
    before = tree(run)
    error = refused(launch, config(run, layout, training=double), "ConfigError")
    assert "float32" in error["message"]
    assert "float64" in error["message"]
    assert "allow_dtype_change" in error["hint"]
    assert tree(run) == before
    saved = plain(run / "checkpoint/step-4")
    ranks = launch(
        config(
            run,
            layout,
            training=double | {"stop_after": 5},
            optimizer={"lr": 0.0},
            checkpoint={"allow_dtype_change": True},
        )
    )
    assert ranks[0].error is None
    cast = plain(run / "checkpoint/step-5")
    for name in [name for name in cast if name.startswith("model.")]:
        assert cast[name].dtype == torch.float64
        assert torch.equal(cast[name], saved[name].double())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"training": {"seq_len": 16}}, ["seq_len was 32, is 16"]),
        ({"training": {"rng_seed": 9}}, ["rng_seed was 0, is 9"]),
        ({"validation": {"fraction": 0.1}}, ["validation_fraction was 0.02, is 0.1"]),
    ],
    ids=["seq_len", "rng_seed", "validation"],
)
@pytest.mark.parametrize("layout", ["1", "fsdp2"])
def test_another_token_stream_is_refused_and_the_difference_named(
    launch: Any, config: Any, run: Path, changes: Any, words: list[str], layout: str
) -> None:
    training = {"steps": 8, **changes.get("training", {})}
    before = tree(run)
    error = refused(launch, config(run, layout, **{**changes, "training": training}), "ConfigError")
    assert all(word in error["message"] for word in words)
    assert "exclude_from_loading" in error["hint"]
    assert tree(run) == before


def test_another_text_is_refused_unless_the_data_begin_anew(
    launch: Any, config: Any, run: Path, tmp_path: Path, shared: Path, events: Any, plain: Any
) -> None:
    other = tmp_path / "other.txt"
    other.write_text((shared / "text.txt").read_text()[1000:90_000])
    named = {"steps": 8, "dataset": str(other)}
    error = refused(launch, config(run, training=named), "ConfigError")
    assert "dataset was" in error["message"]
    assert str(other) in error["message"]
    (rank,) = launch(config(run, training=named | {"stop_after": 5}, checkpoint={"exclude_from_loading": ["data"]}))
    assert rank.error is None
    position = plain(run / "checkpoint/step-5")["train_state.next_sequence"]
    assert int(position) == 8  # one global batch into the new text, not five


def test_a_text_that_only_moved_is_the_same_text(
    launch: Any, config: Any, run: Path, tmp_path: Path, shared: Path
) -> None:
    moved = tmp_path / "elsewhere.txt"
    shutil.copy(shared / "text.txt", moved)
    (rank,) = launch(config(run, training={"steps": 8, "dataset": str(moved)}))
    assert (rank.error, rank.step) == (None, 8)


def test_the_optimizer_can_begin_anew(launch: Any, config: Any, run: Path, plain: Any) -> None:
    (rank,) = launch(
        config(run, training={"steps": 8, "stop_after": 5}, checkpoint={"exclude_from_loading": ["optimizer"]}),
        tensors=True,
    )
    assert rank.error is None
    after = plain(run / "checkpoint/step-5")
    assert {float(t) for name, t in after.items() if name.endswith("weight.step")} == {1.0}
    assert int(after["train_state.step"]) == 5


@pytest.mark.parametrize(
    ("model", "word"),
    [
        ({"ffn_dim": 192}, "ffn_dim expected 192, got 128"),
        ({"n_layers": 1}, "n_layers expected 1, got 2"),
        ({"n_layers": 3}, "n_layers expected 3, got 2"),
        ({"vocab_size": 600}, "vocab_size expected 600, got 512"),
    ],
    ids=["shape", "fewer layers", "more layers", "vocabulary"],
)
@pytest.mark.parametrize("layout", ["1", "fsdp2"])
def test_another_model_is_an_error_and_renames_nothing(
    launch: Any, config: Any, run: Path, model: Any, word: str, layout: str
) -> None:
    before = tree(run)
    error = refused(launch, config(run, layout, training={"steps": 8}, model=model), "TensorMismatch")
    assert word in error["message"]
    assert tree(run) == before


def test_a_seed_of_another_model_is_an_error(launch: Any, tiny: Any, seed: Path, tmp_path: Path) -> None:
    shutil.copytree(seed, tmp_path / "checkpoint/step-0")
    error = refused(launch, tiny(tmp_path, model={"n_layers": 3}), "TensorMismatch")
    assert "n_layers expected 3, got 2" in error["message"]


def test_a_model_of_the_same_shapes_is_refused_wherever_weights_meet_it_and_the_hint_works(
    launch: Any, config: Any, run: Path, tmp_path: Path, longer: Path, metrics: Any
) -> None:
    other = {"n_heads": 8, "n_kv_heads": 4, "rope_theta": 10000.0, "norm_eps": 1e-3, "name": "llama3_1"}
    begun = tmp_path / "begun/checkpoint/step-0"
    convert(run / "checkpoint/step-6", begun)
    named = {"initial_load_path": str(run / "checkpoint/step-6")}
    resumed = {"training": {"steps": 10, "stop_after": 7}}
    before = tree(run)
    asked = [
        *(config(run, model={key: value}, **resumed) for key, value in other.items() if key != "n_kv_heads"),
        config(run, model={"tied_embeddings": True}, **resumed),
        config(run, model=other, **resumed),
        config(tmp_path / "begun", model=other),
        config(tmp_path / "new", model=other, checkpoint=named),
    ]
    asked[0]["model"]["n_kv_heads"] = 4
    words = ["n_heads expected 8, got 4", "rope_theta", "norm_eps", "rope_scaling", "tied expected True, got False"]
    for i, (rank,) in enumerate(launch.each(asked)):
        assert rank.error is not None
        assert rank.error["type"] == "TensorMismatch"
        assert all(word in rank.error["message"] for word in (words[i : i + 1] or words[:4]))
        hint = rank.error["hint"].rpartition(": ")[2].split()
        asked[i]["model"] |= load_config(None, hint)[0].model.model_dump(exclude_unset=True)
    assert tree(run) == before
    mended = launch.each(asked[5:])
    assert [rank.error for (rank,) in mended] == [None] * 3
    assert metrics(run)[6:9] == metrics(longer)[4:7]  # what the run would have gone on with, bit for bit
    assert [line for line in mended[0][0].log if "resuming after step 4" in line]


def test_what_does_not_say_its_model_is_said(launch: Any, config: Any, run: Path, tmp_path: Path, plain: Any) -> None:
    # A checkpoint of the engine's own API, and one without a manifest.
    weights = plain(run / "checkpoint/step-6")
    reshard.save(tmp_path / "engine", weights)
    shutil.copytree(tmp_path / "engine", tmp_path / "foreign")
    (tmp_path / "foreign/manifest.json").unlink()
    places = [tmp_path / "engine", tmp_path / "foreign", run / "checkpoint/step-6"]
    configs = [
        config(tmp_path / f"from-{place.name}", training={"steps": 1}, checkpoint={"initial_load_path": str(place)})
        for place in places
    ]
    for place, (rank,) in zip(places, launch.each(configs), strict=True):
        assert rank.error is None
        said = [line for line in rank.log if "does not say which model it is" in line]
        assert len(said) == (0 if place.name == "step-6" else 1)


def test_tied_or_not_is_compared_at_a_resume_and_settled_by_the_weights_at_the_start(
    launch: Any, config: Any, tmp_path: Path, plain: Any
) -> None:
    tied = {"tied_embeddings": True}
    launch(config(tmp_path / "tied", model=tied))
    named = {"initial_load_path": str(tmp_path / "tied/checkpoint/step-6")}  # weights only: it has both names
    still = {"optimizer": {"lr": 0.0}, "training": {"steps": 3}, "checkpoint": named}
    (untied,), (resumed,) = launch.each(
        [config(tmp_path / "untied", **still), config(tmp_path / "tied", training={"steps": 10})]
    )
    assert untied.error is None
    assert [line for line in untied.log if "become two matrices" in line and "tied" in line]
    stored = plain(tmp_path / "untied/checkpoint/step-2")
    assert torch.equal(stored["model.output.weight"], stored["model.tok_embeddings.weight"])
    assert resumed.error is not None
    assert "tied expected False, got True" in resumed.error["message"]
    assert resumed.error["hint"].endswith(" --model.tied_embeddings true")


# -- tied embeddings --------------------------------------------------------------------------------------------------


def test_tied_models_store_the_embedding_once_in_full_and_under_both_names_alone(
    launch: Any, config: Any, tmp_path: Path, plain: Any
) -> None:
    ranks = launch(config(tmp_path / "tied", "fsdp2xtp2", model={"tied_embeddings": True}))
    assert ranks[0].error is None
    full, weights = (plain(tmp_path / f"tied/checkpoint/step-{step}") for step in (4, 6))
    assert "model.output.weight" not in full
    assert torch.equal(weights["output.weight"], weights["tok_embeddings.weight"])
    # And they start a tied run again, from either kind.
    for step in (4, 6):
        named = {"initial_load_path": str(tmp_path / f"tied/checkpoint/step-{step}")}
        changes = {"model": {"tied_embeddings": True}, "training": {"steps": 1}, "checkpoint": named}
        assert launch(config(tmp_path / f"again-{step}", "fsdp2", **changes))[0].error is None


def test_an_untied_checkpoint_does_not_become_tied_in_silence(
    launch: Any, config: Any, finished: Path, tmp_path: Path
) -> None:
    named = {"initial_load_path": str(finished / "checkpoint/step-6")}
    asked = config(tmp_path / "new", "fsdp2", model={"tied_embeddings": True}, checkpoint=named)
    error = refused(launch, asked, "TensorMismatch")
    assert "output.weight" in error["message"]
    assert "tied_embeddings false" in error["hint"]


def test_a_tied_checkpoint_for_an_untied_model_is_an_error_with_the_way_out(
    launch: Any, config: Any, tmp_path: Path
) -> None:
    launch(config(tmp_path / "tied", model={"tied_embeddings": True}, training={"steps": 3}))
    named = {"initial_load_path": str(tmp_path / "tied/checkpoint/step-2")}
    error = refused(launch, config(tmp_path / "new", checkpoint=named), "TensorMismatch")
    assert "output.weight" in error["message"]
    assert "tied_embeddings true" in error["hint"]


# -- retention, batch, folders ----------------------------------------------------------------------------------------


def test_keep_latest_k_keeps_the_seed_and_the_latest(launch: Any, tiny: Any, seed: Path, tmp_path: Path) -> None:
    shutil.copytree(seed, tmp_path / "checkpoint/step-0")
    (tmp_path / "checkpoint/old-step-2").mkdir()
    (tmp_path / "checkpoint/step-2-keep").mkdir()
    kept = {"interval": 2, "keep_latest_k": 2}
    (rank,) = launch(tiny(tmp_path, training={"steps": 10}, checkpoint=kept))
    assert rank.error is None
    assert steps_in(tmp_path) == {"step-0", "step-8", "step-10", "old-step-2", "step-2-keep"}
    (rank,) = launch(tiny(tmp_path, training={"steps": 16}, checkpoint={**kept, "load_step": 8}))
    # The one that was loaded stays: the run may be sent back to it.
    assert steps_in(tmp_path) == {"step-0", "step-8", "step-14", "step-16", "old-step-2", "step-2-keep"}


def test_keep_latest_k_counts_the_weights_only_step_and_keeps_a_full_one(
    launch: Any, config: Any, tmp_path: Path
) -> None:
    launch(config(tmp_path / "run", "fsdp2", checkpoint={"keep_latest_k": 1}))
    assert steps_in(tmp_path / "run") == {"step-4", "step-6"}


def test_the_global_batch_is_the_checkpoints(launch: Any, config: Any, run: Path, events: Any, plain: Any) -> None:
    (rank,) = launch(config(run, training={"steps": 8, "stop_after": 5, "batch_size": 4, "global_batch_size": -1}))
    assert rank.error is None
    assert int(plain(run / "checkpoint/step-5")["train_state.next_sequence"]) == 5 * 8
    (rank,) = launch(config(run, training={"steps": 8, "stop_after": 7, "batch_size": 4, "global_batch_size": 12}))
    assert any("from 8 to 12" in line for line in rank.log)
    assert int(plain(run / "checkpoint/step-7")["train_state.next_sequence"]) == 5 * 8 + 2 * 12


def test_a_folder_with_torn_steps_only_is_an_error_and_is_left_alone(launch: Any, config: Any, run: Path) -> None:
    for manifest in (run / "checkpoint").glob("step-*/manifest.json"):
        manifest.unlink()
    before = tree(run)
    error = refused(launch, config(run), "TornCheckpoint")
    assert "step-2, step-4, step-6" in error["message"]
    assert "initial_load_path" in error["hint"]
    assert tree(run) == before


def test_torn_steps_beside_a_whole_one_are_said_and_left_alone(
    launch: Any, config: Any, run: Path, events: Any
) -> None:
    (run / "checkpoint/step-6/manifest.json").unlink()
    (run / "checkpoint/step-900").mkdir()
    (run / "checkpoint/step-900/.metadata").write_bytes(b"x")
    (rank,) = launch(config(run, training={"steps": 5}))
    assert rank.error is None
    assert [e for e in events(run) if e["event"] == "start"][-1]["step"] == 4
    for name in ("step-6", "step-900"):
        assert any(line.startswith(f"ignored {name}") for line in rank.log)
    assert (run / "checkpoint/step-900/.metadata").read_bytes() == b"x"


def test_names_that_are_not_ours_are_never_loaded_or_touched(launch: Any, config: Any, run: Path, events: Any) -> None:
    for name in ("old-step-900", "step-900-keep", "step-900.bak", "xstep-900", "step-9a", "step--9"):
        shutil.copytree(run / "checkpoint/step-4", run / "checkpoint" / name)
    (run / "checkpoint/notes.txt").write_text("mine")
    before = tree(run)
    launch(config(run, training={"steps": 7}))
    after = tree(run)
    assert [e for e in events(run) if e["event"] == "start"][-1]["step"] == 4
    ours = ("checkpoint/step-5/", "checkpoint/step-6/", "checkpoint/step-7/", "metrics.jsonl", "events.jsonl")
    assert {k: v for k, v in after.items() if not k.startswith(ours)} == {
        k: v for k, v in before.items() if not k.startswith(ours)
    }


# -- a loss that is not finite ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["1", "fsdp2", "tp2"])
def test_a_loss_that_is_not_finite_stops_before_it_reaches_the_weights(
    launch: Any, tiny: Any, tmp_path: Path, layout: str, metrics: Any
) -> None:
    wild = tiny(tmp_path, layout, optimizer={"lr": 1e30}, training={"warmup_steps": 0}, checkpoint={"interval": 1})
    error = refused(launch, wild, "TrainingError")
    assert "step 2" in error["message"]
    assert "nan" in error["message"] or "inf" in error["message"]
    assert [step for step, _, _ in metrics(tmp_path)] == [1]
    assert steps_in(tmp_path) == {"step-1"}
