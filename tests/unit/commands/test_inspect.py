"""Does `inspect` tell where a checkpoint comes from, what lies in it, and which numbers, without torch where it says so?"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from reshard.checkpoint.manifest import Manifest
from reshard.checkpoint.ranks import Ranks
from reshard.checkpoint.save import About, save
from reshard.commands import inspect_tensor
from reshard.commands.inspect import answer, run
from reshard.commands.inspect_tensor import Statistics
from reshard.commands.inspect_tree import text as tree_text
from reshard.commands.inspect_tree import tree
from reshard.errors import CheckpointError, ConfigError, FormatError
from reshard.train.metrics import Journal

torch.set_num_threads(1)
ONE = {"dp_replicate": 1, "dp_shard": 1, "cp": 1, "tp": 1, "pp": 1}
Make = Callable[..., Manifest]


def state() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    weights = {f"layers.{i}.attention.wq.weight": torch.randn(48, 32, generator=generator) for i in range(3)}
    weights |= {"norm.weight": torch.ones(32), "output.weight": torch.randn(64, 32, generator=generator).bfloat16()}
    moments = {
        f"state.{name}.{kind}": torch.zeros_like(w) for name, w in weights.items() for kind in ("exp_avg", "step")
    }
    return {"model": weights, "optimizer": moments, "train_state": {"step": torch.tensor(3)}}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "checkpoint"


@pytest.fixture
def make(folder: Path) -> Make:
    """make(step, layout, parent, began): a full checkpoint, by a run that began from the directory `began`."""

    def save_step(
        step: int, layout: dict[str, int] | None = None, parent: Manifest | None = None, began: Path | str | None = None,
        **about: Any,
    ) -> Manifest:  # fmt: skip
        told = {"kind": "full", "source": {"kind": "train", "from": str(began) if began else None}, **about}
        content = state() if told["kind"] == "full" else state()["model"]
        return save(
            folder / f"step-{step}", content,
            About(step=step, parent=parent.save_id if parent else None, layout=layout or ONE, **told), Ranks(),
        )  # fmt: skip

    return save_step


def seed(make: Make) -> Manifest:
    return make(0, kind="model", source={"kind": "seed", "rng_seed": 7})


def chain_of(path: Path) -> list[str]:
    lines = answer(path)[1]
    start = next(i for i, line in enumerate(lines) if line.startswith("from "))
    return [line[11:] for line in lines[start : lines.index("", start)]]


def test_the_chain_from_the_seed_over_three_layouts(make: Make, folder: Path) -> None:
    first = seed(make)
    a = make(10, parent=first, began=folder / "step-0")
    b = make(20, parent=a, began=folder / "step-0")
    c = make(30, ONE | {"dp_shard": 2}, parent=b, began=folder / "step-20")
    make(40, ONE | {"tp": 2}, parent=c, began=folder / "step-30")
    assert chain_of(folder / "step-40") == [
        "step-0: seed, rng_seed 7", "-> step-10 .. step-20 (2 saves): full, trained on 1 rank",
        "-> step-30: full, trained on fsdp2", "-> step-40: full, trained on tp2",
    ]  # fmt: skip
    links = run(folder / "step-40")["chain"]
    assert [(link["name"], link["how"]) for link in links] == [
        ("step-40", "trained"), ("step-30", "trained"), ("step-20", "trained"), ("step-10", "trained"), ("step-0", "seed")
    ]  # fmt: skip
    assert links[1]["save_id"] == c.save_id


def test_the_chain_says_where_links_are_gone(make: Make, folder: Path) -> None:
    first = seed(make)
    a = make(10, parent=first, began=folder / "step-0")
    make(20, parent=a, began=folder / "step-0")
    shutil.rmtree(folder / "step-10")
    assert chain_of(folder / "step-20") == [
        "step-0: seed, rng_seed 7", "-> (saves that are gone by now)", "-> step-20: full, trained on 1 rank"
    ]  # fmt: skip
    shutil.rmtree(folder / "step-0")
    assert chain_of(folder / "step-20") == ["step-0: no longer there", "-> step-20: full, trained on 1 rank"]


def test_the_chain_goes_on_in_another_folder(make: Make, folder: Path, tmp_path: Path) -> None:
    """initial_load_path: the run began with weights that lie elsewhere."""
    imported = make(5, kind="model", source={"kind": "import", "format": "meta", "path": "original"})
    (folder / "step-5").rename(tmp_path / "weights")
    make(1, parent=imported, began=tmp_path / "weights")
    assert chain_of(folder / "step-1") == [
        "weights: import of meta original", "-> step-1: full, trained on 1 rank"
    ]  # fmt: skip


def test_a_parent_that_names_itself_does_not_hang(make: Make, folder: Path) -> None:
    a = make(1)
    make(2, parent=a, began=folder / "step-2")
    assert [link["name"] for link in run(folder / "step-2")["chain"]] == ["step-2", "step-1", "its own first weights"]


def test_groups_and_layout(make: Make, folder: Path) -> None:
    make(3, ONE | {"dp_shard": 2, "tp": 4})
    report, lines = answer(folder / "step-3")
    numbers = 3 * 48 * 32 + 32 + 64 * 32
    nbytes = 4 * (3 * 48 * 32 + 32) + 2 * 64 * 32
    assert report["groups"] == {
        "model": {"tensors": 5, "numbers": numbers, "bytes": nbytes},
        "optimizer: exp_avg": {"tensors": 5, "numbers": numbers, "bytes": nbytes},
        "optimizer: step": {"tensors": 5, "numbers": numbers, "bytes": nbytes},
        "train_state": {"tensors": 1, "numbers": 1, "bytes": 8},
    }
    assert any(line.startswith("layout     fsdp2.tp4 (") and "dp_shard 2" in line for line in lines)
    with_tensors = answer(folder / "step-3", tensors=True)[1]
    assert len(with_tensors) == len(lines) + 16


def test_the_table_of_a_folder(make: Make, folder: Path, tmp_path: Path) -> None:
    metrics, events = Journal(tmp_path / "metrics.jsonl"), Journal(tmp_path / "events.jsonl")

    def leg(start: int, steps: range, loss: float, parent: Manifest | None) -> Manifest:
        events.write({"event": "start", "step": start, "layout": ONE, "at": "2020-01-01T00:00:00+00:00"})
        for step in steps:
            metrics.write({"step": step, "loss": loss})
        saved = make(steps[-1], parent=parent, began=folder / f"step-{start}")
        events.write(
            {"event": "save", "step": steps[-1], "path": f"step-{steps[-1]}", "at": "2999-01-01T00:00:00+00:00"}
        )
        return saved

    first = seed(make)
    a = leg(0, range(1, 11), 3.0, first)
    leg(10, range(11, 21), 2.5, a)  # is left behind
    leg(10, range(11, 16), 2.0, a)
    make(30, parent=a)
    (folder / "step-30" / "manifest.json").unlink()
    (folder / "step-9.damaged").mkdir()
    report, lines = answer(folder)
    rows = {row["step"]: row for row in report["steps"]}
    assert {step: (row["holds"], row.get("loss"), row.get("line")) for step, row in rows.items()} == {
        0: ("model", None, "current"), 10: ("full", 3.0, "current"), 15: ("full", 2.0, "current"),
        20: ("full", 2.5, "abandoned"), 30: (None, None, None),
    }  # fmt: skip
    assert rows[10]["verified"] == {"level": "files", "whole": True}
    assert rows[30]["verified"]["whole"] is False
    assert report["set_aside"] == ["step-9.damaged"]
    by_step = {line.split()[0]: line for line in lines}
    assert by_step["20"].split()[-1] == "abandoned"
    assert "2.5000" in by_step["20"]
    assert "DAMAGED" in by_step["30"]
    assert "seed" in by_step["0"]


@pytest.mark.parametrize(
    "name", ["layers.1.attention.wq.weight", "model.layers.1.attention.wq.weight", "output.weight"]
)
def test_statistics_are_those_of_the_numbers(
    make: Make, folder: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inspect_tensor, "READ_BYTES", 1000)  # many parts
    make(3)
    report, lines = answer(folder / "step-3", tensor=name)
    values = state()["model"][name.removeprefix("model.")].double().numpy()
    assert report["name"] == f"model.{name.removeprefix('model.')}"
    assert (report["shape"], report["count"]) == (list(values.shape), values.size)
    assert (report["min"], report["max"]) == (values.min(), values.max())
    assert report["mean"] == pytest.approx(values.mean(), abs=1e-12)
    assert report["std"] == pytest.approx(values.std(), rel=1e-12)
    assert report["zeros"] == np.mean(values == 0)
    assert [b["count"] for b in report["histogram"]] == list(np.histogram(values, inspect_tensor.BINS)[0])
    assert report["stored"][0].startswith("__0_0.distcp at byte ")
    assert len(lines) == 8 + len(report["stored"]) + len(report["histogram"])


def test_statistics_of_numbers_that_are_none() -> None:
    statistics = Statistics()
    for part in ([1.0, 0.0, np.nan], [np.inf, -np.inf, 3.0], [], [np.nan]):
        statistics.add(np.array(part))
    assert (statistics.count, statistics.nan, statistics.infinite, statistics.zeros) == (7, 2, 2, 1)
    assert (statistics.min, statistics.max) == (0.0, 3.0)
    assert statistics.mean == pytest.approx(4 / 3)
    assert statistics.std == pytest.approx(np.std([1.0, 0.0, 3.0]))


@pytest.mark.parametrize(
    "dtype", ["float64", "float32", "float16", "bfloat16", "int64", "uint8", "bool", "float8_e4m3fn"]
)
def test_every_dtype(tmp_path: Path, dtype: str) -> None:
    values = torch.tensor([[0, 1, 1], [0, 0, 1]]).to(getattr(torch, dtype))
    save(tmp_path / "step-1", {"model": {"w": values}}, About(1, "full", {"kind": "train"}), Ranks())
    report, lines = answer(tmp_path / "step-1", tensor="w")
    assert (report["min"], report["max"], report["mean"], report["zeros"]) == (0.0, 1.0, 0.5, 0.5)
    assert (report["histogram"][0]["count"], report["histogram"][-1]["count"]) == (3, 3)
    assert json.loads(json.dumps(report)) == report
    assert dtype in lines[0]


def test_a_constant_and_a_broken_tensor(tmp_path: Path) -> None:
    tensors = {"same": torch.full((9,), 2.5), "nan": torch.full((3,), float("nan")), "one": torch.tensor(4)}
    save(tmp_path / "step-1", {"model": tensors}, About(1, "full", {"kind": "train"}), Ranks())
    same, lines = answer(tmp_path / "step-1", tensor="same")
    assert (same["std"], same["histogram"]) == (0.0, [{"from": 2.5, "to": 2.5, "count": 9}])
    assert "█" in lines[-1]
    nan, _ = answer(tmp_path / "step-1", tensor="nan")
    assert (nan["not_finite"], nan["max"], nan["histogram"]) == (3, None, [])
    assert answer(tmp_path / "step-1", tensor="one")[0]["max"] == 4.0
    json.dumps([same, nan], allow_nan=False)


def test_a_flipped_bit_is_not_part_of_the_statistics(make: Make, folder: Path) -> None:
    make(3)
    report, _ = answer(folder / "step-3", tensor="norm.weight")
    file, _, rest = report["stored"][0].partition(" at byte ")
    start = int(rest.partition(":")[0].replace(",", ""))
    content = bytearray((folder / "step-3" / file).read_bytes())
    at = content.index(np.ones(32, np.float32).tobytes(), start)
    content[at + 5] ^= 16
    (folder / "step-3" / file).write_bytes(content)
    with pytest.raises((FormatError, CheckpointError), match="CRC32"):
        answer(folder / "step-3", tensor="norm.weight")
    answer(folder / "step-3", tensor="output.weight")


def test_names_that_are_not_there_or_not_one(make: Make, folder: Path) -> None:
    make(3)
    with pytest.raises(FormatError) as caught:
        answer(folder / "step-3", tensor="model.norm.wieght")
    assert caught.value.hint == "did you mean `model.norm.weight`?"
    with pytest.raises(FormatError, match=r"3 tensors end in `wq\.weight`"):
        answer(folder / "step-3", tensor="wq.weight")
    for wanted in ({"tensor": "norm.weight"}, {"tree": True}):
        with pytest.raises(ConfigError) as folders:
            answer(folder, **wanted)
        assert folders.value.hint == f"name one: reshard inspect {folder / 'step-3'}"
    with pytest.raises(FormatError, match="does not exist"):
        answer(folder / "step-4", tensor="norm.weight")
    with pytest.raises(CheckpointError, match="does not exist"):
        answer(folder / "step-4")


def test_a_foreign_tensor(tmp_path: Path) -> None:
    from reshard.formats.meta import write_meta
    from reshard.model.spec import LlamaSpec, parameter_shapes

    spec = LlamaSpec(dim=64, n_layers=2, n_heads=16, n_kv_heads=8, ffn_dim=192, vocab_size=128)
    generator = torch.Generator().manual_seed(1)
    weights = {n: torch.randn(s, generator=generator).bfloat16() for n, s in parameter_shapes(spec).items()}
    write_meta(tmp_path / "meta", weights, spec, 2)
    name = "layers.1.attention.wo.weight"
    report, _ = answer(tmp_path / "meta", tensor=name)
    assert report["mean"] == pytest.approx(weights[name].double().mean().item(), abs=1e-12)
    assert [place.partition(" at ")[0] for place in report["stored"]] == ["consolidated.00.pth", "consolidated.01.pth"]
    nested, lines = answer(tmp_path / "meta", tree=True)
    assert nested["tensors"] == len(weights)
    assert any("0 .. 1" in line for line in lines)


def test_the_tree() -> None:
    def tensor(*shape: int) -> dict[str, Any]:
        return {"shape": list(shape), "dtype": "float32", "bytes": 4 * int(np.prod(shape))}

    names = {f"layers.{i}.w.weight": tensor(4, 4) for i in (0, 1, 2, 10)} | {
        "layers.11.w.weight": tensor(8, 4),
        "norm": tensor(),
    }
    nested = tree(names)
    assert (nested["tensors"], nested["numbers"], nested["bytes"]) == (6, 97, 388)
    assert nested["children"]["layers"]["children"]["11"]["bytes"] == 128
    lines = [" ".join(line.split()) for line in tree_text(nested)]
    assert lines == [
        "├── layers 384 B", "│ ├── 0 .. 2 192 B 3 x 64 B", "│ │ └── w.weight 64 B 4 x 4 float32",
        "│ ├── 10.w.weight 64 B 4 x 4 float32", "│ └── 11.w.weight 128 B 8 x 4 float32", "└── norm 4 B one number float32", "",
        "6 tensors, 97 numbers, 388 B",
    ]  # fmt: skip


def test_none_of_it_imports_torch(make: Make, folder: Path) -> None:
    make(3)
    code = (
        "import sys\nfrom reshard.cli import main\nfor words in {words!r}:\n"
        "    try:\n        main(words)\n    except SystemExit as stop:\n        assert stop.code == 0, words\n"
        "print('heavy', sorted({{'torch', 'transformers', 'jinja2'}} & set(sys.modules)))"
    )
    one = str(folder / "step-3")
    words = [["inspect", one], ["inspect", one, "--json"], ["inspect", one, "--tree"], ["inspect", str(folder)],
             ["inspect", one, "--tensor", "output.weight"]]  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code.format(words=words)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("heavy []\n")


def test_it_answers_at_once(make: Make, folder: Path) -> None:
    """Of the processor's time, because the machine may have other work."""
    import resource

    make(3)
    for path in (folder / "step-3", folder):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "reshard", "inspect", str(path)], check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime < 0.4
