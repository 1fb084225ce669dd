"""Is THE permutation the one of the two orders, for any run of rows? Against loops written out by hand."""

import numpy as np
import pytest

from reshard.formats.gguf import Constant
from reshard.formats.rotary import Rotated, rotary_heads, rotated
from reshard.model.spec import LlamaSpec

SPEC = LlamaSpec(dim=24, n_layers=1, n_heads=3, n_kv_heads=1, ffn_dim=8, vocab_size=8)  # head_dim 8


def by_hand(values, head_dim, order):
    """Row by row: where does each row of the other order come from?"""
    out = np.empty_like(values)
    for row in range(len(values)):
        head, r = divmod(row, head_dim)
        if order == "halves":  # row i of the first half is the even one of pair i
            half, i = divmod(r, head_dim // 2)
            source = 2 * i + half
        else:
            i, parity = divmod(r, 2)
            source = i + parity * (head_dim // 2)
        out[row] = values[head * head_dim + source]
    return out


@pytest.mark.parametrize("order", ["halves", "pairs"])
@pytest.mark.parametrize("rows", [(0, 24), (8, 16), (3, 5), (7, 17), (0, 1), (23, 24), (4, 4)])
def test_any_run_of_rows(order, rows):
    values = np.arange(24 * 24, dtype=np.float32).reshape(24, 24)
    tensor = Rotated(Constant("w", values), 8, order)
    buffer = np.empty((rows[1] - rows[0]) * 24 * 4, np.uint8)
    tensor.fill(buffer, *rows)
    assert np.array_equal(buffer.view(np.float32).reshape(-1, 24), by_hand(values, 8, order)[rows[0] : rows[1]])


def test_there_and_back_is_nothing():
    inner = Constant("w", np.zeros((24, 24), np.float32))
    there = rotated(inner, "layers.0.attention.wq.weight", SPEC, "halves")
    assert there.grain == 8
    assert rotated(there, "layers.0.attention.wq.weight", SPEC, "pairs") is inner


def test_only_queries_and_keys_and_each_with_its_heads():
    assert rotary_heads("layers.11.attention.wq.weight", SPEC) == 3
    assert rotary_heads("layers.11.attention.wk.weight", SPEC) == 1
    for name in ("attention.wv", "attention.wo", "feed_forward.w1", "attention_norm"):
        assert rotary_heads(f"layers.0.{name}.weight", SPEC) is None
