"""Is what torchtune's builders cannot say refused, rather than written as a recipe for another model?

The builders' arguments and fixed numbers are those of torchtune 0.6.1: models/llama3/, llama3_1/ and llama3_2/
_component_builders.py; Llama3ScaledRoPE has low 1, high 4 and a context of 8,192 as its defaults.
"""

from dataclasses import replace

import pytest

from reshard.commands.check import check
from reshard.config import load_config
from reshard.errors import FormatError
from reshard.formats.torchtune import builder_of
from reshard.model.spec import LlamaSpec, RopeScaling, flavor

SPEC = LlamaSpec(dim=64, n_layers=1, n_heads=4, n_kv_heads=2, ffn_dim=96, vocab_size=128, rope_theta=10000.0)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"head_dim": 32}, "head_dim 32 (it would be 16)"),
        ({"rope_theta": 10000.5}, "rope_theta 10000.5 (it would be 10000)"),
        ({"rope_scaling": RopeScaling(factor=2.5)}, "rope_scaling.factor 2.5 (it would be 2)"),
        ({"rope_scaling": RopeScaling(original_context=4096)}, "rope_scaling.original_context 4096 (it would be 8192)"),
        ({"rope_scaling": RopeScaling(high_freq_factor=8.0)}, "rope_scaling.high_freq_factor 8 (it would be 4)"),
        ({"rope_scaling": RopeScaling(low_freq_factor=2.0)}, "rope_scaling.low_freq_factor 2 (it would be 1)"),
    ],
)
def test_it_is_refused_by_name(changes, named, tied):
    with pytest.raises(FormatError) as error:
        builder_of(replace(SPEC, tied=tied, **changes))
    assert named in error.value.message
    assert "--to hf" in error.value.hint


def test_what_they_can_say_is_not():
    for spec in (
        SPEC,
        replace(SPEC, tied=True),
        replace(SPEC, rope_scaling=RopeScaling(16.0)),
        flavor("llama3_2", "3B"),
    ):
        builder, arguments = builder_of(spec)
        assert arguments.get("scale_factor", 1) == (spec.rope_scaling.factor if spec.rope_scaling and arguments else 1)
        assert arguments.get("rope_base", spec.rope_theta) == spec.rope_theta
        assert builder.startswith("torchtune.models.llama3")


def test_an_export_that_cannot_be_written_is_known_before_the_training():
    export = ["--checkpoint.enable_checkpoint", "--checkpoint.export", "torchtune"]
    words = ["--model.rope_theta", "10000.5", *export]
    config, _ = load_config(None, words)
    with pytest.raises(FormatError, match=r"rope_theta 10000\.5"):
        check(config, 1)
    check(load_config(None, export)[0], 1)
