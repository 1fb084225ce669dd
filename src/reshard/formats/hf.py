"""How does Hugging Face lay a Llama out? config.json, safetensors in one file or several, an index, the tokenizer's files.

model.safetensors, or model-00001-of-0000N.safetensors with model.safetensors.index.json; tensors are never split across
files; wq and wk have their rows in another order than ours (see rotary.py); a tied model has no lm_head.
Sources: safetensors' README; transformers' modeling_llama.py and modeling_utils.py.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

from reshard.errors import FormatError, TensorMismatch, listed
from reshard.formats.cast import cast
from reshard.formats.dialects import OUTPUT, canonical_tensors, told
from reshard.formats.hf_config import (
    CONFIG,
    GENERATION,
    as_json,
    config_of,
    generation_config_of,
    read_json,
    spec_from_config,
)
from reshard.formats.output import Copy, OutFile, Output, whole
from reshard.formats.protocol import ITEM_BYTES, LazyTensor, Source, StoredTensor
from reshard.formats.rotary import rotated
from reshard.formats.safetensors import DTYPES, open_safetensors
from reshard.model.names import HUGGING_FACE, foreign_name
from reshard.model.spec import LlamaSpec, parameter_shapes

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DEFAULT_SHARD_BYTES = 5 * 10**9
ASSETS = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja", GENERATION, "original/tokenizer.model",
)  # fmt: skip
_NUMBERED = re.compile(r"model-(\d{5})-of-(\d{5})\.safetensors", re.ASCII)
_NAMES = {torch_name: name for name, torch_name in DTYPES.items()}


# -- reading


def open_hf(path: Path, model: LlamaSpec | None = None) -> Source:
    """Which model lies in a Hugging Face directory, or in one .safetensors file with its config.json beside it?

    model: what it is said to be, for a file without config.json. Reads headers only.
    Raises FormatError, TensorMismatch naming file and tensor.
    """
    directory = path if path.is_dir() else path.parent
    config = read_json(directory / CONFIG) if (directory / CONFIG).is_file() else None
    spec = spec_from_config(config, directory / CONFIG) if config is not None else told(path, model)
    files, found = _stored(path) if path.is_dir() else ([path], open_safetensors(path))
    if config is not None and not spec.tied and foreign_name(OUTPUT, HUGGING_FACE) not in found:
        raise TensorMismatch(
            f"{path} has no lm_head.weight, and {CONFIG} does not say that it is tied to the embedding",
            path=path,
            missing=["lm_head.weight"],
            hint=f'a tied model says "tie_word_embeddings": true in its {CONFIG}',
        )
    tensors, spec = canonical_tensors(found, path, spec)
    return Source(
        path,
        spec,
        tensors,
        {
            "kind": "import",
            "format": "hf",
            "path": path.resolve().name,
            "files": [{"name": file.name, "bytes": file.stat().st_size} for file in files],
        },
        _assets(directory),
        _about(config or {}, directory),
    )


def _stored(directory: Path) -> tuple[list[Path], dict[str, StoredTensor]]:
    """Every file of weights, and every tensor in them, against the index."""
    index = directory / INDEX
    single = directory / SINGLE
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(
            type(name) is str and type(file) is str and Path(file).name == file for name, file in weight_map.items()
        ):
            raise FormatError(f"{index} has no weight_map of names to files", path=index)
        files = sorted(set(weight_map.values()))
        lost = [name for name in files if not (directory / name).is_file()]
        if lost:
            raise FormatError(
                f"{directory} lacks {listed(lost)}, which {INDEX} names",
                path=directory / lost[0],
                hint="download the missing file",
            )
        extra = [
            p.name for p in sorted(directory.glob("*.safetensors")) if p.name not in files and _NUMBERED.match(p.name)
        ]
        if extra:
            raise FormatError(
                f"{directory} has {listed(extra)}, which {INDEX} does not name",
                path=directory / extra[0],
                hint="move the files of another model away",
            )
        found: dict[str, StoredTensor] = {}
        for file in files:
            tensors = open_safetensors(directory / file)
            named = {name for name, where in weight_map.items() if where == file}
            missing, unexpected = sorted(named - set(tensors)), sorted(set(tensors) - named)
            if missing or unexpected:
                raise TensorMismatch(
                    f"{directory / file} does not hold what {INDEX} says",
                    path=directory / file, missing=missing, unexpected=unexpected,
                )  # fmt: skip
            found |= tensors
        return [directory / file for file in files], found
    if single.is_file():
        return [single], open_safetensors(single)
    numbered = sorted(p.name for p in directory.glob("*.safetensors"))
    if numbered:
        raise FormatError(
            f"{directory} has {listed(numbered)}, but no {INDEX} that says which belong together",
            path=index,
            hint=f"download {INDEX}, or name one file",
        )
    other = sorted(p.name for p in directory.glob("pytorch_model*.bin"))
    raise FormatError(
        f"{directory} has no {SINGLE} and no {INDEX}",
        path=directory,
        hint=f"{other[0]} is the older format: name the file itself, if it is the only one"
        if other
        else "download the weights",
    )


def _assets(directory: Path) -> dict[str, Path | bytes]:
    return {Path(name).name: directory / name for name in reversed(ASSETS) if (directory / name).is_file()}


def _about(config: Mapping[str, Any], directory: Path) -> dict[str, Any]:
    about = {key: config[key] for key in ("bos_token_id", "eos_token_id") if config.get(key) is not None}
    if type(config.get("max_position_embeddings")) is int:
        about["context_length"] = config["max_position_embeddings"]
    return about


# -- writing


def plan_hf(
    source: Source,
    spec: LlamaSpec,
    *,
    dtype: str | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    assets: Mapping[str, Path | bytes] | None = None,
) -> Output:
    """A directory that AutoModelForCausalLM opens, and AutoTokenizer where assets hold a tokenizer.

    dtype: to cast to; None keeps each tensor's own. A tensor larger than max_shard_bytes gets a file of its own.
    """
    tensors: list[tuple[str, LazyTensor]] = []
    for name in parameter_shapes(spec):
        tensor = cast(rotated(source.tensors[name], name, spec, "halves"), dtype)
        tensors.append((foreign_name(name, HUGGING_FACE), tensor))
    groups = _groups(tensors, max_shard_bytes)
    files, copies = [], []
    weight_map: dict[str, str] = {}
    for i, group in enumerate(groups):
        name = SINGLE if len(groups) == 1 else f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors"
        file, offsets = lay_out(name, group)
        files.append(file)
        copies += [
            Copy(tensor, (whole(name, offset, tensor),)) for (_, tensor), offset in zip(group, offsets, strict=True)
        ]
        weight_map |= {theirs: name for theirs, _ in group}
    dtypes = [tensor.dtype for _, tensor in tensors]
    config = config_of(spec, max(set(dtypes), key=dtypes.count), source.about)
    beside: dict[str, Path | bytes] = {
        GENERATION: as_json(generation_config_of(spec, source.about)),
        **(source.assets if assets is None else assets),
        CONFIG: as_json(config),
    }
    if len(groups) > 1:
        total = sum(tensor.nbytes for _, tensor in tensors)
        beside[INDEX] = as_json({"metadata": {"total_size": total}, "weight_map": weight_map})
    return Output("hf", tuple(files), tuple(copies), beside)


def _groups(tensors: list[tuple[str, LazyTensor]], most: int) -> list[list[tuple[str, LazyTensor]]]:
    groups: list[list[tuple[str, LazyTensor]]] = [[]]
    size = 0
    for name, tensor in tensors:
        if groups[-1] and size + tensor.nbytes > most:
            groups.append([])
            size = 0
        groups[-1].append((name, tensor))
        size += tensor.nbytes
    return groups


def lay_out(file: str, tensors: list[tuple[str, LazyTensor]]) -> tuple[OutFile, list[int]]:
    """A safetensors file without its numbers, and where each tensor's go."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # without it transformers 4 refuses the file
    offsets, at = [], 0
    for name, tensor in tensors:
        nbytes = prod(tensor.shape) * ITEM_BYTES[tensor.dtype]
        header[name] = {
            "dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, at + nbytes]
        }  # fmt: skip
        offsets.append(at)
        at += nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = struct.pack("<Q", len(text)) + text
    return OutFile(file, len(start) + at, ((0, start),)), [len(start) + offset for offset in offsets]
