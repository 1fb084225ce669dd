"""Is everything there that belongs together? A folder of foreign weights: indexes, numbered files, unfinished downloads.

What names the files of a model: an index of Hugging Face's, the numbers in names (model-00001-of-00003), split.count of a
GGUF, and params.json with the shapes in Meta's files. Files that nothing counts are asked one by one. Imports no torch.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from reshard.checkpoint.verify import Advance, Finding, Level, Verdict
from reshard.commands.verify_weights import Answer, Look, kind_of, look_at, nothing_in, unfinished, verdict_of
from reshard.errors import DataError, FormatError, listed
from reshard.formats.hf_config import CONFIG, read_json
from reshard.formats.meta import PARAMS, files_wanted, shard_name

_INDEX = ".index.json"
_NUMBERED = re.compile(r"(?P<name>.+)-(?P<number>\d{5})-of-(?P<total>\d{5})(?P<suffix>\.\w+)", re.ASCII)
_META = re.compile(r"consolidated\.(\d\d)\.pth", re.ASCII)
_BINS = re.compile(r"(pytorch_model|adapter_model|model|consolidated)\b.*\.bin", re.ASCII)  # others are of any kind
_HUB = ".cache/huggingface/download"  # where `hf download --local-dir` keeps what is on its way


@dataclass
class _Folder:
    """A folder, what was seen in it, and what is to be said of it as a whole."""

    path: Path
    looks: dict[str, Look]  # by the files' names, below the folder
    answer: Answer
    complete: bool = False  # some model in it is all there
    absent: list[tuple[str, str]] = field(default_factory=list)  # (what names files, which), where none is there
    counted: set[str] = field(default_factory=set)  # files that something names

    def finding(self, name: str, problem: str, tensors: tuple[str, ...] = ()) -> None:
        """One more thing that is not as it should be."""
        self.answer.problems.append(Finding(name, problem, tensors))


def verify_folder(folder: Path, level: Level, advance: Advance) -> list[Verdict]:
    """A verdict for each file of weights, and one for the folder before them where there is something to say of it.

    Empty where nothing in the folder looks like weights. Raises OSError.
    """
    names = sorted(_weights(folder))
    looks = {name: look_at(folder / name, level, advance) for name in names}
    seen = _Folder(folder, looks, Answer("folder of weights"))
    _unfinished(seen)
    for index in sorted(folder.glob(f"*{_INDEX}")):
        _by_index(seen, index)
    _by_number(seen)
    for place in ("", "original/"):
        _by_params(seen, place)
    if not looks and not seen.absent and not seen.answer.problems:
        return []
    seen.complete = seen.complete or any(look.verdict.whole for name, look in looks.items() if name not in seen.counted)
    for what, which in seen.absent:
        if seen.complete:
            seen.answer.notes.append(f"none of the files that {what} names is there: {which}")
        else:
            seen.finding(which, f"is missing, {what} names it")
    _small_files(seen)
    verdict = verdict_of(folder, seen.answer)
    said = bool(verdict.findings or verdict.problem or verdict.notes)
    return [*([verdict] if said else []), *(look.verdict for look in looks.values())]


def verify_parts(path: Path, level: Level, advance: Advance) -> list[Verdict]:
    """One file; with it the other parts of a GGUF that is split, which programs open by its first part's name."""
    look = look_at(path, level, advance)
    numbered = _NUMBERED.fullmatch(path.name)
    if look.gguf is not None and _split_count(look) > 1:
        names = {path.name}
        if numbered:
            names |= {name for name in _parts(numbered) if (path.parent / name).exists()}
        looks = {n: look if n == path.name else look_at(path.parent / n, level, advance) for n in sorted(names)}
        seen = _Folder(path.parent, looks, Answer("split GGUF"))
        _by_number(seen)
        verdict = verdict_of(path, seen.answer)
        return [*([verdict] if verdict.findings or verdict.problem else []), *(look.verdict for look in looks.values())]
    if numbered and int(numbered["total"]) > 1:
        answer = f"it is one of {int(numbered['total'])} files of a model, the others were not looked at"
        verdict = look.verdict
        return [Verdict(**{**vars(verdict), "notes": (*verdict.notes, answer)})]
    return [look.verdict]


def _weights(folder: Path) -> set[str]:
    """Names of what may be weights, also in original/, and of what an index names and is there."""
    found = set()
    for place in ("", "original/"):
        if not (folder / place).is_dir():
            continue
        for path in (folder / place).iterdir():
            kind = kind_of(path) if path.suffix != ".bin" or _BINS.fullmatch(path.name) else None
            if kind and path.suffix != ".ckpt" and not path.is_dir() and (not place or _META.fullmatch(path.name)):
                found.add(place + path.name)
    for index in folder.glob(f"*{_INDEX}"):
        found |= {
            name for name in set((_weight_map(index) or {}).values()) if _below(name) and (folder / name).exists()
        }
    return found


def _below(name: str) -> bool:
    return not Path(name).is_absolute() and ".." not in Path(name).parts


def _weight_map(index: Path) -> dict[str, str] | None:
    """Tensor -> file, of an index of Hugging Face's; None where it is none."""
    try:
        found = read_json(index).get("weight_map")
    except FormatError:
        return None
    if not isinstance(found, dict) or not found or not all(type(name) is str for name in found.values()):
        return None
    return found


def _by_index(seen: _Folder, index: Path) -> None:
    """Every file that it names, and in each the tensors that it says."""
    weight_map = _weight_map(index)
    if weight_map is None:
        seen.finding(index.name, nothing_in(index) or _json(index) or "has no weight_map of names to files")
        return
    files: dict[str, list[str]] = {}
    for tensor, name in weight_map.items():
        files.setdefault(name, []).append(tensor)
    seen.counted |= set(files)
    missing = sorted(name for name in files if name not in seen.looks)
    if len(missing) == len(files):
        seen.absent.append((index.name, listed(missing)))
        return
    for name in missing:
        seen.finding(name, f"is missing, {index.name} names it", tuple(sorted(files[name])))
    seen.complete = seen.complete or not missing
    for name, tensors in sorted(files.items()):
        shapes = seen.looks[name].shapes if name in seen.looks else None
        if shapes is None:
            continue
        if lacking := sorted(set(tensors) - set(shapes)):
            seen.finding(name, f"lacks tensors that {index.name} says are in it", tuple(lacking))
        if more := sorted(set(shapes) - set(tensors)):
            seen.answer.notes.append(f"{name} holds what {index.name} does not name: {listed(more)}")


def _by_number(seen: _Folder) -> None:
    """The files of model-00001-of-0000N that no index names, and of a GGUF what its split.count says."""
    groups: dict[tuple[str, str, str], list[str]] = {}
    for name in seen.looks:
        numbered = _NUMBERED.fullmatch(name)
        if numbered and name not in seen.counted:
            groups.setdefault((numbered["name"], numbered["total"], numbered["suffix"]), []).append(name)
        elif not numbered and _split_count(seen.looks[name]) > 1:
            count = _split_count(seen.looks[name])
            seen.answer.doubts.append(
                f"{name} is one of {count} files of a GGUF; its name does not say how the others are called"
            )
    for (_, total, suffix), names in groups.items():
        seen.counted |= set(names)
        first = _NUMBERED.fullmatch(names[0])
        assert first is not None
        missing = [name for name in _parts(first) if name not in names]
        for name in missing:
            seen.finding(name, f"is missing: {names[0]} is one of {int(total)} files")
        if suffix == ".gguf":
            _by_split(seen, names, int(total), whole=not missing)
        elif int(total) > 1 and not missing:
            seen.answer.doubts.append(f"no {_INDEX[1:]} says which tensors {names[0]} and the others should hold")
        seen.complete = seen.complete or not missing


def _parts(numbered: re.Match[str]) -> Iterator[str]:
    for i in range(1, int(numbered["total"]) + 1):
        yield f"{numbered['name']}-{i:05d}-of-{numbered['total']}{numbered['suffix']}"


def _split_count(look: Look) -> int:
    count = look.gguf.values.get("split.count", 0) if look.gguf is not None else 0
    return count if type(count) is int else 0


def _by_split(seen: _Folder, names: list[str], total: int, *, whole: bool) -> None:
    """The headers of a split GGUF's parts against their names, and against each other."""
    tensors = 0
    for name in names:
        file = seen.looks[name].gguf
        if file is None:
            return  # it has its own finding
        tensors += len(file.tensors)
        number = file.values.get("split.no")
        if _split_count(seen.looks[name]) != total or (type(number) is int and f"-{number + 1:05d}-of-" not in name):
            seen.finding(
                name,
                f"says that it is part {number} (from 0) of {_split_count(seen.looks[name])}, not what its name says",
            )
    first = seen.looks[names[0]].gguf
    wanted = first.values.get("split.tensors.count") if first is not None else None
    if whole and type(wanted) is int and tensors != wanted:
        seen.finding(names[0], f"says that there are {wanted} tensors in all parts, they hold {tensors}")


def _by_params(seen: _Folder, place: str) -> None:
    """Meta's consolidated.NN.pth: without a hole, and as many as params.json and their shapes say."""
    params = seen.path / place / PARAMS
    shards = {
        int(m[1]): place + m[0]
        for m in map(_META.fullmatch, (n.removeprefix(place) for n in seen.looks if n.startswith(place)))
        if m
    }
    if not shards:
        if params.is_file():
            seen.absent.append((place + PARAMS, place + shard_name(0)))
        return
    seen.counted |= set(shards.values())
    shapes = next((look.shapes for name in shards.values() if (look := seen.looks[name]).shapes is not None), None)
    wanted = None
    try:
        wanted = files_wanted(params, shapes) if shapes is not None and params.is_file() else None
    except FormatError as error:
        seen.answer.doubts.append(error.message)
    missing = sorted(set(range(max(wanted or 0, *(n + 1 for n in shards)))) - set(shards))
    for number in missing:
        why = (
            f"{PARAMS} and the shapes in {shards[min(shards)]} ask for {wanted} files" if wanted else "there is a hole"
        )
        seen.finding(place + shard_name(number), f"is missing: {why}")
    if wanted is None and shapes and not params.is_file() and "layers.0.attention.wq.weight" in shapes:
        seen.answer.doubts.append(f"no {PARAMS} says how many {place}consolidated.NN.pth there should be")
    if wanted is not None and len(shards) > wanted:
        seen.answer.notes.append(f"{PARAMS} and the shapes ask for {wanted} files, there are {len(shards)}")
    seen.complete = seen.complete or not missing


def _unfinished(seen: _Folder) -> None:
    """What a program that downloads or copies has left."""
    for path in [*seen.path.iterdir(), *(seen.path / "original").glob("*"), *(seen.path / _HUB).rglob("*.incomplete")]:
        target = unfinished(path.name)
        name = str(path.relative_to(seen.path))
        if path.is_symlink() and not path.exists() and (kind_of(path) or path.name in _SMALL):
            seen.finding(name, "is a link to what is not there")
        if target is None or path.is_dir():
            continue
        ours = path.suffix == ".incomplete" or kind_of(Path(target)) or target in _SMALL or target.endswith(_INDEX)
        if path.suffix == ".aria2" or (ours and path.suffix != ".incomplete" and not path.with_name(target).exists()):
            seen.finding(name, "is of a download that has not finished")
        elif ours:
            seen.answer.doubts.append(f"{name} lies there: a download is going on, or has stopped")


# -- what lies beside the weights


def _json(path: Path) -> str | None:
    """What is wrong with a file that should hold a JSON object."""
    try:
        read_json(path)
    except FormatError as error:
        return error.message.removeprefix(f"{path} ")
    return None


def _tokenizer_model(path: Path) -> str | None:
    from reshard.text.whole import check_whole

    try:
        check_whole(path.name, path, path.read_bytes())
    except DataError as error:
        return error.message
    return None


_SMALL: dict[str, Callable[[Path], str | None]] = {
    **dict.fromkeys(
        (CONFIG, PARAMS, "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
         "added_tokens.json", "adapter_config.json"),
        _json,
    ),
    "tokenizer.model": _tokenizer_model,
}  # fmt: skip


def _small_files(seen: _Folder) -> None:
    """Are the files beside the weights as whole as can be told?"""
    for place in ("", "original/"):
        for name, ask in _SMALL.items():
            path = seen.path / place / name
            if not path.is_file():
                continue
            if problem := nothing_in(path) or ask(path):
                seen.finding(place + name, problem)
