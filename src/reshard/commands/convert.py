"""How do weights go from any format to any other? `reshard convert`: a stream of slabs, within the memory that was given."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from reshard.commands.sources import FORMATS, open_source
from reshard.commands.tokenizer_files import with_tokenizer
from reshard.errors import ConfigError, FormatError, nearest
from reshard.formats.cast import cast
from reshard.formats.gguf import plan_gguf
from reshard.formats.hf import DEFAULT_SHARD_BYTES, plan_hf
from reshard.formats.meta import open_meta
from reshard.formats.meta_export import plan_meta
from reshard.formats.output import Output, check_space, write_output
from reshard.formats.protocol import ITEM_BYTES, LazyTensor, Ledger, Source, StoredTensor, read_rows, slabs
from reshard.formats.torch_model import plan_torch
from reshard.formats.torchtune import plan_torchtune
from reshard.progress import progress_bar

if TYPE_CHECKING:
    import torch

    from reshard.checkpoint.manifest import Manifest
    from reshard.checkpoint.state import Piece

logger = logging.getLogger(__name__)

PIECE_BYTES = 64 * 2**20  # of a chunk of ours at most: no reader ever needs a whole matrix
DEFAULT_MEMORY = 512 << 20
# What the interpreter and the libraries take before a byte is read; torch is needed to write DCP only.
FLOOR_BYTES, FLOOR_WITH_TORCH_BYTES = 40 << 20, 205 << 20
SLAB_BYTES = 20 << 20
_EMBEDDING, _OUTPUT = "tok_embeddings.weight", "output.weight"
_SUFFIXES = {".gguf": "gguf", ".pt": "torch", ".pth": "torch"}


@dataclass(frozen=True)
class Options:
    """What may be asked of a conversion; see `reshard convert --help`."""

    dtype: str | None = None
    memory: int = DEFAULT_MEMORY
    workers: int = 2
    shards: int = 1
    max_shard_bytes: int = DEFAULT_SHARD_BYTES
    names: Literal["torchtune", "meta"] = "torchtune"
    tokenizer: Path | None = None
    verify: bool = False


def run(
    source: Path,
    target: Path,
    *,
    to: str | None = None,
    model: str | None = None,
    dtype: str | None = None,
    rope_factor: float | None = None,
    options: Options | None = None,
) -> Path:
    """Convert what lies at `source` into a new `target`, which must not exist or be an empty directory.

    to: one of FORMATS; None guesses by the target's name: .gguf, .pt, else a DCP checkpoint.
    Raises ReshardErrors; nothing is then left behind.
    """
    options = options or Options(dtype=dtype)
    opened = open_source(source, model=model, rope_factor=rope_factor)
    convert(opened, target, target_format(target, to), options)
    return target


def import_meta(source: Path, target: Path, *, freqs_cis_rows: int | None = None) -> Path:
    """The specification's own conversion: Meta's files to a DCP checkpoint.

    freqs_cis_rows: write the dialect that torchtitan loaded until July 2025 instead: names under `model.`, and the table
    of rotations for so many positions. Raises as `run` does.
    """
    opened = open_meta(source)
    if freqs_cis_rows is None:
        convert(opened, target, "dcp", Options())
    else:
        from reshard.commands.titan import to_early_titan

        to_early_titan(opened, target, freqs_cis_rows)
    return target


def target_format(target: Path, to: str | None) -> str:
    """Which format is wanted? Raises ConfigError for an unknown one."""
    if to is None:
        return _SUFFIXES.get(target.suffix, "dcp")
    if to not in FORMATS:
        close = nearest(to, FORMATS)
        raise ConfigError(
            f"`{to}` is no format, expected one of {', '.join(FORMATS)}",
            hint=f"did you mean `{close}`?" if close else None,
        )
    return to


def convert(source: Source, target: Path, to: str, options: Options) -> None:
    """Write an opened source in a format. Raises as `run` does."""
    assert source.spec is not None, source.path
    if to == "dcp":
        manifest = to_dcp(
            source, target, dtype=options.dtype, memory=options.memory, workers=options.workers, verify=options.verify
        )
        logger.info(
            "%s: %d tensors, %.1f MB, from %s", target, len(manifest.tensors), manifest.bytes / 1e6, source.path
        )
        return
    source = with_tokenizer(source, source.spec, to, options.tokenizer)
    output = plan(source, target, to, options)
    _say_cast(source, options.dtype)
    ledger = Ledger(drops=_floods(output.nbytes + output.tensor_bytes))
    with progress_bar(f"{source.path.name} to {to}", output.tensor_bytes) as advance:
        write_output(
            output,
            target,
            ledger,
            memory=max(0, options.memory - FLOOR_BYTES),
            workers=options.workers,
            verify=options.verify,
            advance=advance,
        )
    logger.info("%s: %d tensors, %.1f MB, from %s", target, len(output.copies), output.nbytes / 1e6, source.path)


def plan(source: Source, target: Path, to: str, options: Options) -> Output:
    """The layout of an export, before a byte of it is read."""
    spec = source.spec
    assert spec is not None, source.path
    if to == "hf":
        return plan_hf(source, spec, dtype=options.dtype, max_shard_bytes=options.max_shard_bytes)
    if to == "meta":
        return plan_meta(source, spec, shards=options.shards, dtype=options.dtype)
    if to == "torch":
        return plan_torch(source, spec, target.name, dtype=options.dtype)
    if to == "torchtune":
        return plan_torchtune(source, spec, target, names=options.names, dtype=options.dtype)
    assert to == "gguf", to
    return plan_gguf(source, spec, target.name, dtype=options.dtype, name=target.stem)


def describe_plan(source: Source, target: Path, to: str, options: Options) -> dict[str, Any]:
    """What would be written, as plain JSON values: files with their bytes, tensors with where they go."""
    spec = source.spec
    assert spec is not None, source.path
    report: dict[str, Any] = {
        "source": str(source.path), "format": source.provenance.get("format"), "target": str(target), "to": to,
        "model": spec.to_dict(),
    }  # fmt: skip
    if to == "dcp":
        tensors = _dcp_tensors(source, options.dtype)
        rows = [
            {
                "name": name,
                "shape": list(t.shape),
                "dtype": t.dtype,
                "bytes": t.nbytes,
                "places": [["__0_0.distcp", None]],
            }
            for name, t in tensors.items()
        ]
        return {**report, "bytes": sum(t.nbytes for t in tensors.values()), "files": {}, "tensors": rows}
    source = with_tokenizer(source, spec, to, options.tokenizer)
    output = plan(source, target, to, options)
    rows = [
        {
            "name": copy.tensor.name,
            "shape": list(copy.tensor.shape),
            "dtype": copy.tensor.dtype,
            "bytes": copy.tensor.nbytes,
            "places": [[place.file, place.offset] for place in copy.places],
        }
        for copy in output.copies
    ]
    files = {file.name: file.nbytes for file in output.files}
    return {**report, "bytes": output.nbytes, "files": files, "beside": sorted(output.beside), "tensors": rows}


def plan_lines(report: dict[str, Any]) -> list[str]:
    """A plan for people."""
    lines = [
        f"{report['source']} ({report['format']}) to {report['target']} ({report['to']}): {report['bytes'] / 1e6:,.1f} MB"
    ]
    lines += [f"file  {name}  {nbytes:,} bytes" for name, nbytes in report["files"].items()]
    lines += [f"file  {name}" for name in report.get("beside", ())]
    for row in report["tensors"]:
        shape = " x ".join(map(str, row["shape"]))
        places = ", ".join(f"{file}@{offset:,}" if offset is not None else file for file, offset in row["places"])
        lines.append(f"{row['name']:40} {shape:>16} {row['dtype']:9} -> {places}")
    return lines


def _floods(nbytes: int) -> bool:
    """Would so many bytes push everybody else's out of the system's cache?"""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            available = next(int(line.split()[1]) << 10 for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):
        available = 8 << 30
    return nbytes > available // 4


def _say_cast(source: Source, dtype: str | None) -> None:
    own = sorted({tensor.dtype for tensor in source.tensors.values()})
    if dtype is not None and own != [dtype]:
        logger.info("casting the weights from %s to %s", "/".join(own), dtype)


# -- DCP, written by our own writer


def to_dcp(
    source: Source,
    out: Path,
    *,
    dtype: str | None = None,
    memory: int = DEFAULT_MEMORY,
    workers: int = 1,
    verify: bool = False,
) -> Manifest:
    """Write a source as a committed weights-only checkpoint under flat Meta names.

    dtype: a torch dtype name to cast to; None keeps each tensor's own. A tied model is written with both names, which
    torchtune needs, and read once. Memory: one piece of at most PIECE_BYTES. The source's stored CRC32s are checked on
    the way, before the commit. Raises FormatError, NotACheckpoint, StorageError.
    """
    if source.spec is None:
        raise FormatError(f"{source.path} does not say which model it is: heads, RoPE and epsilon", path=source.path)
    tensors = _dcp_tensors(source, dtype)
    check_space(out, sum(tensor.nbytes for tensor in tensors.values()))
    _say_cast(source, dtype)
    from reshard.checkpoint.save import save_weights

    _give_memory_back()
    # The writer may still hold the end of the piece before; a cast holds one slab more.
    piece = min(PIECE_BYTES, (memory - FLOOR_WITH_TORCH_BYTES - SLAB_BYTES) // 2)
    if piece < 1 << 20:
        least = (FLOOR_WITH_TORCH_BYTES + SLAB_BYTES >> 20) + 2
        raise ConfigError(
            f"a memory of {memory / 2**20:.0f} MiB is too little to write DCP, which needs torch: {least} MiB or more"
        )
    total = sum(tensor.nbytes for tensor in tensors.values())
    ledger = Ledger(drops=_floods(2 * total))
    with progress_bar(f"{source.path.name} to dcp", total) as advance:
        pieces = _pieces(tensors, piece, ledger, advance)
        manifest = save_weights(out, pieces, step=0, source=source.provenance, config=None, spec=source.spec)
    if verify:
        _verify(out)
    return manifest


def _give_memory_back() -> None:
    """Let glibc map every slab on its own: it would raise that limit, and keep freed slabs in its heap. Only a hint."""
    import ctypes

    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(-3, 1 << 20)  # M_MMAP_THRESHOLD


def _verify(out: Path) -> None:
    import shutil

    from reshard.checkpoint.verify import verify_checkpoint

    verdict = verify_checkpoint(out, "bytes", lambda done: None)
    if not verdict.whole:
        shutil.rmtree(out)
        raise FormatError(f"{out} was not written right: {verdict.problem or verdict.findings}", path=out)


def _dcp_tensors(source: Source, dtype: str | None) -> dict[str, LazyTensor]:
    """What is written, by name; a tied embedding is the same object under both."""
    assert source.spec is not None
    tensors = {name: cast(tensor, dtype) for name, tensor in source.tensors.items()}
    if source.spec.tied and _same_bytes(source.tensors.get(_OUTPUT), source.tensors[_EMBEDDING]):
        tensors[_OUTPUT] = tensors[_EMBEDDING]
    return tensors


def _same_bytes(copy: LazyTensor | None, tensor: LazyTensor) -> bool:
    """Does a copy come from the very bytes of the tensor, as in Meta's files, or from nowhere?"""
    if copy is None:
        return True
    return isinstance(copy, StoredTensor) and isinstance(tensor, StoredTensor) and copy.blocks == tensor.blocks


def _pieces(
    tensors: dict[str, LazyTensor], most_bytes: int, ledger: Ledger, advance: Callable[[int], object]
) -> Iterator[Piece]:
    """Every tensor, some rows at a time; ends only if the bytes that were read are those that had been written.

    Rows that have two names are read once, and are two pieces, one after the other.
    """
    from reshard.checkpoint.state import Piece

    names: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        names.setdefault(id(tensor), []).append(name)
    for same in names.values():
        tensor = tensors[same[0]]
        scalar = not tensor.shape
        for start, stop in slabs(tensor.shape, ITEM_BYTES[tensor.dtype], most_bytes, tensor.grain):
            rows = _Rows(partial(read_rows, tensor, start, stop, ledger), len(same), advance)
            for name in same:
                yield Piece(
                    fqn=name,
                    shape=tensor.shape,
                    offsets=() if scalar else (start, *(0 for _ in tensor.shape[1:])),
                    sizes=() if scalar else (stop - start, *tensor.shape[1:]),
                    dtype=tensor.dtype,
                    read=rows.take,
                )
    ledger.check()


class _Rows:
    """Rows that are read when they are first taken, and let go when they are taken for the last time."""

    def __init__(self, read: Callable[[], torch.Tensor], uses: int, advance: Callable[[int], object]) -> None:
        self._read, self._uses, self._advance = read, uses, advance
        self._kept: torch.Tensor | None = None

    def take(self) -> torch.Tensor:
        rows = self._read() if self._kept is None else self._kept
        self._uses -= 1
        self._kept = rows if self._uses else None
        self._advance(rows.nbytes)
        return rows
