"""How well does a checkpoint predict held-out text? `reshard eval`: any DCP directory or .pt, in one process."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from reshard.checkpoint.layout import is_foreign
from reshard.checkpoint.manifest import read_manifest
from reshard.checkpoint.ranks import Ranks
from reshard.checkpoint.weights import check_shapes, load_weights
from reshard.config import Config, load_config
from reshard.errors import DataError, FormatError
from reshard.formats.torch_pt import check_records, open_pt
from reshard.model.build import spec_of
from reshard.model.llama import Llama, cross_entropy_sum
from reshard.model.names import META, canonical_names
from reshard.model.spec import LlamaSpec
from reshard.progress import progress_bar
from reshard.text.cache import prepare, tokenizer_for
from reshard.text.entropy import unigram_entropy
from reshard.text.order import held_out


def run(
    path: Path,
    *,
    data: str | None,
    config_path: Path | None,
    flavor: str | None,
    tokenizer: str | None,
    seq_len: int | None,
    sequences: int,
    batch_size: int,
) -> dict[str, Any]:
    """Measure, and report as a dict: loss (nats per token), tokens, data, unigram_entropy, sequences, seq_len.

    data: None takes the held-out documents of the text that the checkpoint was trained on. Other text is measured
    whole: nothing of it was trained on. Model and tokenizer come from the checkpoint, else from config_path or flavor.
    Raises FormatError where a bare .pt or foreign directory comes without a model; DataError, TensorMismatch.
    """
    config, spec = _what_it_is(path, config_path, flavor)
    config = config.with_values(
        model={"tokenizer_path": tokenizer or config.model.tokenizer_path},
        training={"seq_len": seq_len or config.training.seq_len},
        validation={"freq": 0},
    )
    tokens, name = _text(config, spec, data)
    chosen = held_out(tokens, config.training.seq_len, sequences)
    if len(chosen) == 0:
        raise DataError(
            f"the held-out text {name} has {len(tokens)} tokens, but one sequence of seq_len {config.training.seq_len} "
            f"needs {config.training.seq_len + 1}",
            hint="--seq-len with a smaller number, or --data with more text",
        )
    model = _model(path, spec, config.training.seq_len)
    total = 0.0
    with torch.inference_mode(), progress_bar(f"eval {path.name}", len(chosen), unit="items") as advance:
        for start in range(0, len(chosen), batch_size):
            batch_BS = torch.from_numpy(chosen[start : start + batch_size])
            total += float(cross_entropy_sum(model(batch_BS[:, :-1]), batch_BS[:, 1:]))
            advance(len(batch_BS))
    measured = len(chosen) * config.training.seq_len
    return {
        "path": str(path),
        "data": name,
        "loss": total / measured,
        "unigram_entropy": unigram_entropy(tokens),
        "tokens": measured,
        "sequences": len(chosen),
        "seq_len": config.training.seq_len,
    }


def _what_it_is(path: Path, config_path: Path | None, flavor: str | None) -> tuple[Config, LlamaSpec]:
    """Config and model: the manifest's, unless the command line says otherwise."""
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


def _text(config: Config, spec: LlamaSpec, data: str | None) -> tuple[Any, str]:
    """The tokens to measure on, and what to call them."""
    trained_on = config.training.dataset
    if data is None or data == trained_on:
        if config.validation.fraction == 0:
            config = config.with_values(validation={"fraction": 0.02})
        found, _ = prepare(config, spec.vocab_size)
        return found.validation, f"{trained_on} (held-out documents)"
    # Other text, but the run's own tokenizer: one that was trained on the spot was trained on the run's text.
    tokenizer = tokenizer_for(config, spec.vocab_size)
    other = config.with_values(training={"dataset": data, "dataset_path": None}, validation={"fraction": 0.0})
    found, _ = prepare(other, spec.vocab_size, tokenizer=tokenizer)
    return found.train, data


def _model(path: Path, spec: LlamaSpec, seq_len: int) -> Llama:
    """The model in float32 on CPU, with the file's weights."""
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
