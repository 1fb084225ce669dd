"""Which checkpoints are damaged? Two steps of a run of four ranks with optimizer, saved by us and by plain torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from faults import damage
from faults.damage import Fault
from faults.runs import Workshop, train_words

FLIPS, OTHERS = 44, 8  # of each kind, for each file and region: some 2,500 faults


@dataclass(frozen=True)
class Saved:
    """The two folders; each holds step-1 and step-2 of the same numbers."""

    ours: Path
    plain: Path

    def faults(self, folder: Path) -> list[Fault]:
        """Of step-2, with step-1 as what lay there before."""
        return list(damage.faults(folder / "step-2", folder / "step-1", flips=FLIPS, others=OTHERS))


def save_two_steps(shop: Workshop) -> Saved:
    """Train and save them."""
    place = shop.folder("saved")
    ended = shop.runs.run(train_words(place / "ours", shop.text, steps=2, interval=1), world=4)
    assert ended.code == 0, ended.err[0]
    (place / "plain").mkdir()
    ours = place / "ours/checkpoint"
    ended = shop.runs.run(
        world=4, call="faults.onranks:save_plainly", sources=[str(ours / "step-1"), str(ours / "step-2")],
        folder=str(place / "plain"), steps=[1, 2],
    )  # fmt: skip
    assert ended.code == 0, ended.err[0]
    return Saved(ours, place / "plain/checkpoint")
