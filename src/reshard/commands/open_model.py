"""Which model lies at a path, and with which weights? For eval and generate: any format, one process."""

from __future__ import annotations

from pathlib import Path

import torch

from reshard.checkpoint.layout import is_foreign
from reshard.checkpoint.manifest import MANIFEST, read_manifest
from reshard.commands.sources import RopeSaid, open_source
from reshard.config import Config, load_config
from reshard.formats.dialects import Told
from reshard.formats.protocol import Ledger, Source, read_rows
from reshard.model.build import spec_of
from reshard.model.llama import Llama
from reshard.progress import progress_bar


def what_it_is(
    path: Path, config_path: Path | None, model: str | None, rope_scaling: RopeSaid | None = None
) -> tuple[Config, Source]:
    """The config to read text with, and the weights. What a path does not say, config_path, model and rope_scaling must.

    The config is config_path's, else the one that our own checkpoint keeps, else the defaults.
    Raises FormatError where a bare .pt or a foreign directory comes without a model, or where the two disagree.
    """
    config = Config()
    if config_path is not None:
        config, _ = load_config(config_path)
    elif (path / MANIFEST).exists() and not is_foreign(path):
        manifest = read_manifest(path)
        if manifest.config:
            config = Config.model_validate(manifest.config, strict=True)
    told = _told_by(config) if config_path is not None and model is None else model
    return config, open_source(path, model=told, rope_scaling=rope_scaling)


def _told_by(config: Config) -> Told:
    """The model of a config. Its flavor alone, as torchtitan's configs have it, does not say whether RoPE is scaled."""
    if config.model.rope_scaling_factor is not None:
        return Told(spec_of(config))
    return Told(spec_of(config), scaling_from="flavor" if config.model.name == "llama3" else "release")


def load_model(source: Source, seq_len: int) -> Llama:
    """The model in float32 on CPU, for sequences of up to seq_len tokens. Stored CRCs are checked on the way."""
    assert source.spec is not None
    with torch.device("meta"):
        model = Llama(source.spec)
    model.to_empty(device="cpu")
    model.init_rope(torch.arange(seq_len))
    parameters = dict(model.named_parameters())
    ledger = Ledger()
    total = sum(source.tensors[name].nbytes for name in parameters)
    with progress_bar(f"reading {source.path.name}", total) as advance, torch.no_grad():
        for name, parameter in parameters.items():
            tensor = source.tensors[name]
            parameter.copy_(read_rows(tensor, 0, tensor.shape[0], ledger))
            advance(tensor.nbytes)
    ledger.check()
    return model.eval()
