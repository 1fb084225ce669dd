"""Foreign files that are damaged, incomplete, mixed up or hostile: one sentence, exit 2, and nothing left behind."""

import json
import logging
import os
import shutil
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from reshard.cli import main
from reshard.commands.convert import Options, run
from reshard.errors import ReshardError
from reshard.formats.meta import write_meta
from reshard.formats.torch_pt import open_pt
from reshard.model.spec import LlamaSpec, parameter_shapes

SPEC = LlamaSpec(dim=64, n_layers=2, n_heads=16, n_kv_heads=8, ffn_dim=192, vocab_size=128)


@pytest.fixture(autouse=True)
def _logging():
    """The command line's handler writes to the stderr of its own test only."""
    yield
    logging.getLogger().handlers.clear()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The same model in every format, untouched."""
    folder = tmp_path_factory.mktemp("whole")
    generator = torch.Generator().manual_seed(1)
    weights = {n: torch.randn(s, generator=generator).bfloat16() for n, s in parameter_shapes(SPEC).items()}
    write_meta(folder / "meta", weights, SPEC, 2)
    run(folder / "meta", folder / "dcp")
    run(folder / "dcp", folder / "hf", to="hf", options=Options(max_shard_bytes=150_000))
    run(folder / "dcp", folder / "hf1", to="hf")
    run(folder / "dcp", folder / "m.gguf")
    run(folder / "dcp", folder / "m.pt")
    return folder


def edit_json(path, **changes):
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))


def edit_header(path, change):
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def retensor(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def shift(header):
    header["model.norm.weight"]["data_offsets"] = [n + 2 for n in header["model.norm.weight"]["data_offsets"]]


def overlap(header):
    header["model.norm.weight"]["data_offsets"][0] -= 2


def second_shard(folder):
    return sorted(folder.glob("model-0000*"))[1]


def fp8(tensors):
    name = "model.layers.0.mlp.gate_proj.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)


def extra_name(tensors):
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(64)


class Touch:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def first_item(path):
    return open_pt(path).tensors["norm.weight"].blocks[0].region.offset


DAMAGE = {
    "hf: a shard is missing": ("hf", lambda p: second_shard(p).unlink(), "lacks model-00002"),
    "hf: a shard too many": (
        "hf", lambda p: shutil.copy(second_shard(p), p / "model-00009-of-00009.safetensors"), "does not name",
    ),
    "hf: no index": ("hf", lambda p: (p / "model.safetensors.index.json").unlink(), "index"),
    "hf: the index names a tensor that is not there": (
        "hf",
        lambda p: edit_json(
            p / "model.safetensors.index.json",
            weight_map=json.loads((p / "model.safetensors.index.json").read_text())["weight_map"]
            | {"model.layers.9.mlp.up_proj.weight": second_shard(p).name},
        ),
        "model.layers.9.mlp.up_proj.weight",
    ),
    "hf: the index leads out of the folder": (
        "hf", lambda p: edit_json(p / "model.safetensors.index.json", weight_map={"x": "../m.pt"}), "weight_map",
    ),
    "hf: truncated": ("hf1", lambda p: os.truncate(p / "model.safetensors", 60_000), "model.safetensors"),
    "hf: a hole": ("hf1", lambda p: edit_header(p / "model.safetensors", shift), "hole"),
    "hf: an overlap": ("hf1", lambda p: edit_header(p / "model.safetensors", overlap), "overlap"),
    "hf: fp8": ("hf1", lambda p: retensor(p / "model.safetensors", fp8), "quantised weights cannot be kept"),
    "hf: a bias": ("hf1", lambda p: retensor(p / "model.safetensors", extra_name), "q_proj.bias"),
    "hf: another head count": ("hf1", lambda p: edit_json(p / "config.json", num_key_value_heads=4), "attention.wk"),
    "hf: another width": ("hf1", lambda p: edit_json(p / "config.json", intermediate_size=100), "feed_forward.w1"),
    "hf: another model": ("hf1", lambda p: edit_json(p / "config.json", model_type="mistral"), "mistral"),
    "hf: quantised": (
        "hf1", lambda p: edit_json(p / "config.json", quantization_config={"bits": 4}), "quantization_config",
    ),
    "hf: other RoPE": ("hf1", lambda p: edit_json(p / "config.json", rope_scaling={"type": "yarn"}), "yarn"),
    "hf: tied, but with another output": (
        "hf1", lambda p: edit_json(p / "config.json", tie_word_embeddings=True), "differs",
    ),
    "hf: no config": ("hf1", lambda p: (p / "config.json").unlink(), "does not say which model"),
    "hf: config is not JSON": ("hf1", lambda p: (p / "config.json").write_text("{"), "not JSON"),
    "hf: heads that are no number": (
        "hf1", lambda p: edit_json(p / "config.json", num_attention_heads="16"), "num_attention|n_heads",
    ),
    "meta: a flipped bit": (
        "meta", lambda p: flip(p / "consolidated.01.pth", first_item(p / "consolidated.01.pth") + 3), "norm|damaged",
    ),
    "meta: truncated": ("meta", lambda p: os.truncate(p / "consolidated.01.pth", 30_000), "consolidated.01.pth"),
    "meta: hostile": (
        "meta", lambda p: torch.save({"x": Touch(p / "marker")}, p / "consolidated.01.pth"), "posix.system",
    ),
    "meta: not a zip": ("meta", lambda p: (p / "consolidated.01.pth").write_bytes(b"no"), "consolidated.01.pth"),
    "gguf: truncated": ("m.gguf", lambda p: os.truncate(p, 60_000), "cut short"),
    "gguf: truncated header": ("m.gguf", lambda p: os.truncate(p, 300), "ends in its header"),
    "gguf: a count from nowhere": ("m.gguf", lambda p: overwrite(p, 8, b"\xff" * 8), "no model has so many"),
    "gguf: another version": ("m.gguf", lambda p: overwrite(p, 4, struct.pack(">I", 3)), "version"),
    "dcp: a flipped bit": ("dcp", lambda p: flip(p / "__0_0.distcp", 40_000), "damaged"),
    "dcp: a missing file": ("dcp", lambda p: (p / "__0_0.distcp").unlink(), "missing"),
    "dcp: torn": ("dcp", lambda p: (p / "manifest.json").unlink(), "does not say which model"),
}  # fmt: skip


def overwrite(path, at, data):
    content = bytearray(path.read_bytes())
    content[at : at + len(data)] = data
    path.write_bytes(content)


def cli(capsys, *words):
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in words])
    return stop.value.code, capsys.readouterr()


@pytest.mark.parametrize("to", ["hf", "gguf"])
@pytest.mark.parametrize("case", DAMAGE)
def test_one_sentence_and_nothing_left(whole, tmp_path, capsys, case, to):
    name, spoil, named = DAMAGE[case]
    (shutil.copytree if (whole / name).is_dir() else shutil.copy)(whole / name, tmp_path / name)
    spoil(tmp_path / name)
    before = sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(ReshardError, match=named) as error:
        run(tmp_path / name, tmp_path / "new" / "out", to=to)
    assert "\n" not in error.value.message
    assert sorted(p.name for p in tmp_path.iterdir()) == before
    assert list(tmp_path.rglob("marker")) == []
    code, said = cli(capsys, "convert", tmp_path / name, tmp_path / "new" / "out", "--to", to)
    assert code == 2
    assert "error: " in said.err
    assert "Traceback" not in said.err
    assert said.out == ""


def test_another_format_word_and_an_output_that_exists(whole, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    assert cli(capsys, "convert", whole / "dcp", tmp_path / "out", "--to", "onnx")[0] == 2
    assert cli(capsys, "convert", whole / "dcp", tmp_path / "out", "--to", "hf", "--max-memory", "lots")[0] == 2
    main_ok(capsys, "convert", whole / "dcp", tmp_path / "out", "--to", "hf")
    code, said = cli(capsys, "convert", whole / "dcp", tmp_path / "out", "--to", "hf")
    assert code == 2
    assert "exists already" in said.err
    code, said = cli(capsys, "convert", whole / "dcp", tmp_path / "m8", "--to", "meta", "--shards", "3")
    assert code == 2
    assert not (tmp_path / "m8").exists()


def main_ok(capsys, *words):
    main([str(word) for word in words])
    return capsys.readouterr()


def test_diff_and_inspect_answer_by_exit_code(whole, tmp_path, capsys):
    assert cli(capsys, "diff", whole / "hf", whole / "meta")[0] == 0
    shutil.copytree(whole / "hf1", tmp_path / "hf1")
    retensor(tmp_path / "hf1" / "model.safetensors", lambda t: t["model.norm.weight"].__setitem__(7, 42.0))
    code, said = cli(capsys, "diff", tmp_path / "hf1", whole / "dcp")
    assert code == 1
    assert "norm.weight: 1 differ, by up to" in said.out
    assert "at [7] (42 and" in said.out
    code, said = cli(capsys, "diff", "--json", tmp_path / "hf1", whole / "dcp")
    assert json.loads(said.out)["differences"][0]["at"] == [7]
    assert cli(capsys, "diff", tmp_path / "nothing", whole / "dcp")[0] == 2
    for name in ("hf", "meta", "m.gguf"):
        said = main_ok(capsys, "inspect", whole / name, "--json")
        report = json.loads(said.out)
        assert report["model"]["n_kv_heads"] == 8
        assert report["tensors"]["layers.1.attention.wk.weight"]["shape"] == [32, 64]
    assert cli(capsys, "inspect", whole / "m.pt")[0] == 2
    assert cli(capsys, "inspect", tmp_path / "nothing")[0] == 2
