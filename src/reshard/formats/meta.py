"""What did Meta release? params.json and consolidated.00.pth to consolidated.NN.pth: one model, cut for NN+1 GPUs.

Each file is a flat dict of the same names. Which tensors are cut, and along which dim, follows from the shapes: Llama 3
cuts the embedding by vocabulary, Llama 1 and 2 by width, and what is not cut (the norms) must be the same everywhere.
Releases for more GPUs than there are KV heads hold every KV head several times (405B in 16 files): the copies are
compared and dropped.
Sources: meta-llama's llama3/llama/model.py; llama-models' checkpoint.py (`reshard_mp`) and sku_list.py.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reshard.errors import ConfigError, FormatError, LayoutError, TensorMismatch, listed
from reshard.formats.dialects import Told, no_output
from reshard.formats.protocol import WEIGHT_DTYPES, Block, Source, StoredTensor, same_bytes
from reshard.formats.torch_pt import PtFile, open_pt
from reshard.model.names import LAYER, META, canonical_names, row_of
from reshard.model.spec import (
    LlamaSpec,
    ffn_dim_from_params,
    parameter_shapes,
    release_is_tied,
    scaling_of_release,
)

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

PARAMS = "params.json"
_SHARD = re.compile(r"consolidated\.(\d\d)\.pth", re.ASCII)
_EMBEDDING, _NORM, _OUTPUT = "tok_embeddings.weight", "norm.weight", "output.weight"
_WQ, _WK, _WV, _W1 = (
    f"layers.0.{w}.weight" for w in ("attention.wq", "attention.wk", "attention.wv", "feed_forward.w1")
)

# Fields of params.json: those that decide the arithmetic, and those that only sized somebody's buffers.
_USED = {
    "dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "vocab_size", "ffn_dim_multiplier", "multiple_of",
    "norm_eps", "rope_theta", "use_scaled_rope",
}  # fmt: skip
_WITHOUT_EFFECT = {"max_seq_len", "max_batch_size", "model_parallel_size"}


def open_meta(path: Path | str, model: Told | None = None) -> Source:
    """Which model lies in a Meta directory? `path` holds params.json and the shards, or has them in `original/`.

    model: whether it is tied, where the files have no output: params.json cannot say it. Meta's own files have one.
    Reads every file's index, the norms, and the start of the KV heads. The tensors keep the files' dtypes.
    Raises FormatError or TensorMismatch naming the file or tensor: no params.json, a shard missing, extra or of another
    release, shapes against params.json, tensors that should be equal in all files and are not, unknown names, quantised
    weights.
    """
    path = Path(path)
    directory = _directory(path)
    params = _read_params(directory / PARAMS)
    shards = [open_pt(file) for file in _shard_files(directory)]
    parts = [_named(shard, params["n_layers"]) for shard in shards]
    _check_alike(shards, parts)
    _check_count(shards, parts, params)
    spec, repeats = _spec(shards, parts, params, directory / PARAMS)
    tensors = _whole(shards, parts, spec, repeats)
    output = tensors.get(_OUTPUT)
    if output is None and not (model.spec.tied if model and model.says_tie else release_is_tied(spec)):
        raise no_output(directory)
    if output is None or same_bytes(tensors[_EMBEDDING], output):
        spec = replace(spec, tied=True)
    provenance = {
        "kind": "import",
        "format": "meta",
        "path": _folder_name(path),
        "files": [{"name": shard.path.name, "bytes": shard.nbytes} for shard in shards],
        "params": params,
    }
    tokenizer = next((p for p in (directory, directory.parent) if (p / "tokenizer.model").is_file()), None)
    assets = {} if tokenizer is None else {"tokenizer.model": tokenizer / "tokenizer.model"}
    return Source(directory, spec, tensors, provenance, assets)


# -- the directory


def _directory(path: Path) -> Path:
    for candidate in (path, path / "original"):
        if (candidate / PARAMS).is_file():
            return candidate
    if not path.is_dir():
        raise FormatError(f"{path} is not a directory, expected one with {PARAMS} and consolidated.NN.pth", path=path)
    found = sorted(p.parent for base in (path, path / "original") for p in base.glob(f"*/{PARAMS}"))
    if found:
        hint = f"it has subfolders with one each; name the one you mean: {listed([str(p) for p in found])}"
    elif (path / "config.json").is_file():
        hint = "it looks like a Hugging Face directory, this reads Meta's original files"
    else:
        hint = f"{PARAMS} comes with the download and says the model's heads, RoPE and epsilon"
    raise FormatError(f"{path} has no {PARAMS}, neither in itself nor in original/", path=path, hint=hint)


def _shard_files(directory: Path) -> list[Path]:
    """consolidated.00.pth to consolidated.NN.pth, without a hole. Files of other names are not ours to judge."""
    if scales := sorted(p.name for p in directory.glob("fp8_scales*")):
        raise FormatError(
            f"{directory} is an fp8 release ({scales[0]}): quantised weights cannot be kept",
            path=directory,
            hint="use the bf16 release of the same model (bf16-mp8 or bf16-mp16)",
        )
    candidates = sorted(p for p in directory.glob("consolidated*.pth*") if p.is_file())
    strange = [p.name for p in candidates if not _SHARD.fullmatch(p.name)]
    if strange:
        raise FormatError(
            f"{directory} has {listed(strange)}, expected consolidated.00.pth, consolidated.01.pth, ... only",
            path=directory / strange[0],
            hint="finish the download, or move files of another model away",
        )
    if not candidates:
        raise FormatError(
            f"{directory} has {PARAMS}, but no consolidated.00.pth", path=directory, hint="download the weights"
        )
    numbers = [int(p.name[13:15]) for p in candidates]
    missing = sorted(set(range(max(numbers) + 1)) - set(numbers))
    if missing:
        raise FormatError(
            f"{directory} lacks {listed(map(shard_name, missing))}: expected the shards 00 to {max(numbers):02d} without "
            f"a hole, got {len(numbers)} of them",
            path=directory / shard_name(missing[0]),
            hint="download the missing file",
        )
    return candidates


def shard_name(number: int) -> str:
    """What is file number i called?"""
    return f"consolidated.{number:02d}.pth"


def _folder_name(path: Path) -> str:
    """The folder's own name, without the way to it: manifests travel."""
    resolved = path.resolve()
    return f"{resolved.parent.name}/{resolved.name}" if resolved.name == "original" else resolved.name


def _read_params(file: Path) -> dict[str, Any]:
    """params.json, checked for type; Code Llama's nests its fields under "model"."""
    try:
        params = json.loads(file.read_text(encoding="utf-8"))
    except OSError as e:
        raise FormatError(f"{file} cannot be read: {e.strerror}", path=file) from None
    except ValueError as e:
        raise FormatError(f"{file} is not JSON: {e}", path=file) from None
    if isinstance(params, dict) and isinstance(params.get("model"), dict):
        params = params["model"]
    if not isinstance(params, dict):
        raise FormatError(
            f"{file} holds a {type(params).__name__}, expected an object with dim, n_layers, ...", path=file
        )
    params = {key: value for key, value in params.items() if value is not None}
    unknown = sorted(set(params) - _USED - _WITHOUT_EFFECT)
    if unknown:
        quantised = [key for key in unknown if "quant" in key or "lora" in key]
        raise FormatError(
            f"{file} has {listed(unknown)}, which no plain Llama has",
            path=file,
            hint="quantised and adapter releases cannot be converted, use the bf16 one"
            if quantised
            else "the model may be of another kind; a key that changes no arithmetic may be taken out of the file",
        )
    for key in ("dim", "n_layers", "n_heads"):
        if key not in params:
            raise FormatError(f"{file} does not say {key}", path=file)
    for key in ("dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "multiple_of"):
        if key in params and not (type(params[key]) is int and 0 < params[key] < 2**31):
            raise FormatError(f"{file}: {key} is {params[key]!r}, expected a positive whole number", path=file)
    if "head_dim" not in params and params["dim"] % params["n_heads"]:
        raise FormatError(f"{file}: dim {params['dim']} does not divide into n_heads {params['n_heads']}", path=file)
    for key in ("ffn_dim_multiplier", "norm_eps", "rope_theta"):
        if key in params and not (type(params[key]) in (int, float) and 0 < params[key] < float("inf")):
            raise FormatError(f"{file}: {key} is {params[key]!r}, expected a positive number", path=file)
    if type(params.get("vocab_size", -1)) is not int:
        raise FormatError(f"{file}: vocab_size is {params['vocab_size']!r}, expected a whole number", path=file)
    if type(params.get("use_scaled_rope", False)) is not bool:
        raise FormatError(
            f"{file}: use_scaled_rope is {params['use_scaled_rope']!r}, expected true or false", path=file
        )
    return params


def spec_from_params(file: Path) -> LlamaSpec:
    """The model that a params.json describes without its files, untied. Raises FormatError where it does not say enough."""
    params = _read_params(file)
    if params.get("vocab_size", -1) <= 0 or "multiple_of" not in params:
        lacking = "vocab_size" if params.get("vocab_size", -1) <= 0 else "multiple_of"
        raise FormatError(
            f"{file} does not say {lacking}, and there are no files of Meta's beside it that would",
            path=file,
            hint="--model with a config.json, or a flavor",
        )
    ffn_dim = ffn_dim_from_params(params["dim"], params.get("ffn_dim_multiplier"), params["multiple_of"])
    return _spec_of(params, file, params.get("n_kv_heads", params["n_heads"]), ffn_dim, params["vocab_size"])


# -- the files against each other and against params.json


def _named(shard: PtFile, n_layers: int) -> dict[str, StoredTensor]:
    """The weights of one file under their canonical names, all of them and no others."""
    quantised = {name: t.dtype for name, t in shard.tensors.items() if t.dtype not in WEIGHT_DTYPES}
    if quantised:
        name, dtype = next(iter(quantised.items()))
        raise FormatError(
            f"{shard.path}: {name} is {dtype}, expected one of {', '.join(WEIGHT_DTYPES)}: quantised weights cannot be "
            "kept",
            path=shard.path,
            hint="use the bf16 release of the same model",
        )
    names = canonical_names([*shard.tensors, *shard.others], META, path=shard.path)
    part = {canonical: shard.tensors[name] for name, canonical in names.items() if name in shard.tensors}
    layers = sum(row_of(name) == row_of(_WQ) for name in part)
    expected = _all_names(min(n_layers, layers + 1))  # params.json may say a number that no list could hold
    missing = [name for name in expected if name not in part and name != _OUTPUT]
    unexpected = sorted(set(part) - set(expected))
    wrong = {
        name: (f"{_n_dims(name)} dims", str(list(part[name].shape)))
        for name in expected
        if name in part and len(part[name].shape) != _n_dims(name)
    }
    if missing or unexpected or wrong:
        raise TensorMismatch(
            f"{shard.path} has not the tensors of the {n_layers} layers that {PARAMS} says",
            path=shard.path,
            missing=missing,
            unexpected=unexpected,
            wrong=wrong,
        )
    return part


def _n_dims(name: str) -> int:
    return 1 if name.endswith("norm.weight") else 2


def _all_names(n_layers: int) -> list[str]:
    per_layer = [row for row in META.names if LAYER in row]
    return [
        *(row for row in META.names if LAYER not in row),
        *(row.replace(LAYER, str(i)) for i in range(n_layers) for row in per_layer),
    ]


def _check_alike(shards: Sequence[PtFile], parts: Sequence[Mapping[str, StoredTensor]]) -> None:
    """Every file has the same names, each in one shape and dtype; else they are not of one release."""
    first = parts[0]
    for shard, part in zip(shards[1:], parts[1:], strict=True):
        missing, unexpected = sorted(set(first) - set(part)), sorted(set(part) - set(first))
        wrong = {
            name: (_described(first[name]), _described(part[name]))
            for name in first
            if name in part and (first[name].shape, first[name].dtype) != (part[name].shape, part[name].dtype)
        }
        if missing or unexpected or wrong:
            raise TensorMismatch(
                f"{shard.path} does not fit {shards[0].path.name}",
                path=shard.path,
                missing=missing,
                unexpected=unexpected,
                wrong=wrong,
                hint="do not mix the files of two releases in one folder (as 405B's mp8 and mp16)",
            )


def _described(tensor: StoredTensor) -> str:
    return f"{list(tensor.shape)} {tensor.dtype}"


def _check_count(
    shards: Sequence[PtFile], parts: Sequence[Mapping[str, StoredTensor]], params: Mapping[str, Any]
) -> None:
    """Are these all the files? The rows of wq say how many there were."""
    directory, got = shards[0].path.parent, len(shards)
    if parts[0][_NORM].shape != (params["dim"],):
        raise TensorMismatch(
            f"{shards[0].path} is of another width than {PARAMS} says",
            path=shards[0].path,
            wrong={_NORM: (str([params["dim"]]), str(list(parts[0][_NORM].shape)))},
        )
    part = parts[0][_WQ].shape[0]
    rows, expected = _parts_of_wq(params, part)
    if expected is None:
        return  # not a matter of their number: the check of the shapes says it
    if got < expected:
        missing = [shard_name(i) for i in range(got, expected)]
        raise FormatError(
            f"{directory} lacks {listed(missing)}: {_WQ} has {part} of {rows} rows in each file, so there were "
            f"{expected} files, got {got}",
            path=directory / missing[0],
            hint="download the missing file",
        )
    if got > expected:
        extra = [shard_name(i) for i in range(expected, got)]
        raise FormatError(
            f"{directory} has {listed(extra)} too many: {_WQ} has {part} of {rows} rows in each file, so there were "
            f"{expected} files, got {got}",
            path=directory / extra[0],
            hint="move the files of another model away",
        )


def _parts_of_wq(params: Mapping[str, Any], part: int) -> tuple[int, int | None]:
    """Rows of wq, and into how many files they were cut, `part` to each; None where they do not divide so."""
    rows = params["n_heads"] * params.get("head_dim", params["dim"] // params["n_heads"])
    return rows, rows // part if part and rows % part == 0 else None


def files_wanted(params: Path, shapes: Mapping[str, tuple[int, ...]]) -> int | None:
    """How many consolidated.NN.pth were there, by params.json and the shapes in one? None where they do not say.

    Raises FormatError as for a params.json that cannot be read.
    """
    shape = shapes.get(_WQ, ())
    return _parts_of_wq(_read_params(params), shape[0])[1] if shape else None


def _spec(
    shards: Sequence[PtFile], parts: Sequence[Mapping[str, StoredTensor]], params: Mapping[str, Any], file: Path
) -> tuple[LlamaSpec, int]:
    """The model that params.json and the shapes agree on, tied or not; and how often each KV head is stored."""
    first, count = parts[0], len(parts)
    head_dim = params.get("head_dim", params["dim"] // params["n_heads"])
    n_kv_heads, repeats = _kv_heads(shards, parts, params.get("n_kv_heads", params["n_heads"]), head_dim, file)
    vocab_size = params.get("vocab_size", -1)
    if vocab_size <= 0:  # Llama 1 and 2 leave it to the tokenizer; the output is always cut by vocabulary
        by_output = first.get(_OUTPUT)
        by_vocabulary = by_output is not None or first[_EMBEDDING].shape[-1] == params["dim"]
        vocab_size = (by_output or first[_EMBEDDING]).shape[0] * (count if by_vocabulary else 1)
    spec = _spec_of(params, file, n_kv_heads, first[_W1].shape[0] * count, vocab_size)
    if "multiple_of" in params:
        formula = ffn_dim_from_params(spec.dim, params.get("ffn_dim_multiplier"), params["multiple_of"])
        if formula != spec.ffn_dim:
            raise FormatError(
                f"{_W1} has {spec.ffn_dim} rows in {count} file{'s' * (count > 1)}, {file} means {formula} "
                f"(dim {spec.dim}, ffn_dim_multiplier {params.get('ffn_dim_multiplier')}, "
                f"multiple_of {params['multiple_of']})",
                path=file,
            )
    return spec, repeats


def _spec_of(params: Mapping[str, Any], file: Path, n_kv_heads: int, ffn_dim: int, vocab_size: int) -> LlamaSpec:
    try:
        return LlamaSpec(
            dim=params["dim"],
            n_layers=params["n_layers"],
            n_heads=params["n_heads"],
            n_kv_heads=n_kv_heads,
            ffn_dim=ffn_dim,
            vocab_size=vocab_size,
            head_dim=params.get("head_dim", 0),
            rope_theta=float(params.get("rope_theta", 10000.0)),  # absent in Llama 1 and 2
            norm_eps=float(params.get("norm_eps", 1e-5)),
            rope_scaling=scaling_of_release(params["dim"]) if params.get("use_scaled_rope") else None,
        )
    except LayoutError as e:
        raise FormatError(f"{file}: {e.message}", path=file) from None


def _kv_heads(
    shards: Sequence[PtFile],
    parts: Sequence[Mapping[str, StoredTensor]],
    announced: int,
    head_dim: int,
    file: Path,
) -> tuple[int, int]:
    """How many KV heads are there, and in how many files does each lie?

    A release for more GPUs than KV heads puts one head into each file, and copies of it into its neighbours; its
    params.json may count the heads or the copies. Copies are believed after comparing all of them, in every layer.
    """
    count = len(parts)
    stored = parts[0][_WK].shape[0] * count // head_dim if head_dim else 0
    if count == 1 or parts[0][_WK].shape[0] != head_dim:
        return announced, 1
    copies = 1
    while copies < count and all(same_bytes(parts[0][name], parts[copies][name]) for name in (_WK, _WV)):
        copies += 1
    if copies == 1:
        if announced < stored:
            raise FormatError(
                f"{shards[0].path.parent} holds {stored} KV heads in {count} files, {file.name} says {announced}, but "
                f"the heads in {shards[0].path.name} and {shards[1].path.name} are not copies of one",
                path=shards[0].path,
            )
        return announced, 1
    if count % copies or announced not in (stored, stored // copies):
        raise FormatError(
            f"{shards[0].path.parent}: the first {copies} of {count} files hold the same KV head, which fits no "
            f"{announced} KV heads as {file.name} says",
            path=shards[0].path,
        )
    log.info("every KV head lies in %d of the %d files: comparing the copies, keeping one", copies, count)
    for name in parts[0]:
        if row_of(name) in (row_of(_WK), row_of(_WV)):
            for i in range(count):
                kept = i - i % copies
                if not same_bytes(parts[kept][name], parts[i][name]):
                    raise _not_equal(name, shards[kept], shards[i], "copies of one KV head")
    return stored // copies, copies


def _not_equal(name: str, left: PtFile, right: PtFile, what: str) -> FormatError:
    return FormatError(
        f"{name} differs between {left.path} and {right.path.name}, expected {what}",
        path=right.path,
        hint="one of the two files is damaged, or of another release",
    )


def _whole(
    shards: Sequence[PtFile], parts: Sequence[Mapping[str, StoredTensor]], spec: LlamaSpec, repeats: int
) -> dict[str, StoredTensor]:
    """Canonical name -> the whole tensor, its blocks in all the files."""
    tensors: dict[str, StoredTensor] = {}
    wrong: dict[str, tuple[str, str]] = {}
    for name, shape in parameter_shapes(spec).items():
        if name not in parts[0]:
            continue
        is_kv = row_of(name) in (row_of(_WK), row_of(_WV))
        chosen = range(0, len(parts), repeats if is_kv else 1)
        part = parts[0][name]
        dim = _cut_dim(part.shape, shape, len(chosen))
        if dim is None:
            wrong[name] = (
                f"{list(shape)} in {len(chosen)} file{'s' * (len(chosen) > 1)}",
                f"{list(part.shape)} in each",
            )
            continue
        if dim < 0:
            for i in range(1, len(parts)):
                if not same_bytes(part, parts[i][name]):
                    raise _not_equal(name, shards[0], shards[i], "the same numbers in every file")
            chosen = range(1)
        blocks = tuple(_moved(parts[i][name].blocks[0], order, dim) for order, i in enumerate(chosen))
        tensors[name] = StoredTensor(name, shape, part.dtype, blocks)
    if wrong:
        raise TensorMismatch(f"{shards[0].path.parent}: shapes do not fit {PARAMS}", path=shards[0].path, wrong=wrong)
    return tensors


def _cut_dim(part: tuple[int, ...], whole: tuple[int, ...], count: int) -> int | None:
    """Along which dim is a tensor cut into `count` parts? -1: not at all, None: the shapes do not fit."""
    if part == whole:
        return -1
    if len(part) != len(whole):
        return None
    cut = [i for i in range(len(whole)) if part[i] != whole[i]]
    return cut[0] if len(cut) == 1 and cut[0] <= 1 and part[cut[0]] * count == whole[cut[0]] else None


def _moved(block: Block, order: int, dim: int) -> Block:
    """The block of part number `order`, at its place in the whole."""
    if dim < 0:
        return block
    if dim == 0:
        return replace(block, row=order * block.rows)
    return replace(block, column=order * block.width)


# -- writing

# Along which dim does Meta cut? Everything else is in every file.
_CUT_DIM = {
    row: 1 if row.endswith((".wo.weight", ".w2.weight")) else 0 for row in META.names if not row.endswith("norm.weight")
}


def cut_dim(name: str) -> int | None:
    """Along which dim do Llama 3's files cut this tensor? None: it is whole in all of them."""
    return _CUT_DIM.get(row_of(name))


def write_meta(
    directory: Path | str,
    state_dict: Mapping[str, torch.Tensor],
    spec: LlamaSpec,
    shards: int = 1,
    *,
    embedding_dim: int = 0,
) -> None:
    """Write a model as Meta does: params.json and `shards` files, made whole before they appear.

    state_dict: canonical names; a tied model's output.weight is written as a second name of the embedding.
    shards: more than KV heads is allowed, every head is then written several times, as Meta's 405B in 16 files.
    embedding_dim: 0 as Llama 3 cuts the embedding, 1 as Llama 1 and 2 did.
    Holds one shard in memory. Raises FormatError where the directory is not empty, TensorMismatch where the tensors are
    not the spec's, LayoutError where they do not divide, ConfigError for a RoPE factor that params.json cannot say.
    """
    import torch

    directory = Path(directory)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise FormatError(f"{directory} exists and is not an empty directory", path=directory, hint="name another one")
    _check_state_dict(state_dict, spec, directory)
    if spec.n_kv_heads % shards and shards % spec.n_kv_heads:
        raise LayoutError(f"{spec.n_kv_heads} KV heads cannot be cut into {shards} files")
    params = params_of(spec, shards)
    temporary = directory.with_name(f"{directory.name}.tmp-{uuid.uuid4().hex[:8]}")
    temporary.mkdir(parents=True)
    try:
        for i in range(shards):
            part = {
                name: _cut(name, state_dict[name], (i, shards), spec.n_kv_heads, embedding_dim)
                for name in parameter_shapes(spec)
            }
            if spec.tied:  # as released: two names of one storage, where both are cut alike
                whole = state_dict[_EMBEDDING]
                part[_OUTPUT] = part[_EMBEDDING] if embedding_dim == 0 else _cut(_OUTPUT, whole, (i, shards), 0, 0)
            with (temporary / shard_name(i)).open("wb") as stream:
                torch.save(part, stream)
                _flush(stream)
        with (temporary / PARAMS).open("w", encoding="utf-8") as text:
            json.dump(params, text, indent=1)
            _flush(text)
        temporary.replace(directory)  # an empty directory in its place is replaced
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _flush(stream: Any) -> None:
    stream.flush()
    os.fsync(stream.fileno())


def _check_state_dict(state_dict: Mapping[str, torch.Tensor], spec: LlamaSpec, directory: Path) -> None:
    shapes = parameter_shapes(spec)
    known = {*shapes, _OUTPUT}
    wrong = {
        name: (str(list(shape)), str(list(state_dict[name].shape)))
        for name, shape in shapes.items()
        if name in state_dict and tuple(state_dict[name].shape) != shape
    }
    missing = [name for name in shapes if name not in state_dict]
    unexpected = sorted(set(state_dict) - known)
    if missing or unexpected or wrong:
        raise TensorMismatch(
            "the tensors are not those of the model",
            path=directory,
            missing=missing,
            unexpected=unexpected,
            wrong=wrong,
        )


def _cut(name: str, tensor: torch.Tensor, part: tuple[int, int], n_kv_heads: int, embedding_dim: int) -> torch.Tensor:
    """Part (index, of how many) of a tensor, in a storage of its own."""
    row, (index, shards) = row_of(name), part
    dim = embedding_dim if name == _EMBEDDING else _CUT_DIM.get(row)
    if dim is None:
        return tensor.clone()
    if row in (row_of(_WK), row_of(_WV)) and shards > n_kv_heads:
        index, shards = index * n_kv_heads // shards, n_kv_heads
    if tensor.shape[dim] % shards:
        raise LayoutError(f"{name} {list(tensor.shape)} cannot be cut into {shards} files along dim {dim}")
    extent = tensor.shape[dim] // shards
    return tensor.narrow(dim, index * extent, extent).contiguous().clone()


def params_of(spec: LlamaSpec, shards: int = 1) -> dict[str, Any]:
    """What params.json says of a model, in Meta's fields.

    n_kv_heads counts the copies where there are more files than heads, as in the release of 405B in 16 files.
    Raises ConfigError for a RoPE scaling that is not the release's: the file has no field for its factor.
    """
    if spec.rope_scaling is not None and spec.rope_scaling != scaling_of_release(spec.dim):
        raise ConfigError(
            f"params.json cannot say {spec.rope_scaling}, readers assume {scaling_of_release(spec.dim)} for dim {spec.dim}"
        )
    if spec.head_dim * spec.n_heads != spec.dim:
        raise ConfigError(
            f"params.json cannot say a head_dim of {spec.head_dim}, readers assume {spec.dim // spec.n_heads}"
        )
    multiplier, multiple_of = _ffn_params(spec.dim, spec.ffn_dim)
    params: dict[str, Any] = {
        "dim": spec.dim,
        "n_layers": spec.n_layers,
        "n_heads": spec.n_heads,
        "n_kv_heads": max(spec.n_kv_heads, shards),
        "vocab_size": spec.vocab_size,
        "ffn_dim_multiplier": multiplier,
        "multiple_of": multiple_of,
        "norm_eps": spec.norm_eps,
        "rope_theta": spec.rope_theta,
        "use_scaled_rope": True if spec.rope_scaling is not None else None,
    }
    return {key: value for key, value in params.items() if value is not None}


def _ffn_params(dim: int, ffn_dim: int) -> tuple[float | None, int]:
    """ffn_dim_multiplier and multiple_of that mean `ffn_dim`, round ones where there are."""
    for multiple_of in (4096, 1024, 256, 64, 32, 16, 8):
        for multiplier in (None, 1.0, 1.1, 1.2, 1.3, 1.4, 1.5):
            if ffn_dim_from_params(dim, multiplier, multiple_of) == ffn_dim:
                return multiplier, multiple_of
    hidden = int(2 * (4 * dim) / 3)
    multiplier = ceil(ffn_dim / hidden * 1e6) / 1e6  # a hair above, so that int() does not fall below
    if ffn_dim_from_params(dim, multiplier, 1) == ffn_dim:
        return multiplier, 1
    raise ConfigError(f"no ffn_dim_multiplier means a feed-forward of {ffn_dim} for dim {dim}")
