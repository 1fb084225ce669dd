"""Is it whole? `reshard verify`: checkpoints, folders of them, foreign DCP, .pt, .pth and safetensors."""

from __future__ import annotations

from pathlib import Path

from reshard.checkpoint.layout import is_foreign, step_of
from reshard.checkpoint.manifest import MANIFEST
from reshard.checkpoint.verify import Advance, Finding, Level, Verdict, verify_checkpoint, verify_foreign
from reshard.errors import FormatError


def run(path: Path, level: Level = "bytes", advance: Advance = lambda n: None) -> list[Verdict]:
    """Verify what lies at a path; a folder of steps gives a verdict for each. Raises nothing of ours.

    A disk that fails, or too little memory, says nothing of the checkpoint: then `whole` is None.
    """
    try:
        return _run(path, level, advance)
    except MemoryError:
        return [Verdict(str(path), "unknown", None, problem=f"there is too little memory to look at `{path}`")]
    except OSError as error:
        return [Verdict(str(path), "unknown", None, problem=f"`{path}` cannot be read: {error.strerror or error}")]


def _run(path: Path, level: Level, advance: Advance) -> list[Verdict]:
    if path.is_dir():
        if (path / MANIFEST).exists():
            return [verify_checkpoint(path, level, advance)]
        if is_foreign(path):
            return [verify_foreign(path, level, advance)]
        steps = sorted(
            (p for p in _listed(path) if step_of(p) is not None and p.is_dir()), key=lambda p: step_of(p) or 0
        )
        if steps:
            return [verdict for step in steps for verdict in run(step, level, advance)]
        files = [p for p in _listed(path) if p.suffix in (".safetensors", ".pth", ".pt")]
        if files:
            return [verdict for file in files for verdict in run(file, level, advance)]
        return [verify_checkpoint(path, level, advance)]
    if path.suffix == ".safetensors":
        return [_verify_safetensors(path)]
    if path.suffix in (".pt", ".pth") and path.is_file():
        return [_verify_pt(path, level, advance)]
    return [verify_checkpoint(path, level, advance)]


def exit_code(verdicts: list[Verdict]) -> int:
    """0: all are whole. 1: one is not. 2: none is damaged, but of one it could not be told."""
    if any(v.whole is False for v in verdicts):
        return 1
    return 2 if any(v.whole is None for v in verdicts) else 0


def size_of(path: Path) -> int:
    """Bytes below a path, for a progress bar."""
    if path.is_file():
        return path.stat().st_size
    return sum(p.stat().st_size for p in path.rglob("*") if p.is_file())


def _read_through(path: Path) -> None:
    """Is it the file or the disk? Raises OSError where the disk does not give all of it."""
    with open(path, "rb", buffering=0) as file:
        while file.read(1 << 20):
            pass


def _listed(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())


def _verify_safetensors(path: Path) -> Verdict:
    from reshard.formats.safetensors import open_safetensors

    notes = ("safetensors stores no checksums: the structure was checked",)
    try:
        tensors = open_safetensors(path)
    except FormatError as error:
        if not path.exists():
            return Verdict(str(path), "nothing", None, problem=error.message)
        _read_through(path)
        return Verdict(str(path), "safetensors", False, (Finding(path.name, error.message),))
    return Verdict(str(path), f"safetensors ({len(tensors)} tensors)", True, notes=notes)


def _verify_pt(path: Path, level: Level, advance: Advance) -> Verdict:
    from reshard.formats.torch_pt import check_records, open_pt

    try:
        file = open_pt(path)
        if level == "bytes":
            check_records(file)
            advance(file.nbytes)
    except FormatError as error:
        _read_through(path)
        return Verdict(str(path), "torch.save file", False, (Finding(path.name, error.message),))
    checked = file.nbytes if level == "bytes" else 0
    return Verdict(str(path), f"torch.save file ({len(file.tensors)} tensors)", True, bytes_checked=checked)
