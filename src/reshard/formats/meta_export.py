"""How is a model cut into Meta's files without holding it? Each row is read once, and goes to every file that has a part.

The rules of the cutting are meta.py's; here they become places in files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from reshard.errors import LayoutError
from reshard.formats.cast import cast
from reshard.formats.dialects import EMBEDDING, OUTPUT
from reshard.formats.meta import PARAMS, cut_dim, params_of, shard_name
from reshard.formats.output import Copy, OutFile, Output, Place
from reshard.formats.protocol import ITEM_BYTES, LazyTensor, Source
from reshard.formats.torch_save import Saved, lay_out
from reshard.model.names import row_of
from reshard.model.spec import LlamaSpec, parameter_shapes

_KV = ("layers.LAYER.attention.wk.weight", "layers.LAYER.attention.wv.weight")


def plan_meta(
    source: Source,
    spec: LlamaSpec,
    *,
    shards: int = 1,
    dtype: str | None = None,
    assets: Mapping[str, Path | bytes] | None = None,
) -> Output:
    """params.json, `shards` files and the tokenizer. More files than KV heads hold every head several times.

    Raises LayoutError where the model does not divide, ConfigError for what params.json cannot say.
    """
    if not 1 <= shards <= 100:
        raise LayoutError(f"{shards} files, expected 1 to 100")
    if spec.n_kv_heads % shards and shards % spec.n_kv_heads:
        raise LayoutError(f"{spec.n_kv_heads} KV heads cannot be cut into {shards} files")
    params = params_of(spec, shards)
    tensors = {name: cast(source.tensors[name], dtype) for name in parameter_shapes(spec)}
    saved = [
        Saved(name, shape := _part_shape(name, tensor, spec, shards), tensor.dtype, _bytes(shape, tensor.dtype), name)
        for name, tensor in tensors.items()
    ]
    if spec.tied:  # as released: two names of one storage
        embedding = saved[0]
        saved.append(Saved(OUTPUT, embedding.shape, embedding.dtype, embedding.nbytes, EMBEDDING))
    files: list[OutFile] = []
    places: dict[str, list[Place]] = {name: [] for name in tensors}
    for i in range(shards):
        file, offsets = lay_out(shard_name(i), saved, root="consolidated")
        files.append(file)
        for name, tensor in tensors.items():
            places[name].append(_place(shard_name(i), offsets[name], name, tensor, spec, (i, shards)))
    copies = tuple(Copy(tensor, tuple(places[name])) for name, tensor in tensors.items())
    assets = source.assets if assets is None else assets
    kept = {name: content for name, content in assets.items() if name in ("tokenizer.model", "tokenizer.json")}
    beside: dict[str, Path | bytes] = {**kept, PARAMS: json.dumps(params, indent=1).encode()}
    return Output("meta", tuple(files), copies, beside)


def _cuts(name: str, spec: LlamaSpec, shards: int) -> tuple[int | None, int]:
    """Along which dim, and into how many parts?"""
    return cut_dim(name), min(shards, spec.n_kv_heads) if row_of(name) in _KV else shards


def _part_shape(name: str, tensor: LazyTensor, spec: LlamaSpec, shards: int) -> tuple[int, ...]:
    dim, parts = _cuts(name, spec, shards)
    if dim is None:
        return tensor.shape
    if tensor.shape[dim] % parts:
        raise LayoutError(f"{name} {list(tensor.shape)} cannot be cut into {parts} files along dim {dim}")
    return tuple(extent // parts if i == dim else extent for i, extent in enumerate(tensor.shape))


def _bytes(shape: tuple[int, ...], dtype: str) -> int:
    size = ITEM_BYTES[dtype]
    for extent in shape:
        size *= extent
    return size


def _place(file: str, offset: int, name: str, tensor: LazyTensor, spec: LlamaSpec, part: tuple[int, int]) -> Place:
    dim, parts = _cuts(name, spec, part[1])
    index = part[0] * parts // part[1]
    rows, width = tensor.shape[0], tensor.nbytes // tensor.shape[0]
    if dim is None:
        return Place(file, offset, 0, rows, 0, width)
    if dim == 0:
        return Place(file, offset, index * rows // parts, rows // parts, 0, width)
    return Place(file, offset, 0, rows, index * width // parts, width // parts)
