"""Does a state come back bit for bit? One process, any state dict, by our reader and by torch's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from reshard.checkpoint.load import load, stored_names
from reshard.checkpoint.manifest import read_manifest
from reshard.checkpoint.ranks import Ranks
from reshard.checkpoint.save import About, refuse_existing, save, save_weights, tensor_state
from reshard.checkpoint.state import Piece, pieces_of
from reshard.errors import CheckpointError, NotACheckpoint, TensorMismatch
from reshard.model.spec import LlamaSpec

ABOUT = About(step=1, kind="full", source={"kind": "test"})
DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
]


def random_of(dtype: torch.dtype, *shape: int) -> Tensor:
    """Any bits at all: NaNs, infinities, denormals and signed zeros come back as they were, too."""
    generator = torch.Generator().manual_seed(0)
    if dtype == torch.bool:
        return torch.randint(0, 2, shape, generator=generator).bool()
    raw = torch.randint(0, 256, (*shape, dtype.itemsize), dtype=torch.uint8, generator=generator)
    return raw.view(dtype).reshape(shape)


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def empty_like(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.zeros_like(tensor, memory_format=torch.contiguous_format) for name, tensor in state.items()}


def both_ways(directory: Path, state: dict[str, Tensor]) -> None:
    """What we read and what plain torch reads is what was saved."""
    ours, theirs = empty_like(state), empty_like(state)
    assert load(directory, ours, Ranks()) > 0
    dcp.load(theirs, checkpoint_id=str(directory), no_dist=True)
    for name, tensor in state.items():
        for found in (ours[name], theirs[name]):
            assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
            assert torch.equal(bits(found), bits(tensor)), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_comes_back_bit_for_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    state = {"a": random_of(dtype, 37, 5), "b": random_of(dtype, 130), "c": random_of(dtype, 3, 4, 5)}
    save(tmp_path / "x", state, ABOUT, Ranks())
    both_ways(tmp_path / "x", state)


def test_scalars_views_slices_and_odd_shapes(tmp_path: Path) -> None:
    base = torch.randn(40, 30)
    state = {
        "scalar": torch.tensor(3.25),
        "whole number": torch.tensor(2**62 + 1),
        "one": torch.randn(1),
        "column": torch.randn(9, 1),
        "transposed": base.t(),
        "rows": base[10:13],
        "columns": base[:, 3:7],
        "every second": base[::2],
        "expanded": torch.randn(1, 6).expand(5, 6),
        "part of a storage": torch.arange(1000.0)[500:510],
        "odd bytes": torch.arange(7, dtype=torch.uint8),
    }
    save(tmp_path / "x", state, ABOUT, Ranks())
    both_ways(tmp_path / "x", state)


def test_many_small_and_one_large_tensor(tmp_path: Path) -> None:
    state = {f"t{i}": torch.full((1 + i % 7, 3), float(i)) for i in range(600)}
    state["large"] = torch.randn(700, 1000)
    save(tmp_path / "x", state, ABOUT, Ranks())
    both_ways(tmp_path / "x", state)


def test_a_tensor_above_the_size_of_a_chunk_is_cut_along_its_rows(tmp_path: Path) -> None:
    state = {"large": torch.arange(3000 * 8192, dtype=torch.int32).reshape(3000, 8192)}  # 98 MB
    save(tmp_path / "x", state, ABOUT, Ranks())
    described = dcp.FileSystemReader(str(tmp_path / "x")).read_metadata().state_dict_metadata["large"]
    sizes = [chunk.sizes.numel() * 4 for chunk in described.chunks]
    assert len(sizes) > 1
    assert max(sizes) <= 64 << 20
    both_ways(tmp_path / "x", state)


def test_saving_changes_nothing_in_memory(tmp_path: Path) -> None:
    tensor = torch.randn(50, 8, requires_grad=True)
    before = tensor.detach().clone()
    save(tmp_path / "x", {"a": tensor}, ABOUT, Ranks())
    assert torch.equal(tensor, before)
    assert tensor.requires_grad


def test_two_levels_are_one_name_on_disk_and_two_for_torch(tmp_path: Path) -> None:
    state = {"model": {"a.b": torch.randn(4)}, "train_state": tensor_state({"step": 7})}
    save(tmp_path / "x", state, ABOUT, Ranks())
    assert set(stored_names(tmp_path / "x")) == {"model.a.b", "train_state.step"}
    nested = {"model": {"a.b": torch.zeros(4)}, "train_state": {"step": torch.tensor(0)}}
    dcp.load(nested, checkpoint_id=str(tmp_path / "x"), no_dist=True)
    assert torch.equal(nested["model"]["a.b"], state["model"]["a.b"])
    assert nested["train_state"]["step"].item() == 7


def test_whole_numbers_are_kept_to_the_last_digit(tmp_path: Path) -> None:
    numbers = {"tokens": 2**53 + 1, "negative": -5, "zero": 0}
    save(tmp_path / "x", {"n": tensor_state(numbers)}, ABOUT, Ranks())
    found = {f"n.{name}": torch.tensor(0) for name in numbers}
    load(tmp_path / "x", found, Ranks())
    assert {name.removeprefix("n."): int(tensor) for name, tensor in found.items()} == numbers


def test_a_part_can_be_loaded_alone(tmp_path: Path) -> None:
    state = {f"t{i}": torch.randn(200, 40) for i in range(20)}
    save(tmp_path / "x", state, ABOUT, Ranks())
    wanted = {"t7": torch.zeros(200, 40)}
    nbytes = load(tmp_path / "x", wanted, Ranks())
    assert torch.equal(wanted["t7"], state["t7"])
    assert nbytes < 10 * 200 * 40 * 4  # not the whole checkpoint


def test_floats_are_cast_on_the_way_out_if_asked_and_whole_numbers_are_not(tmp_path: Path) -> None:
    state = {"w": torch.randn(30, 3), "n": torch.arange(5)}
    save(tmp_path / "x", state, ABOUT, Ranks(), dtype=torch.bfloat16)
    both_ways(tmp_path / "x", {"w": state["w"].bfloat16(), "n": state["n"]})
    assert read_manifest(tmp_path / "x").tensors["w"].dtype == "bfloat16"


# -- what does not fit is refused before a byte is read ---------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save(tmp_path / "x", {"a": torch.ones(6, 4), "b": torch.ones(3)}, ABOUT, Ranks())
    return tmp_path / "x"


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        ({"a": torch.zeros(6, 5)}, ["a", "(6, 5)", "(6, 4)"]),
        ({"a": torch.zeros(24)}, ["a", "(24,)", "(6, 4)"]),
        ({"c": torch.zeros(1)}, ["missing", "c"]),
        ({"a": torch.zeros(6, 4, dtype=torch.bfloat16)}, ["bfloat16", "float32"]),
    ],
    ids=["shape", "dims", "name", "dtype"],
)
def test_a_mismatch_is_named_and_touches_nothing(saved: Path, wanted: dict[str, Tensor], words: list[str]) -> None:
    other = torch.zeros(3)
    with pytest.raises(TensorMismatch) as caught:
        load(saved, {"b": other, **wanted}, Ranks())
    assert all(word in caught.value.message for word in words)
    assert float(other.sum()) == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_cast_is_done_only_if_asked(saved: Path, dtype: torch.dtype) -> None:
    wanted = {"a": torch.zeros(6, 4, dtype=dtype)}
    load(saved, wanted, Ranks(), cast=True)
    assert torch.equal(wanted["a"], torch.ones(6, 4, dtype=dtype))


def test_loading_from_nowhere_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="absent"):
        load(tmp_path / "absent", {"a": torch.zeros(1)}, Ranks())


# -- a stream of pieces, as `seed` and `convert` save them ------------------------------------------------------------

SPEC = LlamaSpec(dim=4, n_layers=1, n_heads=1, n_kv_heads=1, ffn_dim=4, vocab_size=4)


def stream(state: dict[str, Tensor]) -> list[Piece]:
    return [piece for name, tensor in state.items() for piece in pieces_of(name, tensor)]


def test_a_stream_of_pieces_becomes_a_checkpoint(tmp_path: Path) -> None:
    state = {"norm.weight": torch.randn(4), "output.weight": torch.randn(4, 4)}
    manifest = save_weights(tmp_path / "x", stream(state), step=0, source={"kind": "seed"}, config=None, spec=SPEC)
    assert (manifest.kind, manifest.step, manifest.model) == ("model", 0, SPEC.to_dict())
    both_ways(tmp_path / "x", state)


def test_an_existing_directory_is_refused_unless_it_is_empty(tmp_path: Path) -> None:
    state = {"norm.weight": torch.randn(4)}
    (tmp_path / "empty").mkdir()
    save_weights(tmp_path / "empty", stream(state), step=0, source={}, config=None, spec=SPEC)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("full", "file"):
        with pytest.raises(NotACheckpoint, match="exists already"):
            save_weights(tmp_path / name, stream(state), step=0, source={}, config=None, spec=SPEC)
        with pytest.raises(NotACheckpoint):
            refuse_existing(tmp_path / name)
    assert (tmp_path / "full/mine").read_text() == "mine"
    assert {path.name for path in tmp_path.iterdir()} == {"empty", "full", "file"}


def test_a_source_that_fails_midway_leaves_nothing(tmp_path: Path) -> None:
    def pieces() -> Any:
        yield from stream({"norm.weight": torch.randn(4)})
        raise NotACheckpoint("the source broke")

    with pytest.raises(NotACheckpoint, match="the source broke"):
        save_weights(tmp_path / "x", pieces(), step=0, source={}, config=None, spec=SPEC)
    assert list(tmp_path.iterdir()) == []


def test_pieces_that_do_not_tile_their_tensor_are_refused(tmp_path: Path) -> None:
    (piece,) = stream({"norm.weight": torch.randn(4)})
    half = Piece(piece.fqn, (8,), (0,), (4,), piece.dtype, piece.read)
    with pytest.raises(CheckpointError, match=r"norm\.weight"):
        save_weights(tmp_path / "x", [half], step=0, source={}, config=None, spec=SPEC)
    assert list(tmp_path.iterdir()) == []
