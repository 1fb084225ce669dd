"""What lies at a path, whoever wrote it? Finds the format by looking, opens it, and settles which model it is."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Literal

from reshard.checkpoint.layout import METADATA, entries
from reshard.checkpoint.manifest import MANIFEST
from reshard.commands.dcp_source import open_dcp
from reshard.errors import ConfigError, FormatError, listed
from reshard.formats.dialects import Told
from reshard.formats.gguf import open_gguf
from reshard.formats.hf import BIN, BIN_INDEX, INDEX, SINGLE, is_complete, open_hf, refuse_adapter, say_others
from reshard.formats.hf_config import CONFIG, read_json, spec_from_config
from reshard.formats.meta import PARAMS, open_meta, spec_from_params
from reshard.formats.protocol import Source
from reshard.formats.torch_model import open_torch
from reshard.model.compare import differences
from reshard.model.spec import RELEASES, LlamaSpec, flavor, scaling_of_release

logger = logging.getLogger(__name__)

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
    if is_complete(path):
        return "hf"
    if (path / CONFIG).is_file() and (path / BIN).is_file() and not (path / INDEX).is_file():
        return format_of(path / BIN)
    if (path / PARAMS).is_file():
        return "meta"
    if (path / INDEX).is_file() or (path / SINGLE).is_file() or list(path.glob("*.safetensors")):
        return "hf"
    if (path / "original" / PARAMS).is_file():
        return "meta"
    single = single_file(path)
    if single is not None:
        return format_of(single)
    if several := _weight_files(path):
        raise FormatError(
            f"`{path}` holds several files of weights: {listed(several)}",
            path=path,
            hint=f"name one: {path / several[0]}",
        )
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
    """The one file of weights in a folder, such as a torchtune export's; of several, the one that transformers takes."""
    if (path / BIN).is_file():
        return path / BIN
    found = _weight_files(path)
    return path / found[0] if len(found) == 1 else None


def _weight_files(path: Path) -> list[str]:
    """Files that may each hold a model; not those that only make one together."""
    if (path / BIN_INDEX).is_file():
        return []
    found = sorted(p.name for p in path.iterdir() if p.suffix in (".pt", ".pth", ".bin", ".gguf") and p.is_file())
    return [] if any(name.startswith("consolidated") for name in found) else found


RopeSaid = Literal["none", "llama3"]


def open_source(
    path: Path,
    *,
    model: str | LlamaSpec | Told | None = None,
    rope_scaling: RopeSaid | None = None,
    rope_factor: float | None = None,
    rope_matters: bool = True,
) -> Source:
    """Open any source. model: FLAVOR, NAME/FLAVOR, the path of a params.json or config.json, or the model itself.

    rope_scaling: whether its RoPE is scaled, where nothing says it: a flavor's name does not say how torchtitan trained it.
    rope_matters: False where only names, shapes and numbers are wanted; it is then not asked for.
    What the source says of itself and what it is told to be must agree. Raises ReshardErrors, each naming the file.
    """
    kind = format_of(path)
    said = _told(model)
    if said is not None and rope_scaling is not None:
        said = _with_scaling(said, rope_scaling, path, rope_factor)
    if said is not None and not rope_matters:
        said = replace(said, scaling_from="file")
    if path.is_dir() and kind in ("torch", "gguf"):
        refuse_adapter(path)
        file = single_file(path) or path
        say_others(path, [file.name])
        path = file
    if kind == "dcp":
        source = open_dcp(path, said)
    elif kind == "meta":
        source = open_meta(path, said)
    elif kind == "hf":
        source = open_hf(path, said)
    elif kind == "gguf":
        source = open_gguf(path, said)
    else:
        source = open_torch(path, said)
    spec = source.spec
    assert spec is not None, path  # every opener refuses what does not say enough
    if said is not None:
        hint = "leave out --model" if isinstance(model, str) else "leave out --config"
        _check_told(path, spec, said, ties=kind != "meta", hint=hint)
    if rope_scaling is not None and (spec.rope_scaling is None) != (rope_scaling == "none"):
        is_scaled = "is not scaled" if spec.rope_scaling is None else f"is scaled by {spec.rope_scaling.factor:g}"
        raise FormatError(
            f"{path} says of itself that its RoPE {is_scaled}, told {rope_scaling}",
            path=path,
            hint="leave out --rope-scaling",
        )
    return replace(source, spec=with_rope_factor(spec, rope_factor, path))


def _told(model: str | LlamaSpec | Told | None) -> Told | None:
    if isinstance(model, LlamaSpec):
        return Told(model)
    if not isinstance(model, str):
        return model
    file = _model_file(model)
    if file is None:
        is_scaled_release = "/" in model and not model.startswith("llama3/")
        return Told(named_spec(model), scaling_from="release" if is_scaled_release else "flavor")
    return Told(named_spec(model), says_tie="model_type" in read_json(file))


def _with_scaling(said: Told, rope_scaling: RopeSaid, path: Path, factor: float | None) -> Told:
    """What is told, with the RoPE that --rope-scaling says. Raises ConfigError where the factor is anybody's guess."""
    if rope_scaling == "none":
        return replace(said, spec=replace(said.spec, rope_scaling=None), scaling_from="file")
    scaling = said.spec.rope_scaling or scaling_of_release(said.spec.dim)
    if said.scaling_from == "flavor" and scaling.factor != 8 and factor is None and not (path / MANIFEST).exists():
        raise ConfigError(
            f"{path}: RoPE of this size is scaled by {scaling.factor:g} as released, and by 8 where torchtitan trains it",
            hint=f"--rope-scaling-factor {scaling.factor:g} or --rope-scaling-factor 8; or --model with its config.json",
        )
    return replace(said, spec=replace(said.spec, rope_scaling=scaling), scaling_from="file")


def _check_told(path: Path, spec: LlamaSpec, said: Told, *, ties: bool, hint: str) -> None:
    """Raises FormatError where the source is another model. ties: the source says itself whether it is tied.

    Of Meta's files it is only seen in the numbers: equal matrices are no contradiction to a model that is untied.
    """
    told = said.spec
    if said.scaling_from != "file" and (path / METADATA).exists() and not (path / MANIFEST).exists():
        told = replace(
            told, rope_scaling=spec.rope_scaling
        )  # read off its table of rotations, which says more than a name
    if not said.says_tie or (not ties and spec.tied):
        told = replace(told, tied=spec.tied)
    wrong = [f"{key}: {theirs}, told {ours}" for key, (theirs, ours) in differences(spec.to_dict(), told).items()]
    if wrong:
        raise FormatError(
            f"{path} says of itself that it is another model: {listed(wrong)}",
            path=path,
            hint=hint,
        )


def with_rope_factor(spec: LlamaSpec, factor: float | None, path: Path) -> LlamaSpec:
    """The spec with another RoPE scaling factor. Raises ConfigError where the model's RoPE is not scaled."""
    if factor is None:
        return spec
    if spec.rope_scaling is None:
        raise ConfigError(f"{path}: its RoPE is not scaled, a factor of {factor:g} has no place", hint="leave it out")
    if factor != spec.rope_scaling.factor:
        logger.info("%s: its RoPE scaled by %g, as asked for, in place of %g", path, factor, spec.rope_scaling.factor)
    return replace(spec, rope_scaling=replace(spec.rope_scaling, factor=factor))


def named_spec(model: str) -> LlamaSpec:
    """The model that `--model` names. Raises ConfigError, FormatError."""
    file = _model_file(model)
    if file is not None:
        content = read_json(file)
        return spec_from_config(content, file) if "model_type" in content else spec_from_params(file)
    name, slash, size = model.rpartition("/")
    if slash:
        return flavor(name, size)
    known = [n for n in RELEASES if model in RELEASES[n]]
    return flavor(known[0] if known else "llama3", model)


def _model_file(model: str) -> Path | None:
    """The params.json or config.json that `--model` names; None for a flavor. Raises FormatError where it is not there."""
    path = Path(model)
    if path.suffix != ".json" and not path.is_dir():
        return None
    for file in [path] if path.is_file() else [path / CONFIG, path / PARAMS]:
        if file.is_file():
            return file
    raise FormatError(f"`{model}` does not exist, expected a params.json or config.json", path=path)
