"""What is left of a run that dies by SIGKILL? Real ranks, killed at any moment, against the same run left in peace."""

from __future__ import annotations

import os
import random
import shutil
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from faults.loading import our_digest, plain_digest
from faults.runs import Run, Runs, train_words, wait_for
from reshard.checkpoint.commit import recover
from reshard.checkpoint.layout import entries
from reshard.config import load_config
from reshard.train.metrics import last_of_each_step, read_journal
from reshard.train.start import first_choice


@dataclass
class Killed:
    """What came of the kills. during: what the run was doing, as far as the folder shows."""

    kills: int = 0
    steps: int = 0
    during: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)


def saved_steps(place: Path) -> list[int]:
    """The steps that a run has said it saved, in order."""
    journal = place / "events.jsonl"
    return [r["step"] for r in read_journal(journal) if r["event"] == "save"] if journal.exists() else []


def steps_taken(place: Path) -> int:
    journal = place / "metrics.jsonl"
    return max((r["step"] for r in read_journal(journal)), default=0) if journal.exists() else 0


def kill_saves(
    runs: Runs, place: Path, text: Path, *, kills: int, world: int, seed: int = 0, options: tuple[str, ...] = ()
) -> Killed:
    """A run that saves every step is killed, looked at, and started again, so many times.

    After each death the folder must give a start the newest step that the run said it had saved, or the one after it
    (its save was over, but not yet said), bit for bit as in the run that was left in peace.
    """
    rng, report = random.Random(seed), Killed()
    steps = 6 * kills + 20
    peace, war = place / "peace", place / "war"
    ended = runs.run(train_words(peace, text, steps=steps, interval=1), world=world, timeout_s=600)
    assert ended.code == 0, ended.err[0]
    words = [*train_words(war, text, steps=steps, interval=1, keep_latest_k=3), *options]
    truths: dict[int, str] = {}
    while report.kills < kills:
        before = len(saved_steps(war))
        run = runs.start(words, world=world)
        if report.kills % 5 == 4:  # while it starts, or soon after
            time.sleep(rng.uniform(0, 1.5))
        else:
            some = before + rng.randrange(1, 5)
            wait_for(lambda n=some: len(saved_steps(war)) >= n)
            if report.kills % 5 < 3:  # most deaths are to be in a save
                wait_for(lambda: saving(war / "checkpoint"), every_s=0)
                time.sleep(rng.uniform(0, 0.01))
            else:
                time.sleep(rng.uniform(0, 0.1))
        _kill(run, rng, report, world)
        report.during[_what_it_did(war / "checkpoint")] += 1
        report.failures += _look(war, words, peace, truths, place / "copy")
    report.steps = steps_taken(war)
    return report


def saving(folder: Path) -> bool:
    """Is there a temporary directory just now?"""
    return any(".tmp-" in path.name for path in folder.iterdir())


def _kill(run: Run, rng: random.Random, report: Killed, world: int) -> None:
    """Mostly all ranks at once; now and then a single one, and the others notice."""
    report.kills += 1
    if world > 1 and rng.random() < 0.2 and (run.place / "pids.json").exists():
        run.kill_rank(rng.randrange(world))
    else:
        run.kill()


def _what_it_did(folder: Path) -> str:
    left = list(folder.glob("*.tmp-*")) if folder.exists() else []
    if not left:
        return "no save under way"
    if any((path / "manifest.json").exists() for path in left):
        return "committing, or deleting an old step"
    return "writing a step"


def _look(war: Path, words: list[str], peace: Path, truths: dict[int, str], copy: Path) -> list[str]:
    """The start-up of the next run, on a copy, so that the next run finds everything as the dead one left it."""
    said = saved_steps(war)
    newest, wrong = (said[-1] if said else 0), []
    if not (war / "checkpoint").exists():
        return [] if not said else ["the folder is gone"]
    shutil.copytree(war / "checkpoint", copy / "checkpoint", copy_function=os.link)
    try:
        config, _ = load_config(words[1], [*words[2:], "--job.dump_folder", str(copy)])
        recover(copy / "checkpoint")
        start, aside = first_choice(config)
        wrong += [f"{a.directory.name} was set aside: {a.reason}" for a in aside]
        step = start.manifest.step if start.manifest is not None else 0
        if step not in (newest, newest + 1):
            wrong.append(f"step {step} was chosen, step {newest} had been saved")
        for entry in entries(copy / "checkpoint"):
            truth = truths.get(entry.step) or plain_digest(peace / "checkpoint" / entry.path.name)
            truths[entry.step] = truth
            if our_digest(entry.path) != truth:
                wrong.append(f"{entry.path.name} is not what the run in peace has saved")
    finally:
        shutil.rmtree(copy)
    return wrong


def kill_a_training(
    runs: Runs, place: Path, text: Path, *, steps: int, kills: int, interval: int, world: int, seed: int = 0
) -> Killed:
    """A training is killed at random moments and started again each time, until it has taken all its steps.

    It must end with the losses (of each step, the last time that it was taken) and the tensors of the run that was never
    killed, bit for bit.
    """
    rng, report = random.Random(seed), Killed()
    peace, war = place / "peace", place / "war"
    ended = runs.run(train_words(peace, text, steps=steps, interval=interval), world=world, timeout_s=600)
    assert ended.code == 0, ended.err[0]
    words = train_words(war, text, steps=steps, interval=interval)
    # Moments in the run's own time: for each kill the number of steps taken so far, and then a part of a step.
    marks = sorted(rng.sample(range(1, steps), kills - kills // 4))
    plan: list[Callable[[], None]] = [
        lambda mark=mark: (wait_for(lambda: steps_taken(war) >= mark), time.sleep(rng.uniform(0, 0.06)))[1]
        for mark in marks
    ]
    for _ in range(kills // 4):  # and some while it starts
        plan.insert(rng.randrange(len(plan)), lambda: time.sleep(rng.uniform(0, 1.0)))
    for moment in plan:
        run = runs.start(words, world=world)
        moment()
        _kill(run, rng, report, world)
        report.during[_what_it_did(war / "checkpoint")] += 1
    ended = runs.run(words, world=world, timeout_s=600)
    if ended.code != 0:
        report.failures.append(ended.err[0][-2000:])
        return report
    report.steps = steps_taken(war)
    report.failures += _differences(peace, war, steps)
    return report


def _differences(peace: Path, war: Path, steps: int) -> list[str]:
    left, right = (last_of_each_step(read_journal(place / "metrics.jsonl")) for place in (peace, war))
    keys = ("loss", "grad_norm", "lr", "tokens_seen")
    if sorted(left) != list(range(1, steps + 1)) or sorted(right) != sorted(left):
        return [f"steps {sorted(set(left) ^ set(right))} are in one of the two runs"]
    wrong = [
        f"step {step}: {[left[step][k] for k in keys]} became {[right[step][k] for k in keys]}"
        for step in left
        if any(left[step][k] != right[step][k] for k in keys)
    ]
    last = f"checkpoint/step-{steps}"
    if plain_digest(peace / last) != plain_digest(war / last):
        wrong.append("the last checkpoints differ")
    return wrong
