"""Which tensors come back as they were, and which are refused by name before anything is touched? As plain torch has it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException

import reshard
from reshard.checkpoint.adapters import ReshardReader, ReshardWriter
from reshard.checkpoint.load import open_index
from reshard.checkpoint.manifest import read_manifest
from reshard.checkpoint.verify import verify_checkpoint
from reshard.errors import CheckpointError


def plain_save(path: Path, state: dict[str, Any]) -> None:
    dcp.save(state, checkpoint_id=str(path), no_dist=True)


def plain_load(path: Path, state: dict[str, Any]) -> None:
    dcp.load(state, checkpoint_id=str(path), no_dist=True)


SAVES: dict[str, Callable[[Path, dict[str, Any]], None]] = {
    "reshard": reshard.save,
    "adapter": lambda path, state: dcp.save(state, storage_writer=ReshardWriter(path), no_dist=True),
}
LOADS: dict[str, Callable[[Path, dict[str, Any]], None]] = {
    "reshard": reshard.load,
    "adapter": lambda path, state: dcp.load(state, storage_reader=ReshardReader(path), no_dist=True),
}
doors = pytest.mark.parametrize("door", ["reshard", "adapter"])


# -- subclasses --------------------------------------------------------------------------------------------------------


class Dequantised(Tensor):
    """What optimum-quanto and torchao make: codes inside, and whatever it cannot do is done dequantised."""

    codes: Tensor
    scale: Tensor

    @staticmethod
    def __new__(cls, codes: Tensor, scale: Tensor) -> Any:
        return Tensor._make_wrapper_subclass(cls, codes.shape, dtype=scale.dtype)

    def __init__(self, codes: Tensor, scale: Tensor) -> None:
        self.codes, self.scale = codes, scale

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return cls(args[0].codes, args[0].scale)
        plain = [a.codes.to(a.scale.dtype) * a.scale if isinstance(a, cls) else a for a in args]
        return func(*plain, **(kwargs or {}))


class Watched(Tensor):
    """Real memory, but its functions are its own."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return super().__torch_function__(func, types, args, kwargs or {})


class OwnCopy(nn.Parameter):
    """As bitsandbytes' Int8Params and others: a method that does something else."""

    def detach(self) -> Tensor:
        return super().detach() * 2


class Named(Tensor):
    """Says more of itself, does nothing else."""

    tag = "mine"

    def describe(self) -> str:
        return self.tag


class NamedParameter(nn.Parameter):
    tag = "mine"


def made(kind: str, value: float) -> Tensor:
    numbers = torch.full((3,), float(value))
    match kind:
        case "Dequantised":
            return Dequantised(numbers.to(torch.int8), torch.tensor(0.5))
        case "a parameter of it":
            return nn.Parameter(made("Dequantised", value), requires_grad=False)
        case "Watched":
            return numbers.as_subclass(Watched)
        case "OwnCopy":
            return OwnCopy(numbers)
        case "Named":
            return numbers.as_subclass(Named)
        case "NamedParameter":
            return NamedParameter(numbers)
        case "Buffer":
            return nn.Buffer(numbers)
    return nn.Parameter(numbers)


@doors
@pytest.mark.parametrize("kind", ["Dequantised", "a parameter of it", "Watched", "OwnCopy"])
def test_a_subclass_that_may_mean_something_else_is_refused_before_anything_is_touched(
    kind: str, door: str, tmp_path: Path
) -> None:
    with pytest.raises((CheckpointError, CheckpointException)) as caught:
        SAVES[door](tmp_path / "x", {"ok": torch.ones(2), "odd": made(kind, 1)})
    assert "`odd`" in str(caught.value)
    assert type(made(kind, 1)).__name__ in str(caught.value)
    assert not (tmp_path / "x").exists()
    SAVES[door](tmp_path / "y", {"ok": torch.ones(2), "odd": torch.full((3,), 7.0)})
    target = {"ok": torch.zeros(2), "odd": made(kind, 1)}
    with pytest.raises((CheckpointError, CheckpointException), match="`odd`"):
        LOADS[door](tmp_path / "y", target)
    assert target["ok"].sum() == 0


@doors
@pytest.mark.parametrize("kind", ["Parameter", "Buffer", "Named", "NamedParameter"])
def test_plain_subclasses_come_back(kind: str, door: str, tmp_path: Path) -> None:
    SAVES[door](tmp_path / "x", {"w": made(kind, 3)})
    found, theirs = made(kind, 0), {"w": torch.zeros(3)}
    LOADS[door](tmp_path / "x", {"w": found})
    plain_load(tmp_path / "x", theirs)
    assert found.tolist() == theirs["w"].tolist() == [3, 3, 3]
    assert type(found) is type(made(kind, 0))


# -- no elements -------------------------------------------------------------------------------------------------------


@doors
def test_tensors_without_elements_are_stored_as_plain_torch_stores_them(door: str, tmp_path: Path) -> None:
    state = {
        "a": torch.zeros(0),
        "b": torch.zeros(3, 0, 2, dtype=torch.int16),
        "c": torch.zeros(0, 4).bool(),
        "d": torch.ones(2),
    }
    SAVES[door](tmp_path / "ours", state)
    plain_save(tmp_path / "theirs", state)
    ours, theirs = (dcp.FileSystemReader(tmp_path / name).read_metadata() for name in ("ours", "theirs"))
    for name in state:
        a, b = ours.state_dict_metadata[name], theirs.state_dict_metadata[name]
        assert (a.size, a.properties.dtype, a.chunks) == (b.size, b.properties.dtype, b.chunks)
    assert {(i.fqn, i.offset) for i in ours.storage_data} == {(i.fqn, i.offset) for i in theirs.storage_data}
    said = read_manifest(tmp_path / "ours").tensors
    assert {name: (said[name].shape, said[name].dtype) for name in state} == {
        name: (tuple(t.shape), str(t.dtype).removeprefix("torch.")) for name, t in state.items()
    }
    assert verify_checkpoint(tmp_path / "ours").whole
    for load in (plain_load, *LOADS.values()):
        found = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
        load(tmp_path / "ours", found)
        assert found["d"].tolist() == [1, 1]
        with pytest.raises((reshard.ReshardError, CheckpointException), match="b"):
            load(tmp_path / "ours", {"b": torch.zeros(3, 0, 3, dtype=torch.int16)})
    reshard.load(tmp_path / "theirs", {name: torch.zeros_like(tensor) for name, tensor in state.items()})
    assert set(open_index(tmp_path / "ours")[1].tensors) == set(state)


# -- views -------------------------------------------------------------------------------------------------------------


def views() -> dict[str, Tensor]:
    z = torch.view_as_complex(torch.arange(8.0).view(4, 2))
    return {
        "conjugate": z.conj(), "conjugate, strided": z.conj()[::2], "negative": z.conj().imag, "both": (z.conj() * 1j).conj(),
        "expanded": torch.arange(3.0).expand(2, 3), "transposed": torch.arange(6.0).view(2, 3).t(),
        "scalar": torch.tensor(2j).conj(),
    }  # fmt: skip


@doors
@pytest.mark.parametrize("name", views())
def test_views_are_stored_as_the_numbers_that_they_are(name: str, door: str, tmp_path: Path) -> None:
    SAVES[door](tmp_path / "x", {"w": views()[name]})
    for load in (plain_load, *LOADS.values()):
        found = {"w": torch.zeros_like(views()[name]).contiguous()}
        load(tmp_path / "x", found)
        assert found["w"].tolist() == views()[name].tolist()


def test_a_background_save_of_them(tmp_path: Path) -> None:
    with reshard.AsyncSaver() as saver:
        saver.save(tmp_path / "x", views())
    found = {name: torch.zeros_like(view).contiguous() for name, view in views().items()}
    plain_load(tmp_path / "x", found)
    assert {n: t.tolist() for n, t in found.items()} == {n: t.tolist() for n, t in views().items()}


@doors
def test_loading_into_views(door: str, tmp_path: Path) -> None:
    """What the view shows afterwards is what was stored, as with torch's copy_."""
    wanted = torch.view_as_complex(torch.arange(8.0).view(4, 2))
    reshard.save(tmp_path / "x", {"z": wanted, "i": wanted.imag.contiguous()})
    memory, other = torch.zeros(4, dtype=torch.complex64), torch.zeros(4, dtype=torch.complex64)
    LOADS[door](tmp_path / "x", {"z": memory.conj(), "i": other.conj().imag})
    assert memory.conj().tolist() == wanted.tolist()
    assert other.conj().imag.tolist() == wanted.imag.tolist()


def shared() -> dict[str, Tensor]:
    return {
        "expanded": torch.zeros(1, 3).expand(2, 3), "windows": torch.zeros(4).as_strided((3, 2), (1, 1)),
        "interleaved": torch.zeros(20).as_strided((4, 4), (2, 3)),
    }  # fmt: skip


@doors
@pytest.mark.parametrize("name", shared())
def test_a_place_for_several_numbers_is_refused_before_anything_is_touched(
    name: str, door: str, tmp_path: Path
) -> None:
    target = {"a": torch.zeros(2), "odd": shared()[name]}
    reshard.save(tmp_path / "x", {key: torch.ones(tensor.shape) for key, tensor in target.items()})
    with pytest.raises((CheckpointError, CheckpointException), match="`odd`"):
        LOADS[door](tmp_path / "x", target)
    assert [tensor.sum().item() for tensor in target.values()] == [0, 0]


@doors
def test_strides_that_never_meet_are_filled(door: str, tmp_path: Path) -> None:
    wanted = torch.arange(12.0).view(3, 4)
    reshard.save(tmp_path / "x", {"w": wanted})
    targets = [torch.zeros(30).as_strided((3, 4), (5, 3)), torch.zeros(4, 3).t(), torch.zeros(3, 8)[:, ::2]]
    for target in targets:
        LOADS[door](tmp_path / "x", {"w": target})
        assert target.tolist() == wanted.tolist()


@doors
def test_targets_made_in_inference_mode(door: str, tmp_path: Path) -> None:
    wanted = torch.arange(12.0).view(3, 4)
    reshard.save(tmp_path / "x", {"a": wanted, "b": wanted})
    with torch.inference_mode():
        target = {"a": torch.zeros(3, 4), "b": torch.zeros(4, 3).t()}
    LOADS[door](tmp_path / "x", target)
    assert target["a"].tolist() == target["b"].tolist() == wanted.tolist()


def freed() -> Tensor:
    tensor = torch.ones(3)
    tensor.untyped_storage().resize_(0)
    return tensor


@doors
@pytest.mark.parametrize(
    "tensor",
    [
        torch.eye(3).to_sparse(), torch.eye(3).to_sparse_csr(), torch.empty(3, device="meta"),
        torch.zeros(4, dtype=torch.uint8).view(torch.float4_e2m1fn_x2), torch.zeros(2, dtype=torch.complex32), freed(),
    ],
    ids=["sparse", "csr", "meta", "float4", "complex32", "freed"],
)  # fmt: skip
def test_what_has_no_numbers_that_we_store_is_refused_by_name(tensor: Tensor, door: str, tmp_path: Path) -> None:
    with pytest.raises((CheckpointError, CheckpointException), match="`odd`"):
        SAVES[door](tmp_path / "x", {"a": torch.ones(2), "odd": tensor})
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_tensors_are_refused_by_name(layout: torch.layout, tmp_path: Path) -> None:
    """Through the adapter torch itself refuses them."""
    odd = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=layout)
    with pytest.raises(CheckpointError, match="`odd`"):
        reshard.save(tmp_path / "x", {"a": torch.ones(2), "odd": odd})
