"""How does a finished run hand its model over? The last checkpoint's weights, in every format that was asked for."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path

from reshard.commands.convert import Options, convert, plan
from reshard.commands.sources import open_source
from reshard.commands.tokenizer_files import with_tokenizer
from reshard.errors import ConfigError, DataError, FormatError, listed, nearest
from reshard.formats.hf import ASSETS, INDEX, SINGLE
from reshard.formats.meta import params_of
from reshard.formats.protocol import Source
from reshard.formats.torchtune import builder_of
from reshard.model.spec import LlamaSpec

logger = logging.getLogger(__name__)

EXPORTS = ("torchtune", "hf", "meta", "torch", "gguf")
FOLDER = "exports"  # beside the checkpoint folder, where no resume looks
_FILE = {"torch": "checkpoint.pt", "gguf": "model.gguf"}
# What an export of the same step may have besides, in another dtype or with another tokenizer.
_MAY_COME_WITH_IT = (*ASSETS, INDEX, SINGLE, "model-00001-of-00002.safetensors")


def export(
    checkpoint: Path, dump_folder: Path, formats: Sequence[str], *, dtype: str | None = None, overwrite: bool = True
) -> list[Path]:
    """Write a committed checkpoint's weights to `<dump_folder>/exports/<step-N>/<format>`; returns what was written.

    checkpoint: the committed step-N directory. dtype: to cast to; None keeps the checkpoint's own. One process, on one
    rank; needs no process group and no torch. overwrite: an export that is there already, of an earlier end of the same
    run, is replaced; otherwise it is an error. Raises ReshardErrors; what was written before the error stays.
    """
    check_exports(formats)
    folder = dump_folder / FOLDER / checkpoint.name
    return export_source(open_source(checkpoint), folder, formats, dtype=dtype, overwrite=overwrite)


def export_source(
    source: Source, folder: Path, formats: Sequence[str], *, dtype: str | None = None, overwrite: bool = True
) -> list[Path]:
    """The same of an opened source, to `<folder>/<format>`."""
    written = []
    for to in formats:
        place = folder / to
        target = place / _FILE[to] if to in _FILE else place
        try:
            _write(source, place, target, to, Options(dtype=dtype), overwrite=overwrite)
        except DataError as error:  # a run that has ended cannot be asked: its model goes without the tokenizer
            logger.warning("%s: %s; exporting without a tokenizer", target, error.message)
            _write(source, place, target, to, Options(dtype=dtype, no_tokenizer=True), overwrite=overwrite)
        written.append(target)
    return written


def _write(source: Source, folder: Path, target: Path, to: str, options: Options, *, overwrite: bool) -> None:
    if overwrite and folder.exists():
        _set_aside(folder, source, target, to, options)
    convert(source, target, to, options)


def check_exports(formats: Sequence[str], spec: LlamaSpec | None = None) -> None:
    """Can all of them be written? To be asked before a training starts. Raises ConfigError, FormatError.

    spec: the model, which Meta's params.json and torchtune's builders may not be able to say.
    """
    for to in formats:
        if to not in EXPORTS:
            close = nearest(to, EXPORTS)
            raise ConfigError(
                f"checkpoint.export has `{to}`, expected some of {', '.join(EXPORTS)}",
                key="checkpoint.export",
                hint=f"did you mean `{close}`?" if close else None,
            )
        if spec is not None and to == "torchtune":
            builder_of(spec)
        if spec is not None and to == "meta":
            params_of(spec)


def _set_aside(folder: Path, source: Source, target: Path, to: str, options: Options) -> None:
    """An older export makes room by a rename, so that the new one's commit is a rename too; then it is removed.

    Raises FormatError where it holds files by names that no export in this format writes.
    """
    import secrets
    import shutil

    assert source.spec is not None, source.path
    prepared = with_tokenizer(source, source.spec, to, options.tokenizer, without=options.no_tokenizer)
    output = plan(prepared, target, to, options)
    written = {
        _numberless(name) for name in (*(file.name for file in output.files), *output.beside, *_MAY_COME_WITH_IT)
    }
    found = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()]
    others = sorted(name for name in found if _numberless(name) not in written)
    if others or folder.is_symlink() or not folder.is_dir():
        raise FormatError(
            f"`{folder}` holds {listed(others)}, not part of an export: it was not replaced, nothing was written"
            if others
            else f"`{folder}` is no directory of ours: it was not replaced, nothing was written",
            path=folder,
            hint=f"keep it under another name: mv {folder} {folder}.kept",
        )
    aside = folder.with_name(f"{folder.name}.old-{secrets.token_hex(8)}")
    folder.rename(aside)
    shutil.rmtree(aside)


def _numberless(name: str) -> str:
    """Of how many files an export is depends on its dtype: `model-00001-of-00003` is as good as `-of-00002`."""
    return re.sub("[0-9]+", "0", name)
