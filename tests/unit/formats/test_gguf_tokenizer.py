"""Does a tokenizer keep its meaning on its way into a GGUF and out of it? What llama.cpp would read otherwise is refused.

The other side: transformers' AutoTokenizer, and gguf's SpecialVocab, by which llama.cpp's own converter goes.
"""

import json
import logging

import gguf
import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from reshard.errors import DataError
from reshard.formats.gguf_tokenizer import read_tokenizer, tokenizer_values
from reshard.model.spec import LlamaSpec
from reshard.text.tokenizers import LLAMA3_SPLIT

SPEC = LlamaSpec(dim=64, n_layers=1, n_heads=4, n_kv_heads=2, ffn_dim=96, vocab_size=320)
BOS, END, EOM, EOT, OTHER = SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>", "<|eom_id|>", "<|eot_id|>", "<other>"]
TEXT = "the quick brown fox, 12345 of them's\n\n  and Grüße, 世界!"


def byte_level(split=True, **model):
    """A tokenizer as Llama 3's, or as GPT-2's."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=split, **model))
    own = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not split)
    cut = pre_tokenizers.Split(Regex(LLAMA3_SPLIT), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([cut, own]) if split else own
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["the quick brown fox"] * 9, trainer)
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


def around(tokenizer, template):
    named = [(token, tokenizer.token_to_id(token)) for token in SPECIAL]
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=named)
    return tokenizer


def files(folder, tokenizer, settings=None, generation=None):
    """A folder as transformers has it, and the same as what travels with weights."""
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BOS, "eos_token": EOT} | (settings or {})
        )
    )
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    return {path.name: path for path in folder.iterdir() if path.name != "config.json"}


def ids_of(tokenizer):
    return {token: tokenizer.token_to_id(token) for token in SPECIAL}


def in_folder(folder, assets):
    folder.mkdir()
    for name, content in assets.items():
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.read_bytes())
    return folder


@pytest.mark.parametrize("template", ["$A", f"{BOS} $A", f"$A {EOT}", f"{BOS} $A {EOT}"])
@pytest.mark.parametrize("split", [True, False], ids=["llama-bpe", "gpt-2"])
def test_what_is_put_around_a_text_is_what_transformers_puts(tmp_path, template, split):
    from transformers import AutoTokenizer

    tokenizer = around(byte_level(split), template)
    assets = files(tmp_path / "hf", tokenizer)
    expected = AutoTokenizer.from_pretrained(tmp_path / "hf")(TEXT)["input_ids"]
    values = tokenizer_values(
        assets, SPEC, {"bos_token_id": 1, "eos_token_id": 2}
    )  # LlamaConfig's own, of another tokenizer
    bos, eot = ids_of(tokenizer)[BOS], ids_of(tokenizer)[EOT]
    assert values["tokenizer.ggml.add_bos_token"] == (expected[0] == bos) == template.startswith(BOS)
    assert values["tokenizer.ggml.add_eos_token"] == (expected[-1] == eot) == template.endswith(EOT)
    theirs = gguf.SpecialVocab(tmp_path / "hf")
    assert values["tokenizer.ggml.bos_token_id"] == theirs.special_token_ids["bos"] == bos
    assert values["tokenizer.ggml.eos_token_id"] == theirs.special_token_ids["eos"] == eot
    assert values["tokenizer.ggml.pre"] == ("llama-bpe" if split else "gpt-2")
    back = read_tokenizer(values, tmp_path / "m.gguf")
    if split:
        again = AutoTokenizer.from_pretrained(in_folder(tmp_path / "again", back.assets))
        assert again(TEXT)["input_ids"] == expected
        assert (again.bos_token, again.eos_token) == (BOS, EOT)
    else:
        assert "cuts text as 'gpt-2'" in back.problem
        assert not back.assets


def test_all_tokens_that_end_a_text_are_kept(tmp_path):
    tokenizer = byte_level()
    ids = ids_of(tokenizer)
    for stops, second in (
        ([ids[END], ids[EOM], ids[EOT]], ids[END]),  # llama.cpp knows <|eom_id|> by its name
        ([ids[EOT]], None),
        (ids[OTHER], ids[OTHER]),
        ([ids[EOT], ids[EOM]], None),
    ):
        assets = files(tmp_path / "hf", tokenizer, generation=stops)
        values = tokenizer_values(assets, SPEC, {"eos_token_id": stops})
        assert (
            values["tokenizer.ggml.eos_token_id"]
            == gguf.SpecialVocab(tmp_path / "hf").special_token_ids["eos"]
            == ids[EOT]
        )
        assert values.get("tokenizer.ggml.eom_token_id") == second
        about = read_tokenizer(values, tmp_path / "m.gguf").about
        assert about.get("stop_token_ids", [about["eos_token_id"]]) == [
            ids[EOT],
            *([second] if second is not None else []),
        ]
    assets = files(tmp_path / "hf", tokenizer, generation=[ids[END], ids[OTHER], ids[EOT]])
    with pytest.raises(DataError, match="a GGUF can say two of them") as error:
        tokenizer_values(assets, SPEC, {})
    assert "--no-tokenizer" in error.value.hint


def test_pad_unknown_and_every_chat_template(tmp_path):
    from transformers import AutoTokenizer

    tokenizer = byte_level()
    templates = [{"name": "default", "template": "{{ 1 }}"}, {"name": "tool_use", "template": "{{ 2 }}"}]
    assets = files(tmp_path / "hf", tokenizer, {"pad_token": END, "unk_token": OTHER, "chat_template": templates})
    values = tokenizer_values(assets, SPEC, {})
    assert values["tokenizer.ggml.padding_token_id"] == ids_of(tokenizer)[END]
    assert values["tokenizer.ggml.unknown_token_id"] == ids_of(tokenizer)[OTHER]
    assert values["tokenizer.chat_template"] == "{{ 1 }}"
    assert values["tokenizer.chat_templates"] == ["tool_use"]
    assert values["tokenizer.chat_template.tool_use"] == "{{ 2 }}"
    again = AutoTokenizer.from_pretrained(in_folder(tmp_path / "again", read_tokenizer(values, tmp_path).assets))
    assert again.chat_template == {"default": "{{ 1 }}", "tool_use": "{{ 2 }}"}
    assert (again.pad_token, again.unk_token) == (END, OTHER)


def normalising(tokenizer):
    tokenizer.normalizer = normalizers.NFC()


def digits(tokenizer):
    own = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), own])


def another_split(tokenizer):
    """Llama 3's but for one word; the part about numbers is the same."""
    cut = pre_tokenizers.Split(Regex(LLAMA3_SPLIT.replace("'ll|", "")), "isolated")
    own = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([cut, own])


def prefix_space(tokenizer):
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)


def two_before(tokenizer):
    around(tokenizer, f"{BOS} {OTHER} $A")


def another_before(tokenizer):
    around(tokenizer, f"{OTHER} $A")


@pytest.mark.parametrize(
    ("spoil", "named"),
    [(normalising, "normalises"), (digits, "cuts text"), (another_split, "cuts text"), (prefix_space, "cuts text"),
     (two_before, "more around a text"), (another_before, "puts <other> around each text")],
)  # fmt: skip
def test_what_no_name_stands_for_is_refused(tmp_path, spoil, named):
    tokenizer = byte_level()
    spoil(tokenizer)
    with pytest.raises(DataError, match=named) as error:
        tokenizer_values(files(tmp_path / "hf", tokenizer), SPEC, {})
    assert "--no-tokenizer" in error.value.hint


def test_other_kinds_and_sizes_are_refused(tmp_path):
    pieces = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    with pytest.raises(DataError, match="not a byte-level BPE"):
        tokenizer_values(files(tmp_path / "spm", pieces), SPEC, {})
    small = LlamaSpec(**{**SPEC.__dict__, "vocab_size": 260})
    with pytest.raises(DataError, match="the model has 260 rows"):
        tokenizer_values(files(tmp_path / "hf", byte_level()), small, {})
    with pytest.raises(DataError, match="eos_token_id is 320, expected one of the model's 320 tokens"):
        tokenizer_values(files(tmp_path / "hf", byte_level(), generation=[320]), SPEC, {})
    assert tokenizer_values({}, SPEC, {}) == {}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"tokenizer.ggml.model": "llama"}, "of type 'llama'"),
        ({"tokenizer.ggml.pre": "qwen2"}, "cuts text as 'qwen2'"),
        ({"tokenizer.ggml.pre": None}, "cuts text as None"),
        ({"tokenizer.ggml.bos_token_id": 320}, "bos_token_id is 320"),
        ({"tokenizer.ggml.bos_token_id": 5}, "a bos token that is no special token"),
        ({"tokenizer.ggml.add_sep_token": True}, "separator"),
        ({"tokenizer.ggml.token_type": [1, 6] * 160}, "tokens of type 6"),
        ({"tokenizer.ggml.merges": None}, "no merges"),
    ],
)
def test_a_ggufs_tokenizer_that_cannot_be_handed_on_says_why(tmp_path, changes, named):
    values = tokenizer_values(files(tmp_path / "hf", around(byte_level(), f"{BOS} $A")), SPEC, {})
    found = read_tokenizer(
        {key: value for key, value in (values | changes).items() if value is not None}, tmp_path / "m.gguf"
    )
    assert named in found.problem
    assert found.assets == {}


def test_llama_cpps_own_default_of_bos(tmp_path):
    """For Llama 3's way to cut, a file that does not say it means that each text begins with bos."""
    from transformers import AutoTokenizer

    tokenizer = byte_level()
    values = tokenizer_values(files(tmp_path / "hf", tokenizer), SPEC, {})
    assert values.pop("tokenizer.ggml.add_bos_token") is False
    again = AutoTokenizer.from_pretrained(in_folder(tmp_path / "again", read_tokenizer(values, tmp_path).assets))
    assert again("the")["input_ids"][0] == ids_of(tokenizer)[BOS]


def test_what_transformers_does_not_heed_is_said(tmp_path, caplog):
    """transformers 5 goes by tokenizer.json, whatever tokenizer_config.json says of bos."""
    from transformers import AutoTokenizer

    tokenizer = around(byte_level(), f"{BOS} $A")
    assets = files(tmp_path / "hf", tokenizer, {"add_bos_token": False})
    with caplog.at_level(logging.WARNING):
        values = tokenizer_values(assets, SPEC, {})
    first = AutoTokenizer.from_pretrained(tmp_path / "hf")("the")["input_ids"][0]
    assert values["tokenizer.ggml.add_bos_token"] is (first == ids_of(tokenizer)[BOS]) is True
    assert "add_bos_token" in caplog.text
