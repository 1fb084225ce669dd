"""Which sequence is number i? The order of the training text, and the fixed sequences of validation.

The answer depends on the tokens, the sequence length and the rng seed, never on how many ranks ask: the position in
the data is one integer, and a run that goes on with other ranks reads the same stream.
"""

from __future__ import annotations

import hashlib
import math
import operator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reshard.errors import DataError

Tokens = NDArray[np.integer[Any]]

_ROUNDS = (
    8  # 4 make a good shuffle (Luby and Rackoff 1988) of large digits; the rest is for the small ones of short texts
)


class TrainingText:
    """The endless stream of training sequences: 0, 1, 2, ... over all epochs.

    tokens: (n,) of any integer type, usually a memory map. Sequence k of the text covers the tokens
    [k seq_len, k seq_len + seq_len + 1): inputs and, shifted by one, targets. Each epoch visits every sequence once,
    in an order of its own. Last tokens that do not fill a sequence are left out.
    Raises DataError where there is not one whole sequence.
    """

    def __init__(self, tokens: Tokens, seq_len: int, rng_seed: int) -> None:
        self.tokens, self.seq_len, self.rng_seed = tokens, seq_len, rng_seed
        self.sequences_per_epoch = count_sequences(len(tokens), seq_len)
        if self.sequences_per_epoch == 0:
            raise too_short("training text", len(tokens), seq_len)
        self._shuffle = Shuffle(self.sequences_per_epoch, rng_seed, epoch=0)

    def epoch_of(self, index: int) -> int:
        """In which pass over the text is sequence number `index`? The first is 0."""
        return operator.index(index) // self.sequences_per_epoch

    def __getitem__(self, index: int) -> NDArray[np.int64]:
        """Sequence number `index` of the stream: (seq_len + 1,), a copy. Raises IndexError below 0, never above."""
        index = operator.index(index)
        if index < 0:
            raise IndexError(f"sequence {index}: the stream begins at 0")
        epoch, turn = divmod(index, self.sequences_per_epoch)
        shuffle = self._shuffle
        if epoch != shuffle.epoch:
            self._shuffle = shuffle = Shuffle(self.sequences_per_epoch, self.rng_seed, epoch)
        return _sequence(self.tokens, shuffle[turn], self.seq_len)


class Shuffle:
    """A permutation of 0 .. size-1 that needs no memory: a Feistel network keyed by (rng_seed, epoch).

    A number is written as two digits, left of base a = ceil(sqrt(size)) and right of base b = ceil(size / a). Each
    round adds a keyed hash of one digit to the other, which can be undone, so the network permutes all a b numbers.
    One that lands at `size` or above walks on until it is below: its cycle must come back to where it began. As
    a b < size + a, hardly any has to. Source: Black and Rogaway, Ciphers with Arbitrary Finite Domains, 2002.
    """

    def __init__(self, size: int, rng_seed: int, epoch: int) -> None:
        self.size, self.epoch = size, epoch
        self._left_base = math.isqrt(size - 1) + 1
        self._right_base = -(-size // self._left_base)
        self._keys = [
            hashlib.blake2b(f"{rng_seed} {epoch} {i}".encode(), digest_size=16, person=b"reshard order").digest()
            for i in range(_ROUNDS)
        ]

    def __getitem__(self, turn: int) -> int:
        """Which sequence comes at this turn of the epoch? 0 <= turn < size."""
        if not 0 <= turn < self.size:
            raise IndexError(f"turn {turn} of {self.size}")
        place = self._permuted(turn)
        while place >= self.size:
            place = self._permuted(place)
        return place

    def _permuted(self, number: int) -> int:
        left, right = divmod(number, self._right_base)
        for i, key in enumerate(self._keys):
            if i % 2 == 0:
                left = (left + _keyed_hash(right, key)) % self._left_base
            else:
                right = (right + _keyed_hash(left, key)) % self._right_base
        return left * self._right_base + right


def held_out(tokens: Tokens, seq_len: int, most: int) -> NDArray[np.int64]:
    """The sequences to validate on, the same each time: (n, seq_len + 1) with n = min(most, all).

    Spread evenly over the held-out text, so that few of them still see all of it. n is 0 where there is not one.
    """
    available = count_sequences(len(tokens), seq_len)
    n = min(most, available)
    if n == 0:
        return np.empty((0, seq_len + 1), dtype=np.int64)
    return np.stack([_sequence(tokens, i * available // n, seq_len) for i in range(n)])


def count_sequences(tokens: int, seq_len: int) -> int:
    """How many sequences do so many tokens hold? Each needs seq_len inputs and one more token as the last target."""
    return max(0, (tokens - 1) // seq_len)


def too_short(what: str, tokens: int, seq_len: int) -> DataError:
    """The error for a text that does not fill one sequence."""
    return DataError(
        f"the {what} has {tokens} tokens, but one sequence of seq_len {seq_len} needs {seq_len + 1}",
        hint=f"take more text (--training.dataset), or --training.seq_len {tokens - 1}"
        if tokens > 1
        else "take more text (--training.dataset)",
    )


def stream_hash(text: TrainingText, start: int, stop: int) -> str:
    """A digest of the sequences start .. stop-1 of a stream: equal if and only if the streams are."""
    digest = hashlib.blake2b(digest_size=16)
    for index in range(start, stop):
        digest.update(text[index].astype("<i8").tobytes())
    return digest.hexdigest()


def _sequence(tokens: Tokens, k: int, seq_len: int) -> NDArray[np.int64]:
    return np.array(tokens[k * seq_len : (k + 1) * seq_len + 1], dtype=np.int64)


def _keyed_hash(digit: int, key: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(digit.to_bytes(8, "little"), digest_size=8, key=key).digest(), "little")
