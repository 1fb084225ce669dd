"""Which model lies at a path, and with which weights? For the verbs that run one: eval and generate. One process."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from reshard.checkpoint.layout import is_foreign
from reshard.checkpoint.manifest import read_manifest
from reshard.checkpoint.ranks import Ranks
from reshard.checkpoint.weights import EMBEDDING, OUTPUT, check_shapes, load_weights
from reshard.config import Config, load_config
from reshard.errors import FormatError, TensorMismatch
from reshard.formats.torch_pt import check_records, open_pt
from reshard.model.build import spec_of
from reshard.model.llama import Llama
from reshard.model.names import META, canonical_names
from reshard.model.spec import LlamaSpec


def what_it_is(path: Path, config_path: Path | None, flavor: str | None) -> tuple[Config, LlamaSpec]:
    """Config and model: the manifest's, unless the command line says otherwise.

    Raises FormatError where a bare .pt or a foreign directory comes without a model.
    """
    config, spec = Config(), None
    if path.is_dir() and not is_foreign(path):
        manifest = read_manifest(path)
        spec = LlamaSpec.from_dict(manifest.model) if manifest.model else None
        if manifest.config:
            config = Config.model_validate(manifest.config, strict=True)
    if config_path is not None:
        config, _ = load_config(config_path)
        spec = spec_of(config)
    if flavor is not None:
        config = config.with_values(model={"flavor": flavor})
        spec = spec_of(config)
    if spec is None:
        if not path.exists():
            raise FormatError(f"`{path}` does not exist", path=path)
        raise FormatError(
            f"`{path}` does not say which model it holds",
            path=path,
            hint="--model FLAVOR (e.g. debugmodel, 8B), or --config CONFIG.toml",
        )
    return config, spec


def load_model(path: Path, spec: LlamaSpec, seq_len: int) -> Llama:
    """The model in float32 on CPU, with the path's weights, for sequences of up to seq_len tokens."""
    with torch.device("meta"):
        model = Llama(spec)
    model.to_empty(device="cpu")
    model.init_rope(torch.arange(seq_len))
    parameters = dict(model.named_parameters())
    if path.is_dir():
        load_weights(path, parameters, spec, Ranks())
    else:
        _load_pt(path, parameters, spec)
    return model.eval()


def _load_pt(path: Path, parameters: Mapping[str, nn.Parameter], spec: LlamaSpec) -> None:
    """Fill the model from a .pt under Meta's names, as dcp_to_torch writes it; its records' CRCs are checked."""
    file = open_pt(path)
    check_records(file)
    names = canonical_names(file.tensors, META)
    found = {canonical: file.tensors[name] for name, canonical in names.items()}
    check_shapes(path, {name: tensor.shape for name, tensor in found.items()}, spec)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(found[name].read())
        if spec.tied and OUTPUT in found and not torch.equal(found[OUTPUT].read(), found[EMBEDDING].read()):
            raise TensorMismatch(
                f"`{path}` has an output.weight that differs from its embedding, but the model's are tied",
                path=path,
                hint="it is an untied model: --model or --config with tied_embeddings = false",
            )
