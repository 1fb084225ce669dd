"""How does llama.cpp want a Llama? One GGUF file: sizes as key-values, the tokenizer, the tensors.

Rows of wq and wk lie as in Meta's files. Norms are always float32. Llama 3.1's stretched RoPE is a tensor of its own,
rope_freqs.weight: what each frequency is divided by. A tied model has no output.weight.
Quantised files can be read, to float32, with the `gguf` library. Source: llama.cpp's conversion/llama.py; ggml's gguf.md.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import pi, prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reshard.errors import FormatError, LayoutError, TensorMismatch, listed
from reshard.formats.cast import cast, restored
from reshard.formats.dialects import OUTPUT, Told, check_shapes
from reshard.formats.gguf_file import PLAIN, GgufFile, Info, lay_out, read_gguf
from reshard.formats.gguf_tokenizer import read_tokenizer, tokenizer_values
from reshard.formats.hf_config import context_length
from reshard.formats.output import Copy, Output, whole
from reshard.formats.protocol import ITEM_BYTES, Block, LazyTensor, Ledger, Region, Source, StoredTensor
from reshard.model.names import Dialect, canonical_names, foreign_name
from reshard.model.spec import LlamaSpec, RopeScaling, parameter_shapes

log = logging.getLogger(__name__)

ROPE_FREQS = "rope_freqs.weight"
_SCALING_KEYS = "reshard.rope_scaling."
# With "blk." spelled "layers.", where a layer's number is looked for.
GGUF = Dialect(
    "GGUF",
    {
        "token_embd.weight": "tok_embeddings.weight",
        "output_norm.weight": "norm.weight",
        "output.weight": "output.weight",
        **{
            f"layers.LAYER.{theirs}.weight": f"layers.LAYER.{ours}.weight"
            for theirs, ours in {
                "attn_norm": "attention_norm", "attn_q": "attention.wq", "attn_k": "attention.wk",
                "attn_v": "attention.wv", "attn_output": "attention.wo", "ffn_norm": "ffn_norm",
                "ffn_gate": "feed_forward.w1", "ffn_down": "feed_forward.w2", "ffn_up": "feed_forward.w3",
            }.items()
        },
    },
    frozenset({ROPE_FREQS}),
)  # fmt: skip
_FILE_TYPES = {"float32": 0, "float16": 1, "bfloat16": 32}
_DTYPE_OF_FILE = {number: dtype for dtype, number in _FILE_TYPES.items()}
_ANY = object()
# llama.* keys that are read below, or that change no number; and the values of others that change none. All else is refused.
_READ = (
    "attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.layer_norm_rms_epsilon",
    "attention.value_length", "block_count", "context_length", "embedding_length", "feed_forward_length",
    "rope.dimension_count", "rope.freq_base", "vocab_size",
)  # fmt: skip
_WITHOUT_EFFECT: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(_READ, (_ANY,)),
    "tensor_data_layout": (_ANY,),  # of a converter of 2023; llama.cpp reads it no more
    "rope.scaling.original_context_length": (_ANY,),  # without a factor
    "rope.scaling.finetuned": (_ANY,),
    "rope.scaling.attn_factor": (0, 1),
    "rope.scaling.factor": (0, 1),
    "rope.scale_linear": (0, 1),
    "rope.scaling.type": ("none", "linear"),  # by a factor that is 1, or not there
    "attention.causal": (True,),
    "attention.scale": (0,),
    "embedding_scale": (0, 1),
    "logit_scale": (0, 1),
    "residual_scale": (0, 1),
    "use_parallel_residual": (False,),
}


def rope_frequencies(spec: LlamaSpec) -> NDArray[np.float32]:
    """By how much does each pair turn from one position to the next? (head_dim / 2,) radians, scaled as the spec says."""
    factors = rope_factors(spec)
    return _unscaled(spec) if factors is None else np.divide(_unscaled(spec), factors, dtype=np.float32)


def _unscaled(spec: LlamaSpec) -> NDArray[np.float32]:
    exponent = np.arange(0, spec.head_dim, 2, dtype=np.float32) / np.float32(spec.head_dim)
    frequencies: NDArray[np.float32] = 1.0 / np.power(np.float32(spec.rope_theta), exponent, dtype=np.float32)
    return frequencies


def rope_factors(spec: LlamaSpec) -> NDArray[np.float32] | None:
    """What llama.cpp divides each frequency by: (head_dim / 2,) float32. None without scaling."""
    scaling = spec.rope_scaling
    if scaling is None:
        return None
    factors = []
    for frequency in _unscaled(spec).astype(float):
        wavelength = 2 * pi / frequency
        if wavelength < scaling.original_context / scaling.high_freq_factor:
            factors.append(1.0)
        elif wavelength > scaling.original_context / scaling.low_freq_factor:
            factors.append(scaling.factor)
        else:
            ramp = scaling.original_context / wavelength - scaling.low_freq_factor
            ramp /= scaling.high_freq_factor - scaling.low_freq_factor
            factors.append(1 / ((1 - ramp) / scaling.factor + ramp))
    return np.array(factors, np.float32)


# -- reading


@dataclass(frozen=True)
class Quantised:
    """A LazyTensor whose rows are dequantised as they are read, to float32."""

    name: str
    shape: tuple[int, ...]
    region: Region
    ggml_type: int
    dtype: str = "float32"
    grain: int = 1

    @property
    def nbytes(self) -> int:
        """See LazyTensor."""
        return prod(self.shape) * 4

    def fill(self, buffer: NDArray[np.uint8], start: int, stop: int, ledger: Ledger | None = None) -> None:
        """See LazyTensor."""
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        rows = self.shape[0] if len(self.shape) > 1 else 1
        width = self.region.nbytes // rows
        if len(self.shape) == 1:
            start, stop, buffer_rows = 0, 1, slice(start, stop)
        else:
            buffer_rows = slice(None)
        data = np.empty((stop - start) * width, np.uint8)
        self.region.read_into(data, start * width, ledger)
        numbers = dequantize(data.reshape(stop - start, width), GGMLQuantizationType(self.ggml_type))
        numbers = np.ascontiguousarray(numbers, np.float32).reshape(-1)[buffer_rows]
        buffer[:] = numbers.view(np.uint8)


def open_gguf(path: Path, model: Told | None = None) -> Source:
    """Which model lies in a GGUF file? Reads its header, and its norms. A whole file without output.weight is tied.

    model: only for the scaling of a file whose RoPE factors are of no release. Raises FormatError, TensorMismatch.
    """
    file = read_gguf(path)
    _check_whole(file)
    names = canonical_names([name.replace("blk.", "layers.") for name in file.tensors], GGUF, path=path)
    by_canonical = {ours: file.tensors[theirs.replace("layers.", "blk.")] for theirs, ours in names.items()}
    spec = _spec(file, tied=OUTPUT not in by_canonical, told=model.spec.rope_scaling if model else None)
    check_shapes(path, {name: info.shape for name, info in by_canonical.items()}, spec)
    main_dtype = _DTYPE_OF_FILE.get(file.values.get("general.file_type", -1), "float32")
    tensors: dict[str, LazyTensor] = {}
    for name in (*parameter_shapes(spec), *([OUTPUT] if spec.tied and OUTPUT in by_canonical else [])):
        tensor = _tensor(file, name, by_canonical[name])
        tensors[name] = restored(tensor, main_dtype) if len(tensor.shape) == 1 else tensor
    tokenizer = read_tokenizer(file.values, path)
    return Source(
        path,
        spec,
        tensors,
        {
            "kind": "import",
            "format": "gguf",
            "path": path.name,
            "files": [{"name": path.name, "bytes": file.nbytes}],
        },
        tokenizer.assets,
        tokenizer.about,
        tokenizer.problem,
    )


def _check_whole(file: GgufFile) -> None:
    """Is this all of the model? The first part of a split file may lack nothing but output.weight, and look tied."""
    path, count = file.path, file.values.get("split.count", 0)
    if count not in (0, 1):
        raise FormatError(
            f"{path} is one of {count} files of a GGUF that is split (its split.no is {file.values.get('split.no')})",
            path=path,
            hint="put them together first: llama-gguf-split --merge FIRST_PART MERGED.gguf",
        )
    tensors = file.values.get("split.tensors.count", len(file.tensors))
    if tensors != len(file.tensors):
        raise FormatError(
            f"{path} holds {len(file.tensors)} tensors of a GGUF that was split, expected {tensors}",
            path=path,
            hint="put its parts together: llama-gguf-split --merge FIRST_PART MERGED.gguf",
        )


def _tensor(file: GgufFile, name: str, info: Info) -> LazyTensor:
    if info.ggml_type in PLAIN:
        dtype = PLAIN[info.ggml_type]
        nbytes = prod(info.shape) * ITEM_BYTES[dtype]
        _check_place(file, info, nbytes)
        rows = info.shape[0]
        return StoredTensor(
            name, info.shape, dtype,
            (Block(Region(file.path, info.offset, nbytes), 0, 0, rows, 0, nbytes // rows if rows else 0),),
        )  # fmt: skip
    try:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
        from gguf.quants import dequantize
    except ImportError:
        raise FormatError(
            f"{file.path}: {info.name} is quantised (ggml type {info.ggml_type}), which the library `gguf` can read",
            path=file.path,
            hint="pip install 'reshard[gguf]'",
        ) from None
    try:
        kind = GGMLQuantizationType(info.ggml_type)
        per_block, block_bytes = GGML_QUANT_SIZES[kind]
        dequantize(np.zeros((1, block_bytes), np.uint8), kind)
    except (ValueError, KeyError, NotImplementedError):
        raise FormatError(
            f"{file.path}: {info.name} is of ggml type {info.ggml_type}, which cannot be dequantised",
            path=file.path,
            hint="use a file of type F32, F16, BF16, Q8_0 or a K-quant",
        ) from None
    if not info.shape or info.shape[-1] % per_block:
        raise FormatError(f"{file.path}: {info.name} {list(info.shape)} is no whole number of blocks", path=file.path)
    nbytes = prod(info.shape) // per_block * block_bytes
    _check_place(file, info, nbytes)
    return Quantised(name, info.shape, Region(file.path, info.offset, nbytes), info.ggml_type)


def _check_place(file: GgufFile, info: Info, nbytes: int) -> None:
    if info.offset + nbytes > file.nbytes:
        raise FormatError(
            f"{file.path} is cut short: {info.name} ends at byte {info.offset + nbytes:,}, the file has {file.nbytes:,}",
            path=file.path,
            hint="copy or download this file again",
        )


def _spec(file: GgufFile, *, tied: bool, told: RopeScaling | None) -> LlamaSpec:
    values, path = file.values, file.path
    architecture = values.get("general.architecture")
    if architecture != "llama":
        raise FormatError(f"{path} is of architecture {architecture!r}, expected 'llama'", path=path)

    def natural(key: str, otherwise: int | None = None) -> int:
        value = values.get(f"llama.{key}", otherwise)
        if type(value) is not int or not 0 < value < 2**31:
            raise FormatError(f"{path}: llama.{key} is {value!r}, expected a positive whole number", path=path)
        return value

    def real(key: str, otherwise: float | None = None) -> float:
        value = values.get(f"llama.{key}", otherwise)
        if type(value) is not float or not 0 < value < float("inf"):
            raise FormatError(f"{path}: llama.{key} is {value!r}, expected a positive number", path=path)
        return _short(value)

    _refuse_other_values(file)
    heads, dim = natural("attention.head_count"), natural("embedding_length")
    head_dim = natural("attention.key_length", dim // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if natural(key, head_dim) != head_dim:
            raise FormatError(f"{path}: llama.{key} is {natural(key)}, expected head_dim {head_dim}", path=path)
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise TensorMismatch(f"{path} has no embedding", path=path, missing=["token_embd.weight"])
    try:
        spec = LlamaSpec(
            dim=dim,
            n_layers=natural("block_count"),
            n_heads=heads,
            n_kv_heads=natural("attention.head_count_kv", heads),
            ffn_dim=natural("feed_forward_length"),
            vocab_size=embedding.shape[0],
            head_dim=head_dim,
            rope_theta=real("rope.freq_base", 10000.0),
            norm_eps=real("attention.layer_norm_rms_epsilon"),
            tied=tied,
        )
    except LayoutError as error:
        raise FormatError(f"{path}: {error.message}", path=path) from None
    return replace(spec, rope_scaling=_scaling(file, spec, told))


def _refuse_other_values(file: GgufFile) -> None:
    """Raises FormatError for a value of the header that changes the arithmetic and is not kept here."""
    for key, value in file.values.items():
        name = key.removeprefix("llama.")
        if name == key or (name.startswith("rope.scal") and file.values.get("llama.rope.scaling.type") == "none"):
            continue  # llama.cpp scales nothing then, whatever the factor
        plain = _WITHOUT_EFFECT.get(name, (0,))
        if name == "rope.scaling.type" and ROPE_FREQS in file.tensors:
            plain = (*plain, "llama3")
        if _ANY in plain or (type(value) in (bool, int, float, str) and value in plain):
            continue
        what = "its RoPE is scaled" if name.startswith("rope.") else "no plain Llama has it"
        raise FormatError(
            f"{file.path}: {key} is {repr(value)[:60]}: {what}, and it cannot be kept",
            path=file.path,
            hint=f"a key that changes no number can be taken out: gguf-new-metadata --remove-metadata {key} IN.gguf OUT.gguf",
        )


def _short(value: float) -> float:
    """The number that somebody wrote, from its float32: 1e-05 rather than 9.99999974e-06."""
    return float(str(np.float32(value)))


def _scaling(file: GgufFile, spec: LlamaSpec, told: RopeScaling | None) -> RopeScaling | None:
    """Which scaling gives the tensor of factors? The one that the file says, where we wrote it; else what the user says."""
    info = file.tensors.get(ROPE_FREQS)
    if info is None:
        return None
    if info.ggml_type != 0 or info.shape != (spec.head_dim // 2,):
        raise FormatError(
            f"{file.path}: {ROPE_FREQS} is {list(info.shape)}, expected {[spec.head_dim // 2]} F32", path=file.path
        )
    _check_place(file, info, 4 * info.shape[0])
    data = np.empty(4 * info.shape[0], np.uint8)
    Region(file.path, info.offset, len(data)).read_into(data, 0)
    found = data.view(np.float32)
    said: list[Any] = [file.values.get(f"{_SCALING_KEYS}{key}") for key in ("factor", "low", "high", "original")]
    if all(type(value) is float and 0 < value < 1e9 for value in said):  # we wrote it
        scalings = [RopeScaling(_short(said[0]), _short(said[1]), _short(said[2]), int(said[3]))]
    else:  # the slowest frequencies are divided by the factor itself
        scalings = [*([told] if told else []), RopeScaling(factor=_short(float(found.max())))]
    for scaling in scalings:
        expected = rope_factors(replace(spec, rope_scaling=scaling))
        if expected is not None and np.allclose(found, expected, rtol=1e-4):
            return scaling
    raise FormatError(
        f"{file.path}: {ROPE_FREQS} is not what Llama 3.1's scaling by {scalings[-1].factor:g} gives",
        path=file.path,
        hint="--model with the model's config.json, if its scaling is another one",
    )


# -- writing


def plan_gguf(
    source: Source,
    spec: LlamaSpec,
    file: str,
    *,
    dtype: str | None = None,
    assets: Mapping[str, Path | bytes] | None = None,
    name: str = "",
) -> Output:
    """One GGUF file. dtype: of the matrices; norms are float32. Raises FormatError for float64."""
    tensors: list[tuple[str, LazyTensor]] = []
    for canonical in parameter_shapes(spec):
        tensor = source.tensors[canonical]
        wanted = "float32" if len(tensor.shape) == 1 else dtype or tensor.dtype
        if wanted not in _FILE_TYPES:
            raise FormatError(
                f"{source.path}: {canonical} is {wanted}, a GGUF file holds {listed(_FILE_TYPES)}",
                path=source.path,
                hint="--dtype float32 or --dtype bfloat16",
            )
        tensors.append((_foreign(canonical), cast(tensor, wanted)))
    factors = rope_factors(spec)
    if factors is not None:
        tensors.insert(1, (ROPE_FREQS, Constant(ROPE_FREQS, factors)))
    matrices = [tensor.dtype for _, tensor in tensors if len(tensor.shape) > 1]
    main = max(set(matrices), key=matrices.count)
    values: dict[str, Any] = {
        "general.architecture": "llama",
        "general.type": "model",
        "general.name": name or source.path.resolve().stem,
        "general.file_type": _FILE_TYPES[main],
        "general.quantization_version": 2,
        "llama.context_length": _positions(source, spec),
        "llama.embedding_length": spec.dim,
        "llama.block_count": spec.n_layers,
        "llama.feed_forward_length": spec.ffn_dim,
        "llama.attention.head_count": spec.n_heads,
        "llama.attention.head_count_kv": spec.n_kv_heads,
        "llama.attention.key_length": spec.head_dim,
        "llama.attention.value_length": spec.head_dim,
        "llama.attention.layer_norm_rms_epsilon": float(spec.norm_eps),
        "llama.rope.freq_base": float(spec.rope_theta),
        "llama.rope.dimension_count": spec.head_dim,
        "llama.vocab_size": spec.vocab_size,
        **_scaling_values(spec),
        **tokenizer_values(source.assets if assets is None else assets, spec, source.about),
    }
    described = [(theirs, tensor.shape, tensor.dtype, tensor.nbytes) for theirs, tensor in tensors]
    out, offsets = lay_out(file, values, described)
    copies = tuple(
        Copy(tensor, (whole(file, offset, tensor),)) for (_, tensor), offset in zip(tensors, offsets, strict=True)
    )
    return Output("gguf", (out,), copies, alone=True)


def _positions(source: Source, spec: LlamaSpec) -> int:
    """The key that llama.cpp does not load a file without; said where it is not known."""
    known = context_length(spec, source.about)
    if known is not None:
        return known
    guess = 131072 if spec.rope_scaling is not None else 8192 if spec.rope_theta >= 500000.0 else 4096
    log.warning("%s does not say for how many positions the model is: the GGUF file says %d, since it must say a number",
                source.path, guess)  # fmt: skip
    return guess


def _scaling_values(spec: LlamaSpec) -> dict[str, float]:
    """The scaling in numbers, for ourselves: of small heads the tensor does not show the factor."""
    if spec.rope_scaling is None:
        return {}
    s = spec.rope_scaling
    values = {
        "factor": s.factor, "low": s.low_freq_factor, "high": s.high_freq_factor, "original": s.original_context,
    }  # fmt: skip
    return {f"{_SCALING_KEYS}{key}": float(value) for key, value in values.items()}


def _foreign(canonical: str) -> str:
    return foreign_name(canonical, GGUF).replace("layers.", "blk.")


@dataclass(frozen=True)
class Constant:
    """A LazyTensor of numbers that were computed."""

    name: str
    values: NDArray[np.float32]
    dtype: str = "float32"
    grain: int = 1

    @property
    def shape(self) -> tuple[int, ...]:
        """See LazyTensor."""
        return self.values.shape

    @property
    def nbytes(self) -> int:
        """See LazyTensor."""
        return self.values.nbytes

    def fill(self, buffer: NDArray[np.uint8], start: int, stop: int, ledger: Ledger | None = None) -> None:
        """See LazyTensor."""
        buffer[:] = np.ascontiguousarray(self.values[start:stop]).reshape(-1).view(np.uint8)
