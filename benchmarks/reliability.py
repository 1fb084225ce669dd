"""What does a checkpoint survive? Makes the tables of docs/reliability.md: ours beside plain torch, the same faults.

    python benchmarks/reliability.py            prints them, and puts them into the page (15 minutes on two cores)
    python benchmarks/reliability.py --short    a tenth of the crash states and kills, printed only

Needs strace, to record the system calls of real saves. The faults are those of the tests: tests/faults makes them.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))

from rich.console import Console

from faults import campaign, crash, states, stories
from faults.campaign import DIED, HARMLESS, REFUSED, UNSAID, WRONG, Tally
from faults.kills import Killed, kill_a_training, kill_saves
from faults.loading import load_ours, load_plain, plain_bits, start_ours
from faults.runs import TINIER, Workshop, train_words, workshop
from faults.saved import save_two_steps
from faults.states import Report, Story

PAGE = Path(__file__).resolve().parents[1] / "docs" / "reliability.md"
RESULTS = (HARMLESS, REFUSED, WRONG, UNSAID, DIED)

say = Console(stderr=True).print


@contextmanager
def timed(what: str) -> Iterator[None]:
    """Say what is being done, and how long it took."""
    began = time.monotonic()
    say(f"{what} …")
    yield
    say(f"  {time.monotonic() - began:.0f} s")


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Markdown; numbers to the right."""
    rule = ["---", *("---:" for _ in head[1:])]
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in (head, rule, *rows))


# -- bytes ------------------------------------------------------------------------------------------------------------


def bytes_table(shop: Workshop) -> str:
    """Thousands of damaged directories, each given to a loader."""
    saved = save_two_steps(shop)
    ours, plain = saved.ours / "step-2", saved.plain / "step-2"
    tallies: dict[str, Tally] = {}
    for name, folder, good, loader, is_ours in (
        ("reshard", saved.ours, ours, start_ours, True),
        ("reshard, plain torch's files", saved.plain, plain, load_ours, True),
        ("plain torch, its own files", saved.plain, plain, load_plain, False),
    ):
        with timed(f"damaged bytes: {name}"):
            place = shop.place / f"case-{len(tallies)}"
            tallies[name] = campaign.run(
                saved.faults(folder), good, place, loader, plain_bits(good), ours=is_ours, verified=loader is start_ours
            )
    unseen = len(campaign.not_noticed(tallies["reshard"]))
    kinds = sorted({o.kind for tally in tallies.values() for o in tally.outcomes})
    rows = [[f"**{n}**, {len(t.outcomes)} faults", *(len(t.those(r)) for r in RESULTS)] for n, t in tallies.items()]
    per_kind = [
        [kind, *(_of_kind(tally, kind) for tally in tallies.values())] for kind in kinds
    ]  # fmt: skip
    return (
        table(["loader", "harmless", "refused", "**wrong numbers**", "other error", "process died"], rows)
        + f"\n\n`reshard verify` called {unseen} of the damaged directories whole (files beside the checkpoint, and white\n"
        "space after a manifest's JSON, not counted as damage).\n\n"
        "By kind, as `wrong or died / faults`:\n\n" + table(["fault", *tallies], per_kind)
    )


def _of_kind(tally: Tally, kind: str) -> str:
    found = Counter(outcome.result for outcome in tally.outcomes if outcome.kind == kind)
    return f"{found[WRONG] + found[UNSAID] + found[DIED]} / {found.total()}" if found else "-"


# -- crashes ----------------------------------------------------------------------------------------------------------


def crash_table(shop: Workshop, chance: int, others: int) -> str:
    """Every state between two system calls of a save by four ranks, given to the start-up."""
    (shop.place / "state").mkdir()

    def tried(story: Story, judge: states.Judge | None = None, *, own_chance: int = chance) -> Report:
        found = states.states_of(story.history, chance=own_chance, others=others)
        return states.try_all(story, found, shop.place / "state", judge)

    rows: list[list[object]] = []

    def row(name: str, work: Callable[[], Report]) -> None:
        with timed(f"crashes: {name}"):
            report = work()
        found = sum(report.outcomes.values(), Counter())
        good = found[states.NOTHING] + found[states.PROMISED] + found[states.UNDER_WAY]
        lost, stuck, wrong = (found[what] for what in (states.OLDER, states.STUCK, states.WRONG))
        rows.append([name, report.states, report.distinct, good, lost, stuck, wrong, len(report.failures)])

    new = stories.new_steps(shop.runs, shop.folder("new-steps"), shop.text)
    row("reshard: new steps, an old one deleted", lambda: tried(new))
    again = None
    for exchange in (True, False):
        folder, before = shop.folder(f"again-{exchange}"), shop.place / "new-steps/run"
        again = stories.same_step_again(shop.runs, folder, shop.text, before, exchange=exchange)
        name = "exchange" if exchange else "two renames"
        row(f"reshard: a step saved again ({name})", lambda story=again: tried(story))  # type: ignore[misc]
    assert again is not None
    row("reshard: the start after a crash", lambda: _starts(shop, again))
    sources = [shop.place / f"plain-sources/checkpoint/step-{step}" for step in (1, 2, 3)]
    ended = shop.runs.run(
        train_words(shop.place / "plain-sources", shop.text, steps=3, interval=1, model=TINIER), world=4
    )
    assert ended.code == 0, ended.err[0]
    plain = stories.plain_torch(shop.runs, shop.folder("plain-crashes"), sources)
    row("plain torch: two new steps, one saved again", lambda: tried(plain, states.judge_plain))
    head = [
        "what the ranks did",
        "states",
        "distinct",
        "right start",
        "promised step lost",
        "no start",
        "wrong numbers",
    ]
    return table([*head, "promises broken"], rows)


def _starts(shop: Workshop, again: Story) -> Report:
    place, whole = shop.folder("starts"), Report()
    for story, found in stories.crashes_of_the_start(
        shop.runs, stories.asking_for_the_newest(again), place, every=3, chance=1
    ):
        report = states.try_all(story, iter(found), shop.place / "state")
        whole.states += report.states
        whole.distinct += report.distinct
        whole.failures += report.failures
        for how, outcomes in report.outcomes.items():
            whole.outcomes[how] = whole.outcomes.get(how, Counter()) + outcomes
    return whole


# -- kills ------------------------------------------------------------------------------------------------------------


def kill_table(shop: Workshop, kills: int) -> str:
    """Real SIGKILLs."""
    rows = []
    for name, work in (
        ("two ranks that save every step", lambda: _saves(shop, "disabled", kills * 3 // 2)),
        ("the same, saved in the background", lambda: _saves(shop, "async", kills)),
        ("200 steps on two ranks, saved every 7", lambda: _training(shop, 2, kills)),
        ("200 steps on one rank, saved every 7", lambda: _training(shop, 1, kills)),
    ):
        with timed(f"kills: {name}"):
            report: Killed = work()
        during = ", ".join(f"{count} x {what}" for what, count in report.during.most_common())
        rows.append([name, report.kills, during, len(report.failures)])
    return table(["run", "SIGKILLs", "what it was doing", "not bit for bit as in peace"], rows)


def _saves(shop: Workshop, mode: str, kills: int) -> Killed:
    options = ("--checkpoint.async_mode", mode)
    return kill_saves(shop.runs, shop.folder(f"saves-{mode}"), shop.text, kills=kills, world=2, options=options)


def _training(shop: Workshop, world: int, kills: int) -> Killed:
    place = shop.folder(f"training-{world}")
    return kill_a_training(shop.runs, place, shop.text, steps=200, kills=kills, interval=7, world=world)


def put(page: Path, tables: dict[str, str]) -> None:
    """Into the page, each between its two marks."""
    text = page.read_text(encoding="utf-8")
    for name, made in tables.items():
        pattern = rf"(<!-- {name} -->\n).*?(<!-- end -->)"
        assert re.search(pattern, text, re.S), f"{page} has no place for {name}"
        text = re.sub(pattern, lambda found, made=made: f"{found[1]}\n{made}\n\n{found[2]}", text, flags=re.S)  # type: ignore[misc]
    page.write_text(text, encoding="utf-8")


def main() -> None:
    """Measure, print, and put into the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="fewer crash states and kills; the page stays as it is")
    short = parser.parse_args().short
    if reason := crash.can_trace():
        sys.exit(reason)
    with workshop() as shop:
        tables = {
            "bytes": bytes_table(shop),
            "crashes": crash_table(shop, chance=0 if short else 6, others=10 if short else 100),
            "kills": kill_table(shop, kills=2 if short else 20),
        }
    for made in tables.values():
        print(made, end="\n\n")
    if not short:
        put(PAGE, tables)


if __name__ == "__main__":
    main()
