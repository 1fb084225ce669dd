"""Is a Meta directory read whole and right, and is everything that is not one refused by name?"""

import json
import shutil

import pytest
import torch

from reshard.errors import ConfigError, FormatError, LayoutError, TensorMismatch
from reshard.formats.dialects import Told
from reshard.formats.meta import open_meta, params_of, write_meta
from reshard.model.spec import FLAVORS, RopeScaling, ffn_dim_from_params, parameter_shapes


def assert_equal(source, weights, extra=()):
    assert set(source.tensors) == set(weights) | set(extra)
    for name, tensor in weights.items():
        got = source.tensors[name]
        assert (got.name, got.shape, got.dtype) == (name, tuple(tensor.shape), str(tensor.dtype)[6:])
        assert torch.equal(got.read(), tensor), name
        middle = (tensor.shape[0] // 3, tensor.shape[0] // 2 + 1)  # crosses the files
        assert torch.equal(got.read(*middle), tensor[slice(*middle)]), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("embedding_dim", [0, 1])
@pytest.mark.parametrize("shards", [1, 2, 4, 8])
def test_shards_become_whole_tensors(tiny, tmp_path, shards, embedding_dim, dtype):
    spec = tiny.spec()
    weights = tiny.weights(spec, dtype)
    directory = tiny.save(tmp_path / "Llama", tiny.cut(weights, shards, embedding_dim), tiny.params(spec))
    source = open_meta(directory)
    assert source.spec == spec
    assert_equal(source, weights)
    assert list(source.tensors) == list(parameter_shapes(spec))
    assert source.provenance["format"] == "meta"
    assert source.provenance["path"] == "Llama"
    assert [f["name"] for f in source.provenance["files"]] == [f"consolidated.{i:02d}.pth" for i in range(shards)]
    assert source.provenance["files"][0]["bytes"] == (directory / "consolidated.00.pth").stat().st_size
    assert source.provenance["params"]["dim"] == 64
    json.dumps(source.provenance)


@pytest.mark.parametrize("shards", [1, 2])
def test_four_heads_and_two_kv_heads(tiny, tmp_path, shards):
    spec = tiny.spec(n_heads=4, n_kv_heads=2, n_layers=3)
    weights = tiny.weights(spec)
    source = open_meta(tiny.save(tmp_path, tiny.cut(weights, shards), tiny.params(spec)))
    assert source.spec == spec
    assert_equal(source, weights)


def test_found_in_the_subfolder_original(tiny, tmp_path):
    spec = tiny.spec()
    weights = tiny.weights(spec)
    tiny.save(tmp_path / "Llama-3" / "original", tiny.cut(weights, 2), tiny.params(spec))
    assert open_meta(tmp_path / "Llama-3").provenance["path"] == "Llama-3"
    assert open_meta(tmp_path / "Llama-3" / "original").provenance["path"] == "Llama-3/original"


def test_llama_2_says_less(tiny, tmp_path):
    """vocab_size -1, no n_kv_heads, no rope_theta, rope.freqs in every file, the embedding cut by width."""
    spec = tiny.spec(n_heads=8, n_kv_heads=8, rope_theta=10000.0)
    weights = tiny.weights(spec)
    files = tiny.cut(weights, 4, embedding_dim=1)
    for file in files:
        file["rope.freqs"] = torch.randn(4)
    params = tiny.params(spec, vocab_size=-1, n_kv_heads=None, rope_theta=None)
    source = open_meta(tiny.save(tmp_path, files, params))
    assert source.spec == spec
    assert_equal(source, weights)


def test_code_llama_nests_its_params(tiny, tmp_path):
    spec = tiny.spec(rope_theta=1000000.0)
    directory = tiny.save(tmp_path, tiny.cut(tiny.weights(spec), 1), {"model": tiny.params(spec), "other": 1})
    assert open_meta(directory).spec == spec


def test_a_nested_state_dict(tiny, tmp_path):
    spec = tiny.spec()
    weights = tiny.weights(spec)
    directory = tiny.save(tmp_path, [{"model": weights, "step": 3}], tiny.params(spec))
    assert_equal(open_meta(directory), weights)


@pytest.mark.parametrize(
    ("dim", "heads", "factor"), [(64, 16, 8.0), (2048, 32, 32.0), (3072, 24, 32.0), (4096, 32, 8.0)]
)
def test_scaled_rope_has_the_factor_of_the_release(tiny, tmp_path, dim, heads, factor):
    spec = tiny.spec(dim=dim, n_heads=heads, n_layers=1, ffn_dim=32, rope_scaling=RopeScaling(factor=factor))
    weights = {name: torch.zeros(1).expand(shape).to(torch.bfloat16) for name, shape in parameter_shapes(spec).items()}
    files = [{name: tensor.contiguous() for name, tensor in weights.items()}]
    params = tiny.params(spec, multiple_of=None, use_scaled_rope=True)
    assert open_meta(tiny.save(tmp_path, files, params)).spec.rope_scaling == RopeScaling(factor=factor)


class TestTied:
    def test_names_of_one_storage(self, tiny, tmp_path):
        spec = tiny.spec(tied=True)
        weights = tiny.weights(spec)
        files = tiny.cut(weights, 2)
        for file in files:
            file["output.weight"] = file["tok_embeddings.weight"]
        source = open_meta(tiny.save(tmp_path, files, tiny.params(spec)))
        assert source.spec == spec
        assert source.tensors["output.weight"].same_place(source.tensors["tok_embeddings.weight"]) is True
        assert_equal(source, weights, extra=["output.weight"])

    @pytest.mark.parametrize("embedding_dim", [0, 1])
    def test_equal_numbers(self, tiny, tmp_path, embedding_dim):
        spec = tiny.spec(tied=True)
        weights = tiny.weights(spec)
        both = {**weights, "output.weight": weights["tok_embeddings.weight"].clone()}
        source = open_meta(tiny.save(tmp_path, tiny.cut(both, 2, embedding_dim), tiny.params(spec)))
        assert source.spec == spec

    def test_no_output(self, tiny, tmp_path):
        """params.json cannot say a tie, and Meta's own files have an output: only who says it is believed."""
        spec = tiny.spec(tied=True)
        directory = tiny.save(tmp_path, tiny.cut(tiny.weights(spec), 2), tiny.params(spec, vocab_size=-1))
        for told in (None, Told(tiny.spec()), Told(tiny.spec(), says_tie=False)):
            with pytest.raises(TensorMismatch, match=r"has no output\.weight, and nothing says that it is tied"):
                open_meta(directory, told)
        source = open_meta(directory, Told(spec))
        assert source.spec == spec
        assert "output.weight" not in source.tensors

    def test_one_number_apart_is_not_tied(self, tiny, tmp_path):
        spec = tiny.spec()
        weights = tiny.weights(spec)
        weights["output.weight"] = weights["tok_embeddings.weight"].clone()
        weights["output.weight"][-1, -1] += 1
        assert open_meta(tiny.save(tmp_path, tiny.cut(weights, 2), tiny.params(spec))).spec == spec


class TestRepeatedKvHeads:
    """405B in 16 files: 8 KV heads, each in two neighbouring files. Here 4 heads in 8 files, and 2 in 8."""

    def files(self, tiny, spec, weights, shards=8):
        repeats = shards // spec.n_kv_heads
        files = tiny.cut({n: t for n, t in weights.items() if ".wk." not in n and ".wv." not in n}, shards)
        for name in weights:
            if ".wk." in name or ".wv." in name:
                heads = torch.chunk(weights[name], spec.n_kv_heads)
                for i, file in enumerate(files):
                    file[name] = heads[i // repeats].clone()
        return files

    @pytest.mark.parametrize("announced", ["copies", "heads"])
    @pytest.mark.parametrize("heads", [1, 2, 4])
    def test_the_copies_are_dropped(self, tiny, tmp_path, heads, announced):
        spec = tiny.spec(n_kv_heads=heads)
        weights = tiny.weights(spec)
        params = tiny.params(spec, n_kv_heads=8 if announced == "copies" else heads)
        source = open_meta(tiny.save(tmp_path, self.files(tiny, spec, weights), params))
        assert source.spec == spec
        assert_equal(source, weights)

    @pytest.mark.parametrize("name", ["layers.0.attention.wk.weight", "layers.1.attention.wv.weight"])
    def test_a_copy_that_differs(self, tiny, tmp_path, name):
        spec = tiny.spec(n_kv_heads=4)
        files = self.files(tiny, spec, tiny.weights(spec))
        files[7][name][0, 0] += 1
        with pytest.raises(
            FormatError, match=rf"{name} differs between .*consolidated\.06\.pth and consolidated\.07\.pth"
        ):
            open_meta(tiny.save(tmp_path, files, tiny.params(spec, n_kv_heads=8)))

    def test_heads_that_are_no_copies(self, tiny, tmp_path):
        spec = tiny.spec()
        with pytest.raises(FormatError, match=r"holds 8 KV heads in 8 files, params\.json says 4, .* not copies"):
            open_meta(tiny.save(tmp_path, tiny.cut(tiny.weights(spec), 8), tiny.params(spec, n_kv_heads=4)))

    def test_copies_that_fit_no_number(self, tiny, tmp_path):
        spec = tiny.spec(n_kv_heads=4)
        files = self.files(tiny, spec, tiny.weights(spec))
        with pytest.raises(FormatError, match="fits no 16 KV heads"):
            open_meta(tiny.save(tmp_path, files, tiny.params(spec, n_kv_heads=16)))


class TestRefused:
    @pytest.fixture
    def spec(self, tiny):
        return tiny.spec()

    @pytest.fixture
    def directory(self, tiny, spec, tmp_path):
        return tiny.save(tmp_path / "m", tiny.cut(tiny.weights(spec), 4), tiny.params(spec))

    @pytest.mark.parametrize("number", [0, 1, 2])
    def test_a_hole_in_the_numbers(self, directory, number):
        (directory / f"consolidated.0{number}.pth").unlink()
        with pytest.raises(FormatError, match=rf"lacks consolidated\.0{number}\.pth"):
            open_meta(directory)

    def test_the_last_shard_missing(self, directory):
        (directory / "consolidated.03.pth").unlink()
        with pytest.raises(FormatError, match=r"lacks consolidated\.03\.pth: .* 4 files, got 3"):
            open_meta(directory)

    def test_two_of_four_missing(self, directory):
        for i in (2, 3):
            (directory / f"consolidated.0{i}.pth").unlink()
        with pytest.raises(FormatError, match=r"lacks consolidated\.02\.pth, consolidated\.03\.pth"):
            open_meta(directory)

    def test_an_extra_shard(self, directory):
        shutil.copy(directory / "consolidated.03.pth", directory / "consolidated.04.pth")
        with pytest.raises(FormatError, match=r"consolidated\.04\.pth too many: .* 4 files, got 5"):
            open_meta(directory)

    @pytest.mark.parametrize(
        "name", ["consolidated.0.pth", "consolidated.00 (1).pth", "consolidated.pth", "consolidated.03.pth.part"]
    )
    def test_a_strange_name(self, directory, name):
        shutil.copy(directory / "consolidated.03.pth", directory / name)
        with pytest.raises(FormatError) as raised:
            open_meta(directory)
        assert name in raised.value.message

    def test_other_files_are_left_alone(self, directory, spec):
        (directory / "tokenizer.model").write_bytes(b"x")
        (directory / "optimizer.pth").write_bytes(b"x")
        (directory / "checklist.chk").write_bytes(b"x")
        assert open_meta(directory).spec == spec

    def test_files_of_two_releases(self, tiny, spec, directory):
        """mp8 and mp16 downloaded into one folder: the later one overwrote the first half."""
        other = tiny.cut(tiny.weights(spec), 8)
        for i in range(4, 8):
            torch.save(other[i], directory / f"consolidated.0{i}.pth")
        with pytest.raises(TensorMismatch, match=r"consolidated\.04\.pth does not fit consolidated\.00\.pth") as raised:
            open_meta(directory)
        assert raised.value.wrong["output.weight"] == ("[32, 64] bfloat16", "[16, 64] bfloat16")
        assert "mp16" in raised.value.hint

    def test_a_folder_of_folders(self, tiny, spec, tmp_path):
        for name, shards in (("mp4", 4), ("mp8", 8)):
            tiny.save(tmp_path / "x" / "original" / name, tiny.cut(tiny.weights(spec), shards), tiny.params(spec))
        with pytest.raises(FormatError) as raised:
            open_meta(tmp_path / "x")
        assert "original/mp4" in raised.value.hint
        assert "original/mp8" in raised.value.hint

    def test_replicated_tensors_that_differ(self, tiny, spec, tmp_path):
        files = tiny.cut(tiny.weights(spec), 4)
        files[2]["layers.1.ffn_norm.weight"][5] += 1
        with pytest.raises(FormatError, match=r"layers\.1\.ffn_norm\.weight differs between .*00\.pth and .*02\.pth"):
            open_meta(tiny.save(tmp_path, files, tiny.params(spec)))

    def test_a_tensor_missing_in_one_file(self, tiny, spec, tmp_path):
        files = tiny.cut(tiny.weights(spec), 4)
        del files[3]["layers.1.attention.wo.weight"]
        with pytest.raises(TensorMismatch, match=r"03\.pth.*missing: layers\.1\.attention\.wo\.weight"):
            open_meta(tiny.save(tmp_path, files, tiny.params(spec)))

    def test_output_missing_in_one_file(self, tiny, spec, tmp_path):
        files = tiny.cut(tiny.weights(spec), 4)
        del files[3]["output.weight"]
        with pytest.raises(TensorMismatch, match=r"03\.pth does not fit .*missing: output\.weight"):
            open_meta(tiny.save(tmp_path, files, tiny.params(spec)))

    @pytest.mark.parametrize(
        "name", ["layers.0.attention.wq.weight_scale", "vision_model.x", "layers.2.attention.wq.weight"]
    )
    def test_an_unknown_tensor(self, tiny, spec, tmp_path, name):
        weights = tiny.weights(spec) | {name: torch.zeros(2, 2)}
        with pytest.raises(TensorMismatch) as raised:
            open_meta(tiny.save(tmp_path, tiny.cut(weights, 1), tiny.params(spec)))
        assert raised.value.unexpected == (name,)
        assert "consolidated.00.pth" in raised.value.message

    def test_something_else_in_the_dict(self, tiny, spec, tmp_path):
        with pytest.raises(TensorMismatch, match="args"):
            open_meta(tiny.save(tmp_path, [{**tiny.weights(spec), "args": 1}], tiny.params(spec)))

    @pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
    def test_quantised_weights(self, tiny, spec, tmp_path, dtype):
        weights = tiny.weights(spec)
        weights["layers.0.feed_forward.w1.weight"] = weights["layers.0.feed_forward.w1.weight"].to(dtype)
        with pytest.raises(FormatError, match=rf"layers\.0\.feed_forward\.w1\.weight is {str(dtype)[6:]}.*quantised"):
            open_meta(tiny.save(tmp_path, tiny.cut(weights, 2), tiny.params(spec)))

    def test_an_fp8_release(self, directory):
        (directory / "fp8_scales_0.pt").write_bytes(b"x")
        with pytest.raises(FormatError, match="fp8 release") as raised:
            open_meta(directory)
        assert "bf16" in raised.value.hint

    @pytest.mark.parametrize(
        ("change", "match"),
        [
            ({"dim": 128}, r"another width.*norm\.weight expected \[128\], got \[64\]"),
            ({"n_layers": 3}, r"missing: layers\.2\.attention_norm\.weight"),
            ({"n_layers": 1}, r"unexpected: layers\.1\."),
            (
                {"n_kv_heads": 4},
                r"layers\.0\.attention\.wk\.weight expected \[16, 64\] in 4 files, got \[8, 64\] in each",
            ),
            ({"n_heads": 48}, "does not divide"),
            ({"vocab_size": 256}, r"output\.weight expected \[256, 64\]"),
            ({"multiple_of": 256}, r"w1\.weight has 192 rows in 4 files, .* means 256"),
            ({"ffn_dim_multiplier": 1.5}, "means 256"),
            ({"n_heads": 8, "n_kv_heads": 5}, "8 query heads do not divide among 5 KV heads"),
            ({"dim": None}, "does not say dim"),
            ({"dim": "64"}, "dim is '64', expected a positive whole number"),
            ({"n_heads": 0}, "n_heads is 0"),
            ({"n_layers": True}, "n_layers is True"),
            ({"norm_eps": -1}, "norm_eps is -1"),
            ({"rope_theta": float("inf")}, "rope_theta is inf"),
            ({"vocab_size": 1.5}, r"vocab_size is 1\.5"),
            ({"use_scaled_rope": 1}, "use_scaled_rope is 1"),
            ({"moe_args": {}}, "has moe_args, which no plain Llama has"),
            ({"quantization_args": {}}, "has quantization_args"),
        ],
    )
    def test_params_that_do_not_fit(self, tiny, spec, directory, change, match):
        (directory / "params.json").write_text(json.dumps(tiny.params(spec, **change)))
        with pytest.raises(FormatError, match=match):
            open_meta(directory)

    def test_no_params(self, directory, tmp_path):
        (directory / "params.json").write_text("{")
        with pytest.raises(FormatError, match="not JSON"):
            open_meta(directory)
        (directory / "params.json").write_bytes(b"\xff\xfe\x00")
        with pytest.raises(FormatError, match="not JSON"):
            open_meta(directory)
        (directory / "params.json").write_text("[1]")
        with pytest.raises(FormatError, match="holds a list"):
            open_meta(directory)
        (directory / "params.json").unlink()
        with pytest.raises(FormatError, match=r"has no params\.json"):
            open_meta(directory)
        with pytest.raises(FormatError, match="not a directory"):
            open_meta(tmp_path / "absent")
        (tmp_path / "empty").mkdir()
        (tmp_path / "empty" / "params.json").write_text(json.dumps({"dim": 64, "n_layers": 1, "n_heads": 4}))
        with pytest.raises(FormatError, match=r"no consolidated\.00\.pth"):
            open_meta(tmp_path / "empty")

    def test_a_truncated_shard(self, directory):
        path = directory / "consolidated.02.pth"
        path.write_bytes(path.read_bytes()[:-1000])
        with pytest.raises(FormatError, match=r"consolidated\.02\.pth is truncated"):
            open_meta(directory)

    def test_scalars_in_place_of_weights(self, tiny, spec, tmp_path):
        weights = tiny.weights(spec) | {"layers.0.attention.wq.weight": torch.tensor(1.0)}
        with pytest.raises(TensorMismatch, match=r"wq\.weight expected 2 dims, got \[\]"):
            open_meta(tiny.save(tmp_path, [weights], tiny.params(spec)))


class TestWriting:
    @pytest.mark.parametrize("embedding_dim", [0, 1])
    @pytest.mark.parametrize("shards", [1, 2, 4, 8])
    def test_the_same_files_as_by_hand(self, tiny, tmp_path, shards, embedding_dim):
        spec = tiny.spec()
        weights = tiny.weights(spec)
        write_meta(tmp_path / "out", weights, spec, shards, embedding_dim=embedding_dim)
        for i, expected in enumerate(tiny.cut(weights, shards, embedding_dim)):
            path = tmp_path / "out" / f"consolidated.{i:02d}.pth"
            got = torch.load(path, weights_only=True)
            assert {n: t.tolist() for n, t in got.items()} == {n: t.tolist() for n, t in expected.items()}
            assert path.stat().st_size < sum(t.nbytes for t in got.values()) + 20_000  # no storage of a whole tensor
        assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]
        assert_equal(open_meta(tmp_path / "out"), weights)

    @pytest.mark.parametrize("tied", [False, True])
    @pytest.mark.parametrize("scaled", [False, True])
    @pytest.mark.parametrize(("heads", "shards"), [(8, 8), (4, 8), (1, 2)])
    def test_comes_back(self, tiny, tmp_path, tied, scaled, heads, shards):
        spec = tiny.spec(tied=tied, n_kv_heads=heads, rope_scaling=RopeScaling() if scaled else None)
        weights = tiny.weights(spec)
        write_meta(tmp_path / "out", weights, spec, shards)
        source = open_meta(tmp_path / "out")
        assert source.spec == spec
        assert_equal(source, weights, extra=["output.weight"] if tied else [])

    @pytest.mark.parametrize("flavor", FLAVORS)
    def test_params_mean_the_flavor(self, flavor):
        spec = FLAVORS[flavor]
        params = params_of(spec)
        assert ffn_dim_from_params(spec.dim, params.get("ffn_dim_multiplier"), params["multiple_of"]) == spec.ffn_dim
        assert params["n_kv_heads"] == spec.n_kv_heads

    @pytest.mark.parametrize("ffn_dim", [1, 171, 192, 193, 1000, 12345])
    def test_any_ffn_dim_can_be_said(self, tiny, ffn_dim):
        params = params_of(tiny.spec(ffn_dim=ffn_dim))
        assert ffn_dim_from_params(64, params.get("ffn_dim_multiplier"), params["multiple_of"]) == ffn_dim

    def test_refused(self, tiny, tmp_path):
        spec = tiny.spec()
        weights = tiny.weights(spec)
        with pytest.raises(ConfigError, match="cannot say"):
            write_meta(tmp_path / "out", weights, tiny.spec(rope_scaling=RopeScaling(factor=32.0)))
        with pytest.raises(LayoutError, match="8 KV heads cannot be cut into 3"):
            write_meta(tmp_path / "out", weights, spec, 3)
        with pytest.raises(LayoutError, match="cannot be cut into 128 files"):
            write_meta(tmp_path / "out", weights, spec, 128)
        with pytest.raises(TensorMismatch, match=r"missing: norm\.weight; .*unexpected: x"):
            write_meta(
                tmp_path / "out",
                {n: t for n, t in weights.items() if n != "norm.weight"} | {"x": weights["norm.weight"]},
                spec,
            )
        assert list(tmp_path.iterdir()) == []
        (tmp_path / "out").mkdir()
        write_meta(tmp_path / "out", weights, spec)
        with pytest.raises(FormatError, match="not an empty directory"):
            write_meta(tmp_path / "out", weights, spec)
