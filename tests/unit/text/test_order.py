"""The order of the data: a bijection in every epoch, the same in every process, and new in each epoch."""

from __future__ import annotations

import subprocess
import sys
import time
import tracemalloc
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from reshard.errors import DataError
from reshard.text.order import Shuffle, TrainingText, count_sequences, held_out, stream_hash

SIZES = [1, 2, 3, 4, 5, 7, 8, 9, 10, 13, 16, 17, 31, 64, 97, 100, 101, 257, 1000, 1009, 4096, 4097, 10007]


@pytest.mark.parametrize("size", SIZES)
def test_every_epoch_visits_every_sequence_once(size: int) -> None:
    for epoch in (0, 1, 2, 1000):
        shuffle = Shuffle(size, 42, epoch)
        assert sorted(shuffle[turn] for turn in range(size)) == list(range(size))


@pytest.mark.parametrize("size", [10**9, 10**9 + 7, 2**40, 2**63])
def test_sizes_that_no_array_could_hold(size: int) -> None:
    tracemalloc.start()
    shuffle = Shuffle(size, 7, 3)
    turns = [*range(2000), *range(size - 2000, size), *range(0, size, size // 2000)]
    places = [shuffle[turn] for turn in turns]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(set(places)) == len(set(turns))
    assert 0 <= min(places) <= max(places) < size
    assert peak < 4 << 20
    # Neighbours in the text do not stay neighbours, and the first places reach everywhere.
    assert sum(abs(a - b) == 1 for a, b in pairwise(places)) <= 2
    assert abs(np.mean(np.array(places[:2000], dtype=float) / size) - 0.5) < 0.05


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    orders = {tuple(Shuffle(50, seed, epoch)[turn] for turn in range(50)) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25
    # Seed 1, epoch 12 and seed 11, epoch 2 must not share a key.
    assert [Shuffle(50, 1, 12)[t] for t in range(50)] != [Shuffle(50, 11, 2)[t] for t in range(50)]


def test_all_orders_of_a_small_text_come_up_about_equally_often() -> None:
    counts = Counter(tuple(Shuffle(4, 0, epoch)[turn] for turn in range(4)) for epoch in range(2400))
    assert len(counts) == 24
    chi_square = sum((count - 100) ** 2 / 100 for count in counts.values())
    assert chi_square < 60  # 23 degrees of freedom: beyond 60 one time in 30,000; the epochs are fixed, so it is stable


def test_sequences_are_slices_that_share_one_token() -> None:
    tokens = np.arange(101, dtype=np.uint16)
    text = TrainingText(tokens, 10, rng_seed=5)
    assert text.sequences_per_epoch == 10
    epoch = [text[i] for i in range(10)]
    assert all(sequence.shape == (11,) and sequence.dtype == np.int64 for sequence in epoch)
    assert sorted(int(sequence[0]) for sequence in epoch) == list(range(0, 100, 10))
    assert all((np.diff(sequence) == 1).all() for sequence in epoch)
    assert [int(text[i][0]) for i in range(10)] != [int(text[i][0]) for i in range(10, 20)]
    assert (text.epoch_of(9), text.epoch_of(10), text.epoch_of(35)) == (0, 1, 3)


def test_a_sequence_does_not_depend_on_what_was_read_before() -> None:
    tokens = np.arange(1001, dtype=np.uint32)
    forward = TrainingText(tokens, 7, 3)
    wanted = [forward[i].tolist() for i in range(400)]
    backward = TrainingText(tokens, 7, 3)
    assert [backward[i].tolist() for i in reversed(range(400))] == wanted[::-1]
    assert TrainingText(tokens, 7, 3)[np.int64(399)].tolist() == wanted[399]


def test_the_number_of_ranks_does_not_change_the_stream() -> None:
    tokens = np.random.default_rng(0).integers(0, 500, 5001).astype(np.uint16)
    text = TrainingText(tokens, 16, 1)
    stream = [text[i].tolist() for i in range(240)]
    for ranks in (1, 2, 3, 4, 8):
        texts = [TrainingText(tokens, 16, 1) for _ in range(ranks)]
        assert [texts[i % ranks][i].tolist() for i in range(240)] == stream


def test_the_stream_is_the_same_in_another_process() -> None:
    code = (
        "import numpy as np; from reshard.text.order import TrainingText, stream_hash;"
        "print(stream_hash(TrainingText(np.arange(5000, dtype=np.uint16), 16, 9), 0, 700))"
    )
    ours = stream_hash(TrainingText(np.arange(5000, dtype=np.uint16), 16, 9), 0, 700)
    for hash_seed in ("0", "1"):
        run = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env={"PYTHONHASHSEED": hash_seed, **_path()},
        )
        assert run.stdout.strip() == ours


def test_the_order_is_a_fixed_promise() -> None:
    """A checkpoint only holds a position: a new order for old seeds would silently change what a resume reads."""
    assert [Shuffle(20, 0, 0)[turn] for turn in range(20)] == FIXED_20
    assert [Shuffle(10**9, 1234, 5)[turn] for turn in range(3)] == FIXED_BILLION


def test_a_short_text_is_refused_with_the_numbers() -> None:
    assert TrainingText(np.zeros(17, dtype=np.uint16), 16, 0).sequences_per_epoch == 1
    with pytest.raises(DataError, match=r"16 tokens.*seq_len 16 needs 17") as caught:
        TrainingText(np.zeros(16, dtype=np.uint16), 16, 0)
    assert "--training.seq_len 15" in str(caught.value)
    with pytest.raises(DataError):
        TrainingText(np.zeros(0, dtype=np.uint16), 16, 0)


def test_there_is_nothing_before_the_first_sequence() -> None:
    with pytest.raises(IndexError):
        TrainingText(np.zeros(100, dtype=np.uint16), 16, 0)[-1]


def test_held_out_sequences_are_fixed_and_spread_over_the_text() -> None:
    tokens = np.arange(1001, dtype=np.uint16)
    few = held_out(tokens, 10, 4)
    assert few.shape == (4, 11)
    assert few.dtype == np.int64
    assert few[:, 0].tolist() == [0, 250, 500, 750]
    assert (np.diff(few, axis=1) == 1).all()
    assert (held_out(tokens, 10, 4) == few).all()
    everything = held_out(tokens, 10, 1000)
    assert everything[:, 0].tolist() == list(range(0, 1000, 10))
    assert held_out(tokens[:10], 10, 4).shape == (0, 11)
    assert held_out(tokens[:0], 10, 4).shape == (0, 11)


def test_count_sequences() -> None:
    assert [count_sequences(n, 4) for n in (0, 1, 4, 5, 8, 9)] == [0, 0, 0, 1, 1, 2]


def test_a_sequence_is_found_in_microseconds() -> None:
    text = TrainingText(np.zeros(100_000, dtype=np.uint16), 16, 0)
    started = time.perf_counter()
    for i in range(2000):
        text[i]
    assert time.perf_counter() - started < 1.0  # 9 us each when the machine is idle


def _path() -> dict[str, str]:
    return {"PYTHONPATH": ":".join(sys.path)}


FIXED_20 = [16, 2, 8, 6, 5, 19, 17, 12, 18, 15, 7, 3, 9, 0, 11, 14, 1, 10, 13, 4]
FIXED_BILLION = [898878693, 705041927, 468848163]
