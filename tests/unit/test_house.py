"""Does the house keep its rules? Imports point down, light commands stay light, nothing unsafe, nothing of one machine."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[2]
SOURCE = PROJECT / "src" / "reshard"
MODULES = sorted(SOURCE.rglob("*.py"))
SEED = "SEED"  # stands for the path of a small seed checkpoint
TRACKED_SUFFIXES = {".py", ".md", ".toml", ".sh", ".yaml", ".lock", ".txt", ""}


def named(path: Path) -> str:
    return path.relative_to(PROJECT).as_posix()


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def test_imports_point_down() -> None:
    """The contract is in pyproject.toml."""
    done = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"],
        cwd=PROJECT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 kept, 0 broken" in done.stdout


def test_every_room_is_in_the_contract() -> None:
    config = tomllib.loads((PROJECT / "pyproject.toml").read_text())
    layers = re.findall(r"reshard\.(\w+)", " ".join(config["tool"]["importlinter"]["contracts"][0]["layers"]))
    rooms = {path.stem for path in SOURCE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert rooms - {"__init__", "__main__", "py"} == set(layers)


@pytest.fixture(scope="module")
def seed(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A checkpoint of ours, with all that a manifest of a real one says."""
    folder = tmp_path_factory.mktemp("seed")
    words = ["seed", "--model.dim", "32", "--model.n_layers", "1", "--job.dump_folder", str(folder)]
    done = subprocess.run([sys.executable, "-m", "reshard", *words], capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.mark.parametrize(
    "words",
    [["--help"], ["--version"], ["train", "--help"], ["config", "train_configs/debug_model.toml"],
     ["config", "--keys"], ["config", "--check", "train_configs/debug_model.toml"], ["config", "--nonsense.key", "1"],
     ["tokenize", "--help"], ["verify", "--help"], ["inspect", SEED], ["inspect", f"{SEED}/.."],
     ["verify", "--level", "files", SEED], ["verify", SEED]],
    ids=" ".join,
)  # fmt: skip
def test_light_commands_import_no_torch(words: list[str], seed: str) -> None:
    """`import torch` takes seconds, which nobody waits for to see a help text."""
    words = [word.replace(SEED, seed) for word in words]
    code = (
        "import sys\nfrom reshard.cli import main\n"
        f"try:\n    main({words!r})\nexcept SystemExit as stop:\n    print('code', stop.code)\n"
        "print('heavy', sorted({'torch', 'transformers', 'datasets', 'pyarrow', 'matplotlib'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("heavy []\n"), done.stdout[-300:]
    assert ("code 2" in done.stdout) == ("--nonsense.key" in words), done.stdout + done.stderr


@pytest.mark.parametrize(
    "words",
    [["--help"], ["config", "train_configs/debug_model.toml"], ["inspect", SEED], ["verify", "--level", "files", SEED]],
    ids=" ".join,
)  # fmt: skip
def test_light_commands_answer_at_once(words: list[str], seed: str) -> None:
    """In 0.4 s of processor time, whatever else the machine does; the best of three, as the first fills caches."""
    words = [word.replace(SEED, seed) for word in words]

    def seconds() -> float:
        process = subprocess.Popen([sys.executable, "-m", "reshard", *words], cwd=PROJECT, stdout=subprocess.DEVNULL)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        assert process.returncode == 0
        return used.ru_utime + used.ru_stime

    assert min(seconds() for _ in range(3)) < 0.4


def test_the_trainer_can_be_called_whatever_was_imported_before() -> None:
    """`reshard.train` is a function to users and a package to Python: both must hold, in any order."""
    code = (
        "import reshard\nassert callable(reshard.train) and callable(reshard.train)\n"
        "import reshard.train.metrics as metrics\nassert callable(reshard.train) and metrics.Journal\n"
        "from reshard import train\n"
        "try:\n    train(reshard.load_config(None, ['--parallelism.tensor_parallel_degree', '3'])[0])\n"
        "except reshard.ReshardError as error:\n    print(type(error).__name__)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "LayoutError\n"), done.stderr


def test_the_public_names_are_there_and_come_when_called() -> None:
    code = (
        "import sys, reshard\nassert 'torch' not in sys.modules\n"
        "assert set(reshard.__all__) <= set(dir(reshard))\n"
        "print([name for name in reshard.__all__ if getattr(reshard, name) is None])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr


@pytest.mark.parametrize("path", MODULES, ids=named)
def test_every_module_says_what_it_is_for(path: Path) -> None:
    assert (ast.get_docstring(tree(path)) or "").strip(), f"{named(path)} has no docstring"


def test_no_drawer_for_everything() -> None:
    forbidden = {"util", "utils", "common", "helper", "helpers", "misc", "manager", "base", "core", "lib"}
    assert [named(p) for p in [*MODULES, *SOURCE.rglob("*/")] if p.stem.lower().strip("_") in forbidden] == []


READERS = {"pickle.load", "pickle.loads", "pickle.Unpickler", "marshal.loads", "marshal.load", "shelve.open"}
RUNNERS = {"eval", "exec", "os.system"}


def what_runs_code(path: Path) -> list[str]:
    """Places in a module that would run what the author of a file wants."""
    found = []
    for node in ast.walk(tree(path)):
        match node:
            case ast.keyword(arg="weights_only", value=value) if ast.unparse(value) != "True":
                found.append((value.lineno, "weights_only is not True"))
            case ast.Call(func=func, keywords=given) if ast.unparse(func) == "torch.load":
                if "weights_only" not in {keyword.arg for keyword in given}:
                    found.append((node.lineno, "torch.load without weights_only"))
            case ast.Call(func=func, keywords=given) if ast.unparse(func) in {"numpy.load", "np.load"}:
                if "allow_pickle=False" not in {ast.unparse(keyword) for keyword in given}:
                    found.append((node.lineno, "numpy.load with pickles"))
            case ast.Call(func=func) if ast.unparse(func) in RUNNERS:
                found.append((node.lineno, ast.unparse(func)))
            case ast.Attribute() if path.name != "safe_pickle.py" and ast.unparse(node) in READERS:
                found.append((node.lineno, ast.unparse(node)))
            case ast.ImportFrom(module="pickle") if path.name != "safe_pickle.py":
                found.append((node.lineno, "from pickle import"))
    return [f"{named(path)}:{line} {what}" for line, what in found]


def test_opening_a_file_runs_no_code() -> None:
    """Plain unpickling would run what a checkpoint's author wants; safe_pickle.py is the way."""
    assert [place for path in MODULES for place in what_runs_code(path)] == []


@pytest.mark.parametrize(
    "line", ["torch.load(f)", "torch.load(f, weights_only=False)", "load(f, weights_only=flag)", "pickle.load(f)",
             "read = pickle.loads", "from pickle import load", "np.load(f)", "exec(text)"],
)  # fmt: skip
def test_that_the_rule_sees_what_it_should(tmp_path: Path, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "PROJECT", tmp_path)
    (tmp_path / "module.py").write_text(line)
    assert len(what_runs_code(tmp_path / "module.py")) == 1


def test_libraries_do_not_print() -> None:
    prints = [
        f"{named(path)}:{node.lineno}"
        for path in MODULES
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "print"
    ]
    assert prints == []


def files_of_the_tree() -> list[Path]:
    """What git has or would take: ours, without what the runs and tools leave behind."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=PROJECT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if listed.returncode:  # an unpacked archive: what lies where ours lies
        ours = ("src", "tests", "docs", "benchmarks", "scripts", "examples", "train_configs")
        inside = [path for folder in ours for path in (PROJECT / folder).rglob("*") if "__pycache__" not in path.parts]
        return [path for path in (*PROJECT.iterdir(), *inside) if path.is_file()]
    return [PROJECT / name for name in listed.stdout.split("\0") if name and (PROJECT / name).is_file()]


def test_nothing_of_one_machine_is_in_the_tree() -> None:
    places = re.compile(r"(?<![\w.])/(work|opt|home|root)/\w|//(?:index|registry|mirror|proxy)[.\w-]*\.\w|file:///")
    found = []
    for path in files_of_the_tree():
        if path.suffix in TRACKED_SUFFIXES and path != Path(__file__).resolve():
            for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
                if places.search(line):
                    found.append(f"{named(path)}:{number} {line.strip()[:100]}")
    assert found == []


# -- what make install installs ---------------------------------------------------------------------------------------


def pins() -> dict[str, str]:
    lines = (PROJECT / "requirements.lock").read_text().splitlines()
    pinned = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9._-]+==[0-9][a-z0-9.]*", line.lower()) for line in pinned), pinned
    return dict(line.lower().replace("_", "-").split("==") for line in pinned)


def test_the_lock_has_exact_versions_and_no_gpu_build() -> None:
    locked = pins()
    assert locked["torch"] == "2.13.0"
    assert [name for name in locked if name.startswith(("nvidia", "cuda", "triton"))] == []


def test_the_lock_has_all_that_pyproject_names_and_it_fits() -> None:
    from packaging.requirements import Requirement

    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())
    needed = [*project["project"]["dependencies"], *project["build-system"]["requires"]]
    needed += [name for extra in project["project"]["optional-dependencies"].values() for name in extra]
    locked = pins()
    for requirement in map(Requirement, needed):
        assert requirement.specifier.contains(locked[requirement.name.lower().replace("_", "-")]), str(requirement)


def test_what_is_installed_is_what_the_lock_says() -> None:
    """Else the tests prove something about other versions than `make install` gives to people."""
    from importlib.metadata import PackageNotFoundError, version

    def installed(name: str) -> str:
        try:
            return version(name).partition("+")[0]
        except PackageNotFoundError:
            return "nothing"

    wrong = {name: (want, installed(name)) for name, want in pins().items() if installed(name) != want}
    assert wrong == {}


def test_every_proof_belongs_to_a_part() -> None:
    """`make proof PART=name` runs a folder of tests/proof; a test outside of these folders is in no part."""
    assert not list((PROJECT / "tests" / "proof").glob("test_*.py"))
