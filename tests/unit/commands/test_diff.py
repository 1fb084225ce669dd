"""Does `diff` find the one number that differs, and nothing where only the writing does?"""

from dataclasses import replace

import numpy as np
import pytest
import torch

from reshard.commands.convert import Options, run
from reshard.commands.diff import compare, lines
from reshard.commands.sources import open_source
from reshard.formats.gguf import Constant
from reshard.formats.meta import write_meta
from reshard.formats.protocol import Source
from reshard.model.spec import LlamaSpec, RopeScaling, parameter_shapes

SPEC = LlamaSpec(dim=64, n_layers=2, n_heads=16, n_kv_heads=8, ffn_dim=192, vocab_size=128)


def source(tmp_path, **tensors):
    return Source(tmp_path, None, {name: Constant(name, np.array(v, np.float32)) for name, v in tensors.items()}, {})


def test_the_largest_difference_and_its_place(tmp_path):
    left = source(tmp_path, w=[[1, 2], [3, 4], [5, 6]], same=[1])
    right = source(tmp_path, w=[[1, 2.5], [3, 4], [5, 8]], same=[1])
    (found,) = compare(left, right).differences
    assert (found.name, found.count, found.max_abs, found.at) == ("w", 2, 2.0, (2, 1))
    assert (found.left, found.right) == (6.0, 8.0)
    assert found.max_rel == pytest.approx(0.25)
    assert not compare(left, right).same(tolerance=0.2)
    assert compare(left, right).same(tolerance=0.25)


def test_names_and_shapes(tmp_path):
    report = compare(source(tmp_path, a=[1], b=[[1]]), source(tmp_path, b=[[1, 2]], c=[1]))
    assert (report.only_left, report.only_right) == (("a",), ("c",))
    assert report.differences[0].shapes == ((1, 1), (1, 2))
    assert not report.same(any_dtype=True, tolerance=1e9)


def test_not_a_number(tmp_path):
    nan = float("nan")
    assert compare(source(tmp_path, a=[nan, 1]), source(tmp_path, a=[nan, 1])).same()
    (found,) = compare(source(tmp_path, a=[nan, 1]), source(tmp_path, a=[0, 1])).differences
    assert (found.count, found.max_abs, found.at) == (1, float("inf"), (0,))


def test_a_difference_late_in_a_large_tensor(tmp_path):
    values = np.zeros((3000, 1024), np.float32)  # more than one slab
    other = values.copy()
    other[2999, 1000] = 1e-3
    left, right = (Source(tmp_path, None, {"w": Constant("w", v)}, {}) for v in (values, other))
    (found,) = compare(left, right).differences
    assert found.at == (2999, 1000)


def test_knows_the_permutation_ties_dtypes_and_the_model(tmp_path):
    spec = replace(SPEC, tied=True)
    generator = torch.Generator().manual_seed(1)
    weights = {n: torch.randn(s, generator=generator).bfloat16() for n, s in parameter_shapes(spec).items()}
    write_meta(tmp_path / "meta", weights, spec, 2)
    run(tmp_path / "meta", tmp_path / "hf", to="hf")
    meta, hf = open_source(tmp_path / "meta"), open_source(tmp_path / "hf")
    assert "output.weight" in meta.tensors
    assert "output.weight" not in hf.tensors
    assert compare(meta, hf).same()
    unturned = replace(hf, tensors={n: getattr(t, "inner", t) for n, t in hf.tensors.items()})
    assert {d.name.split(".")[-2] for d in compare(meta, unturned).differences} == {"wq", "wk"}

    run(tmp_path / "hf", tmp_path / "wide", to="hf", options=Options(dtype="float32"))
    report = compare(hf, open_source(tmp_path / "wide"))
    assert not report.same()
    assert report.same(any_dtype=True)
    assert all("equal numbers" in line for line in lines(report))

    scaled = replace(hf, spec=replace(spec, rope_scaling=RopeScaling(8.0)))
    assert list(compare(hf, scaled).model) == ["rope_scaling"]
    assert not compare(hf, scaled).same()
