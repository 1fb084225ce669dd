"""Do weights survive every way from one format to another, bit for bit, and does a damaged or wrong one get no further?"""

import json
import logging
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, TensorProperties

import reshard
from reshard.checkpoint import state
from reshard.checkpoint.adapters import ReshardWriter
from reshard.checkpoint.index import index_bytes, read_index
from reshard.checkpoint.manifest import read_manifest
from reshard.checkpoint.verify import verify_checkpoint
from reshard.commands.convert import Options, describe_plan, import_meta, plan_lines, run, to_dcp
from reshard.commands.convert_dcp import FLOOR_WITH_TORCH_BYTES
from reshard.commands.diff import compare, lines
from reshard.commands.export import export
from reshard.commands.sources import format_of, named_spec, open_source
from reshard.errors import ConfigError, FormatError, ReshardError, StorageError, TensorMismatch
from reshard.formats.hf_config import as_json, config_of, parse_size, spec_from_config
from reshard.formats.meta import write_meta
from reshard.formats.output import COPIES
from reshard.formats.protocol import StoredTensor
from reshard.model.names import TORCHTUNE, foreign_name
from reshard.model.spec import LlamaSpec, RopeScaling, flavor, parameter_shapes

SIZES = {"dim": 64, "n_layers": 2, "n_heads": 16, "n_kv_heads": 8, "ffn_dim": 192, "vocab_size": 128}


def make_weights(spec, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(1)
    return {n: torch.randn(s, generator=generator).to(dtype) for n, s in parameter_shapes(spec).items()}


def make_meta(directory, shards=2, dtype=torch.bfloat16, **changes):
    spec = LlamaSpec(**(SIZES | changes))
    weights = make_weights(spec, dtype)
    write_meta(directory, weights, spec, shards)
    return spec, weights


def config_file(path, spec):
    path.write_bytes(as_json(config_of(spec, "bfloat16", {})))
    return str(path)


CHAIN = {
    "2 shards": {"shards": 2},
    "tied, scaled": {"shards": 1, "tied": True, "rope_scaling": RopeScaling(8.0)},
    "8 shards of 4 KV heads": {"shards": 8, "n_kv_heads": 4},
    "float32": {"shards": 4, "dtype": torch.float32},
    "float16": {"shards": 1, "dtype": torch.float16},
}


@pytest.mark.parametrize("case", CHAIN)
def test_bit_equal_all_the_way_round(tmp_path, case):
    """Meta -> DCP -> HF -> DCP -> torchtune -> DCP -> GGUF -> DCP -> Meta; then torch and torchtune's other names."""
    changes = CHAIN[case]
    spec, weights = make_meta(tmp_path / "meta", **changes)
    told = config_file(tmp_path / "config.json", spec)
    at = lambda name: tmp_path / name  # noqa: E731
    run(at("meta"), at("dcp1"))
    run(at("dcp1"), at("hf"), to="hf", options=Options(max_shard_bytes=70_000, verify=True))
    run(at("hf"), at("dcp2"))
    run(at("dcp2"), at("tune"), to="torchtune", options=Options(verify=True))
    run(at("tune"), at("dcp3"), model=told, options=Options(verify=True))
    run(at("dcp3"), at("m.gguf"), options=Options(verify=True))
    run(at("m.gguf"), at("dcp4"))
    run(at("dcp4"), at("meta2"), to="meta", options=Options(shards=changes["shards"], verify=True, workers=3))
    run(at("dcp4"), at("m.pt"))
    run(at("m.pt"), at("tune2"), to="torchtune", model=told, options=Options(names="meta"))
    start = open_source(at("meta"))
    for name in ("dcp1", "hf", "dcp2", "dcp3", "m.gguf", "dcp4", "meta2"):
        opened = open_source(at(name))
        assert opened.spec == spec, name
        report = compare(start, opened)
        assert report.same(), (name, lines(report))
    for i in range(changes["shards"]):
        before, after = (torch.load(at(d) / f"consolidated.{i:02d}.pth", weights_only=True) for d in ("meta", "meta2"))
        assert set(before) == set(after)
        assert all(torch.equal(before[n], after[n]) and before[n].dtype == after[n].dtype for n in before)
    for path in (at("m.pt"), at("tune2") / "checkpoint.pt"):
        found = torch.load(path, weights_only=True)
        assert ("output.weight" in found) is True  # tied or not: torchtune pops it
        assert all(torch.equal(found[name], weight) for name, weight in weights.items())
    tune = torch.load(at("tune") / "checkpoint.pt", weights_only=True)
    assert set(tune) == {foreign_name(name, TORCHTUNE) for name in weights}
    assert list(tmp_path.rglob("*.tmp-*")) == []
    assert read_manifest(at("dcp2")).source["format"] == "hf"


def test_independent_readers_see_the_same_gguf(tmp_path):
    from gguf import GGUFReader
    from gguf.quants import dequantize

    _, weights = make_meta(tmp_path / "meta", n_heads=4, n_kv_heads=2, rope_scaling=RopeScaling(8.0))
    run(tmp_path / "meta", tmp_path / "m.gguf")
    reader = GGUFReader(tmp_path / "m.gguf")
    tensors = {t.name: t for t in reader.tensors}
    rows = {
        "attn_norm": "attention_norm", "attn_q": "attention.wq", "attn_k": "attention.wk", "attn_v": "attention.wv",
        "attn_output": "attention.wo", "ffn_norm": "ffn_norm", "ffn_gate": "feed_forward.w1",
        "ffn_down": "feed_forward.w2", "ffn_up": "feed_forward.w3",
    }  # fmt: skip
    names = {f"blk.1.{theirs}.weight": f"layers.1.{ours}.weight" for theirs, ours in rows.items()}
    names |= {"token_embd.weight": "tok_embeddings.weight", "output_norm.weight": "norm.weight"}
    names |= {"output.weight": "output.weight"}
    for theirs, ours in names.items():
        tensor, expected = tensors[theirs], weights[ours].float().numpy()
        assert list(tensor.shape) == list(reversed(expected.shape))
        assert np.array_equal(dequantize(tensor.data, tensor.tensor_type).reshape(expected.shape), expected), theirs
    assert len(tensors) == len(weights) + 1
    assert tensors["output_norm.weight"].tensor_type.name == "F32"
    assert tensors["rope_freqs.weight"].data.shape == (8,)
    values = {name: field.contents() for name, field in reader.fields.items()}
    assert values["llama.attention.head_count_kv"] == 2
    assert values["llama.rope.freq_base"] == 500000.0
    assert values["general.file_type"] == 32
    assert "output.weight" in tensors


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "F16"])
def test_a_quantised_gguf_is_read_to_float32(tmp_path, kind):
    """Written by the gguf library, whose own dequantisation is the other side."""
    from gguf import GGMLQuantizationType, GGUFWriter
    from gguf.quants import dequantize, quantize

    _, weights = make_meta(tmp_path / "meta", tied=False)
    run(tmp_path / "meta", tmp_path / "plain.gguf")
    writer = GGUFWriter(tmp_path / "q.gguf", "llama")
    writer.add_block_count(2), writer.add_embedding_length(64), writer.add_feed_forward_length(192)
    writer.add_head_count(16), writer.add_head_count_kv(8), writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(500000.0), writer.add_context_length(8192)
    expected = {}
    plain = open_source(tmp_path / "plain.gguf")
    from reshard.formats.gguf import _foreign

    quantisation = GGMLQuantizationType[kind]
    for name, weight in weights.items():
        values = weight.float().numpy()
        if values.ndim == 1:
            writer.add_tensor(_foreign(name), values)
            expected[name] = values
        else:
            data = quantize(values, quantisation)
            writer.add_tensor(_foreign(name), data, raw_dtype=quantisation)
            expected[name] = dequantize(data, quantisation)
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file()
    writer.close()
    source = open_source(tmp_path / "q.gguf")
    assert source.spec == plain.spec
    run(tmp_path / "q.gguf", tmp_path / "m.pt", dtype="float32")
    found = torch.load(tmp_path / "m.pt", weights_only=True)
    for name, values in expected.items():
        assert np.array_equal(found[name].numpy(), values), name


def test_what_does_not_say_its_heads_is_refused_without_being_told(tmp_path):
    _, weights = make_meta(tmp_path / "meta")
    torch.save(weights, tmp_path / "m.pt")
    for target in ("out", "out.gguf"):
        with pytest.raises(FormatError, match="does not say which model") as error:
            run(tmp_path / "m.pt", tmp_path / target)
        assert "--model" in error.value.hint
    run(tmp_path / "m.pt", tmp_path / "out", model=str(tmp_path / "meta" / "params.json"))
    assert compare(open_source(tmp_path / "meta"), open_source(tmp_path / "out")).same()
    with pytest.raises(TensorMismatch, match="has not the tensors"):
        run(tmp_path / "m.pt", tmp_path / "other", model="debugmodel")
    with pytest.raises(FormatError, match="says of itself that it is another model"):
        run(tmp_path / "meta", tmp_path / "other", model="debugmodel")
    assert not (tmp_path / "other").exists()


def test_foreign_dcp_of_every_generation_of_names(tmp_path):
    """As torchtitan wrote it over the years, with an optimizer beside; written by plain torch."""
    import torch.distributed.checkpoint as dcp

    spec, weights = make_meta(tmp_path / "meta", dtype=torch.float32)
    told = config_file(tmp_path / "config.json", spec)

    def renamed(name):
        name = name.replace("output.weight", "lm_head.weight")
        for w in ("wq", "wk", "wv"):
            name = name.replace(f"attention.{w}.", f"attention.qkv_linear.{w}.")
        return name

    generations = {
        "seed": {"model": {**weights, "freqs_cis": torch.zeros(16, 2, dtype=torch.complex64)},
                 "optimizer": {"state.norm.weight.exp_avg": weights["norm.weight"]}},
        "flat": {**weights, "freqs_cis": torch.zeros(16, 2, dtype=torch.complex64)},
        "plain": weights,
        "2026": {renamed(name): weight for name, weight in weights.items()},
    }  # fmt: skip
    start = open_source(tmp_path / "meta")
    for name, saved in generations.items():
        dcp.save(saved, checkpoint_id=tmp_path / name, no_dist=True)
        with pytest.raises(FormatError, match="--model"):
            _raise_with_hint(lambda name=name: open_source(tmp_path / name))
        run(tmp_path / name, tmp_path / f"{name}-hf", to="hf", model=told)
        assert compare(start, open_source(tmp_path / f"{name}-hf")).same(), name


def _raise_with_hint(call):
    try:
        call()
    except FormatError as error:
        raise FormatError(str(error)) from None


@pytest.mark.parametrize("rows", [64, 96])
def test_the_dialect_of_early_2025_is_what_plain_torch_loads(tmp_path, rows):
    """Nested names and freqs_cis, by dcp.load itself; without the right number of rows it refuses, as it did then."""
    import torch.distributed.checkpoint as dcp

    spec, weights = make_meta(tmp_path / "meta", shards=2)
    import_meta(tmp_path / "meta", tmp_path / "step-0", freqs_cis_rows=rows)
    head = spec.head_dim
    angles = torch.outer(torch.arange(rows), 1.0 / (5e5 ** (torch.arange(0, head, 2).float() / head)))
    expected = {**weights, "freqs_cis": torch.polar(torch.ones_like(angles), angles)}
    state = {"model": {name: torch.zeros_like(value) for name, value in expected.items()}}
    dcp.load(state, checkpoint_id=tmp_path / "step-0", no_dist=True)
    assert all(torch.equal(state["model"][name], value) for name, value in expected.items())
    wrong = {"model": {"freqs_cis": torch.zeros(rows + 1, head // 2, dtype=torch.complex64)}}
    with pytest.raises(dcp.api.CheckpointException, match="Size mismatch"):
        dcp.load(wrong, checkpoint_id=tmp_path / "step-0", no_dist=True)
    run(tmp_path / "step-0", tmp_path / "hf", to="hf", model=config_file(tmp_path / "config.json", spec))
    assert compare(open_source(tmp_path / "meta"), open_source(tmp_path / "hf")).same()


def test_an_index_is_the_same_whichever_python_writes_it(tmp_path, monkeypatch):
    """Python 3.11.0 to 3.11.3 pickles members of enums by getattr; plain torch on any Python reads what stands in its place."""
    make_meta(tmp_path / "meta", shards=2)
    ones = {"model": {"w": torch.ones(4, 3)}}

    def written(folder):
        import_meta(tmp_path / "meta", folder / "titan", freqs_cis_rows=64)
        run(tmp_path / "meta", folder / "ours")
        reshard.save(folder / "saved", ones)
        dcp.save(ones, storage_writer=ReshardWriter(folder / "by dcp.save"), no_dist=True)
        return {path.parent.name: path.read_bytes() for path in folder.glob("*/.metadata")}

    today = written(tmp_path / "today")
    assert len(today) == 4
    with monkeypatch.context() as old:
        by_name = lambda member, protocol: (getattr, (type(member), member.name))  # noqa: E731  Enum.__reduce_ex__ of 3.11.2
        old.setattr(_MEM_FORMAT_ENCODING, "__reduce_ex__", by_name)
        assert b"getattr" in pickle.dumps(TensorProperties())
        assert written(tmp_path / "old") == today
    for name in ("saved", "by dcp.save"):
        found = {"model": {"w": torch.zeros(4, 3)}}
        dcp.load(found, checkpoint_id=tmp_path / "old" / name, no_dist=True)
        assert torch.equal(found["model"]["w"], ones["model"]["w"])


def test_exports_of_a_run_lie_where_no_resume_looks(tmp_path):
    spec, _ = make_meta(tmp_path / "meta")
    step = tmp_path / "outputs" / "checkpoint" / "step-7"
    run(tmp_path / "meta", step)
    for _ in range(2):  # a run that ends twice replaces them
        written = export(step, tmp_path / "outputs", ["torchtune", "hf", "gguf"], dtype="float32")
    folder = tmp_path / "outputs" / "exports" / "step-7"
    assert written == [folder / "torchtune", folder / "hf", folder / "gguf" / "model.gguf"]
    for to, name in (("hf", "README.md"), ("gguf", "old/model.gguf")):
        notes = folder / to / name  # put there by somebody else
        notes.parent.mkdir(exist_ok=True)
        notes.write_text("mine")
        before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        with pytest.raises(FormatError, match=name):
            export(step, tmp_path / "outputs", [to], dtype="float32")
        assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
        notes.unlink()
    assert (folder / "torchtune" / "checkpointer.yaml").exists()
    assert open_source(folder / "hf").spec == spec
    assert [p.name for p in step.parent.iterdir()] == ["step-7"]
    with pytest.raises(ConfigError, match="did you mean `hf`"):
        _raise_config(lambda: export(step, tmp_path, ["hff"]))


def _raise_config(call):
    try:
        call()
    except ConfigError as error:
        raise ConfigError(str(error)) from None


def test_a_dry_run_writes_nothing_and_says_it_all(tmp_path):
    make_meta(tmp_path / "meta")
    before = sorted(tmp_path.rglob("*"))
    source = open_source(tmp_path / "meta")
    for to in ("hf", "meta", "torch", "torchtune", "gguf", "dcp"):
        report = describe_plan(source, tmp_path / "out", to, Options(shards=4))
        json.dumps(report)
        assert report["bytes"] > sum(row["bytes"] for row in report["tensors"]) * 0.99
        assert any("layers.1.feed_forward.w2.weight" in line for line in plan_lines(report))
    assert sorted(tmp_path.rglob("*")) == before


def test_the_tokenizer_goes_along_and_its_absence_is_said(tmp_path, caplog):
    from reshard.formats import tokenizer_json as ours
    from reshard.text.tokenizers import LLAMA3_SPECIALS, LLAMA3_SPLIT

    assert ours.LLAMA3_SPLIT == LLAMA3_SPLIT  # a fact with two homes: rooms on one floor do not import each other
    _, _ = make_meta(tmp_path / "meta", vocab_size=256 + 44 + 256)
    with caplog.at_level(logging.WARNING):
        run(tmp_path / "meta", tmp_path / "without", to="hf")
    assert "has no tokenizer" in caplog.text

    import base64

    import tiktoken
    from tiktoken._educational import bpe_train

    text = " the quick brown fox; the quicker browner foxes, then 12345 of them\n" * 3
    ranks = bpe_train(Path(__file__).read_text(), vocab_size=300, pat_str=LLAMA3_SPLIT, visualise=None)
    assert len(ranks) == 300
    model_file = b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items())
    (tmp_path / "meta" / "tokenizer.model").write_bytes(model_file)
    run(tmp_path / "meta", tmp_path / "hf", to="hf")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    specials = {name: 300 + i for i, name in enumerate(LLAMA3_SPECIALS)}
    meta = tiktoken.Encoding("x", pat_str=LLAMA3_SPLIT, mergeable_ranks=ranks, special_tokens=specials)
    for sample in (text, "Grüße, 世界! 1234567 \n\n  x\t<|eot_id|>"):
        expected = [300, *meta.encode(sample, allowed_special="all")]
        assert tokenizer(sample)["input_ids"] == expected
        assert tokenizer.decode(expected[1:]) == sample
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (300, 301)
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (300, 301)

    run(tmp_path / "hf", tmp_path / "again", to="meta")
    assert (tmp_path / "again" / "tokenizer.model").read_bytes() == model_file
    run(tmp_path / "hf", tmp_path / "m.gguf")
    run(tmp_path / "m.gguf", tmp_path / "hf2", to="hf")
    again = AutoTokenizer.from_pretrained(tmp_path / "hf2")
    assert again(text)["input_ids"] == tokenizer(text)["input_ids"]


def test_models_by_name():
    assert named_spec("8B") == flavor("llama3", "8B")
    assert named_spec("llama3_1/8B") == flavor("llama3_1", "8B")
    with pytest.raises(ConfigError):
        named_spec("9B")
    with pytest.raises(FormatError):
        named_spec("missing/config.json")


@pytest.mark.parametrize(
    ("name", "size", "factor"), [("llama3_2", "1B", 32.0), ("llama3_2", "3B", 32.0), ("llama3_1", "8B", 8.0),
                                 ("llama3_1", "405B", 8.0), ("llama3_3", "70B", 8.0), ("llama3", "8B", None)],
)  # fmt: skip
def test_every_release_has_its_config(tmp_path, name, size, factor):
    spec = flavor(name, size)
    config = config_of(spec, "bfloat16", {})
    assert (config["rope_scaling"] or {}).get("factor") == factor
    assert config["tie_word_embeddings"] == (size in ("1B", "3B"))
    assert config["max_position_embeddings"] == (131072 if factor else 8192)
    assert spec_from_config(config, tmp_path) == spec


def test_another_rope_factor(tmp_path):
    make_meta(tmp_path / "meta", rope_scaling=RopeScaling(8.0))
    run(tmp_path / "meta", tmp_path / "hf", to="hf", rope_factor=32.0)
    assert open_source(tmp_path / "hf").spec.rope_scaling.factor == 32.0
    make_meta(tmp_path / "plain")
    with pytest.raises(ConfigError, match="is not scaled"):
        run(tmp_path / "plain", tmp_path / "out", to="hf", rope_factor=8.0)


@pytest.mark.parametrize(("text", "size"), [("512MiB", 512 << 20), ("5GB", 5 * 10**9), ("1.5 kB", 1500), ("77", 77)])
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "5 parsecs", "0"])
def test_no_sizes(text):
    with pytest.raises(ConfigError):
        parse_size(text)


def test_formats_are_told_by_what_is_there(tmp_path):
    make_meta(tmp_path / "meta")
    run(tmp_path / "meta", tmp_path / "step-3")
    for to, name in (("hf", "hf"), ("torchtune", "tune"), ("gguf", "x.bin")):
        run(tmp_path / "step-3", tmp_path / name, to=to)
    expected = {"meta": "meta", "step-3": "dcp", "hf": "hf", "tune": "torch", "x.bin": "gguf"}
    assert {name: format_of(tmp_path / name) for name in expected} == expected
    assert format_of(tmp_path / "hf" / "model.safetensors") == "hf"
    assert compare(open_source(tmp_path / "meta"), open_source(tmp_path / "hf" / "model.safetensors")).same()
    shutil.copytree(tmp_path / "step-3", tmp_path / "folder" / "step-3")
    with pytest.raises(FormatError, match="folder of checkpoints"):
        open_source(tmp_path / "folder")
    (tmp_path / "nothing").mkdir()
    for path in ("nothing", "missing"):
        with pytest.raises(FormatError):
            open_source(tmp_path / path)


def test_too_little_memory_is_said(tmp_path):
    make_meta(tmp_path / "meta")
    for to in ("dcp", "hf"):
        with pytest.raises(ConfigError, match="memory"):
            run(tmp_path / "meta", tmp_path / "out", to=to, options=Options(memory=20 << 20))
    assert not (tmp_path / "out").exists()


def test_no_space_is_said_first(tmp_path, monkeypatch):
    make_meta(tmp_path / "meta")
    full = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    for target in ("out", "out.gguf", "out.pt"):
        with pytest.raises(StorageError, match="GB free"):
            run(tmp_path / "meta", tmp_path / target)
    assert [p.name for p in tmp_path.iterdir()] == ["meta"]
    assert issubclass(StorageError, ReshardError)


def test_a_tied_embedding_is_read_once_and_written_twice(tmp_path, monkeypatch):
    _, weights = make_meta(tmp_path / "meta", tied=True)
    source, rows = open_source(tmp_path / "meta"), {}
    assert "output.weight" in source.tensors  # as Meta releases it: two names of one storage
    real = StoredTensor.fill

    def fill(self, buffer, start, stop, ledger=None):
        rows[self.name] = rows.get(self.name, 0) + stop - start
        real(self, buffer, start, stop, ledger)

    monkeypatch.setattr(StoredTensor, "fill", fill)
    to_dcp(source, tmp_path / "out")
    assert rows == {name: tensor.shape[0] for name, tensor in source.tensors.items() if name != "output.weight"}
    found = {
        name: torch.empty_like(weights["tok_embeddings.weight"]) for name in ("tok_embeddings.weight", "output.weight")
    }
    dcp.load(found, storage_reader=dcp.FileSystemReader(tmp_path / "out"), no_dist=True)
    assert all(torch.equal(tensor, weights["tok_embeddings.weight"]) for tensor in found.values())


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_large_tensors_become_chunks_of_two_files_whatever_the_slabs(tmp_path, monkeypatch, workers):
    """Rows of 1,040 bytes, slabs, chunks and blocks of sums end at different places; some chunks begin with a block."""
    monkeypatch.setattr(state, "PIECE_BYTES", 5_000_000)
    sizes = {"dim": 520, "n_heads": 4, "n_kv_heads": 2, "ffn_dim": 700, "vocab_size": 9002, "n_layers": 1, "tied": True}
    _, weights = make_meta(tmp_path / "meta", **sizes)
    memory = FLOOR_WITH_TORCH_BYTES + workers * COPIES * 300_000
    manifest = to_dcp(open_source(tmp_path / "meta"), tmp_path / "out", memory=memory, workers=workers)
    data = [tmp_path / "out" / name for name in manifest.files if name.endswith(".distcp")]
    assert [path.name for path in data] == ["__0_0.distcp", "__0_1.distcp"]
    assert max(path.stat().st_size for path in data) < 0.7 * sum(path.stat().st_size for path in data)
    verdict = verify_checkpoint(tmp_path / "out", "bytes", lambda done: None)
    assert verdict.whole, verdict.problem or verdict.findings
    chunks = (
        read_index(index_bytes(tmp_path / "out", manifest), tmp_path / "out").tensors["tok_embeddings.weight"].chunks
    )
    assert len(chunks) == 2
    weights = {**weights, "output.weight": weights["tok_embeddings.weight"]}
    found = {name: torch.empty_like(weight) for name, weight in weights.items()}
    dcp.load(found, storage_reader=dcp.FileSystemReader(tmp_path / "out"), no_dist=True)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in found.items())


def test_a_conversion_that_is_killed_leaves_no_checkpoint_and_the_next_one_works(tmp_path):
    """Into DCP, killed with its first bytes on the disk."""
    make_meta(tmp_path / "meta", dim=512, vocab_size=60_000, ffn_dim=2048)
    command = [sys.executable, "-m", "reshard", "convert", tmp_path / "meta", tmp_path / "out", "--to", "dcp"]
    child = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("out.tmp-*/__0_0.distcp")) and time.monotonic() < deadline:
        time.sleep(0.001)
    child.kill()
    assert child.wait() == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    assert len(list(tmp_path.glob("out.tmp-*"))) == 1
    run(tmp_path / "meta", tmp_path / "out", options=Options(verify=True))
    assert compare(open_source(tmp_path / "meta"), open_source(tmp_path / "out")).same()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["meta", "out"]


def test_a_run_is_told_from_its_checkpoints(tmp_path):
    """`outputs` where `outputs/checkpoint` was meant."""
    (tmp_path / "outputs" / "tokens").mkdir(parents=True)
    make_meta(tmp_path / "meta")
    run(tmp_path / "meta", tmp_path / "outputs" / "checkpoint" / "step-7")
    with pytest.raises(FormatError, match="holds no weights") as caught:
        format_of(tmp_path / "outputs")
    assert caught.value.hint == f"its checkpoints are in {tmp_path / 'outputs' / 'checkpoint'}"


def test_what_a_living_run_writes_is_not_taken_for_a_dead_conversions(tmp_path):
    """A run's own save of the same step has no lock of ours on it."""
    make_meta(tmp_path / "meta")
    living, dead = (tmp_path / f"{name}.tmp-{'0' * 16}" for name in ("step-0", "out"))
    for name, folder in (("step-0", living), ("out", dead)):
        folder.mkdir()
        run(tmp_path / "meta", tmp_path / name)
    assert living.exists()
    assert not dead.exists()
