"""Is a source taken for what it says of itself? Ties, parts, two models in one folder, and what a user says beside it.

The files are written by safetensors, torch and gguf; which of two models is right is asked of transformers.
"""

import json
import logging
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import gguf
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file

from reshard.cli import main
from reshard.commands.convert import run
from reshard.commands.sources import open_source
from reshard.errors import ConfigError, FormatError, TensorMismatch
from reshard.formats.dialects import Told, canonical_tensors
from reshard.formats.hf_config import as_json, config_of
from reshard.formats.protocol import Block, Region, StoredTensor
from reshard.model.names import HUGGING_FACE, foreign_name
from reshard.model.spec import LlamaSpec, RopeScaling, flavor, parameter_shapes

SPEC = LlamaSpec(dim=64, n_layers=1, n_heads=4, n_kv_heads=2, ffn_dim=96, vocab_size=128, rope_theta=10000.0)
OUTPUT = "output.weight"


def make_weights(seed=1):
    """Meta's names and order of rows; untied."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in parameter_shapes(SPEC).items()}


def in_halves(name, weight):
    heads = {"wq": SPEC.n_heads, "wk": SPEC.n_kv_heads}.get(name.split(".")[-2])
    if heads is None:
        return weight
    return weight.view(heads, SPEC.head_dim // 2, 2, SPEC.dim).transpose(1, 2).reshape(weight.shape).contiguous()


def hf_names(weights):
    return {foreign_name(name, HUGGING_FACE): in_halves(name, weight) for name, weight in weights.items()}


def write_hf(folder, weights, **changes):
    folder.mkdir(exist_ok=True)
    write_config(folder / "config.json", **changes)
    save_file(hf_names(weights), folder / "model.safetensors", {"format": "pt"})
    return folder


def write_config(path, **changes):
    content = config_of(SPEC, "float32", {"context_length": 64}) | changes
    path.write_bytes(as_json({key: value for key, value in content.items() if value is not ...}))
    return str(path)


def write_gguf(path, weights, extra=lambda writer: None, split=0):
    writer = gguf.GGUFWriter(path, "llama", split_max_tensors=split)
    writer.add_context_length(64), writer.add_embedding_length(SPEC.dim), writer.add_block_count(SPEC.n_layers)
    writer.add_feed_forward_length(SPEC.ffn_dim), writer.add_head_count(SPEC.n_heads)
    writer.add_head_count_kv(SPEC.n_kv_heads), writer.add_layer_norm_rms_eps(SPEC.norm_eps)
    writer.add_rope_freq_base(SPEC.rope_theta), writer.add_rope_dimension_count(SPEC.head_dim)
    extra(writer)
    rows = {"attention_norm": "attn_norm", "wq": "attn_q", "wk": "attn_k", "wv": "attn_v", "wo": "attn_output",
            "ffn_norm": "ffn_norm", "w1": "ffn_gate", "w2": "ffn_down", "w3": "ffn_up"}  # fmt: skip
    whole = {"tok_embeddings.weight": "token_embd.weight", "norm.weight": "output_norm.weight", OUTPUT: OUTPUT}
    for name, weight in weights.items():
        writer.add_tensor(whole.get(name) or f"blk.0.{rows[name.split('.')[-2]]}.weight", weight.numpy())
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file()
    writer.close()
    return path


def without_output(weights):
    return {name: weight for name, weight in weights.items() if name != OUTPUT}


# -- tied


def test_a_missing_output_is_not_taken_for_a_tie(tmp_path):
    """In every format that may lack it; told to be tied the same files are read."""
    weights = without_output(make_weights())
    untied = write_config(tmp_path / "untied.json")
    tied = write_config(tmp_path / "tied.json", tie_word_embeddings=True)
    torch.save(weights, tmp_path / "m.pt")
    dcp.save({"model": weights}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    save_file(hf_names(weights), tmp_path / "bare.safetensors")
    (tmp_path / "meta").mkdir()
    torch.save(weights, tmp_path / "meta" / "consolidated.00.pth")
    params = {"dim": 64, "n_layers": 1, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 128, "rope_theta": 10000.0}
    (tmp_path / "meta" / "params.json").write_text(json.dumps(params))
    (tmp_path / "params.json").write_text(json.dumps(params | {"multiple_of": 96, "ffn_dim_multiplier": 0.5}))
    (tmp_path / "hf").mkdir()
    for name in ("m.pt", "dcp", "meta", "bare.safetensors"):
        (tmp_path / "config.json").unlink(missing_ok=True)
        for told in (untied, str(tmp_path / "params.json"), *([None] if name == "meta" else [])):
            with pytest.raises(TensorMismatch, match="nothing says that it is tied") as error:
                open_source(tmp_path / name, model=told)
            assert error.value.missing == ("lm_head.weight" if "bare" in name else OUTPUT,)
            assert "tie_word_embeddings" in error.value.hint
        opened = open_source(tmp_path / name, model=tied)  # what the hint says
        assert opened.spec == replace(SPEC, tied=True)
    run(tmp_path / "meta", tmp_path / "out", to="hf", model=tied)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is True


def test_a_model_without_text_output_is_called_by_its_name(tmp_path):
    weights = without_output(make_weights())
    write_hf(tmp_path / "reward", weights, architectures=["LlamaForSequenceClassification"])
    with pytest.raises(TensorMismatch, match="LlamaForSequenceClassification"):
        open_source(tmp_path / "reward")


def test_the_released_tie_of_llama_3_2_needs_no_word():
    """params.json cannot say it; sizes, RoPE and epsilon are those of the release. Nothing is read: the files are not there."""
    spec = flavor("llama3_2", "1B")
    found = {}
    for name, shape in parameter_shapes(spec).items():
        rows, width = shape[0], 2 * (shape[1] if len(shape) > 1 else 1)
        block = Block(Region("nowhere", 0, rows * width), 0, 0, rows, 0, width)
        found[name] = StoredTensor(name, shape, "bfloat16", (block,))
    untied = replace(spec, tied=False)
    assert canonical_tensors(found, "x", Told(untied, says_tie=False))[1] == spec
    with pytest.raises(TensorMismatch, match="nothing says that it is tied"):
        canonical_tensors(found, "x", Told(untied))
    with pytest.raises(TensorMismatch, match="nothing says that it is tied"):
        canonical_tensors(found, "x", Told(replace(untied, rope_theta=1e6), says_tie=False))


def test_a_part_of_a_split_gguf_is_no_tied_model(tmp_path):
    """All tensors but output.weight are in the first file."""
    write_gguf(tmp_path / "m.gguf", make_weights(), split=11)
    parts = sorted(tmp_path.iterdir())
    assert [len(gguf.GGUFReader(part).tensors) for part in parts] == [11, 1]
    for part in parts:
        with pytest.raises(FormatError, match="one of 2 files of a GGUF that is split") as error:
            open_source(part)
        assert part.name in error.value.message
    whole = without_output(make_weights())
    cut = write_gguf(tmp_path / "cut.gguf", whole, lambda w: w.add_int32("split.tensors.count", 12))
    with pytest.raises(FormatError, match="11 tensors of a GGUF that was split, expected 12"):
        open_source(cut)
    merged = write_gguf(tmp_path / "merged.gguf", whole, lambda w: w.add_uint16("split.count", 0))
    assert open_source(merged).spec == replace(SPEC, tied=True)  # as llama.cpp has it


# -- two models in one folder


def embedding(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).get_input_embeddings().weight


def sharded(folder, weights):
    names = sorted(weights)
    files = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(names)}
    for file in set(files.values()):
        save_file({n: weights[n] for n in names if files[n] == file}, folder / file, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))


def beside_shards(folder, old):
    sharded(folder, hf_names(old))


def beside_bin(folder, old):
    torch.save(hf_names(old), folder / "pytorch_model.bin")


def beside_meta(folder, old):
    torch.save(old, folder / "consolidated.00.pth")
    params = {"dim": 64, "n_layers": 1, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 128, "rope_theta": 10000.0}
    (folder / "params.json").write_text(json.dumps(params))


def shards_beside_bin(folder, old):
    """The shards are the new ones."""
    (folder / "model.safetensors").unlink()
    beside_bin(folder, old)
    sharded(folder, hf_names(make_weights(2)))


def bin_beside_meta(folder, old):
    (folder / "model.safetensors").unlink()
    beside_bin(folder, make_weights(2))
    torch.save({"x": 1}, folder / "training_args.bin")
    beside_meta(folder, old)
    write_gguf(folder / "m.gguf", old)


@pytest.mark.parametrize(
    ("add", "left"),
    [(beside_shards, "model-00001-of-00002.safetensors"), (beside_bin, "pytorch_model.bin"),
     (beside_meta, "consolidated.00.pth"), (shards_beside_bin, "pytorch_model.bin"), (bin_beside_meta, "m.gguf")],
)  # fmt: skip
def test_of_two_models_in_a_folder_that_of_transformers(tmp_path, caplog, add, left):
    folder = write_hf(tmp_path / "s", make_weights(2))
    add(folder, make_weights(1))
    with caplog.at_level(logging.WARNING):
        source = open_source(folder)
    assert any("it also has" in r.message and left in r.message for r in caplog.records)
    run(folder, tmp_path / "m.pt")
    found = torch.load(tmp_path / "m.pt", weights_only=True)
    assert source.spec == SPEC
    assert torch.equal(found["tok_embeddings.weight"], embedding(folder))
    assert torch.equal(found["tok_embeddings.weight"], make_weights(2)["tok_embeddings.weight"])


def test_a_whole_model_of_metas_goes_before_half_a_download(tmp_path):
    folder = tmp_path / "s"
    write_hf(folder, make_weights(2))
    sharded(folder, hf_names(make_weights(2)))
    (folder / "model.safetensors").unlink()
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FormatError, match="lacks model-00002"):
        open_source(folder)
    beside_meta(folder, make_weights(1))
    assert open_source(folder).provenance["format"] == "meta"


def test_an_adapter_beside_a_model_is_not_passed_over(tmp_path):
    folder = write_hf(tmp_path / "s", make_weights())
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(FormatError, match="adapter") as error:
        open_source(folder)
    assert str(folder / "model.safetensors") in error.value.hint
    assert open_source(folder / "model.safetensors").spec == SPEC
    beside_bin(folder, make_weights())
    (folder / "model.safetensors").unlink()
    with pytest.raises(FormatError, match="adapter") as error:
        open_source(folder)
    assert str(folder / "pytorch_model.bin") in error.value.hint


def test_several_files_in_a_folder_are_named(tmp_path):
    for name in ("a.gguf", "b.gguf"):
        write_gguf(tmp_path / name, make_weights())
    with pytest.raises(FormatError, match=r"several files of weights: a\.gguf, b\.gguf"):
        open_source(tmp_path)


# -- what is told beside what is said


SCALED = RopeScaling(8.0, original_context=64)
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}  # fmt: skip
TOLD = {
    "rope_scaling": {"rope_scaling": None},
    "another factor": {"rope_scaling": LLAMA3 | {"factor": 4.0}},
    "rope_theta": {"rope_theta": 20000.0},
    "norm_eps": {"rms_norm_eps": 1e-6},
    "n_heads": {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8},
    "tied": {"tie_word_embeddings": True},
}


@pytest.fixture(scope="module")
def scaled(tmp_path_factory):
    """A GGUF, a Hugging Face folder, a pytorch_model.bin and a checkpoint of ours, each of which says what it is."""
    folder = tmp_path_factory.mktemp("scaled")
    write_hf(folder / "hf", make_weights(), rope_scaling=LLAMA3)
    run(folder / "hf", folder / "m.gguf")
    run(folder / "hf", folder / "dcp")
    (folder / "bin").mkdir()
    torch.save(hf_names(make_weights()), folder / "bin" / "pytorch_model.bin")
    write_config(folder / "bin" / "config.json", rope_scaling=LLAMA3)
    return folder


@pytest.mark.parametrize("name", ["m.gguf", "hf", "bin", "dcp"])
def test_a_source_that_says_what_it_is_cannot_be_told_otherwise(scaled, tmp_path, name):
    right = {"rope_scaling": LLAMA3}
    assert open_source(scaled / name, model=write_config(tmp_path / "c.json", **right)).spec.rope_scaling == SCALED
    for change in TOLD.values():
        told = write_config(tmp_path / "c.json", **(right | change))
        with pytest.raises(FormatError, match="says of itself that it is another model"):
            open_source(scaled / name, model=told)
    with pytest.raises(FormatError, match="says of itself that its RoPE is scaled"):
        open_source(scaled / name, rope_scaling="none")


def test_factors_of_no_release_are_believed_only_as_far_as_the_file_has_them(tmp_path):
    """Another program's rope_freqs: what the user says must give its numbers."""
    scaling = RopeScaling(8.0, original_context=64)
    wavelengths = [2 * torch.pi * 10000.0 ** (2 * i / SPEC.head_dim) for i in range(SPEC.head_dim // 2)]
    factors = []
    for wavelength in wavelengths:
        ramp = (64 / wavelength - 1) / 3
        factors.append(8.0 if wavelength > 64 else 1.0 if wavelength < 16 else 1 / ((1 - ramp) / 8 + ramp))
    freqs = torch.tensor(factors).numpy()
    path = write_gguf(tmp_path / "m.gguf", make_weights(), lambda w: w.add_tensor("rope_freqs.weight", freqs))
    told = write_config(tmp_path / "c.json", rope_scaling=LLAMA3)
    assert open_source(path, model=told).spec == replace(SPEC, rope_scaling=scaling)
    with pytest.raises(FormatError, match=r"rope_freqs\.weight is not what"):
        open_source(path)
    with pytest.raises(FormatError, match=r"rope_freqs\.weight is not what"):
        open_source(path, model=write_config(tmp_path / "d.json", rope_scaling=LLAMA3 | {"high_freq_factor": 2.0}))


# -- values of a GGUF's header


LOST = {
    "llama.rope.scale_linear": 4.0, "llama.rope.scaling.factor": 4.0, "llama.rope.scaling.attn_factor": 1.5,
    "llama.rope.scaling.type": "yarn", "llama.rope.scaling.yarn_log_multiplier": 0.125, "llama.rope.freq_base_swa": 1e4,
    "llama.attention.sliding_window": 64, "llama.attention.scale": 0.5, "llama.attention.clamp_kqv": 8.0,
    "llama.attention.causal": False, "llama.logit_scale": 0.5, "llama.final_logit_softcapping": 30.0,
    "llama.embedding_scale": 12.0, "llama.residual_scale": 0.25, "llama.expert_count": 8,
}  # fmt: skip
WITHOUT_EFFECT = {
    "llama.vocab_size": 128, "llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 4.0, "llama.expert_count": 0,
    "llama.rope.scaling.finetuned": False, "llama.attention.causal": True, "llama.logit_scale": 1.0,
    "llama.rope.scaling.original_context_length": 64, "llama.tensor_data_layout": "Meta AI original pth",
    "general.license": "llama3", "tokenizer.ggml.model": "none",
}  # fmt: skip


def values(**found):
    kinds = {bool: "add_bool", int: "add_uint32", float: "add_float32", str: "add_string"}

    def add(writer):
        for key, value in found.items():
            getattr(writer, kinds[type(value)])(key, value)

    return add


@pytest.mark.parametrize("key", LOST)
def test_a_value_that_changes_numbers_and_is_not_kept_is_refused_by_name(tmp_path, key):
    write_gguf(tmp_path / "m.gguf", make_weights(), values(**{key: LOST[key]}))
    with pytest.raises(FormatError) as error:
        open_source(tmp_path / "m.gguf")
    assert f"{key} is {LOST[key]!r}" in error.value.message
    assert f"--remove-metadata {key}" in error.value.hint
    if key.startswith("llama.rope"):
        assert "its RoPE is scaled" in error.value.message


def test_one_that_changes_none_is_not(tmp_path):
    """llama.cpp scales by no factor where the type is none."""
    write_gguf(tmp_path / "m.gguf", make_weights(), values(**WITHOUT_EFFECT))
    assert open_source(tmp_path / "m.gguf").spec == SPEC
    linear = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 1.0, "llama.rope.scale_linear": 1.0}
    write_gguf(tmp_path / "l.gguf", make_weights(), values(**linear))
    assert open_source(tmp_path / "l.gguf").spec == SPEC


def test_the_hint_takes_a_key_out(tmp_path):
    write_gguf(tmp_path / "m.gguf", make_weights(), values(**{"llama.pooling_type": 1}))
    with pytest.raises(FormatError) as error:
        open_source(tmp_path / "m.gguf")
    words = error.value.hint.split(": ")[1].replace("IN.gguf OUT.gguf", "m.gguf o.gguf").split()
    script = Path(sys.executable).with_name(words[0])
    subprocess.run([script, *words[1:]], cwd=tmp_path, check=True, capture_output=True, input=b"YES\n")  # as it asks
    assert open_source(tmp_path / "o.gguf").spec == SPEC


# -- torchtitan


def rotations(scaling=None, rows=8, theta=10000.0):
    """torchtitan's precompute_freqs_cis; scaled as transformers does it."""
    frequencies = 1.0 / (theta ** (torch.arange(0, SPEC.head_dim, 2).float() / SPEC.head_dim))
    if scaling is not None:
        from transformers import LlamaConfig
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        config = LlamaConfig(
            hidden_size=SPEC.dim, num_attention_heads=SPEC.n_heads, rope_theta=theta, rope_scaling=scaling
        )
        frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](config)
    angles = torch.outer(torch.arange(rows), frequencies)
    return torch.polar(torch.ones_like(angles), angles)


def titan(folder, *, full=True, **model):
    """As torchtitan lays a checkpoint out since July 2025; a full one has its training beside the weights."""
    beside = {"lr_scheduler": {"last_epoch": torch.tensor(3)}, "dataloader": {"rank_0": torch.ones(3)}} if full else {}
    dcp.save({**make_weights(), **model, **beside}, checkpoint_id=folder, no_dist=True)
    return folder


@pytest.fixture
def _small_flavor(monkeypatch):
    """8B of a size that fits here: a flavor is all that torchtitan's own config names."""
    from reshard.model import spec

    monkeypatch.setitem(spec.FLAVORS, "8B", replace(SPEC, rope_theta=10000.0))


@pytest.mark.usefixtures("_small_flavor")
def test_a_flavors_name_does_not_say_how_torchtitan_trained_it(tmp_path):
    full, alone = titan(tmp_path / "full"), titan(tmp_path / "alone", full=False)
    for path, names in ((full, ("8B", "llama3/8B", "llama3_1/8B")), (alone, ("8B", "llama3/8B"))):
        for name in names:
            for to in ("hf", "gguf", "dcp", "meta", "torchtune"):
                with pytest.raises(FormatError, match="does not say whether its RoPE is scaled") as error:
                    run(path, tmp_path / "out", to=to, model=name)
                assert "--rope-scaling llama3 or --rope-scaling none" in error.value.hint
    run(full, tmp_path / "m.pt", model="8B")  # of a .pt nobody asks
    assert open_source(alone, model="llama3_1/8B").spec.rope_scaling == RopeScaling(8.0)  # the name of a scaled release
    for said, expected in (("none", None), ("llama3", RopeScaling(8.0))):
        main(["convert", str(full), str(tmp_path / said), "--to", "hf", "--model", "8B", "--rope-scaling", said])
        config = json.loads((tmp_path / said / "config.json").read_text())
        assert config["rope_scaling"] == (
            None if expected is None else LLAMA3 | {"original_max_position_embeddings": 8192}
        )
    told = write_config(tmp_path / "c.json")
    assert open_source(full, model=told).spec == SPEC  # a file says it
    logging.getLogger().handlers.clear()


@pytest.mark.usefixtures("_small_flavor")
def test_a_full_pt_of_torchtitan_does_not_say_it_either(tmp_path):
    torch.save({"model": make_weights(), "lr_scheduler": {}, "optimizer": {}}, tmp_path / "m.pt")
    with pytest.raises(FormatError, match="does not say whether its RoPE is scaled"):
        open_source(tmp_path / "m.pt", model="8B")
    assert open_source(tmp_path / "m.pt", model="8B", rope_scaling="llama3").spec.rope_scaling == RopeScaling(8.0)
    torch.save(make_weights(), tmp_path / "w.pt")
    assert open_source(tmp_path / "w.pt", model="8B").spec == SPEC


def test_a_table_that_is_none_says_nothing(tmp_path):
    """As other programs' stand-ins: the same turn everywhere, none at all, or one at position 0."""
    angles = torch.ones(8, SPEC.head_dim // 2)
    told = write_config(tmp_path / "c.json")
    for i, table in enumerate((angles, 0 * angles, torch.arange(8)[:, None] * angles, rotations()[1:].angle())):
        folder = titan(tmp_path / f"{i}", freqs_cis=torch.polar(torch.ones_like(table), table))
        assert open_source(folder, model=told).spec == SPEC


def test_a_factor_that_torchtitan_and_the_release_differ_in_is_asked_for(tmp_path):
    folder = titan(tmp_path / "full")
    with pytest.raises(ConfigError, match="by 32 as released, and by 8 where torchtitan trains it"):
        open_source(folder, model="1B", rope_scaling="llama3")


@pytest.mark.usefixtures("_small_flavor")
def test_the_table_of_rotations_of_a_trained_checkpoint_says_it(tmp_path):
    """As torchtitan kept it until August 2025. In a converted seed it is that of torchtitan's code, not of the weights."""
    scaling = {**LLAMA3, "original_max_position_embeddings": 8192}
    unscaled, stretched = (
        titan(tmp_path / "u", freqs_cis=rotations()),
        titan(tmp_path / "s", freqs_cis=rotations(scaling)),
    )
    assert open_source(unscaled, model="8B").spec == SPEC
    assert open_source(stretched, model="8B").spec.rope_scaling == RopeScaling(8.0)
    for path, rope in ((unscaled, scaling), (stretched, None)):
        with pytest.raises(FormatError, match="was trained with another RoPE than it is told to have"):
            open_source(path, model=write_config(tmp_path / "c.json", rope_scaling=rope))
    with pytest.raises(FormatError, match="was trained with another RoPE"):
        open_source(unscaled, model=write_config(tmp_path / "c.json", rope_theta=20000.0))
    seed = titan(tmp_path / "seed", full=False, freqs_cis=rotations())
    assert open_source(seed, model="llama3_1/8B").spec.rope_scaling == RopeScaling(8.0)


@pytest.mark.usefixtures("_small_flavor")
def test_all_is_a_sentence_and_exit_2(tmp_path, capsys):
    folder = titan(tmp_path / "full")
    for verb in (["eval"], ["generate"], ["inspect"], ["diff", str(folder)]):
        with pytest.raises(SystemExit) as stop:
            main([*verb, str(folder), "--model", "8B"])
        assert stop.value.code == 2
        assert "--rope-scaling llama3" in capsys.readouterr().err
    main(["inspect", str(folder), "--model", "8B", "--rope-scaling", "llama3"])
    assert "RoPE scaled 8 times" in capsys.readouterr().out
    logging.getLogger().handlers.clear()
