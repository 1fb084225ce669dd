"""Does any state dict come back as it was? reshard.save, load, newest and AsyncSaver in one process."""

from __future__ import annotations

import copy
import math
import os
import re
import resource
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import state_dict as torch_state_dict
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)

import reshard
from reshard.checkpoint.load import open_index
from reshard.checkpoint.verify import verify_checkpoint
from reshard.errors import CheckpointError, IntegrityError, StorageError, TensorMismatch

VALUES: dict[str, Any] = {
    "step": 7,
    "large": 2**80 + 1,
    "negative": -3,
    "name": "größer\n\u2603",
    "empty": "",
    "rate": 0.1,
    "infinite": -math.inf,
    "on": True,
    "nothing": None,
    "list": [1, [2.5, "x"], []],
    "pair": (0.9, (1, 2)),
    "nested": {"a": {"b": 1}},
    "groups": [{"lr": 0.5, "betas": (0.1, 0.2), "params": ["a", "b"]}, {"lr": 0.25}],
}


def blank(value: Any) -> Any:
    """The same structure with other values in it."""
    if isinstance(value, dict):
        return {key: blank(v) for key, v in value.items()}
    if isinstance(value, list) and any(isinstance(v, dict) for v in value):
        return [blank(v) for v in value]
    if isinstance(value, torch.Tensor):
        return torch.zeros_like(value)
    return tuple(None for _ in value) if isinstance(value, tuple) else None


def test_values_of_every_plain_kind_come_back(tmp_path: Path) -> None:
    reshard.save(tmp_path / "x", VALUES)
    found = blank(VALUES)
    reshard.load(tmp_path / "x", found)
    expected = {**VALUES, "pair": (0.9, [1, 2])}  # the tuple inside was not announced, so it is a list
    assert found == expected
    assert type(found["on"]) is bool
    assert type(found["groups"][0]["betas"]) is tuple


def test_nan_comes_back(tmp_path: Path) -> None:
    reshard.save(tmp_path / "x", {"loss": math.nan})
    found = {"loss": 0.0}
    reshard.load(tmp_path / "x", found)
    assert math.isnan(found["loss"])


def test_model_and_optimizer_of_torchs_own_state_dict_functions(tmp_path: Path, trained: Any, step_on: Any) -> None:
    model, optimizer = trained(steps=3)
    weights, moments = get_state_dict(model, optimizer)
    reshard.save(tmp_path / "step-3", {"model": weights, "optimizer": moments, "step": 3})

    other, its_optimizer = trained(steps=1, seed=1)
    its_optimizer.param_groups[0]["lr"] = 5.0
    weights, moments = get_state_dict(other, its_optimizer)
    state = {"model": weights, "optimizer": moments, "step": 0}
    reshard.load(tmp_path / "step-3", state)
    set_state_dict(other, its_optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])

    assert state["step"] == 3
    assert its_optimizer.param_groups[0]["lr"] == 0.01
    assert its_optimizer.param_groups[0]["betas"] == (0.8, 0.9)
    step_on(model, optimizer, 2)
    step_on(other, its_optimizer, 2)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_torchs_optimizer_state_with_numbers_for_names(tmp_path: Path, trained: Any) -> None:
    _, optimizer = trained(steps=2)
    saved = copy.deepcopy(optimizer.state_dict())
    reshard.save(tmp_path / "x", {"optimizer": optimizer.state_dict()})
    _, other = trained(steps=1, seed=1)
    state = other.state_dict()
    reshard.load(tmp_path / "x", {"optimizer": state})
    other.load_state_dict(state)
    for number, moments in saved["state"].items():
        for key, tensor in moments.items():
            assert torch.equal(other.state_dict()["state"][number][key], tensor)


def test_nothing_in_it_is_a_pickled_object(tmp_path: Path) -> None:
    reshard.save(tmp_path / "x", {"a": torch.ones(3), **VALUES})
    _, index = open_index(tmp_path / "x")
    assert index.objects == {}
    assert set(index.tensors) == {"a", "reshard.values"}


def test_a_checkpoint_of_the_api_is_whole_and_read_by_plain_torch(tmp_path: Path) -> None:
    state = {"model": {"a.b": torch.randn(5, 4)}, "list": [torch.arange(3), 1], "step": 1}
    reshard.save(tmp_path / "step-9", state)
    verdict = verify_checkpoint(tmp_path / "step-9")
    assert (verdict.whole, verdict.step) == (True, 9)
    plain = {"model": {"a.b": torch.zeros(5, 4)}, "list": [torch.zeros(3, dtype=torch.int64)]}
    dcp.load(plain, checkpoint_id=str(tmp_path / "step-9"), no_dist=True)
    assert torch.equal(plain["model"]["a.b"], state["model"]["a.b"])
    assert torch.equal(plain["list"][0], torch.arange(3))


@pytest.mark.parametrize(
    "dtype", ["complex64", "float8_e4m3fn", "float8_e5m2", "uint16", "uint32", "uint64", "bfloat16", "bool", "int8"]
)
def test_rarer_dtypes(dtype: str, tmp_path: Path) -> None:
    bits = torch.randint(0, 2, (6, 32), dtype=torch.uint8)
    tensor = bits.view(getattr(torch, dtype))
    reshard.save(tmp_path / "x", {"t": tensor})
    ours, theirs = {"t": torch.zeros_like(tensor)}, {"t": torch.zeros_like(tensor)}
    reshard.load(tmp_path / "x", ours)
    dcp.load(theirs, checkpoint_id=str(tmp_path / "x"), no_dist=True)
    for found in (ours["t"], theirs["t"]):
        assert found.dtype == tensor.dtype
        assert torch.equal(found.view(torch.uint8), bits)


# -- what cannot be stored is said, and leaves nothing ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({"a": {"b": object()}}, ["`a.b`", "a object"]),
        ({"a": {1, 2}}, ["`a`", "a set"]),
        ({"a": b"bytes"}, ["`a`", "bytes"]),
        ({"a": (torch.ones(1), 2)}, ["`a`", "tuple"]),
        ({"a": torch.eye(3).to_sparse()}, ["`a`", "sparse"]),
        ({"a": torch.empty(3, device="meta")}, ["`a`", "meta"]),
        ({"a": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)}, ["`a`", "qint8"]),
        ({"a.b": 1, "a": {"b": 2}}, ["`a.b`", "same name"]),
        ({"reshard.values": torch.ones(1)}, ["`reshard.values`", "same name"]),
    ],
    ids=[
        "object",
        "set",
        "bytes",
        "tensor in a tuple",
        "sparse",
        "meta",
        "quantised",
        "one name twice",
        "our own name",
    ],
)
def test_what_cannot_be_stored(state: dict[str, Any], words: list[str], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        reshard.save(tmp_path / "x", state)
    assert all(word in caught.value.message for word in [*words, str(tmp_path / "x")]), caught.value.message
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_refuses(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="file/step-1"):
        reshard.save(tmp_path / "file/step-1", {"a": torch.ones(3)})


# -- what does not fit is refused before anything is touched ----------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    reshard.save(tmp_path / "x", {"a": torch.ones(6, 4), "b": torch.ones(3), "step": 5})
    return tmp_path / "x"


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        ({"a": torch.zeros(4, 6)}, ["a", "(4, 6)"]),
        ({"a": torch.zeros(6, 4, dtype=torch.float64)}, ["a", "float64"]),
        ({"c": torch.zeros(1)}, ["missing", "c"]),
        ({"epoch": 0}, ["missing", "epoch"]),
        ({"a": 0}, ["missing", "a"]),
    ],
    ids=["shape", "dtype", "tensor", "value", "a value for a tensor"],
)
def test_a_mismatch_touches_nothing(saved: Path, wanted: dict[str, Any], words: list[str]) -> None:
    state = {"b": torch.zeros(3), "step": 0, **wanted}
    with pytest.raises(TensorMismatch) as caught:
        reshard.load(saved, state)
    assert all(word in caught.value.message for word in words), caught.value.message
    assert float(state["b"].sum()) == 0
    assert state["step"] == 0


def test_a_part_is_enough_and_a_cast_has_to_be_asked_for(saved: Path) -> None:
    state = {"a": torch.zeros(6, 4, dtype=torch.bfloat16)}
    reshard.load(saved, state, cast=True)
    assert torch.equal(state["a"], torch.ones(6, 4, dtype=torch.bfloat16))


def test_parameters_are_filled_in_place(saved: Path) -> None:
    parameter = torch.nn.Parameter(torch.zeros(6, 4))
    address = parameter.data_ptr()
    reshard.load(saved, {"a": parameter})
    assert parameter.data_ptr() == address
    assert torch.equal(parameter, torch.ones(6, 4))


@pytest.mark.parametrize("part", ["data", "index", "values"])
def test_a_flipped_bit_is_an_error(saved: Path, part: str) -> None:
    path = saved / (".metadata" if part == "index" else "__0_0.distcp")
    content = bytearray(path.read_bytes())
    at = {"data": content.find(torch.ones(4).numpy().tobytes()), "index": 50, "values": content.find(b'"step": 5')}[
        part
    ]
    assert at > 0
    content[at + 1] ^= 4
    path.write_bytes(content)
    with pytest.raises(IntegrityError):
        reshard.load(saved, {"a": torch.zeros(6, 4), "b": torch.zeros(3), "step": 0})


def test_a_newer_save_replaces_the_older_one(saved: Path) -> None:
    reshard.save(saved, {"a": torch.full((6, 4), 2.0)}, step=12)
    state = {"a": torch.zeros(6, 4)}
    reshard.load(saved, state)
    assert float(state["a"][0, 0]) == 2
    assert verify_checkpoint(saved).step == 12
    assert list(saved.parent.iterdir()) == [saved]


def test_a_step_cannot_contradict_the_name(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="expected 3"):
        reshard.save(tmp_path / "step-3", {"a": torch.ones(2)}, step=8)
    assert list(tmp_path.iterdir()) == []


# -- a section that the state dict names is loaded as a whole ---------------------------------------------------------

FLAT = StateDictOptions(flatten_optimizer_state_dict=True)
# How an optimizer's state is made -> (its state dict, how it is given back).
OPTIMIZERS: dict[str, tuple[Any, Any]] = {
    "by parameter": (
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    ),
    "by parameter, flat": (
        lambda model, optimizer: get_optimizer_state_dict(model, optimizer, options=FLAT),
        lambda model, optimizer, state: set_optimizer_state_dict(model, optimizer, state, options=FLAT),
    ),
    "by number": (
        lambda model, optimizer: optimizer.state_dict(),
        lambda model, optimizer, state: optimizer.load_state_dict(state),
    ),
}


@pytest.mark.parametrize("by", ["reshard.save", "dcp.save"])
@pytest.mark.parametrize("how", list(OPTIMIZERS))
def test_an_optimizer_without_moments_is_refused_and_the_hint_makes_them(
    how: str, by: str, tmp_path: Path, trained: Any, step_on: Any
) -> None:
    get, give_back = OPTIMIZERS[how]
    model, optimizer = trained(steps=3)
    state = {"model": model.state_dict(), "optimizer": copy.deepcopy(get(model, optimizer))}
    if by == "reshard.save":
        reshard.save(tmp_path / "x", state)
    else:
        dcp.save(state, checkpoint_id=str(tmp_path / "x"), no_dist=True)

    other, its_optimizer = trained(steps=0, seed=1)
    groups = {key: value for key, value in get(other, its_optimizer).items() if not key.startswith("state")}
    its_optimizer.state.clear()  # torch's function makes the moments: this is what other ways give for a new optimizer
    before = copy.deepcopy(other.state_dict())
    for lacking in ({"state": {}, **groups} if "flat" not in how else groups, groups, {}):
        with pytest.raises(TensorMismatch) as caught:
            reshard.load(tmp_path / "x", {"model": other.state_dict(), "optimizer": lacking})
        assert "names `optimizer`" in caught.value.message
        assert "exp_avg" in caught.value.message
        assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())

    calls = re.findall(r"get_optimizer_state_dict\(.*?\)+", caught.value.hint or "")
    assert len(calls) == 1
    made = eval(calls[0], {**vars(torch_state_dict), "model": other, "optimizer": its_optimizer})  # as the hint says
    moments = its_optimizer.state_dict() if "before optimizer.state_dict()" in (caught.value.hint or "") else made
    found = {"model": other.state_dict(), "optimizer": moments}
    assert reshard.load(tmp_path / "x", found) == []
    give_back(other, its_optimizer, found["optimizer"])
    step_on(model, optimizer, 2)  # plain torch, which was not interrupted
    step_on(other, its_optimizer, 2)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.fixture
def nested(tmp_path: Path) -> Path:
    state = {
        "model": {"a": torch.ones(2), "deep": {"b": torch.ones(3), "c": [torch.ones(1), 5]}},
        "model.ema": {"a": torch.ones(2)},
        "groups": [{"lr": 0.5, "betas": [0.1, 0.2]}, {"lr": 0.25}],
        "step": 7,
    }
    reshard.save(tmp_path / "x", state)
    return tmp_path / "x"


@pytest.mark.parametrize(
    ("wanted", "lacking"),
    [
        ({"model": {"a": torch.zeros(2)}}, ["`model`", "model.deep.b", "model.deep.c.0", "model.deep.c.1"]),
        ({"model": {"a": torch.zeros(2), "deep": {"b": torch.zeros(3), "c": [torch.zeros(1)]}}}, ["model.deep.c.1"]),
        ({"model": {}}, ["`model`", "model.a"]),
        ({"groups": [{"lr": 0.0, "betas": []}]}, ["`groups`", "groups.1.lr"]),
        ({"groups": [{"lr": 0.0}, {"lr": 0.0}]}, ["groups.0.betas"]),
        ({"step": 0, "model.ema": {}}, ["`model.ema`", "model.ema.a"]),
    ],
    ids=["tensors", "a value", "everything", "an entry of a list", "a value in a list", "a key with a dot"],
)
def test_a_part_of_a_section_is_refused_unless_it_is_asked_for(
    nested: Path, wanted: dict[str, Any], lacking: list[str]
) -> None:
    before = copy.deepcopy(wanted)
    with pytest.raises(TensorMismatch) as caught:
        reshard.load(nested, wanted)
    assert all(word in caught.value.message for word in [*lacking, str(nested)]), caught.value.message
    assert "strict=False" in (caught.value.hint or "")
    assert repr(wanted) == repr(before)
    left = reshard.load(nested, wanted, strict=False)
    assert {name for name in lacking if "`" not in name} <= set(left)
    assert repr(wanted) != repr(before) or wanted == {"model": {}}


def test_sections_that_are_not_named_are_returned(nested: Path) -> None:
    whole = {
        "model": {"a": torch.zeros(2), "deep": {"b": torch.zeros(3), "c": [torch.zeros(1), 0]}},
        "model.ema": {"a": torch.zeros(2)},
        "groups": [{"lr": 0.0, "betas": []}, {"lr": 0.0}],
        "step": 0,
    }
    names = {
        "model": ["model.a", "model.deep.b", "model.deep.c.0", "model.deep.c.1"],
        "model.ema": ["model.ema.a"],
        "groups": ["groups.0.betas", "groups.0.lr", "groups.1.lr"],
        "step": ["step"],
    }
    for section in whole:
        others = sorted(name for other in names if other != section for name in names[other])
        assert reshard.load(nested, {section: whole[section]}) == others
    assert reshard.load(nested, whole) == []
    assert reshard.load(nested, {}) == sorted(name for of_section in names.values() for name in of_section)


def test_what_is_missing_is_said_with_what_is_left_out(nested: Path) -> None:
    """As where the parameters have other names."""
    with pytest.raises(TensorMismatch) as caught:
        reshard.load(nested, {"model.ema": {"module.a": torch.zeros(2)}})
    assert caught.value.missing == ("model.ema.module.a",)
    assert "model.ema.a" in caught.value.message


def test_a_part_of_a_flat_state_dict_is_said(saved: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert reshard.load(saved, {"a": torch.zeros(6, 4)}) == ["b", "step"]
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [
        f"`{saved}` also holds tensors that were not asked for: b"
    ]
    caplog.clear()
    assert reshard.load(saved, {"a": torch.zeros(6, 4)}, strict=False) == ["b", "step"]
    assert reshard.load(saved, {"a": torch.zeros(6, 4), "b": torch.zeros(3)}) == ["step"]
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


# -- checkpoints of other programs ------------------------------------------------------------------------------------


class NotPlain:
    """Pickled by torch's planner; unpickling it would run code."""

    def __reduce__(self) -> Any:
        return os.system, ("touch proof-that-code-ran",)


def test_what_dcp_saved_with_numbers_and_strings(tmp_path: Path) -> None:
    state = {"a": torch.randn(30, 4), "step": 9, "name": "x", "groups": [{"lr": 0.1, "params": ["a", "b"]}]}
    dcp.save(state, checkpoint_id=str(tmp_path / "theirs"), no_dist=True)
    found = {"a": torch.zeros(30, 4), "step": 0, "name": "", "groups": [{"lr": 0.0, "params": []}]}
    reshard.load(tmp_path / "theirs", found)
    assert torch.equal(found.pop("a"), state.pop("a"))
    assert found == state


def test_what_dcp_pickled_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    dcp.save({"a": torch.ones(3), "evil": NotPlain()}, checkpoint_id=str(tmp_path / "theirs"), no_dist=True)
    found = {"a": torch.zeros(3)}
    assert reshard.load(tmp_path / "theirs", found) == ["evil"]
    assert torch.equal(found["a"], torch.ones(3))
    dcp.save({"part": {"a": torch.ones(3), "evil": NotPlain()}}, checkpoint_id=str(tmp_path / "in"), no_dist=True)
    with pytest.raises(TensorMismatch, match=r"part\.evil: pickled") as caught:
        reshard.load(tmp_path / "in", {"part": {"a": torch.zeros(3)}})
    assert "strict=False" in (caught.value.hint or "")
    assert reshard.load(tmp_path / "in", {"part": {"a": torch.zeros(3)}}, strict=False) == ["part.evil"]
    with pytest.raises(TensorMismatch, match="evil"):
        reshard.load(tmp_path / "theirs", {"evil": None})
    assert not (tmp_path / "proof-that-code-ran").exists()


# -- which one is newest ----------------------------------------------------------------------------------------------


def test_newest_is_the_one_saved_last_and_whole(tmp_path: Path) -> None:
    assert reshard.newest(tmp_path / "absent") is None
    for step in (5, 10, 7):
        reshard.save(tmp_path / f"step-{step}", {"a": torch.ones(2)})
    (tmp_path / "step-99").mkdir()
    (tmp_path / "step-99/__0_0.distcp").write_bytes(b"torn")
    (tmp_path / "step-8.tmp-0123456789abcdef").mkdir()
    assert reshard.newest(tmp_path) == tmp_path / "step-7"
    (tmp_path / "step-7/__0_0.distcp").write_bytes(b"short")
    assert reshard.newest(tmp_path) == tmp_path / "step-10"


# -- in the background ------------------------------------------------------------------------------------------------


def test_what_is_saved_is_what_was_there_when_save_returned(tmp_path: Path) -> None:
    state = {"a": torch.zeros(1 << 20), "step": 0}
    with reshard.AsyncSaver(write_limit_mb_s=40) as saver:
        for step in range(3):
            state["a"].fill_(step)
            state["step"] = step
            saver.save(tmp_path / f"step-{step}", state)
            state["a"].fill_(-1)  # the 4 MiB take a tenth of a second to write
            state["step"] = -1
    for step in range(3):
        found = {"a": torch.zeros(1 << 20), "step": -1}
        reshard.load(tmp_path / f"step-{step}", found)
        assert found["step"] == step
        assert torch.equal(found["a"], torch.full((1 << 20,), float(step)))


def test_one_save_is_in_flight_and_leaving_waits_for_it(tmp_path: Path) -> None:
    with reshard.AsyncSaver(write_limit_mb_s=20) as saver:
        saver.save(tmp_path / "step-1", {"a": torch.ones(1 << 20)})
        assert not (tmp_path / "step-1").exists()
        saver.save(tmp_path / "step-2", {"a": torch.ones(1 << 20)})
        assert (tmp_path / "step-1").exists()
        assert not (tmp_path / "step-2").exists()
    assert (tmp_path / "step-2").exists()


def test_wait_waits(tmp_path: Path) -> None:
    saver = reshard.AsyncSaver(write_limit_mb_s=20)
    saver.save(tmp_path / "step-1", {"a": torch.ones(1 << 20)})
    saver.wait()
    assert verify_checkpoint(tmp_path / "step-1").whole


def test_an_error_in_the_background_is_raised_by_the_next_call(tmp_path: Path) -> None:
    saver = reshard.AsyncSaver()
    (tmp_path / "file").write_text("in the way")
    saver.save(tmp_path / "file/step-1", {"a": torch.ones(3)})
    with pytest.raises(StorageError, match="step-1"):
        saver.save(tmp_path / "step-2", {"a": torch.ones(3)})
    saver.save(tmp_path / "step-3", {"a": torch.ones(3)})  # and it goes on
    saver.wait()
    assert {path.name for path in tmp_path.iterdir()} == {"file", "step-3"}


def test_an_exception_in_training_keeps_the_save_in_flight(tmp_path: Path) -> None:
    def train() -> None:
        with reshard.AsyncSaver(write_limit_mb_s=20) as saver:
            saver.save(tmp_path / "step-1", {"a": torch.ones(1 << 20)})
            raise RuntimeError("training broke")

    with pytest.raises(RuntimeError, match="training broke"):
        train()
    assert verify_checkpoint(tmp_path / "step-1").whole


# -- how it is reached ------------------------------------------------------------------------------------------------


def test_importing_reshard_alone_imports_no_torch() -> None:
    code = "import reshard, sys; assert 'torch' not in sys.modules; reshard.save; assert 'torch' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_ordered_dict_and_a_path_as_text(tmp_path: Path) -> None:
    state = OrderedDict(a=torch.ones(2), inner=OrderedDict(b=3))
    reshard.save(str(tmp_path / "x"), state)
    found = OrderedDict(a=torch.zeros(2), inner=OrderedDict(b=0))
    reshard.load(str(tmp_path / "x"), found)
    assert found["inner"]["b"] == 3


def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(StorageError, match="File too large"):
            reshard.save(tmp_path / "x", {"a": torch.ones(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []
