"""What does a checkpoint survive? Thousands of faults and crashes, disks that say no, and what must not be touched.

The short form is tests/faults/test_faults_short.py. `python benchmarks/reliability.py` makes docs/reliability.md of it.
"""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2]))

from faults import campaign, crash, states, stories
from faults.campaign import DIED, HARMLESS, REFUSED, UNSAID, WRONG, Tally
from faults.crash import traced
from faults.damage import Fault
from faults.kills import saved_steps
from faults.loading import load_ours, load_plain, our_digest, plain_bits, plain_digest, start_ours
from faults.runs import TINIER, TINY, Ended, Workshop, train_words, workshop
from faults.saved import Saved, save_two_steps
from faults.states import Report, Story
from reshard.train.metrics import last_of_each_step, read_journal


@pytest.fixture(scope="module")
def shop() -> Iterator[Workshop]:
    with workshop() as made:
        yield made


@pytest.fixture(scope="module")
def tracing() -> None:
    """Needs strace, and says so: a proof that is left out proves nothing."""
    if reason := crash.can_trace():
        pytest.fail(reason)


# -- bytes ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(shop: Workshop) -> Saved:
    return save_two_steps(shop)


def said_the_file(tally: Tally, faults: list[Fault]) -> None:
    for outcome, fault in zip(tally.outcomes, faults, strict=True):
        if outcome.result == REFUSED:
            assert "step-2" in outcome.message, outcome
            if len(fault.change) == 1 and outcome.kind in ("flipped bit", "truncated", "missing", "empty", "extended"):
                assert next(iter(fault.change)) in outcome.message or "manifest" in outcome.message, outcome


def test_no_fault_loads_a_wrong_number(shop: Workshop, saved: Saved) -> None:
    """Every file (manifest, index, data, sidecars), every region: the error, or every bit right."""
    faults, good = saved.faults(saved.ours), saved.ours / "step-2"
    assert len(faults) >= 2000
    assert {name for fault in faults for name in fault.change} > {path.name for path in good.iterdir()}
    tally = campaign.run(faults, good, shop.place / "case-ours", start_ours, plain_bits(good), ours=True, verified=True)
    assert len(tally.outcomes) == len(faults)
    assert tally.those(WRONG, UNSAID, DIED) == []
    assert campaign.not_noticed(tally) == []  # nor does `reshard verify` call any of it whole
    said_the_file(tally, faults)
    assert {o.kind for o in tally.those(HARMLESS)} <= {"extra file", "truncated", "extended"}  # JSON's last new line


def test_foreign_files_are_checked_as_far_as_they_can_be(shop: Workshop, saved: Saved) -> None:
    """Plain torch's files, read by us: only what is whole in itself, but of another save, can pass for the real thing."""
    faults, good = saved.faults(saved.plain), saved.plain / "step-2"
    tally = campaign.run(faults, good, shop.place / "case-foreign", load_ours, plain_bits(good), ours=True)
    assert tally.those(UNSAID, DIED) == []
    assert {o.kind for o in tally.those(WRONG)} <= {"stale file", "stale page"}
    assert len(tally.those(REFUSED)) > 500


def test_the_same_faults_do_load_wrong_through_plain_torch(shop: Workshop, saved: Saved) -> None:
    """Otherwise the zeros above would prove nothing."""
    faults, good = saved.faults(saved.plain), saved.plain / "step-2"
    numbers = [f for f in faults if f.kind == "flipped bit" and f.what.endswith("numbers")]
    tally = campaign.run(numbers, good, shop.place / "case-plain", load_plain, plain_bits(good), ours=False)
    assert len(tally.those(WRONG)) == len(numbers) > 100


# -- crashes ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def new_steps(shop: Workshop, tracing: None) -> Story:
    return stories.new_steps(shop.runs, shop.folder("new-steps"), shop.text)


@pytest.fixture(scope="module", params=[True, False], ids=["exchange", "two renames"])
def again(shop: Workshop, new_steps: Story, request: pytest.FixtureRequest) -> Story:
    place = shop.folder(f"again-{request.param}")
    return stories.same_step_again(
        shop.runs, place, shop.text, shop.place / "new-steps/run", exchange=request.param
    )  # fmt: skip


def tried(shop: Workshop, story: Story, *, chance: int = 6, others: int = 100) -> Report:
    state = shop.place / "state"
    state.mkdir(exist_ok=True)
    return states.try_all(story, states.states_of(story.history, chance=chance, others=others), state)


def test_every_crash_of_a_save_starts_from_the_newest_step(shop: Workshop, new_steps: Story) -> None:
    """Four ranks, three saves, one deletion; each call's state, in thirteen ways and by chance."""
    report = tried(shop, new_steps)
    assert report.failures == []
    assert report.states > 1500


def test_every_crash_of_saving_a_step_again_starts_from_the_old_or_the_new(shop: Workshop, again: Story) -> None:
    """With the command that went back to an older step, and with the plain one."""
    for story in (again, stories.asking_for_the_newest(again)):
        report = tried(shop, story)
        assert report.failures == []
        assert report.states > 1500


def test_every_crash_of_the_start_after_a_crash(shop: Workshop, again: Story) -> None:
    """Putting the folder in order may be interrupted, too, by a power failure even."""
    place = shop.place / f"starts-{again.saves[-1].save_id}"
    place.mkdir()
    (shop.place / "state").mkdir(exist_ok=True)
    count = 0
    for story, found in stories.crashes_of_the_start(
        shop.runs, stories.asking_for_the_newest(again), place, every=3, chance=1
    ):
        report = states.try_all(story, iter(found), shop.place / "state")
        assert report.failures == []
        count += report.states
    assert count > 500


def test_the_same_crashes_do_harm_to_plain_torch(shop: Workshop, new_steps: Story) -> None:
    """Otherwise the zeros above would prove nothing."""
    sources = [shop.place / f"plain-sources/checkpoint/step-{step}" for step in (1, 2, 3)]
    ended = shop.runs.run(
        train_words(shop.place / "plain-sources", shop.text, steps=3, interval=1, model=TINIER), world=4
    )
    assert ended.code == 0, ended.err[0]
    story = stories.plain_torch(shop.runs, shop.folder("plain-crashes"), sources)
    (shop.place / "state").mkdir(exist_ok=True)
    found = states.states_of(story.history, chance=0, others=20)
    report = states.try_all(story, found, shop.place / "state", states.judge_plain)
    assert report.outcomes["killed"][states.STUCK] > 10
    assert report.outcomes["killed"][states.WRONG] + report.outcomes["power lost"][states.WRONG] > 0


# -- the real trainer falls back --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(shop: Workshop) -> Path:
    """Three saved steps of two ranks; and, in `peace`, the five that the run takes in all."""
    place = shop.folder("trained")
    for name, steps in (("run", 3), ("peace", 5)):
        ended = shop.runs.run(train_words(place / name, shop.text, steps=steps, interval=1), world=2)
        assert ended.code == 0, ended.err[0]
    return place


def losses(place: Path) -> dict[int, float]:
    return {step: r["loss"] for step, r in last_of_each_step(read_journal(place / "metrics.jsonl")).items()}


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if not path.name.startswith(".")}


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 4
    path.write_bytes(data)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "a flipped bit in the first rank's numbers": lambda step: flip(step / "__0_0.distcp", 5000),
    "a flipped bit in the last rank's numbers": lambda step: flip(step / "__1_0.distcp", 350_000),
    "a flipped bit in a sidecar": lambda step: flip(step / "__1_0.distcp.crc", 30),
    "a flipped bit in the index": lambda step: flip(step / ".metadata", 3000),
    "a flipped bit in the manifest": lambda step: flip(step / "manifest.json", 3000),
    "a file cut short": lambda step: os.truncate(step / "__0_0.distcp", 100),
    "a missing file": lambda step: (step / "__1_0.distcp").unlink(),
    "a data file of another step": lambda step: shutil.copy(step.parent / "step-2/__1_0.distcp", step / "__1_0.distcp"),
}


@pytest.mark.parametrize("what", DAMAGES)
def test_a_run_falls_back_past_a_damaged_step(what: str, shop: Workshop, trained: Path, tmp_path: Path) -> None:
    """Two ranks agree on it, say what was lost, and end with the losses of the run that met no damage."""
    run = tmp_path / "run"
    shutil.copytree(trained / "run", run)
    DAMAGES[what](run / "checkpoint/step-3")
    ended = shop.runs.run(train_words(run, shop.text, steps=5, interval=1), world=2)
    assert ended.code == 0, ended.err[0]
    assert "step-3.damaged" in ended.err[0]
    assert names_in(run / "checkpoint") == {"step-1", "step-2", "step-3", "step-4", "step-5", "step-3.damaged"}
    (rollback,) = [event for event in read_journal(run / "events.jsonl") if event["event"] == "rollback"]
    assert rollback["now"].endswith("step-3.damaged")
    assert losses(run) == losses(trained / "peace")
    assert plain_digest(run / "checkpoint/step-5") == plain_digest(trained / "peace/checkpoint/step-5")


def test_two_damaged_steps_are_two_steps_back(shop: Workshop, trained: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained / "run", run)
    for step, name in ((3, "__1_0.distcp"), (2, "__0_0.distcp")):
        flip(run / f"checkpoint/step-{step}/{name}", 5000)
    ended = shop.runs.run(train_words(run, shop.text, steps=5, interval=1), world=2)
    assert ended.code == 0, ended.err[0]
    assert names_in(run / "checkpoint") >= {"step-2.damaged", "step-3.damaged"}
    assert losses(run) == losses(trained / "peace")


@pytest.mark.parametrize("cut", [False, True], ids=["a flipped bit", "a file cut short"])
def test_with_no_step_left_nothing_is_started_afresh(cut: bool, shop: Workshop, trained: Path, tmp_path: Path) -> None:
    """Neither at once nor when the job is started again."""
    run = tmp_path / "run"
    shutil.copytree(trained / "run", run)
    for step in (1, 2, 3):
        path = run / f"checkpoint/step-{step}/__1_0.distcp"
        os.truncate(path, 100) if cut else flip(path, 5000)
    for _ in range(2):
        ended = shop.runs.run(train_words(run, shop.text, steps=5, interval=1), world=2)
        assert ended.code == 2
        assert len(ended.sentences) == 1
        assert "no whole checkpoint is left" in ended.sentences[0]
        assert names_in(run / "checkpoint") == {"step-1.damaged", "step-2.damaged", "step-3.damaged"}


def test_moments_that_were_read_before_the_damage_do_not_stay(shop: Workshop, tmp_path: Path) -> None:
    """The step behind the damaged one is a seed: weights alone. The optimizer must then be as in a run from the seed."""
    for name in ("run", "peace"):
        words = train_words(tmp_path / name, shop.text)[1:]
        assert shop.runs.run(["seed", *words]).code == 0
    assert shop.runs.run(train_words(tmp_path / "run", shop.text, steps=2, interval=2)).code == 0
    path = tmp_path / "run/checkpoint/step-2/__0_0.distcp"
    flip(path, path.stat().st_size - 3000)  # in what is read last
    for name in ("run", "peace"):
        ended = shop.runs.run(train_words(tmp_path / name, shop.text, steps=3, interval=3))
        assert ended.code == 0, ended.err[0]
    assert (tmp_path / "run/checkpoint/step-2.damaged").is_dir()
    assert losses(tmp_path / "run") == losses(tmp_path / "peace")


# -- disks that say no ------------------------------------------------------------------------------------------------


@contextmanager
def small_disk(place: Path, nbytes: int) -> Iterator[Callable[[int], None]]:
    """A file system of so many bytes; gives a function that changes its size. Needs the right to mount."""
    if os.geteuid() != 0:
        pytest.fail("a small file system is needed, which only root may mount: sudo make proof")
    place.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={nbytes}", "tmpfs", str(place)], check=True)
    try:
        yield lambda size: subprocess.run(["mount", "-o", f"remount,size={size}", str(place)], check=True) and None
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def one_sentence(ended: Ended) -> str:
    """What the run has to say: exit code 2, one sentence, no traceback."""
    assert ended.code == 2, "\n".join(ended.err)
    assert not any("Traceback" in text for text in ended.err), "\n".join(ended.err)
    assert len(ended.sentences) == 1, ended.err
    return ended.sentences[0]


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("mode", ["disabled", "async"])
def test_a_disk_that_fills_up(world: int, mode: str, shop: Workshop, tmp_path: Path) -> None:
    """One sentence; the step does not exist; older ones are whole; with more room the run goes on to the same end."""
    disk, options = tmp_path / "disk", {"steps": 8, "interval": 1, "async_mode": mode}
    assert shop.runs.run(train_words(tmp_path / "peace", shop.text, **options), world=world).code == 0
    nbytes = sum(path.stat().st_size for path in (tmp_path / "peace/checkpoint/step-8").iterdir())
    with small_disk(disk, int(3.5 * nbytes) + 100_000) as resize:
        words = train_words(disk / "run", shop.text, **options)
        sentence = one_sentence(shop.runs.run(words, world=world))
        assert "no space left to save" in sentence
        assert "step-4" in sentence
        folder = disk / "run/checkpoint"
        assert names_in(folder) == {"step-1", "step-2", "step-3"}
        assert shop.runs.run(["verify", str(folder)]).code == 0
        resize(20 * nbytes)
        ended = shop.runs.run(words, world=world)
        assert ended.code == 0, ended.err[0]
        assert "resuming after step 3" in ended.err[0]
        assert losses(disk / "run") == losses(tmp_path / "peace")
        assert plain_digest(folder / "step-8") == plain_digest(tmp_path / "peace/checkpoint/step-8")


# A call that fails in a run that saves steps 1, 2 and 3: its name, the error, and for which time in one process. strace
# makes the kernel's answer the error; nothing of ours is replaced. fsync: of rank 0 after the folder's own, six a save.
CALLS = [
    ("writev", "EIO", 2), ("writev", "EIO", 3), ("writev", "ENOSPC", 2), ("writev", "EDQUOT", 2), ("rename", "EIO", 2),
    ("rename", "ENOSPC", 1), ("renameat2", "EIO", 1), *(("fsync", "EIO", n) for n in (1, 6, 7, 8, 9, 10, 11, 12, 17)),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "when"), CALLS, ids=str)
def test_a_call_that_fails_in_a_save(
    call: str, error: str, when: int, shop: Workshop, tracing: None, trained: Path, tmp_path: Path
) -> None:
    """The disk says no at one place: one sentence; what is there is whole; the next start goes on to the same end."""
    world = 1 if call == "writev" else 2  # gloo calls writev, too
    peace, run, again = tmp_path / "peace", tmp_path / "run", ()
    if call == "renameat2":  # only where a step is saved again
        again = ("--checkpoint.load_step", "1")
        shutil.copytree(trained / "run", run)
        shutil.copytree(trained / "run", peace)
    if call == "fsync":
        when += len((run / "checkpoint").parents)
    for place in (peace, run):
        words = train_words(place, shop.text, *again, steps=3, interval=1)
        tracer = ["-o", "/dev/null", "-e", f"trace={call}", "-e", f"inject={call}:error={error}:when={when}"]
        with traced(shop.runs.process, *tracer) if place == run else nullcontext():
            ended = shop.runs.run(words, world=world)
    sentence = one_sentence(ended)
    assert "could not be saved" in sentence or "no space left" in sentence
    folder = run / "checkpoint"
    assert names_in(folder) <= {"step-1", "step-2", "step-3"}
    for step in names_in(folder):
        assert our_digest(folder / step) == plain_digest(peace / "checkpoint" / step), step
    assert {f"step-{step}" for step in saved_steps(run)} <= names_in(folder)
    ended = shop.runs.run(words, world=world)
    assert ended.code == 0, ended.err[0]
    assert losses(run) == losses(peace)
    assert plain_digest(folder / "step-3") == plain_digest(peace / "checkpoint/step-3")


def test_a_disk_that_swallows_a_write_is_noticed_before_the_commit(
    shop: Workshop, tracing: None, tmp_path: Path
) -> None:
    """The call says that all was written, and nothing was: sizes are compared with the disk."""
    words = train_words(tmp_path / "run", shop.text, steps=2, interval=1)
    with traced(
        shop.runs.process, "-o", "/dev/null", "-e", "trace=writev", "-e", "inject=writev:retval=4000000:when=2"
    ):
        ended = shop.runs.run(words, world=1)
    assert "step-2" in one_sentence(ended)
    assert names_in(tmp_path / "run/checkpoint") == {"step-1"}


# -- what renames nothing ---------------------------------------------------------------------------------------------


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    found = {path: path.stat() for path in sorted(folder.rglob("*")) if path.name not in (".lock", ".owner.json")}
    return {str(path.relative_to(folder)): (s.st_size, s.st_mtime_ns) for path, s in found.items() if path.is_file()}


@pytest.mark.parametrize(
    "options",
    [("--model.dim", "64"), ("--model.n_layers", "3"), ("--model.vocab_size", "1024"), ("--training.dtype", "bfloat16"),
     ("--training.seq_len", "32")],
    ids=" ".join,
)  # fmt: skip
def test_what_does_not_fit_renames_nothing(
    options: tuple[str, ...], shop: Workshop, trained: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained / "run", run)
    before = tree(run / "checkpoint")
    one_sentence(shop.runs.run([*train_words(run, shop.text, steps=5, interval=1), *options], world=2))
    assert tree(run / "checkpoint") == before


@pytest.mark.parametrize("name", ["manifest.json", ".metadata", "__0_0.distcp", "__1_0.distcp", "__1_0.distcp.crc"])
@pytest.mark.parametrize("verb", ["train", "verify"])
def test_a_file_that_cannot_be_read_renames_nothing(
    verb: str, name: str, shop: Workshop, tracing: None, trained: Path, tmp_path: Path
) -> None:
    """EIO from every read of one file: it says nothing about the checkpoint, so the run stops and verify cannot tell."""
    run = tmp_path / "run"
    shutil.copytree(trained / "run", run)
    before = tree(run / "checkpoint")
    path = run / "checkpoint/step-3" / name
    calls = "read,pread64,readv,preadv,preadv2"
    words = ["verify", str(path.parent)] if verb == "verify" else train_words(run, shop.text, steps=5, interval=1)
    with traced(
        shop.runs.process, "-o", "/dev/null", "-P", str(path), "-e", f"trace={calls}", "-e", f"inject={calls}:error=EIO"
    ):
        ended = shop.runs.run(words, world=1 if verb == "verify" else 2)
    assert tree(run / "checkpoint") == before
    if verb == "train":
        assert "cannot be read: Input/output error" in one_sentence(ended)
        assert shop.runs.run(words, world=2).code == 0  # the disk has come back, and nothing was lost
        assert not any("damaged" in found for found in names_in(run / "checkpoint"))
    else:
        assert ended.code == 2, ended.out
        assert "cannot be read: Input/output error" in ended.out[0]


def test_too_little_memory_renames_nothing(shop: Workshop, tmp_path: Path) -> None:
    """A limit that is reached at many places, in the load among them. Whatever fails then, no step is to blame."""
    wide = (*TINY, "--model.dim", "256", "--model.vocab_size", "16384", "--model.ffn_dim", "64")
    run = tmp_path / "run"
    ended = shop.runs.run(train_words(run, shop.text, steps=1, interval=1, model=wide))
    assert ended.code == 0, ended.err[0]
    before = tree(run / "checkpoint")
    in_the_load = done = 0
    more = ("--training.dtype", "bfloat16", "--checkpoint.allow_dtype_change")
    words = train_words(run, shop.text, *more, steps=2, stop_after=1, model=wide)
    for megabytes in range(20, 200, 10):
        ended = shop.runs.run(call="faults.onranks:with_little_memory", megabytes=megabytes, command=words)
        assert tree(run / "checkpoint") == before, ended.err[0]
        done += ended.code == 0
        in_the_load += "reader.py" in ended.err[0]
    assert in_the_load > 0
    assert done > 0
    assert resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY  # of this process: not touched


def test_verify_never_calls_little_memory_damage(shop: Workshop, trained: Path) -> None:
    codes = set()
    for kilobytes in range(0, 20_000, 1_000):
        ended = shop.runs.run(
            call="faults.onranks:with_little_memory", megabytes=kilobytes / 1000,
            command=["verify", str(trained / "run/checkpoint/step-3")],
        )  # fmt: skip
        assert "DAMAGED" not in ended.out[0]
        codes.add(ended.code)
    assert codes == {0, 2}  # whole, or cannot tell
