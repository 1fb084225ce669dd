"""What does a loader do with thousands of damaged checkpoints? Each is refused, harmless, or loads wrong without a word.

Loads happen in child processes with a limit on memory and time: damage may end a process (plain torch's sometimes does).
"""

from __future__ import annotations

import json
import os
import resource
import signal
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from faults.damage import Case, Fault
from faults.loading import Destination, quiet
from reshard.checkpoint.verify import verify_checkpoint
from reshard.errors import ReshardError

REFUSED, HARMLESS, WRONG, UNSAID, DIED = "refused", "harmless", "wrong", "unsaid", "died"
MOST_MEMORY = 1 << 30  # that a load may take beyond what the process has
MOST_SECONDS = 20


@dataclass(frozen=True)
class Outcome:
    """What became of one fault.

    refused: an error of ours (of torch: any) · harmless: every bit is right · wrong: some are not, and nobody said so ·
    unsaid: an error that is not one of ours · died: the process ended, took too long or wanted too much memory.
    whole: what verify says of the same directory, where it was asked.
    """

    kind: str
    what: str
    result: str
    message: str = ""
    whole: bool | None = None


@dataclass
class Tally:
    """All outcomes of one loader."""

    outcomes: list[Outcome] = field(default_factory=list)

    def those(self, *results: str) -> list[Outcome]:
        return [outcome for outcome in self.outcomes if outcome.result in results]

    def by_kind(self) -> dict[str, Counter[str]]:
        table: dict[str, Counter[str]] = {}
        for outcome in self.outcomes:
            table.setdefault(outcome.kind, Counter())[outcome.result] += 1
        return table


def run(
    faults: Sequence[Fault],
    good: Path,
    place: Path,
    loader: Callable[[Path, Destination], None],
    truth: torch.Tensor,
    *,
    ours: bool,
    verified: bool = False,
) -> Tally:
    """Load every damaged copy of `good`. ours: errors must be ReshardErrors. verified: ask `reshard verify` as well."""
    case, destination, tally = Case(good, place), Destination.of(good), Tally()
    while len(tally.outcomes) < len(faults):
        status = _in_child(faults[len(tally.outcomes) :], case, destination, loader, truth, tally, ours, verified)
        if len(tally.outcomes) < len(faults):
            fault = faults[len(tally.outcomes)]
            tally.outcomes.append(Outcome(fault.kind, fault.what, DIED, f"the process ended with {status}"))
            case.repair(fault)
    return tally


def _in_child(
    faults: Sequence[Fault],
    case: Case,
    destination: Destination,
    loader: Callable[[Path, Destination], None],
    truth: torch.Tensor,
    tally: Tally,
    ours: bool,
    verified: bool,
) -> int:
    """Try faults in a child until it ends; its outcomes come through a pipe. Returns its exit code."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        try:
            _limit_memory()
            quiet()
            with os.fdopen(writing, "w") as out:
                for fault in faults:
                    signal.alarm(MOST_SECONDS)
                    outcome = _try(fault, case, destination, loader, truth, ours, verified)
                    out.write(json.dumps(outcome.__dict__) + "\n")
                    out.flush()
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as lines:
        for line in lines:
            tally.outcomes.append(Outcome(**json.loads(line)))
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _limit_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MOST_MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _try(
    fault: Fault,
    case: Case,
    destination: Destination,
    loader: Callable[[Path, Destination], None],
    truth: torch.Tensor,
    ours: bool,
    verified: bool,
) -> Outcome:
    case.damage(fault)
    result, message = HARMLESS, ""
    try:
        loader(case.directory, destination)
        if not torch.equal(destination.memory, truth):
            result = WRONG
    except ReshardError as error:
        result, message = REFUSED, error.message
    except MemoryError as error:
        result, message = DIED, f"MemoryError {error}"
    except BaseException as error:  # torch's CheckpointException is not an Exception
        result, message = UNSAID if ours else REFUSED, f"{type(error).__name__}: {error}"
    whole = verify_checkpoint(case.directory).whole if verified else None
    case.repair(fault)
    return Outcome(fault.kind, fault.what, result, message[:300], whole)


def not_noticed(tally: Tally) -> list[Outcome]:
    """Damage that `reshard verify` has not called damage, though it could have mattered."""
    return [
        outcome
        for outcome in tally.outcomes
        if outcome.whole is True and outcome.kind != "extra file" and not _only_json_space(outcome)
    ]


def _only_json_space(outcome: Outcome) -> bool:
    """White space around a manifest's JSON says nothing; all that is in it has the digest."""
    return outcome.kind in ("truncated", "extended") and "manifest.json" in outcome.what and outcome.result == HARMLESS
