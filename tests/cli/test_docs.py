"""Do the pages tell the truth? Every command and program in them is run here, or stands in ELSEWHERE with the reason.

python tests/cli/test_docs.py FOLDER        makes the folder that the pages' reader would have, with a small model in it
"""

from __future__ import annotations

import ast
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

PROJECT = Path(__file__).resolve().parents[2]
SOURCE = PROJECT / "src" / "reshard"
PAGES = [PROJECT / "README.md", PROJECT / "CONTRIBUTING.md", *sorted((PROJECT / "docs").rglob("*.md"))]
SHELLS = ("bash", "sh", "console")
OTHERS = ("python", "toml", "json", "")

# What begins so is not run here: why, and what runs it instead where something does.
ELSEWHERE: dict[str, tuple[str, str]] = {
    "make demo": ("minutes", "tests/proof/users/test_pages.py::test_the_demo"),
    "make test": ("it runs this test", ".ci/run"),
    "source .venv/bin/activate": ("needs `make install`", "tests/cli/test_readme.py::test_from_metas_weights_to_one_file"),
    "python3 scripts/convert_llama_to_dcp.py Meta-": ("8B", "tests/cli/test_readme.py::test_from_metas_weights_to_one_file"),
    "NGPU=": ("many GPUs, or minutes", "tests/cli/test_configs.py::test_every_recipe_fits"),
    "python -m torch.distributed.checkpoint.format_utils dcp_to_torch": (
        "of the 8B", "tests/cli/test_readme.py::test_from_metas_weights_to_one_file"),
    "reshard eval checkpoint.pt --config train_configs/llama3_8b.toml": (
        "of the 8B", "tests/cli/test_readme.py::test_from_metas_weights_to_one_file"),
    "torchrun --nproc-per-node 8 -m reshard train": ("8 GPUs", "tests/cli/test_configs.py::test_every_recipe_fits"),
    "NNODES=": ("several nodes", "tests/cli/test_run_script.py::test_two_nodes_without_a_scheduler"),
    "sbatch --nodes": ("SLURM", "tests/cli/test_run_script.py::test_the_slurm_script_on_one_node"),
    "reshard parity": ("many processes", "tests/proof/users/test_pages.py::test_parity_as_the_pages_have_it"),
    "llama-cli": ("llama.cpp", "tests/proof/formats/test_formats_llamacpp.py::test_same_tokens_and_same_continuation"),
    "tune ": ("torchtune", "tests/proof/formats/test_formats_torchtune.py::test_equal_logits"),
    "python benchmarks/": ("minutes, and a quiet machine", ""),
    "vllm serve": ("vLLM needs a GPU; the page says that it was not run", ""),
}  # fmt: skip


class Block(NamedTuple):
    """A fenced block of a page: its language, and its text."""

    language: str
    text: str


def blocks(page: Path) -> list[Block]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    return [Block(*block) for block in found]


def commands(page: Path) -> list[str]:
    """The lines of its shell blocks as typed: continued ones joined, comments and prompts gone."""
    lines = "\n".join(b.text.replace("\\\n", " ") for b in blocks(page) if b.language in SHELLS).splitlines()
    return [re.sub(r"\s+#\s.*$|^#.*$|^\$ ", "", line).strip() for line in lines if line.strip()]


def elsewhere(line: str) -> str | None:
    return next((start for start in ELSEWHERE if line.startswith(start)), None)


def named(path: Path) -> str:
    return path.relative_to(PROJECT).as_posix()


# -- commands ---------------------------------------------------------------------------------------------------------


def prepare(folder: Path) -> None:
    """What the pages' reader has: the configs, Meta's weights, and a step-1000. All of one model of 50,000 parameters."""
    import torch

    from reshard.checkpoint.save import save_weights
    from reshard.commands.seed import seed_pieces
    from reshard.config import config_to_toml, load_config
    from reshard.formats.meta import write_meta
    from reshard.model.build import spec_of
    from reshard.model.spec import parameter_shapes

    shutil.copytree(PROJECT / "train_configs", folder / "train_configs")
    (folder / "text.txt").write_text("\n".join(p.read_text(encoding="utf-8") for p in sorted(SOURCE.rglob("*.py"))))
    words = (
        "--model.dim 32 --model.n_layers 2 --model.n_heads 8 --model.n_kv_heads 2 --model.ffn_dim 64 --training.seq_len 32 "
        f"--training.dataset {folder / 'text.txt'} --training.batch_size 2"
    )
    debug = folder / "train_configs" / "debug_model.toml"
    config, _ = load_config(debug, words.split())
    debug.write_text(config_to_toml(config))
    spec = spec_of(config)
    pieces = seed_pieces(spec, 0, "float32")
    step = folder / "outputs" / "checkpoint" / "step-1000"
    save_weights(step, pieces, step=1000, source={"kind": "train"}, config=config.model_dump(), spec=spec)
    weights = {name: torch.randn(shape).bfloat16() for name, shape in parameter_shapes(spec).items()}
    write_meta(folder / "Meta-Llama-3-8B" / "original", weights, spec, 2)


@pytest.fixture(scope="session")
def reader(typed: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("reader") / "folder"
    folder.mkdir()
    done = typed(["python", __file__, str(folder)], PROJECT)
    assert done.code == 0, done.err
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)], ids=named)
def test_every_command_of_a_page_runs(page: Path, typed: Any, reader: Path, tmp_path: Path) -> None:
    """In order, as they stand, in a folder of their own. A clone has no outputs, and README.md is read in a clone."""
    here = Path(shutil.copytree(reader, tmp_path / "here"))
    if page.name == "README.md":
        shutil.rmtree(here / "outputs")
    for line in commands(page):
        if elsewhere(line):
            continue
        words = shlex.split(line)
        assert words[0] == "reshard", f"{named(page)}: `{line}` is neither run nor in ELSEWHERE"
        done = typed(words, here)
        assert done.code == 0, f"{named(page)}: `{line}`\n{done.out}\n{done.err}"
        assert "Traceback" not in done.err, done.err


def test_what_is_not_run_here_is_in_a_page_and_run_by_what_is_named() -> None:
    lines = [line for page in PAGES for line in commands(page)]
    assert [start for start in ELSEWHERE if not any(line.startswith(start) for line in lines)] == []
    for reason, place in ELSEWHERE.values():
        assert reason
        file, _, function = place.partition("::")
        assert not file or (PROJECT / file).is_file(), place
        assert not function or f"def {function}(" in (PROJECT / file).read_text(), place


def test_every_program_of_ours_that_a_page_starts_is_there() -> None:
    words = [word for page in PAGES for line in commands(page) for word in line.split()]
    ours = [word for word in words if word.endswith((".py", ".sh")) and "/" in word]
    assert len(ours) >= 5
    assert [word for word in ours if not (PROJECT / word).is_file()] == []


def test_no_command_hides_in_another_block() -> None:
    programs = re.compile(r"^(\$ )?(reshard|torchrun|python3?|pip|make|tune|sbatch|vllm|\./\w+) ", re.MULTILINE)
    for page in PAGES:
        for block in blocks(page):
            assert block.language in (*SHELLS, *OTHERS), f"{named(page)}: a block of {block.language}"
            if block.language not in SHELLS:
                assert not programs.search(block.text), f"{named(page)}:\n{block.text}"


# -- Python -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_page_about_python_is_a_program(typed: Any, tmp_path: Path) -> None:
    """Its blocks one after the other, where a clone's configs and README.md are."""
    text = "\n".join(b.text for b in blocks(PROJECT / "docs" / "python.md") if b.language == "python")
    (tmp_path / "page.py").write_text(text)
    for name in ("train_configs", "README.md"):
        (tmp_path / name).symlink_to(PROJECT / name)
    done = typed(["python", "page.py"], tmp_path)
    assert done.code == 0, done.err
    assert "outputs/checkpoint/step-0" in done.out
    assert "TensorMismatch" in done.out


def test_the_page_about_python_has_every_name() -> None:
    import reshard

    page = (PROJECT / "docs" / "python.md").read_text()
    assert [name for name in reshard.__all__ if f"`{name}(" not in page and f"`{name}`" not in page] == []
    assert len(reshard.__all__) == 13  # the page says so


def test_python_in_other_pages_is_python() -> None:
    for page in PAGES:
        for block in blocks(page):
            if block.language == "python":
                ast.parse(block.text)


@pytest.mark.slow
def test_the_api_is_typed(tmp_path: Path) -> None:
    """mypy --strict sees the types of all names from outside of the package."""
    program = tmp_path / "program.py"
    program.write_text(
        "from pathlib import Path\nimport reshard\n"
        "config, warnings = reshard.load_config(None)\n"
        "a: Path = reshard.convert('a', Path('b'), to='hf')\n"
        "b: bool = reshard.diff('a', 'b').same(any_dtype=True)\n"
        "c: list[bool | None] = [v.whole for v in reshard.verify('a', level='files')]\n"
        "d: int = reshard.train(config).step\ne: Path = reshard.seed(config)\nf: Path | None = reshard.newest('a')\n"
        "reshard.verify('a', level='bites')\nreshard.inspect(3)\n"
    )
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--strict",
        "--no-error-summary",
        "--cache-dir",
        str(PROJECT / ".mypy_cache"),
    ]
    done = subprocess.run(
        [*command, str(program)], cwd=PROJECT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    lines = re.findall(r"program\.py:(\d+): error: .*\[([\w-]+)\]", done.stdout)
    assert lines == [("10", "arg-type"), ("11", "arg-type")], done.stdout + done.stderr


# -- troubleshooting --------------------------------------------------------------------------------------------------


def sentences() -> list[str]:
    """Every string literal of the source, f-strings with ... for what is filled in."""
    found = []
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(str(v.value) if isinstance(v, ast.Constant) else "..." for v in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def quoted() -> list[str]:
    """The messages that docs/troubleshooting.md explains: its headings of the third level."""
    page = (PROJECT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    return re.findall(r"^### (.+)$", page, flags=re.MULTILINE)


def test_every_message_that_is_explained_can_still_be_said() -> None:
    """`...` stands for what is filled in; parts between them must lie in one message of the source, in this order."""
    source = sentences()

    def said(message: str) -> Iterator[str]:
        parts = [re.escape(part) for part in message.split("...")]
        pattern = re.compile(".*".join(parts), re.DOTALL)
        return (sentence for sentence in source if pattern.search(sentence))

    messages = quoted()
    assert len(messages) >= 30
    assert [message for message in messages if next(said(message), None) is None] == []


def test_that_a_message_of_nobody_would_show(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "quoted", lambda: ["the moon is full"] * 30)
    with pytest.raises(AssertionError):
        test_every_message_that_is_explained_can_still_be_said()


# -- places -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_file_that_a_page_names_is_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (page.parent / target).exists(), target
    for target in re.findall(r"`((?:src|tests|scripts|docs|examples|benchmarks|train_configs)/[\w./-]+\.\w+)", text):
        assert (PROJECT / target).exists(), target


def test_the_tour_names_what_is_there() -> None:
    """`room/file.py` and `room/file.py::function` of docs/tour.md, as it is written there."""
    page = (PROJECT / "docs" / "tour.md").read_text(encoding="utf-8")
    places = re.findall(r"`([\w/]+\.py)(?:::(\w+))?`", page)
    assert len(places) > 40
    for file, name in places:
        path = next((base / file for base in (SOURCE, PROJECT) if (base / file).is_file()), None)
        assert path is not None, file
        assert not name or re.search(rf"\b(def|class) {name}\b|^{name}\b.* = ", path.read_text(), re.MULTILINE), (
            f"{file} {name}"
        )
    rooms = {path.name for path in SOURCE.iterdir() if (path / "__init__.py").is_file()}
    assert [room for room in rooms if f"`{room}/" not in page] == []


def test_pre_commit_starts_only_what_make_install_has_installed() -> None:
    import yaml

    config = yaml.safe_load((PROJECT / ".pre-commit-config.yaml").read_text())
    assert [repo["repo"] for repo in config["repos"]] == ["local"]  # nothing is fetched from anywhere
    hooks = config["repos"][0]["hooks"]
    assert {hook["language"] for hook in hooks} == {"system"}
    programs = {hook["entry"].split()[0] for hook in hooks}
    assert programs == {".venv/bin/ruff", ".venv/bin/mypy", ".venv/bin/lint-imports"}
    assert all(Path(sys.executable).with_name(Path(program).name).exists() for program in programs)


if __name__ == "__main__":
    prepare(Path(sys.argv[1]))
