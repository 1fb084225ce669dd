"""Every kind of source, and every way in which one cannot be used."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from reshard.config import Training
from reshard.errors import DataError
from reshard.text import load_tokenizer
from reshard.text.sources import PIECE_CHARACTERS, HubDataset, LocalFiles, StandardLibrary, open_source


def documents(dataset: Path | str, **training: Any) -> list[str]:
    return list(open_source(Training(dataset=str(dataset), **training)).documents())


def write_records(file: Path, records: list[Any]) -> Path:
    file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return file


def test_stdlib_is_the_source_of_this_python() -> None:
    source = open_source(Training())
    assert isinstance(source, StandardLibrary)
    assert source.total_bytes is not None
    assert source.total_bytes > 8 << 20
    names = [file.relative_to(source.root).as_posix() for file in source.files]
    assert names == sorted(names)
    assert {"argparse.py", "json/decoder.py", "asyncio/tasks.py"} <= set(names)
    assert not [n for n in names if {"test", "tests", "idle_test", "site-packages"} & set(Path(n).parts)]
    first = next(source.documents())
    assert first == source.files[0].read_text(encoding="utf-8")
    assert open_source(Training()).identity == source.identity
    assert f"Python {sys.version_info.major}.{sys.version_info.minor}" in source.name


def test_stdlib_elsewhere_leaves_out_tests_and_other_encodings(tmp_path: Path) -> None:
    for name, content in {
        "b.py": b"b = 1\n",
        "a/x.py": "ä = 1\n".encode(),
        "a/latin.py": "# -*- coding: latin-1 -*-\nä = 1\n".encode("latin-1"),
        "a/empty.py": b"",
        "test/t.py": b"no = 1\n",
        "a/tests/t.py": b"no = 1\n",
        "site-packages/s.py": b"no = 1\n",
        "note.txt": b"no",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    assert documents("stdlib", dataset_path=str(tmp_path)) == ["ä = 1\n", "b = 1\n"]
    (tmp_path / "moved").mkdir()
    with pytest.raises(DataError, match=r"no \.py files"):
        open_source(Training(dataset_path=str(tmp_path / "moved")))


def test_a_text_file_is_one_document_as_it_is(tmp_path: Path) -> None:
    text = "first line\r\nsecond 漢字 🙂\n\n\x0ctail without newline"
    for name in ("a.txt", "a.md", "a.py", "NOTES", "a.weird"):
        file = tmp_path / name
        file.write_bytes(text.encode())
        assert documents(file) == [text]
    bom = tmp_path / "bom.txt"
    bom.write_bytes(b"\xef\xbb\xbfhello")
    assert documents(bom) == ["hello"]


def test_jsonl(tmp_path: Path) -> None:
    records = [
        {"text": "one", "id": 1},
        {"text": "  \n"},
        {"text": None},
        {"text": "zwei ü", "more": [1]},
        {"text": ""},
    ]
    file = write_records(tmp_path / "a.jsonl", records)
    file.write_text("\ufeff" + file.read_text().replace('{"text": null}', "\n\n") + "\n", encoding="utf-8")
    assert documents(file) == ["one", "zwei ü"]
    assert documents(write_records(tmp_path / "b.json", [{"body": "x", "text": 3}]), text_column="body") == ["x"]
    last_without_newline = tmp_path / "c.jsonl"
    last_without_newline.write_bytes(b'{"text": "a"}\r\n{"text": "b"}')
    assert documents(last_without_newline) == ["a", "b"]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_parquet(tmp_path: Path, kind: pa.DataType) -> None:
    texts = [f"text {i} ü" for i in range(1000)] + [None, " "]
    table = pa.table({"id": list(range(1002)), "text": pa.array(texts).cast(kind)})
    file = tmp_path / "a.parquet"
    pq.write_table(table, file, row_group_size=300)
    assert documents(file) == texts[:1000]


def test_a_folder_is_read_in_order_with_all_that_we_can_read(tmp_path: Path) -> None:
    (tmp_path / "b" / "c").mkdir(parents=True)
    (tmp_path / "b" / "c" / "x.txt").write_text("x")
    (tmp_path / "a.py").write_text("a")
    (tmp_path / "b" / "y.md").write_text("y")
    (tmp_path / "blank.txt").write_text(" \n\n")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    (tmp_path / ".hidden.txt").write_text("hidden")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "z.txt").write_text("git")
    write_records(tmp_path / "b" / "r.jsonl", [{"text": "r1"}, {"text": "r2"}])
    pq.write_table(pa.table({"text": ["p"]}), tmp_path / "z.parquet")
    assert documents(tmp_path) == ["a", "x", "r1", "r2", "y", "p"]
    assert documents("mine", dataset_path=str(tmp_path / "b")) == ["x", "r1", "r2", "y"]


def test_links_are_followed_once(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "real.txt").write_text("linked file")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "o.txt").write_text("linked folder")
    (tmp_path / "data" / "f.txt").symlink_to(tmp_path / "real.txt")
    (tmp_path / "data" / "o").symlink_to(tmp_path / "other")
    (tmp_path / "other" / "loop").symlink_to(tmp_path / "data")
    assert documents(tmp_path / "data") == ["linked file", "linked folder"]


def test_globs(tmp_path: Path) -> None:
    for name in ("b.log1", "a.log1", "sub/c.log1", "no.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert documents(f"{tmp_path}/*.log1") == ["a.log1", "b.log1"]
    assert documents(f"{tmp_path}/**/*.log1") == ["a.log1", "b.log1", "sub/c.log1"]
    with pytest.raises(DataError, match="no file matches"):
        open_source(Training(dataset=f"{tmp_path}/*.nothing"))


def test_large_text_comes_in_pieces_that_tokenise_as_the_whole(tmp_path: Path, tokenizer_model: Path) -> None:
    line = "the thing — 漢字 — is\tin 12345 places;    return it\n\n  \n"
    text = line * (3 * PIECE_CHARACTERS // len(line))
    file, records = tmp_path / "big.txt", write_records(tmp_path / "big.jsonl", [{"text": text}, {"text": "small"}])
    file.write_text(text, encoding="utf-8")
    pieces = list(open_source(Training(dataset=str(file))).pieces())
    assert [piece.last for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert len(pieces) >= 3
    assert all(len(piece.text) <= PIECE_CHARACTERS for piece in pieces)
    assert "".join(piece.text for piece in pieces) == text
    assert sum(piece.source_bytes for piece in pieces) == file.stat().st_size
    assert documents(records) == [text, "small"]
    from_records = [piece.text for piece in open_source(Training(dataset=str(records))).pieces()]
    assert from_records[:-1] == [piece.text for piece in pieces]
    tokenizer = load_tokenizer(str(tokenizer_model), vocab_size=1000, cache_folder=tmp_path)
    [whole] = tokenizer.encode_batch([text])
    in_pieces = [i for ids in tokenizer.encode_batch([piece.text for piece in pieces]) for i in ids.tolist()]
    assert in_pieces == whole.tolist()


@pytest.mark.parametrize("unit", ["x", "\n", "word ", "漢", "\U0001f642"])
def test_large_text_without_good_places_to_cut(tmp_path: Path, unit: str) -> None:
    text = "a" + unit * (2 * PIECE_CHARACTERS // len(unit)) + "b"
    file = tmp_path / "big.txt"
    file.write_text(text, encoding="utf-8", newline="")
    assert documents(file) == [text]


def test_a_large_file_is_never_in_memory(tmp_path: Path) -> None:
    file = tmp_path / "big.txt"
    with open(file, "w", encoding="utf-8") as stream:
        for _ in range(64):
            stream.write("some words of a long book\n" * 40_000)
    tracemalloc.start()
    count = sum(len(piece.text) for piece in open_source(Training(dataset=str(file))).pieces())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == file.stat().st_size > 60 << 20
    assert peak < 16 << 20


def test_identity_follows_content_place_and_column(tmp_path: Path) -> None:
    file = write_records(tmp_path / "a.jsonl", [{"text": "one", "body": "two"}])
    identity = open_source(Training(dataset=str(file))).identity
    assert open_source(Training(dataset=str(file))).identity == identity
    assert open_source(Training(dataset=str(tmp_path))).identity == identity  # the folder holds the same one file
    assert open_source(Training(dataset=str(file), text_column="body")).identity != identity
    os.utime(file, ns=(1, 1))
    assert open_source(Training(dataset=str(file))).identity != identity
    hub = {
        open_source(Training(dataset="org/name", dataset_split=split)).identity
        for split in ("train", "test", "train[:5]")
    }
    hub |= {open_source(Training(dataset=name)).identity for name in ("org/name:en", "org/other")}
    assert len(hub) == 5


def test_names_of_torchtitan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    c4 = open_source(Training(dataset="c4"))
    assert isinstance(c4, HubDataset)
    assert (c4.path, c4.config, c4.split) == ("allenai/c4", "en", "train")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="tests/assets/c4_test") as caught:
        open_source(Training(dataset="c4_test"))
    assert "--training.dataset_path" in str(caught.value)
    folder = tmp_path / "tests" / "assets" / "c4_test"
    folder.mkdir(parents=True)
    write_records(folder / "data.json", [{"text": "c4", "timestamp": "2019", "url": "http"}])
    assert documents("c4_test") == ["c4"]
    assert documents("c4_test", dataset_path="tests/assets/c4_test/data.json") == ["c4"]


def test_hub_names_are_told_from_paths() -> None:
    for name in ("roneneldan/TinyStories", "wikitext", "org/name:config-1.0"):
        source = open_source(Training(dataset=name))
        assert isinstance(source, HubDataset)
        assert source.path == name.partition(":")[0]
    for name in (
        "./data",
        "data/corpus.txt",
        "corpus.jsonl",
        "/no/such/place",
        "a/b/c",
        "data/",
        "~/corpus",
        "two words",
    ):
        with pytest.raises(DataError, match="does not exist"):
            open_source(Training(dataset=name))


def test_what_does_not_exist_has_a_neighbour(tmp_path: Path) -> None:
    (tmp_path / "corpus.txt").write_text("x")
    with pytest.raises(DataError, match="does not exist") as caught:
        open_source(Training(dataset=str(tmp_path / "corups.txt")))
    assert f"did you mean {tmp_path / 'corpus.txt'}" in str(caught.value)
    with pytest.raises(DataError, match="does not exist"):
        open_source(Training(dataset="mine", dataset_path=str(tmp_path / "nowhere")))


def test_empty_sources(tmp_path: Path) -> None:
    (tmp_path / "blank.txt").write_text(" \n\t\n" * 10)
    (tmp_path / "empty.txt").write_text("")
    write_records(tmp_path / "blank.jsonl", [{"text": ""}, {"text": None}])
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "none.parquet")
    for name in ("blank.txt", "empty.txt", "blank.jsonl", "none.parquet", ""):
        with pytest.raises(DataError, match="is empty"):
            documents(tmp_path / name)
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match="holds no text: no files"):
        documents(tmp_path / "folder")
    (tmp_path / "folder" / "a.png").write_bytes(b"\x89PNG")
    with pytest.raises(DataError, match=r"holds no text: only \.png"):
        documents(tmp_path / "folder")


@pytest.mark.parametrize("before", [0, 5, (1 << 20) - 1, 1 << 20, 3 << 20])
def test_not_utf8_is_refused_at_its_byte(tmp_path: Path, before: int) -> None:
    file = tmp_path / "latin.txt"
    file.write_bytes(b"x" * before + "é".encode("latin-1") + b" and more")
    with pytest.raises(DataError, match=rf"not UTF-8 at byte {before} \(0xe9") as caught:
        documents(file)
    assert caught.value.path == str(file)
    assert "iconv" in str(caught.value)


def test_a_character_cut_off_at_the_end_and_one_across_blocks(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes(b"ab" + "漢".encode()[:2])
    with pytest.raises(DataError, match="not UTF-8 at byte 2"):
        documents(file)
    text = "x" * ((1 << 20) - 1) + "漢"
    file.write_bytes(text.encode())
    assert documents(file) == [text]
    file.write_bytes(b"x" * ((1 << 20) - 1) + b"\xe6\xbcz")
    with pytest.raises(DataError, match=rf"not UTF-8 at byte {(1 << 20) - 1} "):
        documents(file)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_utf16_is_not_utf8_even_where_its_bytes_are(tmp_path: Path, encoding: str) -> None:
    file = tmp_path / "wide.txt"
    file.write_bytes("plain ascii words".encode(encoding))
    with pytest.raises(DataError, match=r"not UTF-8"):
        documents(file)


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        (b'{"text": "a"}\n{"body": "b", "url": "u"}\n', r"line 2: no `text`, only body, url"),
        (b'{"text": "a"}\n{"text": "b"\n', r"line 2: not a JSON record"),
        (b'{"text": "a"}\n\n\n{}\n', r"line 4: no `text`, only an empty record"),
        (b'{"text": 3}\n', r"line 1: `text` is int, expected a string"),
        (b'{"text": ["a"]}\n', r"line 1: `text` is list, expected a string"),
        (b'"text"\n', r"line 1: expected a JSON object, got str"),
        (b'[{"text": "a"}]\n', r"line 1: expected a JSON object, got list"),
        (b'[\n{"text": "a"}\n]\n', r"line 1: not a JSON record"),
        (b'{\n"text": "a"\n}\n', r"line 1: not a JSON record"),
        (b'{"text": "a"}\n{"text": "\xe9"}\n', r"not UTF-8 at byte 24 \(0xe9"),
        (b'{"text": "a\\ud800"}\n', r"line 1: character 1 of `text` is half of a surrogate pair \(0xd800\)"),
        (b"[" * 100_000 + b"\n", r"line 1: not a JSON record"),
        (b'{"text": "a", "n": ' + b"9" * 5000 + b"}\n", r"line 1: not a JSON record"),
    ],
)
def test_broken_records(tmp_path: Path, content: bytes, wanted: str) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(content)
    with pytest.raises(DataError, match=wanted) as caught:
        documents(file)
    assert str(file) in caught.value.message


def test_hints_of_broken_records(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        documents(write_records(tmp_path / "a.jsonl", [{"texts": "a", "id": 1}]))
    assert "--training.text_column texts" in str(caught.value)
    with pytest.raises(DataError) as caught:
        documents(write_records(tmp_path / "a.jsonl", [[{"text": "a"}]]))
    assert "jq" in str(caught.value)


def test_broken_parquet(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    pq.write_table(pa.table({"body": ["x"], "n": [1]}), file)
    with pytest.raises(DataError, match=r"no `text`, only body, n"):
        documents(file)
    with pytest.raises(DataError, match=r"column `n` holds int64, expected string"):
        documents(file, text_column="n")
    good = file.read_bytes()
    for bad in (b"", b"PAR1", good[: len(good) // 2], b"hello" * 100):
        file.write_bytes(bad)
        with pytest.raises(DataError, match="cannot be read"):
            documents(file)
    latin = pa.array([b"fine", b"\xe9"]).view(pa.binary())
    table = pa.table({"text": pa.Array.from_buffers(pa.string(), 2, latin.buffers())})
    pq.write_table(table, file)
    with pytest.raises(DataError, match=r"row 1: not UTF-8"):
        documents(file)


@pytest.mark.parametrize("name", ["a.txt.gz", "a.jsonl.zst", "a.parquet.bz2"])
def test_compressed_files_are_refused_with_the_command(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x1f\x8b")
    with pytest.raises(DataError, match="is compressed"):
        documents(tmp_path / name)
    with pytest.raises(DataError, match="is compressed"):
        documents(f"{tmp_path}/a*")


def test_a_link_to_nothing_is_not_passed_over(tmp_path: Path) -> None:
    """A clone without its large files is full of them; a run must not train on the rest without a word."""
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "b.txt").symlink_to(tmp_path / "not" / "fetched.txt")
    with pytest.raises(DataError, match=r"b\.txt cannot be read"):
        documents(tmp_path)


def test_missing_libraries_name_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pq.write_table(pa.table({"text": ["x"]}), tmp_path / "a.parquet")
    for module in ("pyarrow", "pyarrow.parquet", "datasets"):
        monkeypatch.setitem(sys.modules, module, None)  # what Python itself does to forbid an import
    for dataset in (str(tmp_path / "a.parquet"), "org/name"):
        with pytest.raises(DataError, match="not installed") as caught:
            documents(dataset)
        assert "reshard[data]" in str(caught.value)


READ_BY_DATASETS = """
import json, sys
import datasets
from reshard.config import Training
from reshard.errors import DataError
from reshard.text.sources import open_source

folder = sys.argv[1]
datasets.disable_progress_bars()
datasets.Dataset.from_dict({"text": ["s1", "s2"]}).save_to_disk(f"{folder}/saved")
datasets.DatasetDict({"train": datasets.Dataset.from_dict({"text": ["d1"]})}).save_to_disk(f"{folder}/saved_dict")

def read(**training):
    try:
        source = open_source(Training(**training))
        return [type(source).__name__, list(source.documents())]
    except DataError as error:
        return ["DataError", str(error)]

print(json.dumps({
    "train": read(dataset=f"{folder}/repo"),
    "test": read(dataset=f"{folder}/repo", dataset_split="test"),
    "part": read(dataset=f"{folder}/repo", dataset_split="train[1:4]"),
    "named": read(dataset="org/name", dataset_path=f"{folder}/repo"),
    "no_split": read(dataset=f"{folder}/repo", dataset_split="nope"),
    "no_column": read(dataset=f"{folder}/repo", text_column="body"),
    "saved": read(dataset=f"{folder}/saved"),
    "saved_dict": read(dataset=f"{folder}/saved_dict"),
    "saved_no_split": read(dataset=f"{folder}/saved_dict", dataset_split="test"),
    "gz": read(dataset="c4", dataset_path=f"{folder}/c4"),
    "broken": read(dataset=f"{folder}/broken"),
    "hub": read(dataset="nobody/nothing-here"),
    "typo": read(dataset="sdtlib"),
}))
"""


def test_folders_that_datasets_reads(tmp_path: Path) -> None:
    """Hub clones, save_to_disk folders and compressed shards, in a process of its own (cache and offline switch)."""
    import gzip

    card = "---\ndataset_info:\n  features:\n  - name: text\n    dtype: string\n---\n# Not a document\n"
    for name in ("repo", "broken"):
        (tmp_path / name / "data").mkdir(parents=True)
        (tmp_path / name / "README.md").write_text(card)
    pq.write_table(
        pa.table({"text": ["one", "two", " ", "three"]}), tmp_path / "repo/data/train-00000-of-00001.parquet"
    )
    pq.write_table(pa.table({"text": ["held out"]}), tmp_path / "repo/data/test-00000-of-00001.parquet")
    (tmp_path / "broken/data/train.parquet").write_bytes(b"PAR1 nothing")
    for name, text in (
        ("c4-train.00000-of-00002", "c0"),
        ("c4-train.00001-of-00002", "c1"),
        ("c4-validation.00000-of-00001", "v"),
    ):
        (tmp_path / "c4" / "en").mkdir(parents=True, exist_ok=True)
        (tmp_path / "c4" / "en" / f"{name}.json.gz").write_bytes(
            gzip.compress(json.dumps({"text": text}).encode() + b"\n")
        )
    env = os.environ | {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": ":".join(sys.path)}
    run = subprocess.run(
        [sys.executable, "-c", READ_BY_DATASETS, str(tmp_path)], capture_output=True, text=True, env=env, check=False
    )
    assert run.returncode == 0, run.stderr
    got = json.loads(run.stdout.splitlines()[-1])
    assert got["train"] == ["HubDataset", ["one", "two", "three"]]
    assert got["test"] == ["HubDataset", ["held out"]]
    assert got["part"] == ["HubDataset", ["two", "three"]]
    assert got["named"] == got["train"]
    assert got["saved"] == ["HubDataset", ["s1", "s2"]]
    assert got["saved_dict"] == ["HubDataset", ["d1"]]
    assert got["gz"] == ["HubDataset", ["c0", "c1"]]
    for key, wanted in {
        "no_split": ("nope", "--training.dataset_split"),
        "no_column": ("record 1 of dataset", "no `body`, only text", "--training.text_column"),
        "saved_no_split": ("`test` is not one of train",),
        "broken": ("broken",),
        "hub": ("`nobody/nothing-here` is neither a file here nor can `datasets` open it",),
        "typo": ("did you mean `stdlib`?",),
    }.items():
        assert got[key][0] == "DataError", key
        assert all(part in got[key][1] for part in wanted), got[key]


def test_splits_that_streams_do_not_have() -> None:
    for split in ("train[:10%]", "train[-5:]", "train[3]", "train[1:2", "train+test[:3]x"):
        with pytest.raises(DataError, match="range of records"):
            open_source(Training(dataset="org/name", dataset_split=split))


def test_local_files_say_what_they_are(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    source = open_source(Training(dataset="mine", dataset_path=str(tmp_path / "a.txt")))
    assert isinstance(source, LocalFiles)
    assert (source.name, source.total_bytes) == ("mine", 1)
