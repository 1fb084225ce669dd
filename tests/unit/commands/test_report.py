"""Is the report one page that needs nothing else, says what happened, and runs nothing that a file says?"""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from reshard.checkpoint.ranks import Ranks
from reshard.checkpoint.save import About, save
from reshard.commands.amounts import counted, seconds, size
from reshard.commands.inspect import answer
from reshard.commands.report import run
from reshard.commands.report_charts import (
    MOST_POINTS,
    Curve,
    Line,
    drawn,
    path,
    short,
    smoothed,
    step_scale,
    thinned,
    tick_text,
    value_scale,
)
from reshard.errors import ConfigError, DataError, StorageError
from reshard.train.metrics import Journal

ONE = {"dp_replicate": 1, "dp_shard": 1, "cp": 1, "tp": 1, "pp": 1}
NASTY = '"><script>alert(1)</script><b>&amp;{{ 7*7 }}</script>'
VOID = {"meta", "link", "br", "hr", "img", "input"}


class Page(HTMLParser):
    """The page as a browser's parser sees it: elements, texts, and whether every element is closed."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(content)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, self.getpos()

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.texts.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.texts))

    def all(self, tag: str, **attributes: str) -> list[dict[str, str | None]]:
        wanted = {name.rstrip("_").replace("_", "-"): value for name, value in attributes.items()}
        return [a for t, a in self.found if t == tag and wanted.items() <= a.items()]


def write_run(folder: Path, *, word: str = "fsdp run", steps: int = 40) -> None:
    """Two layouts, a save each, the second of which was gone back from; checkpoints lie in the folder."""
    metrics, events = Journal(folder / "metrics.jsonl"), Journal(folder / "events.jsonl")
    config = {"job": {"description": word}, "training": {"steps": steps, "rng_seed": 0}, "model": {"flavor": word}}

    def leg(start: int, stop: int, layout: dict[str, int]) -> None:
        events.write({"event": "start", "at": "2026-01-02T03:04:05.000+00:00", "step": start, "layout": layout,
                      "world_size": 2, "resumed": start > 0, "loaded": f"{word}/step-{start}", "notes": [word]})  # fmt: skip
        for step in range(start + 1, stop + 1):
            metrics.write({"step": step, "loss": 3 + 4 / step, "grad_norm": 1 / step, "lr": 1e-3, "tokens_seen": 64 * step,
                           "tokens_per_s": 1000.0, "step_time_s": 0.064, "memory_gib": 0.5})  # fmt: skip
        events.write({"event": "validation", "step": stop, "loss": 3.5, "sequences": 8})
        directory = folder / "checkpoint" / f"step-{stop}"
        about = About(stop, "full", {"kind": "train", "from": word}, layout=layout, config=config)
        save(directory, {"model": {"w": __import__("torch").ones(4)}}, about, Ranks())
        events.write({"event": "save", "at": "2026-01-02T03:05:05.000+00:00", "step": stop, "kind": "full", "bytes": 1234,
                      "path": str(directory), "stall_s": 0.25, "write_s": 1.5})  # fmt: skip

    leg(0, steps // 2, ONE)
    leg(steps // 2, steps, ONE | {"tp": 2})
    events.write({"event": "rollback", "step": steps, "set_aside": word, "now": word, "reason": word})
    (folder / "exports" / f"step-{steps}" / "hf").mkdir(parents=True)
    (folder / "exports" / f"step-{steps}" / "hf" / "model.safetensors").write_bytes(bytes(2_000_000))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    write_run(folder)
    return folder


@pytest.fixture(scope="module")
def page(folder: Path) -> Page:
    (written,) = run(folder)
    assert written == folder / "report.html"
    page = Page(written.read_text())
    assert page.open == []
    return page


def test_what_it_shows(page: Page) -> None:
    assert [a["data-stretch"] for a in page.all("tr") if "data-stretch" in a] == ["1", "2"]
    assert [a["data-kind"] for a in page.all("span", class_="mark")] == ["start", "reshard", "rollback", "save", "save"]
    assert [a["data-step"] for a in page.all("tr") if "data-step" in a] == ["20", "40"]
    assert {a["data-chart"] for a in page.all("div", class_="plot")} == {
        "loss", "grad-norm", "lr", "throughput", "memory", "saves"
    }  # fmt: skip
    for words in ("fsdp run", "finished step 40 of 40", "resharded 1 rank → tp2 from step-20", "waited 250 ms",
                  "committed after 1.5 s", "names and sizes agree", "validation loss 3.5 the best, at step 20", "2.0 MB",
                  "tp2", "exports/step-40/hf"):  # fmt: skip
        assert words in page.text, words


def test_it_needs_nothing_but_itself(page: Page, folder: Path) -> None:
    assert [a for tag in ("script", "link", "img", "iframe", "use") for a in page.all(tag) if "src" in a] == []
    links = {a.get("href") or "" for tag in ("link", "use", "a") for a in page.all(tag)}
    assert {link for link in links if not link.startswith("#")} == {"data:,"}
    content = (folder / "report.html").read_text()
    assert not re.search(r"https?://|url\(|@import|fetch\(|XMLHttpRequest|innerHTML", content)


def test_the_numbers_under_the_pointer_are_the_runs(folder: Path, page: Page) -> None:
    content = (folder / "report.html").read_text()
    data = json.loads(re.search(r'id="data">(.*?)</script>', content, re.S)[1])  # type: ignore[index]
    loss = next(c for c in data["charts"] if c["key"] == "loss")
    assert loss["lines"][0]["points"][9] == [10, "3.4"]
    assert data["stretches"] == [
        {"from": 0, "to": 20, "layout": "1 rank"}, {"from": 20, "to": 40, "layout": "tp2"}
    ]  # fmt: skip


def test_texts_from_files_are_only_texts(tmp_path: Path) -> None:
    write_run(tmp_path, word=NASTY)
    run(tmp_path)
    content = (tmp_path / "report.html").read_text()
    page = Page(content)
    assert page.open == []
    assert len(page.all("script")) == 2
    assert len(page.all("b")) == len(page.all("li"))  # ours
    assert "alert(1)" not in re.sub(r"&lt;script&gt;alert\(1\)|\\u003cscript\\u003ealert\(1\)", "", content)
    assert NASTY in page.text  # and it is there, as it was written
    assert "49" not in re.findall(r"<h1>.*?</h1>", content)[0]


def test_a_checkpoint_is_read_through_where_that_is_asked(tmp_path: Path) -> None:
    write_run(tmp_path)
    (data,) = (tmp_path / "checkpoint" / "step-40").glob("*.distcp")
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    run(tmp_path, verify=True)
    text = Page((tmp_path / "report.html").read_text()).text
    assert "verified, every byte" in text
    assert re.search(r"DAMAGED: __0_0.distcp has CRC32", text)
    assert re.search(r"verified in [\d.]+ ms", text)


def test_checkpoints_that_are_no_longer_what_they_were(tmp_path: Path) -> None:
    write_run(tmp_path)
    (tmp_path / "checkpoint" / "step-20").rename(tmp_path / "checkpoint" / "step-20.damaged")
    events = Journal(tmp_path / "events.jsonl")
    events.write(
        {"event": "rollback", "step": 10, "set_aside": "x/step-20", "now": "x/step-20.damaged", "reason": "bits"}
    )
    events.write({"event": "save", "step": 40, "path": str(tmp_path / "checkpoint" / "step-40"), "bytes": 5})
    events.write({"event": "save", "step": 50, "path": str(tmp_path / "checkpoint" / "step-50"), "bytes": 5})
    run(tmp_path)
    text = Page((tmp_path / "report.html").read_text()).text
    for words in ("set aside as step-20.damaged", "replaced", "deleted since"):
        assert words in text, words


@pytest.mark.parametrize("lines", [1, 2, 400])
def test_runs_of_any_length(tmp_path: Path, lines: int) -> None:
    metrics = Journal(tmp_path / "metrics.jsonl")
    for step in range(1, lines + 1):
        metrics.write({"step": step, "loss": math.nan if step % 7 == 3 else 2.0, "grad_norm": math.inf, "lr": 0.0,
                       "memory_gib": 1e300 * step})  # fmt: skip
    run(tmp_path, tmp_path / "sub.html")
    page = Page((tmp_path / "sub.html").read_text())
    assert page.open == []
    assert not re.search(r"\b(nan|inf)\b", " ".join(a.get("d") or "" for a in page.all("path")), re.IGNORECASE)
    assert "not recorded" in page.text
    assert {a["data-chart"] for a in page.all("div", class_="plot")} == {"loss", "lr", "memory"}


def test_the_same_curves_as_png(tmp_path: Path) -> None:
    write_run(tmp_path)
    written = run(tmp_path, tmp_path / "out.html", png=True)
    names = [path.name for path in written]
    assert names == [
        "out.html",
        "out-loss.png",
        "out-grad-norm.png",
        "out-lr.png",
        "out-throughput.png",
        "out-memory.png",
    ]
    assert all(path.read_bytes().startswith(b"\x89PNG\r\n") for path in written[1:])
    assert [path for path in tmp_path.iterdir() if ".tmp-" in path.name] == []


def test_what_cannot_be_reported_or_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError):
        run(tmp_path)
    write_run(tmp_path)
    with pytest.raises(StorageError) as caught:
        run(tmp_path, tmp_path / "absent" / "x.html")
    assert "--output" in (caught.value.hint or "")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr("reshard.commands.report_png.find_spec", lambda name: None)
    with pytest.raises(ConfigError) as without:
        run(tmp_path, png=True)
    assert "reshard[plot]" in (without.value.hint or "")
    assert not (tmp_path / "report.html").exists()


def test_no_link_out_of_the_run_is_followed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What they lead to is the run's own, moved away: were a link followed, its numbers would be on the page."""
    run_folder, away = tmp_path / "run", tmp_path / "away"
    write_run(run_folder)
    (run_folder / "exports" / "step-40" / "hf" / "a").symlink_to("a")
    (run_folder / "exports" / "step-40" / "gguf").symlink_to("/")
    (run_folder / "checkpoint" / "step-40").rename(away)
    (run_folder / "checkpoint" / "step-40").symlink_to(away)
    (run_folder / "checkpoint" / "step-30").symlink_to("/proc")

    def page() -> str:
        run(run_folder, tmp_path / "r.html", verify=True)
        return Page((tmp_path / "r.html").read_text()).text

    text = page()
    assert text.count("not looked at: a link leads to") == 2
    assert "exports/step-40/gguf is a link, not followed" in text
    assert "2.00 MB" in text or "2.0 MB" in text  # the export's one file, not the link beside it
    listed, lines = answer(run_folder / "checkpoint")
    assert [row["holds"] for row in listed["steps"]] == ["full", None, None]
    assert sum("a link leads to" in line for line in lines) == 2
    assert not any("DAMAGED" in line for line in lines)
    (run_folder / "checkpoint").rename(tmp_path / "checkpoints")
    (run_folder / "checkpoint").symlink_to(tmp_path / "checkpoints")
    assert f"not looked at: the folder is a link to {tmp_path / 'checkpoints'}" in page()
    assert f"reshard inspect {tmp_path / 'checkpoints'}" in caplog.text
    for journal in ("events.jsonl", "metrics.jsonl"):
        (run_folder / journal).rename(tmp_path / journal)
        (run_folder / journal).symlink_to(tmp_path / journal)
        with pytest.raises(DataError, match=rf"{journal}` is a link to"):
            run(run_folder, tmp_path / "r.html")
        (run_folder / journal).unlink()
        (tmp_path / journal).rename(run_folder / journal)


def test_a_run_is_reported_through_a_link_that_the_user_names(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    (tmp_path / "link").symlink_to("run")
    (written,) = run(tmp_path / "link")
    assert "names and sizes agree" in Page(written.read_text()).text


def test_it_imports_no_torch(folder: Path) -> None:
    code = (
        "import sys\nfrom reshard.cli import main\n"
        f"try:\n    main(['report', {str(folder)!r}, '--verify', '--json'])\n"
        "except SystemExit as stop:\n    assert not stop.code\n"
        "print(sorted({'torch', 'matplotlib', 'transformers'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == [json.dumps([str(folder / "report.html")]), "[]"], done.stderr


# -- where a number goes


@pytest.mark.parametrize(
    ("values", "options", "ends"),
    [([2.1, 6.9], {}, (2, 7)), ([0.31, 0.33], {"floor": True}, (0, 0.4)), ([5.0], {}, (2, 8)), ([0.0], {"floor": True}, (0, 1)),
     ([0.01, 40.0], {"may_log": True}, (0.01, 100)), ([-3.0, 3.0], {"floor": True}, (-4, 4)), ([1e-5, 3e-4], {}, (0, 3e-4)),
     ([7e9, 7.0000001e9], {}, None), ([-1.7e308, 1.7e308], {}, None)],
)  # fmt: skip
def test_scales_have_round_ends_that_hold_all(
    values: list[float], options: Any, ends: tuple[float, float] | None
) -> None:
    scale = value_scale(values, **options)
    if ends is not None:
        assert (scale.low, scale.high) == pytest.approx(ends)
    assert 2 <= len(scale.ticks) <= 9
    assert scale.percent(scale.low) == 0
    assert scale.percent(scale.high) == 100
    if max(map(abs, values)) < 1e300:
        assert all(0 <= scale.percent(value) <= 100 for value in values)
    labels = [tick_text(tick, scale) for tick in scale.ticks]
    assert len(set(labels)) == len(labels)


def test_steps_have_whole_ticks() -> None:
    for low, high in ((0, 1), (0, 3), (0, 40), (7, 8), (0, 121_987), (100_000, 100_010)):
        scale = step_scale(low, high)
        assert all(tick == int(tick) and low <= tick <= high for tick in scale.ticks)
        assert 1 <= len(scale.ticks) <= 12


def test_thinning_keeps_every_spike() -> None:
    points = [(step, 1.0) for step in range(1, 100_001)]
    points[54_321] = (54_322, 9.0)
    points[77_777] = (77_778, -5.0)
    kept = thinned(points)
    assert len(kept) <= MOST_POINTS + 2
    assert {(54_322, 9.0), (77_778, -5.0), points[0], points[-1]} <= set(kept)
    assert kept == sorted(kept)
    assert thinned(points[:10]) == points[:10]


def test_the_average_does_not_lag_and_skips_what_is_no_number() -> None:
    line = [(step, 2.0 * step) for step in range(1, 501)]
    assert all(value == pytest.approx(2.0 * step) for step, value in smoothed(line))
    assert len(smoothed(line)) == 500
    assert smoothed(line[:20]) == []
    noisy = [(step, 1.0 + (-1) ** step) for step in range(1, 501)]
    noisy[250] = (251, math.nan)
    middle = dict(smoothed(noisy))
    assert 251 not in middle
    assert all(0.4 < value < 1.6 for step, value in middle.items() if 5 < step < 495)


def test_a_path_breaks_where_there_is_no_number() -> None:
    x, y = step_scale(0, 10), value_scale([0.0, 10.0])
    assert path([(0, 0.0), (5, math.nan), (10, 10.0)], x, y) == "M0 1000M1000 0"
    assert path([(0, 0.0), (5, 5.0), (10, 10.0)], x, y) == "M0 1000L500 500L1000 0"
    log = value_scale([1.0, 1000.0], may_log=True)
    assert path([(0, 1.0), (5, -1.0), (10, 1000.0)], x, log) == "M0 1000M1000 0"


def test_one_point_is_seen() -> None:
    chart = drawn(Curve("k", "t", "u", (Line("n", "main", [(1, 2.0)]),)), step_scale(0, 10))
    assert chart["lines"][0]["single"] == [(10.0, pytest.approx(50.0))]


def test_amounts_for_people() -> None:
    assert [size(n) for n in (0, 999, 1000, 2_905_033, 112e9, 3e12)] == [
        "0 B",
        "999 B",
        "1.0 kB",
        "2.9 MB",
        "112.0 GB",
        "3.0 TB",
    ]
    assert [seconds(s) for s in (0, 2e-4, 0.0234, 3.14, 75.2, 3600, 90_000)] == [
        "0 ms", "0.2 ms", "23 ms", "3.1 s", "1 min 15 s", "1 h 0 min", "25 h 0 min"
    ]  # fmt: skip
    assert [counted(n) for n in (7823, 61_440, 1.97e6, 5.12e11)] == ["7,823", "61.4 k", "1.97 M", "512 G"]
    assert [short(n) for n in (0, 2.84651, 12345.6, 3e-4, 1e20, math.inf)] == [
        "0",
        "2.847",
        "12,346",
        "3e-4",
        "1e20",
        "inf",
    ]
