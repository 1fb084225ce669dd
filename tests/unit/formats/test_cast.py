"""Is a cast the one that torch makes, bit for bit, NaNs and infinities included?"""

import numpy as np
import pytest
import torch

from reshard.errors import FormatError
from reshard.formats.cast import cast, cast_into, restored
from reshard.formats.gguf import Constant

DTYPES = ("float32", "bfloat16", "float16", "float64")


def every_kind_of_number(dtype):
    generator = torch.Generator().manual_seed(5)
    if dtype in ("bfloat16", "float16"):
        return torch.arange(65536, dtype=torch.int32).to(torch.int16).view(getattr(torch, dtype))  # all there are
    bits = torch.randint(-(2**31), 2**31, (300_000,), generator=generator).to(torch.int32).view(torch.float32)
    ties = torch.tensor([0x3F808000, 0x3F818000, 0x7F7F8000, 0x7F7F7FFF, 0x7F800000, 0x00000001, 0x33000000])
    bits = torch.cat([bits, ties.to(torch.int32).view(torch.float32), torch.randn(100_000, generator=generator)])
    return (
        bits if dtype == "float32" else torch.cat([bits.double(), torch.randn(100_000, generator=generator).double()])
    )


@pytest.mark.parametrize("source", DTYPES)
@pytest.mark.parametrize("target", DTYPES)
def test_as_torch_does(source, target):
    values = every_kind_of_number(source)
    expected = values.to(getattr(torch, target))
    out = np.empty(expected.nbytes, np.uint8)
    finite = cast_into(out, values.view(torch.uint8).numpy(), source, target)
    got = torch.from_numpy(out).view(getattr(torch, target))
    nan = torch.isnan(values)
    assert torch.isnan(got[nan]).all()
    assert torch.equal(got[~nan].view(torch.uint8), expected[~nan].view(torch.uint8))
    assert finite == (not (torch.isinf(expected) & ~torch.isinf(values)).any())


def test_too_large_a_number_is_named_with_its_tensor():
    tensor = cast(Constant("layers.1.attention.wv.weight", np.array([1.0, -1e6], np.float32)), "float16")
    with pytest.raises(FormatError, match=r"layers\.1\.attention\.wv\.weight has numbers up to 1e\+06.*float16"):
        tensor.fill(np.empty(4, np.uint8), 0, 2)


def test_an_infinity_that_was_there_stays():
    tensor = cast(Constant("w", np.array([np.inf, 1.0], np.float32)), "float16")
    out = np.empty(4, np.uint8)
    tensor.fill(out, 0, 2)
    assert np.isinf(out.view(np.float16)[0])


def test_a_narrower_dtype_is_restored_only_where_no_number_changes():
    exact, inexact = np.array([1.0, 1.5], np.float32), np.array([1.0, 1.0001], np.float32)
    assert restored(Constant("a", exact), "bfloat16").dtype == "bfloat16"
    assert restored(Constant("a", inexact), "bfloat16").dtype == "float32"
    assert restored(Constant("a", exact), "float32").dtype == "float32"
