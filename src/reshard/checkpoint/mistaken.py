"""What lies at a path where a checkpoint was expected? Told by names alone; nothing is opened. Imports no torch.

People name the folder that holds a run's steps, the run's own folder, or another program's weights.
"""

from __future__ import annotations

import re
from pathlib import Path

from reshard.checkpoint.layout import METADATA, entries
from reshard.checkpoint.manifest import MANIFEST
from reshard.errors import NotACheckpoint, listed

_OURS = re.compile(r"(__[0-9]+_[0-9]+\.distcp(\.crc)?|manifest\.json|\.metadata)\Z")


def mistaken(path: Path, step_0: Path) -> NotACheckpoint | None:
    """The error that calls it by its name and says what to type; None where it may be a checkpoint, whole or torn.

    step_0: where the run would take converted weights from. Raises StorageError.
    """
    if not path.is_dir():
        if not path.exists():
            return None
        return _convert(path, f"`{path}` is a file", step_0)
    names = sorted(item.name for item in path.iterdir())
    if not names or any(map(_OURS.match, names)):
        return None
    for folder in (path, *(path / name for name in names if (path / name).is_dir())):
        found = entries(folder)
        if not found:
            continue
        steps = listed(e.path.name for e in found)
        what = f"a folder of checkpoints ({steps})" if folder == path else f"a run's folder, with {steps} in `{folder}`"
        whole = [e.path for e in found if e.committed]
        return NotACheckpoint(
            f"`{path}` is {what}, expected one checkpoint",
            path=path,
            hint=f"name one: --checkpoint.initial_load_path {whole[-1]}"
            if whole
            else f"`reshard verify {folder}` says what each is",
        )
    if "config.json" in names or any(name.endswith(".safetensors") for name in names):
        return _convert(path, f"`{path}` is a Hugging Face directory", step_0)
    if "params.json" in names or any(name.startswith("consolidated.") for name in names):
        return _convert(path, f"`{path}` holds Meta's files", step_0)
    if any(name.endswith((".pt", ".pth", ".gguf", ".bin")) for name in names):
        return _convert(path, f"`{path}` holds {listed(names)}", step_0)
    return NotACheckpoint(
        f"`{path}` holds {listed(names)}: no checkpoint, it has neither {MANIFEST} nor {METADATA}",
        path=path,
        hint="name a step-N directory of a run, or a DCP directory; other weights are read by `reshard convert`",
    )


def _convert(path: Path, what: str, step_0: Path) -> NotACheckpoint:
    source = path.with_name(f"{path.name}.kept") if path == step_0 else path
    commands = [f"mv {path} {source}"] if source != path else []
    commands.append(f"reshard convert {source} {step_0}")
    return NotACheckpoint(
        f"{what}, expected a checkpoint",
        path=path,
        hint="convert it (with --model MODEL where the weights do not say which model they are), then start again: "
        + " && ".join(commands),
    )
