"""Does a real browser show the report of a run that was resumed on three layouts: every stretch and mark, to every reader?

The run is real, and so is what befalls it: it is moved from one process to FSDP and to tensor parallel, and the newest
checkpoint is damaged in between. Chromium (browser.py) opens the page in light and dark, on a desk and on a phone.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2]))

from proof.launch import Ranks, base_config, on_layout
from proof.users.browser import Browser
from reshard.commands.export import export

STEPS = 48
READERS = [(scheme, width) for scheme in ("light", "dark") for width in (1280, 390)]
CURVES = {"loss", "grad-norm", "lr", "throughput", "memory", "saves"}

# What a reader can see: it has an extent, is not hidden, and lies within the screen's width.
SEEN = """(e) => {
  const box = e.getBoundingClientRect(), style = getComputedStyle(e);
  return box.width > 0 && box.height > 0 && style.visibility === "visible" && style.opacity > 0
    && box.left >= -0.5 && box.right <= document.documentElement.clientWidth + 0.5;
}"""

# Every text that is shown, with the contrast of its colour and what lies behind it (WCAG 2, relative luminance).
CONTRASTS = """(() => {
  const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  const over = (below, colour) => {
    canvas.fillStyle = below; canvas.fillRect(0, 0, 1, 1);
    canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
    return "rgb(" + [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3).join(",") + ")";
  };
  const luminance = (colour) => {
    const linear = (v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
    const [r, g, b] = colour.match(/\\d+/g).map((v) => linear(v / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (e) => {
    const layers = [];
    for (let at = e; at; at = at.parentElement) layers.unshift(getComputedStyle(at).backgroundColor);
    if (e.matches(".track .name")) layers.push(getComputedStyle(e.parentElement.querySelector(".bar")).backgroundColor);
    return layers.reduce(over, "white");
  };
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const text = walker.currentNode.data.trim(), e = walker.currentNode.parentElement;
    if (!text || e.closest("script, style") || !e.getClientRects().length) continue;
    const below = behind(e), ink = over(below, getComputedStyle(e).color);
    const [high, low] = [luminance(below), luminance(ink)].sort((a, b) => b - a);
    found.push({text: text.slice(0, 40), contrast: (high + 0.05) / (low + 0.05)});
  }
  return found;
})()"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dump folder of the run."""
    place = tmp_path_factory.mktemp("report")
    folder = place / "run"
    base = base_config(place)

    def leg(layout: str, stop: int, async_mode: str = "disabled") -> Any:
        return on_layout(
            base, layout, folder, job={"description": "Three layouts"},
            training={"steps": STEPS, "stop_after": stop}, validation={"freq": 6, "sequences": 8, "fraction": 0.05},
            checkpoint={"enable_checkpoint": True, "interval": 6, "async_mode": async_mode},
        )  # fmt: skip

    with Ranks(place / "ranks") as ranks:
        assert ranks.problems([leg("1", 12), leg("fsdp2", 30)]) == [None, None]
        (data,) = (folder / "checkpoint" / "step-30").glob("__0_*.distcp")
        content = bytearray(data.read_bytes())
        content[len(content) // 2] ^= 1
        data.write_bytes(content)
        assert ranks.problems([leg("tp2", 0, "async")]) == [None]
    export(folder / "checkpoint" / f"step-{STEPS}", folder, ["hf"])
    return folder


@pytest.fixture(scope="module")
def page(run: Path, shell: Any) -> Path:
    done = shell(f"reshard report {run} --verify --png")
    assert done.code == 0, done.err
    assert done.out.splitlines()[0] == str(run / "report.html")
    return run / "report.html"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("chromium") / "profile") as browser:
        yield browser


@pytest.fixture(params=READERS, ids=lambda reader: f"{reader[0]}-{reader[1]}")
def reader(request: pytest.FixtureRequest, browser: Browser, page: Path) -> tuple[Browser, str, int]:
    """The page, opened as one reader has it."""
    scheme, width = request.param
    browser.open(page, scheme=scheme, width=width)
    return browser, scheme, width


def shown(browser: Browser, selector: str, what: str) -> list[Any]:
    """What JavaScript finds in each element that a reader sees. Fails where one is there, but not seen."""
    elements = f"[...document.querySelectorAll({json.dumps(selector)})]"
    hidden = browser.run(f"{elements}.filter((e) => !({SEEN})(e)).map((e) => e.outerHTML.slice(0, 200))")
    assert hidden == [], selector
    return list(browser.run(f"{elements}.map((e) => {what})"))


def test_every_stretch_and_mark_is_seen(reader: tuple[Browser, str, int]) -> None:
    browser, _, _ = reader
    rows = shown(browser, "tr[data-stretch]", "e.innerText")
    assert [next(name for name in ("1 rank", "fsdp2", "tp2") if name in row) for row in rows] == [
        "1 rank",
        "fsdp2",
        "tp2",
    ]
    bars = shown(browser, ".bar[data-stretch]", "[e.title, parseFloat(e.style.left), parseFloat(e.style.width)]")
    assert [title for title, _, _ in bars] == ["start 1: 1 rank", "start 2: fsdp2", "start 3: tp2"]
    ends = [(round(left * STEPS / 100), round((left + width) * STEPS / 100)) for _, left, width in bars]
    assert ends == [(0, 12), (12, 24), (24, 48)]  # up to where the next one went on from
    names = shown(browser, ".track .name", "[e.innerText, e.scrollWidth <= e.clientWidth]")
    assert names == [["1 rank", True], ["fsdp2", True], ["tp2", True]]

    marks = shown(browser, ".lanes .mark", "[e.dataset.kind, parseFloat(e.style.left)]")
    saves = [("save", step) for step in (6, 12, 18, 24, 30, 30, 36, 42, 48)]  # 30 again, on tp2
    restarts = [("start", 0), ("reshard", 12), ("rollback", 24), ("reshard", 24)]
    assert sorted((kind, round(left * STEPS / 100)) for kind, left in marks) == sorted([*restarts, *saves])
    told = shown(browser, ".marks li", "e.innerText.replace(/\\s+/g, ' ')")
    for words in ("began on 1 rank", "resharded 1 rank → fsdp2 from step-12", "resharded fsdp2 → tp2 from step-24",
                  "rolled back to step 24: step-30 was damaged"):  # fmt: skip
        assert sum(words in line for line in told) == 1, words
    rules = browser.run(
        "[...document.querySelectorAll('#chart-loss .rule')].map((e) => [e.getAttribute('class'), getComputedStyle(e).stroke,"
        " e.getBoundingClientRect().height])"
    )
    assert sorted(kind for kind, _, _ in rules) == ["rule reshard", "rule reshard", "rule rollback"]
    assert all(stroke.startswith("rgb") and height > 100 for _, stroke, height in rules)


def test_every_curve_is_drawn(reader: tuple[Browser, str, int]) -> None:
    browser, _, width = reader
    drawn = browser.run(
        "[...document.querySelectorAll('.plot')].map((plot) => [plot.dataset.chart, ...['width', 'height'].map((side) =>"
        " Math.max(...[...plot.querySelectorAll('path.curve')].map((e) => e.getBoundingClientRect()[side])))])"
    )
    assert {key for key, _, _ in drawn} == CURVES
    assert all(wide > width * 0.3 and high > 1 for _, wide, high in drawn), drawn
    assert len(shown(browser, "#chart-loss .dot", "1")) == 8  # the validations


def test_checkpoints_and_exports(reader: tuple[Browser, str, int]) -> None:
    browser, _, _ = reader
    rows = shown(browser, "tr[data-step]", "e.innerText.replace(/\\s+/g, ' ')")
    assert len(rows) == 9
    assert ["set aside as step-30.damaged" in row for row in rows] == [False] * 4 + [True] + [False] * 4
    assert sum("verified, every byte" in row for row in rows) == 8
    assert all("waited" in row and "committed after" in row for row in rows)
    assert "exports/step-48/hf" in browser.run("document.body.innerText")


def test_nothing_is_wider_than_the_screen(reader: tuple[Browser, str, int]) -> None:
    browser, _, width = reader
    browser.run("document.querySelectorAll('details').forEach((e) => { e.open = true; })")
    assert browser.run("document.documentElement.scrollWidth") <= width
    wide = "[...document.querySelectorAll('.scroll')].filter((e) => e.scrollWidth > e.clientWidth + 1)"
    assert browser.run(f"{wide}.map((e) => e.innerText.slice(0, 300))") == []  # tables, too, fit
    assert browser.run("[...document.querySelectorAll('.fact .number')].every((e) => e.scrollWidth <= e.clientWidth)")


def test_every_text_can_be_read(reader: tuple[Browser, str, int]) -> None:
    browser, scheme, _ = reader
    found = browser.run("(document.querySelectorAll('details').forEach((e) => { e.open = true; }), " + CONTRASTS + ")")
    assert len(found) > 300
    assert [text for text in found if text["contrast"] < 4.5] == []
    page = browser.run("getComputedStyle(document.body).backgroundColor")
    brightness = sum(int(part) for part in page.removeprefix("rgb(").removesuffix(")").split(",")) / 3
    assert brightness > 200 if scheme == "light" else brightness < 40


def test_the_pointer_and_the_keys_tell_the_runs_own_numbers(reader: tuple[Browser, str, int], run: Path) -> None:
    browser, _, _ = reader
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    loss = {record["step"]: record["loss"] for record in records}
    plot = "document.querySelector('#chart-loss .plot')"
    browser.run(f"{plot}.scrollIntoView({{block: 'center'}})")
    left, top, wide = browser.run(f"(({{left, top, width}}) => [left, top, width])({plot}.getBoundingClientRect())")
    for step, layout in ((9, "1 rank"), (15, "fsdp2"), (30, "tp2")):
        browser.move(left + wide * step / STEPS, top + 60)
        tip = shown(browser, "#chart-loss .tip", "e.innerText")[0].splitlines()
        assert (tip[0], tip[-1]) == (f"step {step}", layout)
        assert tip[1] == f"training {loss[step]:.4g}"
        assert len(shown(browser, ".cursor", "1")) == len(CURVES)  # in every plot at once
    browser.run(f"{plot}.focus()")
    browser.key("ArrowLeft")
    assert shown(browser, "#chart-loss .tip", "e.innerText")[0].startswith("step 29\n")
    browser.key("Escape")
    assert browser.run(f"{plot}.querySelector('.tip').hidden")
    assert browser.console == []


def test_it_asks_for_nothing_and_complains_of_nothing(
    reader: tuple[Browser, str, int], page: Path, tmp_path: Path
) -> None:
    browser, _, _ = reader
    picture = tmp_path / "page.png"
    browser.screenshot(picture)  # after which everything has been painted
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert browser.console == []
    assert [address for address in browser.requests if not address.startswith("data:")] == [page.resolve().as_uri()]


def test_without_scripts_all_of_it_is_there_but_the_pointer(browser: Browser, page: Path) -> None:
    browser.open(page, scheme="light", width=1280, scripts=False)
    try:
        assert len(shown(browser, "tr[data-stretch]", "1")) == 3
        assert len(shown(browser, ".lanes .mark", "1")) == 13
        assert browser.console == []
    finally:
        browser.open(page, scheme="light", width=1280)
