"""Does memory stay within --max-memory whatever the model's size, and does size matter at all?

Sources are files with holes: gigabytes that cost no disk. Anonymous memory is sampled from outside; a converted 70B goes
into a sink that keeps the first and the last gigabyte.
"""

import math
import os
import subprocess
import sys
import threading
import time
import zipfile
from dataclasses import dataclass

import numpy as np
import pytest

from reshard.commands.sources import open_source
from reshard.formats.hf import lay_out
from reshard.formats.hf_config import as_json, config_of
from reshard.formats.output import write_output
from reshard.formats.protocol import Ledger
from reshard.formats.torch_model import plan_torch
from reshard.formats.torch_pt import open_pt
from reshard.model.names import HUGGING_FACE, foreign_name
from reshard.model.spec import LlamaSpec, RopeScaling, flavor, parameter_shapes


@dataclass
class Shape:
    shape: tuple
    dtype: str = "bfloat16"

    @property
    def nbytes(self):
        return 2 * math.prod(self.shape)


def sparse_hf(directory, spec):
    """A Hugging Face directory of zeros that takes a few KB of disk. Returns the offset of each tensor's numbers."""
    directory.mkdir()
    named = [(foreign_name(name, HUGGING_FACE), Shape(shape)) for name, shape in parameter_shapes(spec).items()]
    file, offsets = lay_out("model.safetensors", named)
    with (directory / "model.safetensors").open("wb") as out:
        out.truncate(file.nbytes)
        out.write(file.known[0][1])
    (directory / "config.json").write_bytes(as_json(config_of(spec, "bfloat16", {})))
    return dict(zip(parameter_shapes(spec), offsets, strict=True))


def peak_anonymous(*words):
    """MiB of anonymous memory at most, sampled every few milliseconds, threads and imports included."""
    command = [sys.executable, "-m", "reshard", "convert", *map(str, words)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    child = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    most = 0
    while child.poll() is None:
        try:
            with open(f"/proc/{child.pid}/status") as status:
                most = max([most, *(int(line.split()[1]) for line in status if line.startswith("RssAnon"))])
        except OSError:
            pass
        time.sleep(0.003)
    assert child.returncode == 0, child.stderr.read()
    return most / 1024


ONE_LAYER = {"n_layers": 1, "n_heads": 32, "n_kv_heads": 8, "ffn_dim": 8192}
WAYS = {
    "hf": (["--to", "hf"], 128, 100),
    "gguf, cast": (["--to", "gguf", "--dtype", "float32"], 128, 100),
    "meta in 4": (["--to", "meta", "--shards", "4"], 128, 100),
    "pt": (["--to", "torch"], 128, 100),
    "one worker": (["--to", "hf", "--workers", "1"], 64, 64),
    "dcp": (["--to", "dcp"], 512, 300),
    "dcp, cast": (["--to", "dcp", "--dtype", "float32"], 512, 300),
    "dcp, little": (["--to", "dcp"], 256, 256),
}


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_anonymous_memory_is_what_was_given(tmp_path, way):
    """The embedding alone is 537 MB, more than any of the limits. Also the issue's own targets: 100 MB, 300 with torch."""
    words, memory, target = WAYS[way]
    spec = LlamaSpec(dim=2048, vocab_size=131072, tied=True, rope_scaling=RopeScaling(32.0), **ONE_LAYER)
    sparse_hf(tmp_path / "in", spec)
    peak = peak_anonymous(tmp_path / "in", tmp_path / "out", *words, "--max-memory", f"{memory}MiB")
    print(f"{way}: {peak:.0f} MiB of {memory}, target {target}")
    assert peak < min(memory, target)


class Window:
    """An OpenFile that keeps the first and the last gigabyte of what is written, in a file with holes; and of the rest what
    is small: the archive's own structure.
    """

    def __init__(self, path, nbytes):
        self.nbytes, self.bytes, self.lock = nbytes, 0, threading.Lock()
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT)
        os.ftruncate(self.fd, nbytes)

    def write(self, offset, data):
        view = np.frombuffer(data, np.uint8)
        with self.lock:
            self.bytes += len(view)
        if len(view) < 1 << 16 or offset < 1 << 30 or offset + len(view) > self.nbytes - (1 << 30):
            for at in range(0, len(view), 1 << 20):
                part = view[at : at + (1 << 20)]
                if part.any():
                    os.pwrite(self.fd, part, offset + at)

    def close(self):
        os.close(self.fd)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_seventy_billion_through_a_window(tmp_path):
    """141 GB of a 70B's shape, Hugging Face's order of rows to Meta's, in one file: size does not matter."""
    spec = flavor("llama3", "70B")
    offsets = sparse_hf(tmp_path / "in", spec)
    mark = np.random.default_rng(0).integers(0, 256, 8192 * 2, np.uint8)
    with (tmp_path / "in" / "model.safetensors").open("r+b") as file:
        file.seek(offsets["tok_embeddings.weight"] + 16384 * 17)
        file.write(mark)
        file.seek(offsets["output.weight"] + 16384 * 128255)  # the very last row
        file.write(mark[::-1].tobytes())
    source = open_source(tmp_path / "in")
    output = plan_torch(source, spec, "m.pt")
    assert output.nbytes > 141e9
    before = anonymous()
    peaks, sinks = [], []

    def opened(path, nbytes):
        sinks.append(Window(path, nbytes))
        return sinks[0]

    write_output(
        output, tmp_path / "m.pt", Ledger(), memory=128 << 20, workers=2,
        advance=lambda done: peaks.append(anonymous()), open_file=opened,
    )  # fmt: skip
    assert sinks[0].bytes == output.nbytes
    assert max(peaks) - before < 128 << 20
    print(f"{output.nbytes / 1e9:.1f} GB with {(max(peaks) - before) / 2**20:.0f} MiB more")
    # torch would have to map all of it, which no machine of this size allows: the records are Python's zipfile's to find.
    index = open_pt(tmp_path / "m.pt")
    with zipfile.ZipFile(tmp_path / "m.pt") as archive:
        records = {record.filename: record for record in archive.infolist()}
    assert sum(record.file_size for record in records.values()) > 141e9
    for name, row, expected in (
        ("tok_embeddings.weight", 17, mark),
        ("tok_embeddings.weight", 16, np.zeros_like(mark)),
        ("output.weight", 128255, mark[::-1]),
        ("output.weight", 128254, np.zeros_like(mark)),
    ):
        assert np.array_equal(index.tensors[name].read_bytes(row, row + 1), expected), (name, row)


def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith("RssAnon"))
