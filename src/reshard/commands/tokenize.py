"""Tokenise the text of a run ahead of time: what `reshard train` would do first, without a model or ranks."""

from __future__ import annotations

from typing import Any

from reshard.config import Config
from reshard.model.build import spec_of
from reshard.text import count_sequences, prepare


def run(config: Config) -> dict[str, Any]:
    """Build the token cache of `config`, or find it whole. Imports no torch.

    Returns a report: folder, dataset, documents, train_tokens, validation_tokens, vocabulary (the tokenizer's),
    sequences_per_epoch, reused. Raises DataError and ConfigError as text.prepare does.
    """
    data, tokenizer = prepare(config, spec_of(config).vocab_size)
    return {
        "folder": str(data.folder),
        "dataset": data.fingerprint["dataset"],
        "documents": data.documents,
        "train_tokens": len(data.train),
        "validation_tokens": len(data.validation),
        "vocabulary": tokenizer.vocab_size,
        "sequences_per_epoch": count_sequences(len(data.train), config.training.seq_len),
        "reused": data.reused,
    }
