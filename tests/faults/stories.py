"""Which crashes are tried? Those of runs that save new steps, save a step again, delete old ones, and start after a crash."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from faults import crash
from faults.crash import History, Loss
from faults.runs import TINIER, Runs, train_words
from faults.states import FOLDER, State, Story, read_plain_story, read_story, states_of
from reshard.config import Config, load_config

NO_EXCHANGE = "inject=renameat2:error=ENOSYS"  # as old kernels and some file systems say


def new_steps(runs: Runs, place: Path, text: Path, *, world: int = 4, steps: int = 3) -> Story:
    """A fresh run that saves every step and keeps two. Its folder stays at place/run."""
    words = train_words(place / "run", text, steps=steps, interval=1, keep_latest_k=2, model=TINIER)
    return _traced(runs, place, words, world)


def same_step_again(runs: Runs, place: Path, text: Path, before: Path, *, exchange: bool = True) -> Story:
    """The run went back to step 2 of `before` and saves steps 3, 4 and 5; step 3 is there already, and other numbers.

    exchange False: the kernel cannot exchange two names, so it takes two renames.
    """
    shutil.copytree(before, place / "run")
    words = train_words(
        place / "run", text, steps=5, interval=1, keep_latest_k=2, load_step=2, lr=7e-3, model=TINIER
    )  # fmt: skip
    return _traced(runs, place, words, 4, *([] if exchange else ["-e", NO_EXCHANGE]))


def plain_torch(runs: Runs, place: Path, sources: list[Path]) -> Story:
    """torch.distributed.checkpoint.save of the same: two new steps, then the second again with the third's numbers.

    sources: three checkpoints of ours.
    """
    root = place / "run"
    root.mkdir()
    (place / "nothing").mkdir()
    with crash.recording(runs.process, place / "calls"):
        ended = runs.run(
            world=4, call="faults.onranks:save_plainly", sources=[str(source) for source in sources],
            folder=str(root), steps=[1, 2, 2],
        )  # fmt: skip
    assert ended.code == 0, "\n".join(ended.err)
    history = History.of(place / "nothing")
    history.root = str(root)
    history.add(crash.calls_in(place / "calls"))
    _check_against_the_disk(history, root)
    (place / "truths").mkdir()
    return read_plain_story(history, Config(), place / "truths")


def asking_for_the_newest(story: Story) -> Story:
    """The same crashes, but the run is started again without load_step."""
    return replace(story, config=story.config.with_values(checkpoint={"load_step": -1}))


def _traced(runs: Runs, place: Path, words: list[str], world: int, *options: str) -> Story:
    root = place / "run"
    before = root / FOLDER if root.exists() else None
    if before is not None:
        shutil.copytree(root, place / "before")
    start = place / "before" if before is not None else place / "nothing"
    start.mkdir(exist_ok=True)
    with crash.recording(runs.process, place / "calls", *options):
        ended = runs.run(words, world=world)
    assert ended.code == 0, "\n".join(ended.err)
    history = History.of(start)
    history.root = str(root)
    history.add(crash.calls_in(place / "calls"))
    _check_against_the_disk(history, root)
    config, _ = load_config(words[1], words[2:])
    (place / "truths").mkdir()
    config = config.with_values(training={"steps": 1000})  # a run that has more to do
    return read_story(history, config, start / FOLDER if before is not None else None, place / "truths")


def _check_against_the_disk(history: History, root: Path) -> None:
    """Has every call been understood? Then the folder that is put together from them is the one that is there."""
    rebuilt = crash.at(crash.found_after(history, lambda _: True, Loss()), FOLDER)
    assert isinstance(rebuilt, dict)
    steps = {name: tree for name, tree in rebuilt.items() if not name.startswith(".")}
    assert sorted(steps) == sorted(path.name for path in (root / FOLDER).glob("[!.]*"))
    for name, tree in steps.items():
        assert isinstance(tree, dict)
        assert tree == {path.name: path.read_bytes() for path in (root / FOLDER / name).iterdir()}, name


def crashes_of_the_start(
    runs: Runs, story: Story, place: Path, *, every: int, chance: int
) -> Iterator[tuple[Story, list[State]]]:
    """The machine dies while a run that was killed is started again: its `recover` is recorded, too.

    every: take every so many-th call after which something was left for it to do.
    """
    bases = []
    for call in range(0, len(story.history.ops)):
        tree = crash.found_after(story.history, lambda i, c=call: i <= c, Loss())
        folder = crash.at(tree, FOLDER)
        if isinstance(folder, dict) and any(".tmp-" in name or ".old-" in name for name in folder):
            bases.append((call, tree))
    bases = bases[::every]
    for call, tree in bases:
        crash.put(tree, place / f"after-{call}")
    with crash.recording(runs.process, place / "calls"):
        folders = [str(place / f"after-{call}" / FOLDER) for call, _ in bases]
        assert runs.run(call="faults.onranks:recover_all", folders=folders).code == 0
    calls = crash.calls_in(place / "calls")
    for call, _ in bases:
        history = story.history.until(call)
        history.root = str(place / f"after-{call}")
        history.add(calls)
        states = [
            replace(s, call=call, lost=True) for s in states_of(history, chance=chance, others=0) if s.call > call
        ]
        yield replace(story, history=history), states
