"""What do we read? Text from somewhere, as tokens, in an order that any number of ranks can share.

    sources      where does the text come from?
    tokenizers   which token is this text?
    cache        is the text tokenised already?
    order        which sequence is number i?
    entropy      how well can text be predicted without context?
    once         who builds it, when many processes want the same file at once?

A training sequence is a pure function of (dataset, tokenizer, rng seed, index). Imports neither torch nor, until
they are needed, any tokenizer or dataset library.
"""

from __future__ import annotations

from reshard.text.cache import (
    TokenData,
    fingerprint_difference,
    full_fingerprint,
    prepare,
    tokenizer_for,
)
from reshard.text.entropy import unigram_entropy
from reshard.text.order import TrainingText, count_sequences, held_out, stream_hash
from reshard.text.sources import Source, open_source
from reshard.text.tokenizers import Tokenizer, check_tokenizer, check_vocabulary, load_tokenizer

__all__ = [
    "Source",
    "TokenData",
    "Tokenizer",
    "TrainingText",
    "check_tokenizer",
    "check_vocabulary",
    "count_sequences",
    "fingerprint_difference",
    "full_fingerprint",
    "held_out",
    "load_tokenizer",
    "open_source",
    "prepare",
    "stream_hash",
    "tokenizer_for",
    "unigram_entropy",
]
