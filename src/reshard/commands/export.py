"""How does a finished run hand its model over? The last checkpoint's weights, in every format that was asked for."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from reshard.commands.convert import Options, convert
from reshard.commands.sources import open_source
from reshard.errors import ConfigError, nearest

logger = logging.getLogger(__name__)

EXPORTS = ("torchtune", "hf", "meta", "torch", "gguf")
FOLDER = "exports"  # beside the checkpoint folder, where no resume looks
_FILE = {"torch": "checkpoint.pt", "gguf": "model.gguf"}


def export(
    checkpoint: Path, dump_folder: Path, formats: Sequence[str], *, dtype: str | None = None, overwrite: bool = True
) -> list[Path]:
    """Write a committed checkpoint's weights to `<dump_folder>/exports/<step-N>/<format>`; returns what was written.

    checkpoint: the committed step-N directory. dtype: to cast to; None keeps the checkpoint's own. One process, on one
    rank; needs no process group and no torch. overwrite: an export that is there already, of an earlier end of the same
    run, is replaced; otherwise it is an error. Raises ReshardErrors; what was written before the error stays.
    """
    check_exports(formats)
    source = open_source(checkpoint)
    written = []
    for to in formats:
        folder = dump_folder / FOLDER / checkpoint.name / to
        if overwrite and folder.exists():
            _set_aside(folder)
        target = folder / _FILE[to] if to in _FILE else folder
        convert(source, target, to, Options(dtype=dtype))
        written.append(target)
    return written


def check_exports(formats: Sequence[str]) -> None:
    """Can all of them be written? To be asked before a training starts. Raises ConfigError."""
    for to in formats:
        if to not in EXPORTS:
            close = nearest(to, EXPORTS)
            raise ConfigError(
                f"checkpoint.export has `{to}`, expected some of {', '.join(EXPORTS)}",
                key="checkpoint.export",
                hint=f"did you mean `{close}`?" if close else None,
            )


def _set_aside(folder: Path) -> None:
    """An older export makes room by a rename, so that the new one's commit is a rename too; then it is removed."""
    import secrets
    import shutil

    aside = folder.with_name(f"{folder.name}.old-{secrets.token_hex(8)}")
    folder.rename(aside)
    shutil.rmtree(aside)
