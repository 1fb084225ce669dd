"""Commands that only ask something: do they write nothing, and nowhere that the file which they open names?"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from reshard.checkpoint.manifest import crc32_hex
from reshard.commands import evaluate
from reshard.commands.seed import seed
from reshard.config import load_config
from reshard.errors import DataError
from reshard.train.metrics import Journal

TEXT = "".join(f"line {i} of a text, and no more than that.\n" for i in range(400))


def changed(step: Path, **sections: dict[str, Any]) -> None:
    """Give a checkpoint another config, as whoever made it could have: its digest is right."""
    body = json.loads((step / "manifest.json").read_text())
    for section, values in sections.items():
        body["config"][section] |= values
    del body["digest"]
    digest = crc32_hex(json.dumps(body, sort_keys=True, separators=(",", ":")).encode())
    (step / "manifest.json").write_text(json.dumps(body | {"digest": digest}))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stranger's run: a text, a checkpoint whose tokenizer was trained on it, and a journal."""
    place = tmp_path_factory.mktemp("theirs")
    (place / "text.txt").write_text(TEXT)
    words = ["--model.dim", "16", "--model.n_layers", "1", "--model.n_heads", "2", "--model.n_kv_heads", "1"]
    words += [
        "--model.vocab_size",
        "300",
        "--model.tokenizer_path",
        "bpe",
        "--training.dataset",
        str(place / "text.txt"),
    ]
    config, _ = load_config(None, [*words, "--training.seq_len", "16", "--job.dump_folder", str(place / "run")])
    seed(config)
    Journal(place / "run" / "metrics.jsonl").write({"step": 1, "loss": 2.0})
    return place


def inventory(folder: Path) -> dict[str, int]:
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in folder.rglob("*")}


def test_nothing_is_written_but_what_was_asked_for(place: Path) -> None:
    """All of them in one process, in a home and a working directory of its own."""
    step, home = place / "run/checkpoint/step-0", place / "home"
    other = Path(shutil.copytree(step, place / "run/checkpoint/step-1"))
    changed(step, job={"dump_folder": str(place / "elsewhere")})
    changed(other, training={"cache_folder": str(place / "elsewhere")})
    for name in ("cwd", "tmp"):
        (home / name).mkdir(parents=True)
    asked: list[list[object]] = [
        ["eval", step, "--sequences", 2],
        ["eval", other, "--sequences", 2],
        ["eval", other, "--data", place / "text.txt", "--sequences", 2, "--tokenizer", "bytes"],
        ["generate", step, "--prompt", "line", "--max-tokens", 2],
        ["inspect", step],
        ["inspect", step.parent],
        ["verify", step],
        ["diff", step, other],
        ["report", place / "run", "--png", "--output", home / "tmp/r.html"],
    ]
    code = (
        "import json, sys\nfrom reshard.cli import main\n"
        "for words in json.loads(sys.argv[1]):\n"
        "    try:\n        main(words)\n"
        "    except SystemExit as stop:\n        assert not stop.code, (words, stop.code)\n"
    )
    before = inventory(place)
    words = json.dumps([[str(word) for word in one] for one in asked])
    env = {k: v for k, v in os.environ.items() if not k.startswith(("XDG_", "MPL", "HF_"))}
    env |= {"HOME": str(home), "TMPDIR": str(home / "tmp"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, words], cwd=home / "cwd", env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    written = {name for name, at in inventory(place).items() if before.get(name) != at} - {"home/tmp"}
    written = {name for name in written if "/torchinductor_" not in name}  # an empty folder of torch's
    shutil.rmtree(other)
    assert written == {"home/tmp/r.html", "home/tmp/r-loss.png"}


def test_a_conversion_writes_its_target_only(place: Path, tmp_path: Path) -> None:
    from reshard.commands.convert import run

    changed(
        place / "run/checkpoint/step-0",
        job={"dump_folder": str(place / "elsewhere too")},
        training={"cache_folder": None},
    )
    before = inventory(place)
    run(place / "run/checkpoint/step-0", tmp_path / "hf", to="hf")
    assert (tmp_path / "hf" / "tokenizer.json").is_file()
    assert inventory(place) == before


def test_tokens_are_kept_where_the_user_says_and_measured_as_they_are(place: Path, tmp_path: Path) -> None:
    step = place / "run/checkpoint/step-0"
    told = {"config_path": None, "flavor": None, "tokenizer": "bytes", "seq_len": 8, "sequences": 4, "batch_size": 2}
    (tmp_path / "new.txt").write_text("one text\n" * 8)
    report = evaluate.run(step, data=str(tmp_path / "new.txt"), cache_folder=tmp_path / "kept", **told)
    assert [p.name for p in (tmp_path / "kept").glob("*/meta.json")]
    kept = inventory(tmp_path)
    assert evaluate.run(step, data=str(tmp_path / "new.txt"), cache_folder=tmp_path / "kept", **told) == report
    assert inventory(tmp_path) == kept
    assert 4 < report["loss"] < 7  # nothing was trained: near ln 300


def test_which_text_it_measures_on_is_said_and_refused_where_it_is_not_there(
    place: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    step = place / "run/checkpoint/step-0"
    told = {"config_path": None, "flavor": None, "tokenizer": "bytes", "seq_len": 8, "sequences": 4, "batch_size": 2}
    with caplog.at_level("INFO", logger="reshard"):
        evaluate.run(step, data=None, **told)
    assert any(str(place / "text.txt") in record.getMessage() for record in caplog.records)
    changed(step, training={"dataset": str(tmp_path / "gone.txt")})
    with pytest.raises(DataError, match=r"gone\.txt") as caught:
        evaluate.run(step, data=None, **told)
    assert "--data" in (caught.value.hint or "")
    changed(step, training={"dataset": str(place / "text.txt")})
