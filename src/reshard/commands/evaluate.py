"""How well do weights predict held-out text? `reshard eval`: any format, in one process."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

from reshard.commands.model_tokenizer import model_tokenizer
from reshard.commands.open_model import load_model, what_it_is
from reshard.commands.sources import RopeSaid
from reshard.config import Config
from reshard.errors import DataError
from reshard.model.llama import cross_entropy_sum
from reshard.model.spec import LlamaSpec
from reshard.progress import progress_bar
from reshard.text.cache import folder_for_one_question, prepare
from reshard.text.entropy import unigram_entropy
from reshard.text.order import held_out
from reshard.text.sources import open_source
from reshard.text.tokenizers import Tokenizer

logger = logging.getLogger(__name__)


def run(
    path: Path,
    *,
    data: str | None,
    config_path: Path | None,
    flavor: str | None,
    tokenizer: str | None,
    rope_scaling: RopeSaid | None = None,
    seq_len: int | None,
    sequences: int,
    batch_size: int,
    cache_folder: Path | None = None,
) -> dict[str, Any]:
    """Measure, and report as a dict: loss (nats per token), tokens, data, unigram_entropy, sequences, seq_len.

    data: None takes the held-out documents of the text that the checkpoint was trained on. Other text is measured
    whole: nothing of it was trained on. Model and tokenizer come from the checkpoint, else from config_path or flavor.
    cache_folder: where tokens are kept that the run's own cache does not have; None: nowhere, nothing stays.
    Raises FormatError where a bare .pt or foreign directory comes without a model; DataError, TensorMismatch.
    """
    config, source = what_it_is(path, config_path, flavor, rope_scaling)
    assert source.spec is not None
    names_it = config_path is not None and "tokenizer_path" in config.model.model_fields_set
    own = model_tokenizer(source, config, named=tokenizer, config_names_it=names_it)
    config = config.with_values(
        training={"seq_len": seq_len or config.training.seq_len},
        validation={"freq": 0},
    )
    with folder_for_one_question(cache_folder) as build_in:
        tokens, name = _text(config, source.spec, own, data, build_in)
        chosen = held_out(tokens, config.training.seq_len, sequences)
        entropy = unigram_entropy(tokens)
    if len(chosen) == 0:
        raise DataError(
            f"the held-out text {name} has {len(tokens)} tokens, but one sequence of seq_len {config.training.seq_len} "
            f"needs {config.training.seq_len + 1}",
            hint="--seq-len with a smaller number, or --data with more text",
        )
    model = load_model(source, config.training.seq_len)
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
        "unigram_entropy": entropy,
        "tokens": measured,
        "sequences": len(chosen),
        "seq_len": config.training.seq_len,
    }


def _text(config: Config, spec: LlamaSpec, tokenizer: Tokenizer, data: str | None, build_in: Path) -> tuple[Any, str]:
    """The tokens to measure on, and what to call them."""
    trained_on = config.training.dataset
    if data is None or data == trained_on:
        if data is None:
            _say_text(config)
        if config.validation.fraction == 0:
            config = config.with_values(validation={"fraction": 0.02})
        found, _ = prepare(config, spec.vocab_size, tokenizer=tokenizer, build_in=build_in)
        return found.validation, f"{trained_on} (held-out documents)"
    other = config.with_values(training={"dataset": data, "dataset_path": None}, validation={"fraction": 0.0})
    found, _ = prepare(other, spec.vocab_size, tokenizer=tokenizer, build_in=build_in)
    return found.train, data


def _say_text(config: Config) -> None:
    """Which text is it that nobody named here? Raises DataError where it is not there, with the option that names one."""
    training = config.training
    place = f" at {training.dataset_path}" if training.dataset_path is not None else ""
    try:
        open_source(training)
    except DataError as error:
        raise DataError(
            f"the text that the model's config names, `{training.dataset}`{place}, cannot be used: {error.message}",
            path=error.path,
            hint="--data names another: a file, a folder or `stdlib`",
        ) from None
    logger.info(
        "measuring on held-out documents of `%s`%s, as the model's config says (--data: other text)",
        training.dataset,
        place,
    )
