"""What lies at a path, whoever wrote it? Finds the format by looking, opens it, and settles which model it is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from reshard.checkpoint.layout import METADATA, entries
from reshard.checkpoint.manifest import MANIFEST
from reshard.commands.dcp_source import open_dcp
from reshard.errors import ConfigError, FormatError, listed
from reshard.formats.gguf import open_gguf
from reshard.formats.hf import INDEX, SINGLE, open_hf
from reshard.formats.hf_config import CONFIG, read_json, spec_from_config
from reshard.formats.meta import PARAMS, open_meta, spec_from_params
from reshard.formats.protocol import Source
from reshard.formats.torch_model import open_torch
from reshard.model.spec import RELEASES, LlamaSpec, flavor

FORMATS = ("dcp", "hf", "meta", "torch", "torchtune", "gguf")


def format_of(path: Path) -> str:
    """dcp, hf, meta, torch or gguf. Raises FormatError where it is none, or several in one folder."""
    if not path.exists():
        raise FormatError(f"`{path}` does not exist", path=path)
    if path.is_dir():
        return _format_of_directory(path)
    with path.open("rb") as file:
        start = file.read(9)
    if start.startswith(b"GGUF"):
        return "gguf"
    if path.suffix == ".safetensors" or (len(start) == 9 and start[8:] == b"{"):
        return "hf"
    return "torch"  # says itself what is wrong with it, if it is none


def _format_of_directory(path: Path) -> str:
    if (path / MANIFEST).exists() or (path / METADATA).exists():
        return "dcp"
    if (path / PARAMS).is_file():
        return "meta"
    if (path / INDEX).is_file() or (path / SINGLE).is_file() or list(path.glob("*.safetensors")):
        return "hf"
    if (path / "original" / PARAMS).is_file():
        return "meta"
    single = single_file(path)
    if single is not None:
        return format_of(single)
    if (path / CONFIG).is_file():
        return "hf"
    steps = [entry.path.name for entry in entries(path)]
    if steps:
        raise FormatError(
            f"`{path}` is a folder of checkpoints: {listed(steps)}", path=path, hint=f"name one: {path / steps[-1]}"
        )
    if list(path.glob("consolidated*.pth")):
        return "meta"  # and says that params.json is missing
    inside = [folder for folder in sorted(path.iterdir()) if folder.is_dir() and entries(folder)]
    expected = "a DCP, Meta or Hugging Face directory, or a .pt, .safetensors or .gguf file is expected"
    raise FormatError(
        f"`{path}` holds no weights in a format that is known",
        path=path,
        hint=f"its checkpoints are in {inside[0]}" if inside else expected,
    )


def single_file(path: Path) -> Path | None:
    """The one file of weights in a folder, such as a torchtune export's."""
    found = sorted(p for p in path.iterdir() if p.suffix in (".pt", ".pth", ".bin", ".gguf") and p.is_file())
    return found[0] if len(found) == 1 and not found[0].name.startswith("consolidated") else None


def open_source(path: Path, *, model: str | LlamaSpec | None = None, rope_factor: float | None = None) -> Source:
    """Open any source. model: FLAVOR, NAME/FLAVOR, the path of a params.json or config.json, or the model itself.

    What the source says of itself and what it is told to be must agree. Raises ReshardErrors, each naming the file.
    """
    kind = format_of(path)
    told_spec = named_spec(model) if isinstance(model, str) else model
    if path.is_dir() and kind in ("torch", "gguf"):
        path = single_file(path) or path
    if kind == "dcp":
        source = open_dcp(path, told_spec)
    elif kind == "meta":
        source = open_meta(path)
    elif kind == "hf":
        source = open_hf(path, told_spec)
    elif kind == "gguf":
        source = open_gguf(path, told_spec)
    else:
        source = open_torch(path, told_spec)
    spec = source.spec
    assert spec is not None, path  # every opener refuses what does not say enough
    if told_spec is not None and replace(told_spec, tied=spec.tied) != spec:
        ours, theirs = told_spec.to_dict(), spec.to_dict()
        wrong = [
            f"{key}: {theirs[key]}, told {ours[key]}" for key in ours if ours[key] != theirs[key] and key != "tied"
        ]
        raise FormatError(
            f"{path} says of itself that it is another model: {listed(wrong)}", path=path, hint="leave out --model"
        )
    return replace(source, spec=with_rope_factor(spec, rope_factor, path))


def with_rope_factor(spec: LlamaSpec, factor: float | None, path: Path) -> LlamaSpec:
    """The spec with another RoPE scaling factor. Raises ConfigError where the model's RoPE is not scaled."""
    if factor is None:
        return spec
    if spec.rope_scaling is None:
        raise ConfigError(f"{path}: its RoPE is not scaled, a factor of {factor:g} has no place", hint="leave it out")
    return replace(spec, rope_scaling=replace(spec.rope_scaling, factor=factor))


def named_spec(model: str) -> LlamaSpec:
    """The model that `--model` names. Raises ConfigError, FormatError."""
    path = Path(model)
    if path.suffix == ".json" or path.is_dir():
        for file in [path] if path.is_file() else [path / CONFIG, path / PARAMS]:
            if file.is_file():
                content = read_json(file)
                return spec_from_config(content, file) if "model_type" in content else spec_from_params(file)
        raise FormatError(f"`{model}` does not exist, expected a params.json or config.json", path=path)
    name, slash, size = model.rpartition("/")
    if slash:
        return flavor(name, size)
    known = [n for n in RELEASES if model in RELEASES[n]]
    return flavor(known[0] if known else "llama3", model)
