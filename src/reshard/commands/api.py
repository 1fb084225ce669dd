"""How does a Python program ask? The verbs convert, inspect, verify and diff as functions, for `import reshard`.

Each is what the command of its name does before it prints. Paths may be strings; errors are ReshardErrors.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from reshard.checkpoint.verify import Level, Verdict
from reshard.paths import local_path

if TYPE_CHECKING:
    from reshard.commands.diff import Report

AnyPath = str | os.PathLike[str]


def convert(
    source: AnyPath,
    target: AnyPath,
    *,
    to: str | None = None,
    model: str | None = None,
    dtype: str | None = None,
    tokenizer: AnyPath | None = None,
    no_tokenizer: bool = False,
    rope_scaling: Literal["none", "llama3"] | None = None,
    rope_factor: float | None = None,
    max_memory: str | int = "512MiB",
    verify: bool = False,
) -> Path:
    """Write the weights at `source`, in whatever format, as a new `target`. Returns its path.

    to: dcp, hf, meta, torch, torchtune or gguf; None goes by the target's name: .gguf, .pt, else a DCP checkpoint.
    model: what the source is, where it does not say: FLAVOR, NAME/FLAVOR, a params.json or config.json.
    dtype: float16, bfloat16, float32 or float64; None keeps what is there. tokenizer: instead of the one beside the source.
    no_tokenizer: the weights alone, where the tokenizer cannot be handed on. rope_scaling: whether RoPE is scaled, where
    nothing says it, as of torchtitan's checkpoints. rope_factor: of a stretched RoPE, instead of the release's.
    max_memory: anonymous memory, bytes or e.g. "2GiB".
    verify: read everything back. The target must not exist, or be an empty directory.
    Raises ReshardError; nothing is then left behind.
    """
    from reshard.commands.convert import Options, run
    from reshard.formats.hf_config import parse_size

    options = Options(
        dtype=dtype,
        memory=max_memory if isinstance(max_memory, int) else parse_size(max_memory),
        tokenizer=Path(tokenizer) if tokenizer is not None else None,
        no_tokenizer=no_tokenizer,
        verify=verify,
    )
    return run(
        local_path(source),
        local_path(target),
        to=to,
        model=model,
        rope_scaling=rope_scaling,
        rope_factor=rope_factor,
        options=options,
    )


def inspect(
    path: AnyPath, *, model: str | None = None, rope_scaling: Literal["none", "llama3"] | None = None
) -> dict[str, Any]:
    """What is in it? The report of `reshard inspect --json`: plain values, of headers and manifests alone.

    `kind` is checkpoint (one of ours), folder (of such) or weights (any other format). model, rope_scaling: as in
    `convert`.
    Raises ReshardError.
    """
    from reshard.commands.inspect import run

    return run(local_path(path), model, rope_scaling)


def verify(path: AnyPath, *, level: Level = "bytes") -> list[Verdict]:
    """Is it whole? A verdict for the checkpoint or file, or for each in a folder: `whole` is True, False or None (unknown).

    level: "files" looks at manifest, index, headers, names and sizes, "bytes" also reads every byte that has a checksum.
    Damage is a finding, not an error. Of safetensors and GGUF, which have no checksums, True means that all of these fit.
    """
    from reshard.commands.verify import run

    return run(local_path(path), level)


def diff(
    left: AnyPath,
    right: AnyPath,
    *,
    model: str | None = None,
    rope_scaling: Literal["none", "llama3"] | None = None,
) -> Report:
    """Are these the same weights, in whatever formats? `.same()` says so; `.differences` where they differ.

    model, rope_scaling: as in `convert`, for both. Raises ReshardError.
    """
    from reshard.commands.diff import compare
    from reshard.commands.sources import open_source

    a, b = (open_source(path, model=model, rope_scaling=rope_scaling) for path in [local_path(left), local_path(right)])
    return compare(a, b)
