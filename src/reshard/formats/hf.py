"""How does Hugging Face lay a Llama out? config.json, safetensors in one file or several, an index, the tokenizer's files.

model.safetensors, or model-00001-of-0000N.safetensors with model.safetensors.index.json; tensors are never split across
files; wq and wk have their rows in another order than ours (see rotary.py); a tied model has no lm_head.
Sources: safetensors' README; transformers' modeling_llama.py and modeling_utils.py.
"""

from __future__ import annotations

import json
import logging
import re
import struct
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

from reshard.errors import FormatError, TensorMismatch, listed
from reshard.formats.cast import cast
from reshard.formats.dialects import OUTPUT, Told, canonical_tensors, no_output, told
from reshard.formats.hf_config import (
    CONFIG,
    GENERATION,
    TOKEN_IDS,
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

log = logging.getLogger(__name__)

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
BIN, BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
DEFAULT_SHARD_BYTES = 5 * 10**9
ASSETS = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja", GENERATION, "original/tokenizer.model",
)  # fmt: skip
_ADAPTER = "adapter_config.json"
_SLOW_TOKENIZER = ("vocab.json", "merges.txt", "spiece.model")  # what older tokenizers have in place of tokenizer.json
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin", "consolidated*.pth", "*.gguf")
_NUMBERED = re.compile(r"model-(\d{5})-of-(\d{5})\.safetensors", re.ASCII)
_NAMES = {torch_name: name for name, torch_name in DTYPES.items()}


# -- reading


def open_hf(path: Path, model: Told | None = None) -> Source:
    """Which model lies in a Hugging Face directory, or in one .safetensors file with its config.json beside it?

    model: what it is said to be, for a file without config.json. Reads headers only. Of several models in a directory
    the one is taken that transformers takes. Raises FormatError, TensorMismatch naming file and tensor.
    """
    directory = path if path.is_dir() else path.parent
    config = read_json(directory / CONFIG) if (directory / CONFIG).is_file() else None
    refuse_adapter(path)
    said = Told(spec_from_config(config, directory / CONFIG)) if config is not None else told(path, model)
    files, found = _stored(path) if path.is_dir() else ([path], open_safetensors(path))
    if config is not None and not said.spec.tied and foreign_name(OUTPUT, HUGGING_FACE) not in found:
        raise _no_head(path, config)
    tensors, spec = canonical_tensors(found, path, said)
    if path.is_dir():
        say_others(path, [file.name for file in files])
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
        assets_beside(directory),
        about_of(config or {}),
        tokenizer_problem(directory),
    )


def refuse_adapter(path: Path) -> None:
    """transformers puts an adapter on top of the model beside it: the model alone would be another one."""
    if path.is_dir() and (path / _ADAPTER).is_file():
        whole = next((path / name for name in (SINGLE, BIN) if (path / name).is_file()), None)
        raise FormatError(
            f"{path} holds an adapter (LoRA or the like; {_ADAPTER}), which is no model of its own",
            path=path / _ADAPTER,
            hint="merge it into its base with peft's merge_and_unload() and save_pretrained()"
            + (f"; for the model without the adapter, name the file: {whole}" if whole else ""),
        )


def _no_head(path: Path, config: Mapping[str, Any]) -> TensorMismatch:
    kinds = config.get("architectures")
    why, hint = f" in {CONFIG}", f'a tied model says "tie_word_embeddings": true in its {CONFIG}'
    if isinstance(kinds, list) and kinds and "LlamaForCausalLM" not in kinds:
        why = f": its {CONFIG} says architectures {listed(map(str, kinds))}, which is no LlamaForCausalLM"
        hint = "this model has no output projection for text; use the LlamaForCausalLM that it was made from"
    return no_output(path, foreign_name(OUTPUT, HUGGING_FACE), why=why, hint=hint)


def is_complete(directory: Path) -> bool:
    """Is there a config.json with a whole file of weights, or with an index and all files that it names?"""
    if not (directory / CONFIG).is_file() or (directory / SINGLE).is_file():
        return (directory / CONFIG).is_file()
    if not (directory / INDEX).is_file():
        return False
    files = read_json(directory / INDEX).get("weight_map")
    return isinstance(files, dict) and all((directory / str(file)).is_file() for file in set(map(str, files.values())))


def say_others(directory: Path, taken: Sequence[str]) -> None:
    """One line where a folder holds other weights beside those that are read."""
    found = {file.name for pattern in _WEIGHTS for file in directory.glob(pattern)}
    if left := sorted(found - set(taken)):
        log.warning("%s: reading %s, as transformers does; it also has %s", directory, listed(taken), listed(left))


def _stored(directory: Path) -> tuple[list[Path], dict[str, StoredTensor]]:
    """Every file of weights, and every tensor in them, against the index."""
    index = directory / INDEX
    single = directory / SINGLE
    if index.is_file() and not (single.is_file() and _names_others(index)):
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
    if (directory / BIN_INDEX).is_file():
        raise FormatError(
            f"{directory} has its weights in several files of the older format ({BIN_INDEX}), which cannot be read yet",
            path=directory / BIN_INDEX,
            hint="save it again with transformers: from_pretrained(...).save_pretrained(...), which writes safetensors",
        )
    raise FormatError(f"{directory} has no {SINGLE} and no {INDEX}", path=directory, hint="download the weights")


def _names_others(index: Path) -> bool:
    """Does the index belong to other files than model.safetensors? Of both, transformers takes the one file."""
    weight_map = read_json(index).get("weight_map")
    return not isinstance(weight_map, dict) or set(map(str, weight_map.values())) != {SINGLE}


def assets_beside(directory: Path) -> dict[str, Path | bytes]:
    """The tokenizer's files, and generation_config.json."""
    return {Path(name).name: directory / name for name in reversed(ASSETS) if (directory / name).is_file()}


def about_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a config.json says beside the arithmetic."""
    about = {key: config[key] for key in TOKEN_IDS if config.get(key) is not None}
    if type(config.get("max_position_embeddings")) is int:
        about["context_length"] = config["max_position_embeddings"]
    return about


def tokenizer_problem(directory: Path) -> str:
    """Which part of the tokenizer lies in files that are not handed on?"""
    slow = [name for name in _SLOW_TOKENIZER if (directory / name).is_file()]
    if slow and not any((directory / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        return f"{directory}: its tokenizer is {listed(slow)}, without a tokenizer.json"
    if list(directory.glob("additional_chat_templates/*.jinja")):
        return f"{directory}: it has additional_chat_templates, which are not handed on yet"
    return ""


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
