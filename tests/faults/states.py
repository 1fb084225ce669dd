"""Does a run start rightly from every state that a crash can leave? Thousands of folders, each given to the real start-up."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from faults import crash
from faults.crash import AllLost, AnyLost, History, Loss, Tree
from faults.loading import Destination, load_ours, load_plain, plain_digest
from reshard.checkpoint.commit import recover
from reshard.checkpoint.layout import all_leftovers, entries
from reshard.checkpoint.manifest import MANIFEST, read_manifest
from reshard.config import Config
from reshard.errors import listed
from reshard.train.start import first_choice

FOLDER = "checkpoint"
NOTHING, PROMISED, UNDER_WAY = "nothing, as nothing had been promised", "the newest promised", "the one under way"


@dataclass(frozen=True)
class Save:
    """A save that the run made, and the numbers of the calls that decide about it.

    committed: the rename to step-N. promised: the run has said so (a line in events.jsonl). gone: another rename took
    its name away, because it was replaced or may go; None: never. Before the run: -1.
    """

    save_id: str
    step: int
    digest: str
    committed: int
    promised: int
    gone: int | None


@dataclass
class Story:
    """What a traced run did to its folder. config: with which a run is started again; was: saves of before."""

    history: History
    config: Config
    saves: list[Save]

    @property
    def line(self) -> list[Save]:
        """Those that a start may take: with load_step, that step and what came of it."""
        step = self.config.checkpoint.load_step
        return [save for save in self.saves if step < 0 or save.committed >= 0 or save.step == step]

    def newest(self, call: int) -> Save | None:
        """The last save that was promised by then, of those that a start may take."""
        return max((s for s in self.line if s.promised <= call), key=lambda s: (s.promised, s.committed), default=None)


def read_story(history: History, config: Config, before: Path | None, place: Path) -> Story:
    """Find the saves in what was recorded. before: the checkpoint folder at the beginning. The truth about each is read
    by plain torch from the directory as it was when the run said that it was saved.
    """
    saves = []
    for number, old in enumerate(
        sorted((before or place / "none").glob("step-*"), key=lambda p: read_manifest(p).sequence)
    ):
        manifest = read_manifest(old)
        digest = plain_digest(old)
        saves.append(Save(manifest.save_id, manifest.step, digest, number - 1000, number - 1000, None))
    promises = _promises(history)
    for number, op in enumerate(history.ops):
        verb, _, rest = op.what.partition(" ")
        source, _, name = rest.partition(" -> ")
        if verb not in ("rename", "exchange") or not name.startswith("step-") or ".tmp-" not in source:
            continue
        step = int(name.removeprefix("step-"))
        promised = min(call for call, said in promises if said == step and call > number)
        tree = crash.at(crash.found_after(history, lambda i, n=promised: i <= n, Loss()), f"{FOLDER}/{name}")
        assert isinstance(tree, dict)
        crash.put(tree, place / f"truth-{number}")
        digest = plain_digest(place / f"truth-{number}")
        save_id = json.loads((place / f"truth-{number}" / MANIFEST).read_text())["save_id"]
        shutil.rmtree(place / f"truth-{number}")
        # With two renames it counts from the first one on: a start finishes what that one has begun.
        first = [i for i, o in enumerate(history.ops) if o.path.endswith(f"/{name}.old-{save_id}")][:1]
        saves.append(Save(save_id, step, digest, *first or [number], promised, None))
    return Story(history, config, [_until(history, save) for save in saves])


def read_plain_story(history: History, config: Config, place: Path) -> Story:
    """The same for plain torch, whose saves are committed by the rename of .metadata; all begin with an empty folder."""
    saves, promises = [], _promises(history)
    for number, op in enumerate(history.ops):
        if op.what.startswith("rename ") and op.path.endswith("/.metadata"):
            name = op.path.removeprefix(f"{FOLDER}/").removesuffix("/.metadata")
            promised = min(call for call, step in promises if f"step-{step}" == name and call > number)
            tree = crash.at(crash.found_after(history, lambda i, n=promised: i <= n, Loss()), f"{FOLDER}/{name}")
            assert isinstance(tree, dict)
            crash.put(tree, place / f"truth-{number}")
            digest = plain_digest(place / f"truth-{number}")
            shutil.rmtree(place / f"truth-{number}")
            saves.append(Save(str(number), int(name.removeprefix("step-")), digest, number, promised, None))
    return Story(history, config, saves)


def _promises(history: History) -> list[tuple[int, int]]:
    """(call, step) of each line of events.jsonl that says a step is saved."""
    (events,) = [inode for inode in history.files if inode == history._find(f"{history.root}/events.jsonl")]
    said = []
    for call, _, data in history.files[events]:
        for line in data.decode().splitlines():
            event = json.loads(line)
            if event["event"] == "save" and call >= 0:
                said.append((call, event["step"]))
    return said


def _until(history: History, save: Save) -> Save:
    """With the call that took its name away, if any did."""
    name = f"{FOLDER}/step-{save.step}"
    for number, op in enumerate(history.ops):
        if number <= save.committed:
            continue
        source, _, target = op.what.partition(" ")[2].partition(" -> ")
        renamed = op.what.startswith("rename ") and source == name
        if renamed or (op.what.startswith("exchange ") and f"{FOLDER}/{target}" == name):
            return Save(save.save_id, save.step, save.digest, save.committed, save.promised, number)
    return save


@dataclass(frozen=True)
class State:
    """One folder as a crash leaves it. call: the last one that had happened. lost: may it have lost anything?"""

    call: int
    how: str
    tree: Tree
    lost: bool


def states_of(history: History, *, chance: int, others: int, seed: int = 0) -> Iterator[State]:
    """The folder after every call, each in several ways. chance: random ways for each call. others: for each save, how
    many mixtures of the ranks' progress, as other timings would have made them.
    """
    rng = random.Random(seed)
    for call in range(-1, len(history.ops)):
        for how, loss in crash.losses(rng, chance):
            yield State(call, how, crash.found_after(history, lambda i, c=call: i <= c, loss), how.startswith("power"))
    writing: dict[str, list[int]] = {}
    for number, op in enumerate(history.ops):
        head, _, name = op.path.rpartition("/")
        if ".tmp-" in head and name.startswith("__") and not op.what.startswith("remove"):
            writing.setdefault(head, []).append(number)
    for numbers in writing.values():
        for _ in range(others):
            happened = _mixture(history, numbers, rng)
            loss = rng.choice((Loss(), AllLost(), AnyLost(rng)))
            tree = crash.found_after(history, happened, loss)
            yield State(numbers[0], "other timing", tree, type(loss) is not Loss)


def _mixture(history: History, numbers: list[int], rng: random.Random) -> Callable[[int], bool]:
    """All before these calls; and of these, of each process the first so many."""
    left = {}
    for process in {history.ops[n].process for n in numbers}:
        own = [n for n in numbers if history.ops[n].process == process]
        left[process] = set(own[rng.randrange(len(own) + 1) :])
    return lambda i: i < numbers[0] or (i <= numbers[-1] and i in numbers and i not in left[history.ops[i].process])


@dataclass
class Report:
    """What came of all states."""

    states: int = 0
    distinct: int = 0
    ways: Counter[str] = field(default_factory=Counter)
    outcomes: dict[str, Counter[str]] = field(default_factory=dict)  # of distinct states, by "killed" or "power lost"
    failures: list[str] = field(default_factory=list)


Judge = Callable[["Story", State, Path, "Digests"], tuple[list[str], str]]


def try_all(story: Story, states: Iterator[State], place: Path, judge: Judge | None = None) -> Report:
    """Give every state to a start; what must hold is in `judge_ours`, which is the default."""
    story = replace(story, config=story.config.with_values(job={"dump_folder": str(place)}))
    judge, report, seen = judge or judge_ours, Report(), set()
    digests = Digests(load_plain if judge is judge_plain else load_ours)
    for state in states:
        report.states += 1
        report.ways[state.how] += 1
        tree = crash.at(state.tree, FOLDER)
        newest = story.newest(state.call)
        key = (_key(tree), newest.save_id if newest else None, state.lost, _phase(story, state.call))
        if key in seen:
            continue
        seen.add(key)
        report.distinct += 1
        folder = place / FOLDER
        if isinstance(tree, dict):
            crash.put(tree, folder)
        try:
            said, chosen = judge(story, state, folder, digests)
        except Exception as error:  # nothing may go wrong here, whatever it is
            said, chosen = [f"{type(error).__name__}: {error}"], "an error"
        report.outcomes.setdefault("power lost" if state.lost else "killed", Counter())[chosen] += 1
        what = story.history.ops[state.call].what if state.call >= 0 else "nothing"
        report.failures += [f"after call {state.call} ({what}), {state.how}: {line}" for line in said]
        if folder.exists():
            shutil.rmtree(folder)
    return report


class Digests:
    """What a directory loads as, by one loader. Directories of the same bytes are loaded once."""

    def __init__(self, loader: Callable[[Path, Destination], None]) -> None:
        self._loader = loader
        self._destination: Destination | None = None
        self._known: dict[bytes, str] = {}

    def of(self, directory: Path) -> str:
        key = _key({path.name: path.read_bytes() for path in directory.iterdir()})
        if key not in self._known:
            self._destination = self._destination or Destination.of(directory)
            self._loader(directory, self._destination)
            self._known[key] = self._destination.digest()
        return self._known[key]


def _phase(story: Story, call: int) -> tuple[bool, ...]:
    return tuple(number <= call for s in story.saves for number in (s.committed, s.gone or 10**9))


def judge_ours(story: Story, state: State, folder: Path, digests: Digests) -> tuple[list[str], str]:
    """What is wrong, and what was chosen: recover, first_choice, and a load of every checkpoint that is there.

    The start takes the newest save that was promised, or the one whose rename has been called since; nothing else, and
    an error never. Without loss, a rename that was called counts. Everything that counts as a checkpoint is, bit for bit,
    what was saved under this id; what was promised and not given up is there. Nothing is set aside: a crash is no damage.
    """
    wrong, by_id = [], {save.save_id: save for save in story.saves}
    recover(folder)
    start, aside = first_choice(story.config)
    wrong += [f"{a.directory.name} was set aside: {a.reason}" for a in aside]
    promised = story.newest(state.call)
    since = [s for s in story.line if s.committed <= state.call < s.promised]
    allowed = {s.save_id for s in since} | ({promised.save_id} if promised is not None else set())
    if since and not state.lost:
        allowed = {since[-1].save_id}
    chosen = start.manifest.save_id if start.manifest is not None else None
    if chosen not in allowed and not (chosen is None and promised is None and (state.lost or not since)):
        names = {save_id: f"step-{save.step} ({save_id})" for save_id, save in by_id.items()}
        wrong.append(f"{names.get(chosen or '', chosen)} was chosen, expected {[names[a] for a in sorted(allowed)]}")
    there = {}
    for entry in entries(folder):
        if entry.manifest is None:
            wrong.append(f"{entry.path.name} is no checkpoint: {entry.problem}")
            continue
        there[entry.manifest.save_id] = entry
        truth = by_id.get(entry.manifest.save_id)
        if truth is None or digests.of(entry.path) != truth.digest or truth.step != entry.step:
            wrong.append(f"{entry.path.name} does not hold what was saved")
    for save in story.saves:
        if save.promised <= state.call and (save.gone is None or state.call < save.gone) and save.save_id not in there:
            wrong.append(f"step-{save.step} ({save.save_id}) was promised and is gone")
    left = all_leftovers(folder)
    if left:
        wrong.append(f"{listed(path.name for path in left)} is left after recover")
    if chosen is None:
        return wrong, NOTHING
    return wrong, PROMISED if promised is not None and chosen == promised.save_id else UNDER_WAY


OLDER, STUCK, WRONG = "an older one, a promised one is lost", "an error: it does not start", "wrong numbers, unsaid"


def judge_plain(story: Story, state: State, folder: Path, digests: Digests) -> tuple[list[str], str]:
    """The same for plain torch, with the usual rule around it: the newest step that has a .metadata is loaded."""
    promised = story.newest(state.call)
    allowed = {s.digest: UNDER_WAY for s in story.saves if s.promised > state.call}
    allowed |= {promised.digest: PROMISED} if promised is not None else {}
    found = [path for path in folder.glob("step-*") if (path / ".metadata").is_file()]
    if not found:
        return ([], NOTHING) if promised is None else (["every step is gone"], STUCK)
    newest = max(found, key=lambda path: int(path.name.removeprefix("step-")))
    try:
        digest = digests.of(newest)
    except BaseException as error:  # CheckpointException is not an Exception
        return [f"{newest.name} does not load: {type(error).__name__}"], STUCK
    if digest in allowed:
        return [], allowed[digest]
    older = {save.digest for save in story.saves}
    return [f"{newest.name} does not hold what was saved"], OLDER if digest in older else WRONG


def _key(tree: Tree | bytes | None) -> bytes:
    digest = hashlib.blake2b(digest_size=16)

    def walk(found: Tree | bytes | None) -> None:
        if isinstance(found, dict):
            digest.update(b"d%d" % len(found))
            for name, child in sorted(found.items()):
                digest.update(name.encode() + b"\0")
                walk(child)
        elif found is not None:
            digest.update(b"f%d:" % len(found) + found)

    walk(tree)
    return digest.digest()
