"""Does `python3 scripts/convert_llama_to_dcp.py <input_dir> <output_dir>` do what the guide says, and nothing by halves?

Typed as a user would, from the root of the repository. The readers are torch's own: dcp.load and dcp_to_torch.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from reshard.checkpoint.manifest import read_manifest
from reshard.commands.convert import run, to_dcp
from reshard.errors import FormatError, NotACheckpoint, StorageError
from reshard.formats.meta import open_meta, write_meta
from reshard.formats.protocol import Block, Region, Source, StoredTensor
from reshard.formats.torch_pt import open_pt
from reshard.model.spec import LlamaSpec, parameter_shapes

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = "scripts/convert_llama_to_dcp.py"


def make(directory, shards=2, dtype=torch.bfloat16, **changes):
    """A Meta directory, and what is in it."""
    values = {"dim": 64, "n_layers": 3, "n_heads": 16, "n_kv_heads": 8, "ffn_dim": 192, "vocab_size": 128} | changes
    spec = LlamaSpec(**values)
    generator = torch.Generator().manual_seed(1)
    weights = {n: torch.randn(s, generator=generator).to(dtype) for n, s in parameter_shapes(spec).items()}
    write_meta(directory, weights, spec, shards)
    if spec.tied:
        weights["output.weight"] = weights["tok_embeddings.weight"]
    return spec, weights


def script(*arguments, python=sys.executable, cwd=ROOT, **environment):
    return subprocess.run(
        [python, SCRIPT, *map(str, arguments)],
        cwd=cwd, capture_output=True, text=True, check=False, timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )  # fmt: skip


def plain_load(directory, weights):
    """What torch's own reader finds under the names of `weights`."""
    found = {name: torch.empty_like(tensor) for name, tensor in weights.items()}
    dcp.load(found, checkpoint_id=directory, no_dist=True)
    return found


def assert_equal(found, weights):
    assert set(found) == set(weights)
    for name, tensor in weights.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def test_as_in_the_guide(tmp_path):
    spec, weights = make(tmp_path / "Llama", shards=4)
    out = tmp_path / "outputs" / "checkpoint" / "step-0"
    done = script(tmp_path / "Llama", out, "--max_seq_len", "131072")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{out}\n"
    assert [line for line in done.stderr.splitlines() if "max_seq_len" in line] == [
        "--max_seq_len has no effect: the result trains at any sequence length"
    ]
    assert_equal(plain_load(out, weights), weights)

    metadata = dcp.FileSystemReader(out).read_metadata()
    assert set(metadata.state_dict_metadata) == set(weights)
    manifest = read_manifest(out)
    assert (manifest.step, manifest.kind) == (0, "model")
    assert LlamaSpec.from_dict(manifest.model) == spec
    assert manifest.source["format"] == "meta"
    assert manifest.source["path"] == "Llama"
    assert len(manifest.source["files"]) == 4
    assert manifest.source["params"]["n_kv_heads"] == 8
    assert str(tmp_path) not in (out / "manifest.json").read_text()

    exported = subprocess.run(
        [sys.executable, "-m", "torch.distributed.checkpoint.format_utils", "dcp_to_torch", out, tmp_path / "model.pt"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert exported.returncode == 0, exported.stderr
    assert_equal(torch.load(tmp_path / "model.pt", weights_only=True), weights)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("changes", [
    {"shards": 1},
    {"shards": 8},
    {"shards": 1, "tied": True},
    {"shards": 2, "tied": True},
    {"shards": 8, "n_kv_heads": 4},  # every KV head in two files
    {"shards": 2, "n_heads": 4, "n_kv_heads": 2},
], ids=str)  # fmt: skip
def test_bit_equal(tmp_path, changes, dtype):
    spec, weights = make(tmp_path / "m", dtype=dtype, **changes)
    run(tmp_path / "m", tmp_path / "out")
    assert_equal(plain_load(tmp_path / "out", weights), weights)
    assert LlamaSpec.from_dict(read_manifest(tmp_path / "out").model) == spec
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m", "out"]


def test_large_tensors_come_in_chunks(tmp_path):
    """134 MB of embedding: three chunks, none above 64 MiB, also where a file's end is in the middle of one."""
    _, weights = make(tmp_path / "m", shards=2, dim=1024, n_layers=1, ffn_dim=32, vocab_size=65536 + 2)
    run(tmp_path / "m", tmp_path / "out")
    chunks = dcp.FileSystemReader(tmp_path / "out").read_metadata().state_dict_metadata["tok_embeddings.weight"].chunks
    assert [tuple(c.sizes) for c in chunks] == [(32768, 1024), (32768, 1024), (2, 1024)]
    assert_equal(plain_load(tmp_path / "out", weights), weights)


def test_a_cast_is_torchs(tmp_path):
    _, weights = make(tmp_path / "m", dtype=torch.float32)
    run(tmp_path / "m", tmp_path / "out", dtype="bfloat16")
    expected = {name: tensor.bfloat16() for name, tensor in weights.items()}
    assert_equal(plain_load(tmp_path / "out", expected), expected)


def test_a_cast_that_overflows_is_refused(tmp_path):
    spec, weights = make(tmp_path / "m", dtype=torch.float32)
    weights["layers.1.attention.wv.weight"][3, 3] = 1e6
    write_meta(tmp_path / "n", weights, spec)
    with pytest.raises(FormatError, match=r"layers\.1\.attention\.wv\.weight has numbers up to 1e\+06.* float16"):
        run(tmp_path / "n", tmp_path / "out", dtype="float16")
    assert not (tmp_path / "out").exists()


def test_an_empty_directory_is_fine_a_used_one_is_not(tmp_path):
    make(tmp_path / "m")
    (tmp_path / "out").mkdir()
    run(tmp_path / "m", tmp_path / "out")
    before = (tmp_path / "out" / "manifest.json").read_bytes()
    with pytest.raises(NotACheckpoint):
        run(tmp_path / "m", tmp_path / "out")
    assert (tmp_path / "out" / "manifest.json").read_bytes() == before
    with pytest.raises(NotACheckpoint):
        run(tmp_path / "m", tmp_path / "m")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(NotACheckpoint):
        run(tmp_path / "m", tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def shard(directory, number):
    return directory / f"consolidated.{number:02d}.pth"


def lose(directory):
    shard(directory, 1).unlink()


def truncate(directory):
    os.truncate(shard(directory, 1), 5000)


def flip_a_weight(directory):
    region = open_pt(shard(directory, 1)).tensors["layers.2.feed_forward.w2.weight"].blocks[0].region
    with shard(directory, 1).open("r+b") as file:
        file.seek(region.offset + 77)
        byte = file.read(1)
        file.seek(region.offset + 77)
        file.write(bytes([byte[0] ^ 1]))


def change_params(directory):
    params = json.loads((directory / "params.json").read_text())
    (directory / "params.json").write_text(json.dumps(params | {"n_layers": 2**31 - 1}))


class Touch:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def poison(directory):
    torch.save({"x": Touch(directory / "marker")}, shard(directory, 1))


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (shutil.rmtree, "is not a directory"),
        (lose, "consolidated.01.pth"),
        (truncate, "consolidated.01.pth"),
        (flip_a_weight, "consolidated.01.pth is damaged"),
        (change_params, "layers.3."),
        (poison, "posix.system"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(tmp_path, spoil, named):
    make(tmp_path / "m")
    spoil(tmp_path / "m")
    done = script(tmp_path / "m", tmp_path / "new" / "out")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("error: ")
    assert named in done.stderr
    assert done.stdout == ""
    assert not (tmp_path / "new" / "out").exists()
    assert list(tmp_path.rglob("*.tmp-*")) == []
    assert not (tmp_path / "m" / "marker").exists()


def test_wrong_words_are_two(tmp_path):
    assert script().returncode == 2
    done = script(tmp_path, tmp_path / "x", "--max_seq_length", "3")
    assert done.returncode == 2
    assert "--max_seq_len" in done.stderr


def test_no_space_is_said_before_the_first_byte(tmp_path):
    """A source of 2^60 bytes that nobody has to store: it must not even be opened."""
    region = Region(tmp_path / "absent", 0, 2**60)
    tensor = StoredTensor("norm.weight", (2**29, 2**30), "bfloat16", (Block(region, 0, 0, 2**29, 0, 2**31),))
    spec = LlamaSpec(dim=2, n_layers=1, n_heads=1, n_kv_heads=1, ffn_dim=1, vocab_size=1)
    with pytest.raises(StorageError, match=r"needs 1152921504\.61 GB"):
        to_dcp(Source(tmp_path, spec, {"norm.weight": tensor}, {}), tmp_path / "a" / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_python_without_reshard_goes_on_in_the_venv_or_says_how(tmp_path):
    """An empty environment, in a copy of the script beside a .venv of its own."""
    bare = tmp_path / "bare"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", bare], check=True)
    checkout = tmp_path / "checkout"
    (checkout / "scripts").mkdir(parents=True)
    shutil.copy(ROOT / SCRIPT, checkout / "scripts")
    make(tmp_path / "m")

    done = script(tmp_path / "m", tmp_path / "out", python=bare / "bin" / "python", cwd=checkout, PYTHONPATH="")
    assert done.returncode == 2
    assert "hint: make install" in done.stderr
    assert "Traceback" not in done.stderr

    (checkout / ".venv" / "bin").mkdir(parents=True)
    (checkout / ".venv" / "bin" / "python").write_text(
        f'#!/bin/sh\nPYTHONPATH={ROOT / "src"} exec {sys.executable} "$@"\n'
    )
    (checkout / ".venv" / "bin" / "python").chmod(0o755)
    done = script(tmp_path / "m", tmp_path / "out", python=bare / "bin" / "python", cwd=checkout, PYTHONPATH="")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "manifest.json").exists()
    assert open_meta(tmp_path / "m").spec is not None
