"""How do weights go from any format to any other? `reshard convert`: a stream of slabs, within the memory that was given."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from reshard.commands.convert_dcp import dcp_tensors, to_dcp
from reshard.commands.sources import FORMATS, RopeSaid, open_source
from reshard.commands.tokenizer_files import say_left_out, with_tokenizer
from reshard.errors import ConfigError, nearest
from reshard.formats.gguf import plan_gguf
from reshard.formats.hf import DEFAULT_SHARD_BYTES, plan_hf
from reshard.formats.meta import open_meta
from reshard.formats.meta_export import plan_meta
from reshard.formats.output import DEFAULT_MEMORY, Output, floods, write_output
from reshard.formats.protocol import Ledger, Source
from reshard.formats.torch_model import plan_torch
from reshard.formats.torchtune import plan_torchtune
from reshard.paths import local_path
from reshard.progress import progress_bar

logger = logging.getLogger(__name__)

FLOOR_BYTES = 40 << 20  # what the interpreter and the libraries take before a byte is read
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
    no_tokenizer: bool = False
    verify: bool = False

    def __post_init__(self) -> None:
        if self.no_tokenizer and self.tokenizer is not None:
            raise ConfigError("--tokenizer and --no-tokenizer contradict each other", hint="leave one of them out")


def run(
    source: Path,
    target: Path,
    *,
    to: str | None = None,
    model: str | None = None,
    dtype: str | None = None,
    rope_scaling: RopeSaid | None = None,
    rope_factor: float | None = None,
    options: Options | None = None,
) -> Path:
    """Convert what lies at `source` into a new `target`, which must not exist or be an empty directory.

    to: one of FORMATS; None guesses by the target's name: .gguf, .pt, else a DCP checkpoint.
    Raises ReshardErrors; nothing is then left behind.
    """
    options = options or Options(dtype=dtype)
    form = target_format(target, to)
    opened = open_source(
        source, model=model, rope_scaling=rope_scaling, rope_factor=rope_factor, rope_matters=form != "torch"
    )
    convert(opened, target, form, options)
    return target


def import_meta(source: Path, target: Path, *, freqs_cis_rows: int | None = None) -> Path:
    """The specification's own conversion: Meta's files to a DCP checkpoint.

    freqs_cis_rows: write the dialect that torchtitan loaded until July 2025 instead: names under `model.`, and the table
    of rotations for so many positions. Raises as `run` does.
    """
    opened = open_meta(local_path(source))
    if freqs_cis_rows is None:
        convert(opened, local_path(target), "dcp", Options())
    else:
        from reshard.commands.titan import to_early_titan

        to_early_titan(opened, local_path(target), freqs_cis_rows)
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
    spec = source.spec
    assert spec is not None, source.path
    _say_cast(source, options.dtype)
    source = with_tokenizer(source, spec, to, options.tokenizer, without=options.no_tokenizer)
    say_left_out(source, spec, to)
    if to == "dcp":
        manifest = to_dcp(
            source, target, dtype=options.dtype, memory=options.memory, workers=options.workers, verify=options.verify
        )
        logger.info(
            "%s: %d tensors, %.1f MB, from %s", target, len(manifest.tensors), manifest.bytes / 1e6, source.path
        )
        return
    output = plan(source, target, to, options)
    ledger = Ledger(drops=floods(output.nbytes + output.tensor_bytes))
    with progress_bar(f"{source.path.name} to {to}", output.tensor_bytes) as advance:
        write_output(
            output,
            target,
            ledger,
            memory=options.memory,
            floor=FLOOR_BYTES,
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
        tensors = dcp_tensors(source, options.dtype)
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
    source = with_tokenizer(source, spec, to, options.tokenizer, without=options.no_tokenizer)
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


def _say_cast(source: Source, dtype: str | None) -> None:
    own = sorted({tensor.dtype for tensor in source.tensors.values()})
    if dtype is not None and own != [dtype]:
        logger.info("casting the weights from %s to %s", "/".join(own), dtype)
