"""Who trains the same model fastest on this machine? One command, one page of tables.

    python benchmarks/train.py --litgpt venv/bin/python              everything, 7 rounds
    python benchmarks/train.py --rounds 3 --ranks 1 --only speed --out -

reshard is its real loop (reshard.train, with checkpoints enabled), stopped between rounds at the end of a step.
transformers and litgpt are plain loops: batch, forward, loss, backward, clip, step, loss.item(). All train one Llama
(--size) on the bytes of the standard library with AdamW (0.9, 0.95, 1e-8, decay 0.1), clip at norm 1, recompute
nothing; two ranks are FSDP2, fully_shard on each block and the root; compiled is torch.compile of each block. AdamW runs
on the kernel that each project takes by itself: transformers' Trainer fused, litgpt's pretrain fused on CUDA and torch's
default elsewhere, reshard what optimizer.implementation `auto` takes.

The processes of a table live side by side and wait; one contestant at a time is let go for some steps, in an order that
turns from round to round, so that what else happens on the machine hits all alike. Ratios are taken within a round.
A litgpt of its own: python -m venv venv; point a .pth file in its site-packages at those that hold torch, so that all run
the same torch; venv/bin/pip install --no-deps litgpt lightning lightning-utilities torchmetrics.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import os
import platform
import re
import select
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from page import processor, put_between_marks

PROJECT = Path(__file__).resolve().parents[1]
PARTS = ("speed", "loop", "start")
SIZES = {  # the first is torchtitan 0.2.2's debug model; the other is for a GPU
    "6M": {"dim": 256, "n_layers": 6, "n_heads": 16, "n_kv_heads": 16, "ffn_dim": 768, "vocab_size": 2048},
    "1B": {"dim": 2048, "n_layers": 16, "n_heads": 32, "n_kv_heads": 8, "ffn_dim": 8192, "vocab_size": 128256},
}
PATIENCE_S = 400  # until a contestant that says nothing is given up: the first step compiles


@dataclass(frozen=True)
class Case:
    """What all contestants of a table train. batch: sequences per rank and step. threads: per rank."""

    size: str
    batch: int
    seq_len: int
    dtype: str
    threads: int
    ranks: int
    compiled: bool

    @property
    def tokens(self) -> int:
        """Per step, of all ranks."""
        return self.batch * self.seq_len * self.ranks

    def __str__(self) -> str:
        ranks = "1 process" if self.ranks == 1 else f"{self.ranks} ranks of FSDP2"
        return f"{ranks}, {'compiled' if self.compiled else 'eager'}"


# -- one rank of a contestant --------------------------------------------------------------------------------------------


class Gate:
    """Where a training loop waits between steps for the parent's word, and tells it how long the steps have taken."""

    def __init__(self) -> None:
        self._left, self._begun = 0, False
        self._wall = self._cpu = 0.0
        self._base_mib = 0.0
        self.bare_step: Callable[[], None] | None = None
        self.inside_s = 0.0  # in forward, backward, clipping and optimizer, since the gate was opened

    def about_to_build(self) -> None:
        """Everything is imported, nothing is made yet."""
        self._base_mib = _status_mib("VmRSS")

    def step(self) -> None:
        """A step is about to begin. Returns when it may."""
        while self._left == 0:
            if self._begun:
                self._answer()
            words = sys.stdin.readline().split()
            if not words or words[0] == "end":
                os._exit(0)
            self._begun, self._left, self.inside_s = True, int(words[1]), 0.0
            _synchronize()
            self._wall, self._cpu = time.perf_counter(), time.process_time()
            if words[0] == "bare":
                assert self.bare_step is not None
                for _ in range(self._left):
                    self.bare_step()
                self._left = 0
        self._left -= 1

    def _answer(self) -> None:
        _synchronize()
        wall, cpu = time.perf_counter() - self._wall, time.process_time() - self._cpu
        say({"wall": wall, "cpu": cpu, "inside": self.inside_s, "peak": _peak_mib(), "base": self._base_mib})


def say(answer: dict[str, Any]) -> None:
    """A line to the parent. Others may write to stdout, too, so it is marked."""
    print("@" + json.dumps(answer), flush=True)


def be_rank(task: dict[str, Any]) -> None:
    """Train until the parent says end."""
    import torch

    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    case = Case(**task["case"])
    torch.set_num_threads(case.threads)
    gate = Gate()
    if task["name"] == "reshard":
        train_reshard(case, Path(task["place"]), gate, task["observe"])
    else:
        train_peer(task["name"], case, gate)


def train_reshard(case: Case, place: Path, gate: Gate, observe: bool) -> None:
    """The trainer itself. Its reporter's clock is where a step begins; there the gate is."""
    from reshard.config import Config
    from reshard.model.build import spec_of
    from reshard.model.spec import parameter_count
    from reshard.train import loop
    from reshard.train.metrics import Reporter

    config = Config().with_values(**reshard_values(case, place))

    class Gated(Reporter):
        def start_clock(self) -> None:
            gate.step()
            super().start_clock()

    vars(loop)["Reporter"] = Gated
    if observe:
        _observe(loop, gate)
    say({**about_device(), "parameters": parameter_count(spec_of(config))})
    gate.about_to_build()
    loop.train(config)


def reshard_values(case: Case, place: Path) -> dict[str, dict[str, Any]]:
    """The config's keys of a case."""
    return {
        "job": {"dump_folder": str(place / "run")},
        "model": {**SIZES[case.size], "rope_scaling_factor": 0, "tied_embeddings": False},
        "training": {
            "batch_size": case.batch, "seq_len": case.seq_len, "steps": 1_000_000, "warmup_steps": 10,
            "dtype": case.dtype, "compile": case.compiled, "cache_folder": str(place / "tokens"),
        },
        "checkpoint": {"enable_checkpoint": True, "interval": 1_000_000},
        "activation_checkpoint": {"mode": "none"},
    }  # fmt: skip


def _observe(loop: Any, gate: Gate) -> None:
    """Time forward, backward, clipping and optimizer within the loop, and give the gate a bare step on its model."""
    import torch

    held: dict[str, Any] = {}

    def timed(work: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            result = work(*args, **kwargs)
            gate.inside_s += time.perf_counter() - begin
            return result

        return run

    passes_of, optimizer_of, clip = loop.Passes, loop.build_optimizer, loop.clip_gradients

    def build_optimizer(parameters: Any, *args: Any, **kwargs: Any) -> Any:
        held["parameters"], held["optimizer"] = parameters, optimizer_of(parameters, *args, **kwargs)
        held["step"] = held["optimizer"].step
        held["optimizer"].step = timed(held["step"])
        return held["optimizer"]

    class Observed(passes_of):  # type: ignore[misc,valid-type]
        def __init__(self, **values: Any) -> None:
            super().__init__(**values)
            held["passes"] = self

        _forward_backward = timed(passes_of._forward_backward)

    def bare_step() -> None:
        passes, parameters = held["passes"], held["parameters"]
        if "batch" not in held:
            tokens = torch.randint(0, 256, (passes.batches.rows, len(passes.positions_S) + 1), device=passes.device)
            held["batch"] = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        held["optimizer"].zero_grad(set_to_none=True)
        passes_of._forward_backward(passes, *held["batch"])
        clip(parameters, 1.0)
        held["step"]()

    vars(loop).update(Passes=Observed, build_optimizer=build_optimizer, clip_gradients=timed(clip))
    gate.bare_step = bare_step


def train_peer(name: str, case: Case, gate: Gate) -> None:
    """A plain loop around another project's model."""
    import torch
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    rank, device = int(os.environ.get("RANK", "0")), torch.device("cpu")
    if torch.cuda.is_available():  # not yet run on a GPU
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
    build = {"transformers": build_transformers, "litgpt": build_litgpt}[name]
    torch.manual_seed(0)  # the same weights on all ranks
    model, blocks, loss_of, fused = build(case, gate)
    model.to(device=device, dtype=getattr(torch, case.dtype))
    say({**about_device(), "parameters": sum(p.numel() for p in model.parameters())})
    if case.compiled:
        for block in blocks:
            block.compile()
    if case.ranks > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        mesh = dist.device_mesh.init_device_mesh(device.type, (case.ranks,))
        for block in blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=8e-4, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, fused=fused(device.type)
    )
    tokens = torch.frombuffer(bytearray(standard_library()), dtype=torch.uint8)
    rows = len(tokens) // (case.seq_len + 1)
    for number in itertools.count(rank, case.ranks):
        gate.step()
        at = [(number * case.batch + i) % rows * (case.seq_len + 1) for i in range(case.batch)]
        both = torch.stack([tokens[i : i + case.seq_len + 1].long() for i in at])
        inputs, labels = both[:, :-1].to(device), both[:, 1:].to(device)
        optimizer.zero_grad()
        loss = loss_of(inputs, labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        loss.item()


def standard_library() -> bytes:
    """What reshard's default dataset reads, or most of it."""
    return b"".join(path.read_bytes() for path in sorted(Path(os.__file__).parent.glob("*.py")))


Built = tuple[Any, list[Any], Callable[[Any, Any], Any], Callable[[str], bool | None]]


def build_transformers(case: Case, gate: Gate) -> Built:
    """Its model, blocks, loss, and whether its Trainer (adamw_torch_fused) would take the fused AdamW on a device."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaForCausalLM

    gate.about_to_build()
    s = SIZES[case.size]
    config = LlamaConfig(
        hidden_size=s["dim"], num_hidden_layers=s["n_layers"], num_attention_heads=s["n_heads"],
        num_key_value_heads=s["n_kv_heads"], intermediate_size=s["ffn_dim"], vocab_size=s["vocab_size"],
        max_position_embeddings=case.seq_len, rms_norm_eps=1e-5, tie_word_embeddings=False, use_cache=False,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    )  # fmt: skip
    model = LlamaForCausalLM(config)

    def loss_of(inputs: Any, labels: Any) -> Any:
        return model(input_ids=inputs, labels=labels, shift_labels=labels.contiguous()).loss

    return model, list(model.model.layers), loss_of, lambda device: True


def build_litgpt(case: Case, gate: Gate) -> Built:
    """Its model, blocks, loss, and whether its pretrain would take the fused AdamW on a device."""
    from litgpt.config import Config
    from litgpt.model import GPT
    from litgpt.utils import chunked_cross_entropy

    gate.about_to_build()
    s = SIZES[case.size]
    config = Config(
        n_embd=s["dim"], n_layer=s["n_layers"], n_head=s["n_heads"], n_query_groups=s["n_kv_heads"],
        intermediate_size=s["ffn_dim"], vocab_size=s["vocab_size"], padded_vocab_size=s["vocab_size"],
        block_size=case.seq_len, rotary_percentage=1.0, parallel_residual=False, bias=False, norm_eps=1e-5,
        norm_class_name="RMSNorm", mlp_class_name="LLaMAMLP", rope_base=500000,
    )  # fmt: skip
    model = GPT(config)

    def loss_of(inputs: Any, labels: Any) -> Any:
        return chunked_cross_entropy(model(inputs), labels)

    return model, list(model.transformer.h), loss_of, lambda device: True if device == "cuda" else None


def about_device() -> dict[str, str]:
    """What the parent, which does not import torch, wants to know."""
    import torch

    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {"device": name, "torch": torch.__version__}


def _synchronize() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _peak_mib() -> float:
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return _status_mib("VmHWM")


def _status_mib(name: str) -> float:
    return int(Path("/proc/self/status").read_text().split(f"{name}:")[1].split()[0]) / 1024


# -- the parent's side of it ---------------------------------------------------------------------------------------------


@dataclass
class Contestant:
    """The processes of one contestant, waiting at their gates."""

    name: str
    log: Path
    processes: list[subprocess.Popen[bytes]]
    about: dict[str, Any] = field(default_factory=dict)
    _read: dict[int, bytes] = field(default_factory=dict)

    @staticmethod
    def start(name: str, python: str, case: Case, place: Path, *, observe: bool = False) -> Contestant:
        """Start it; it comes to its gate by itself."""
        task = {"name": name, "case": asdict(case), "place": str(place), "observe": observe}
        log = place / f"{name}.log"
        environment = {
            **os.environ, "OMP_NUM_THREADS": str(case.threads), "TORCHINDUCTOR_COMPILE_THREADS": "1",
            "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore",
        }  # fmt: skip
        if case.ranks > 1:
            environment |= {"WORLD_SIZE": str(case.ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        processes = []
        for rank in range(case.ranks):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if case.ranks > 1 else {}
            with log.open("ab") as errors:
                processes.append(
                    subprocess.Popen(
                        [python, __file__, "--as-rank", json.dumps(task)], env=environment | own,
                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
                    )
                )  # fmt: skip
        return Contestant(name, log, processes)

    def greet(self) -> None:
        """Wait until it can take its first step."""
        self.about, *_ = [self._hear(process) for process in self.processes]

    def run(self, steps: int, command: str = "go") -> dict[str, float]:
        """Let it take some steps. Seconds of the slowest rank, CPU seconds of all, MiB of the largest; per step."""
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.write(f"{command} {steps}\n".encode())
            process.stdin.flush()
        heard = [self._hear(process) for process in self.processes]
        slowest = max(heard, key=lambda h: h["wall"])
        return {
            "wall": slowest["wall"] / steps,
            "inside": slowest["inside"] / steps,
            "cpu": sum(h["cpu"] for h in heard) / steps,
            "peak": max(h["peak"] for h in heard),
            "beyond": max(h["peak"] - h["base"] for h in heard),
        }

    def end(self) -> None:
        """End its processes."""
        for process in self.processes:
            process.kill()
            process.wait()

    def _hear(self, process: subprocess.Popen[bytes]) -> dict[str, Any]:
        assert process.stdout is not None
        fd = process.stdout.fileno()
        text = self._read.pop(fd, b"")
        while True:
            line, newline, rest = text.partition(b"\n")
            if newline:
                text = rest
                if line.startswith(b"@"):
                    self._read[fd] = rest
                    heard: dict[str, Any] = json.loads(line[1:])
                    return heard
                continue
            ready, _, _ = select.select([fd], [], [], PATIENCE_S)
            more = os.read(fd, 1 << 16) if ready else b""
            if not more:
                said = self.log.read_text(errors="replace").strip()[-1500:]
                raise RuntimeError(f"{self.name} has ended or says nothing for {PATIENCE_S} s:\n{said}")
            text += more


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


Runs = dict[str, list[dict[str, float]]]


def race(case: Case, pythons: dict[str, str], place: Path, rounds: int, steps: int) -> tuple[Runs, dict[str, Any]]:
    """Every contestant in every round, in turning order; one unmeasured round first, which also compiles."""
    contestants: dict[str, Contestant] = {}
    runs: Runs = {}
    try:
        for name, python in pythons.items():
            own = place / f"{name}-{case.ranks}-{case.compiled}"
            own.mkdir()
            (own / "tokens").symlink_to(place / "tokens")
            contestants[name] = Contestant.start(name, python, case, own)
        for contestant in contestants.values():
            contestant.greet()
        counts = {name: c.about["parameters"] for name, c in contestants.items()}
        if len(set(counts.values())) > 1:
            raise RuntimeError(f"not the same model: {counts}")
        names = list(contestants)
        for number in range(-1, rounds):
            shift = number % len(names)
            for name in names[shift:] + names[:shift]:
                seen = contestants[name].run(steps if number >= 0 else 2)
                if number >= 0:
                    runs.setdefault(name, []).append(seen)
        return runs, contestants["reshard"].about
    finally:
        for contestant in contestants.values():
            contestant.end()


def tell_race(case: Case, runs: Runs, about: dict[str, Any]) -> list[str]:
    """A row for each contestant."""
    from reshard.model.spec import LlamaSpec, flops_per_token
    from reshard.train.metrics import PEAK_FLOPS

    flops = flops_per_token(LlamaSpec.from_dict(dict(SIZES[case.size])), case.seq_len)
    peak = next((value for name, value in PEAK_FLOPS.items() if name in about["device"]), None)
    rows = []
    for name, seen in runs.items():
        rates = [case.tokens / run["wall"] for run in seen]
        cpu = statistics.median(run["cpu"] for run in seen)
        ratio = spread([a["wall"] / b["wall"] for a, b in zip(runs["reshard"], seen, strict=True)])
        cpu_ratio = statistics.median(a["cpu"] / b["cpu"] for a, b in zip(runs["reshard"], seen, strict=True))
        mfu = [f"{flops * statistics.median(rates) / (peak * case.ranks):.1%}"] if peak else []
        rows.append(
            row(
                case, name, f"{statistics.median(rates):,.0f} ({max(rates):,.0f}, {min(rates):,.0f})",
                ratio if name != "reshard" else "1", f"{cpu:.3f}", f"{cpu_ratio:.3f}" if name != "reshard" else "1",
                f"{seen[-1]['peak']:.0f} ({seen[-1]['beyond']:.0f})", *mfu,
            )
        )  # fmt: skip
    return rows


def verdict(case: Case, runs: Runs) -> list[str]:
    """reshard against the fastest peer of the table."""
    peers = {name: statistics.median(run["wall"] for run in seen) for name, seen in runs.items() if name != "reshard"}
    if not peers:
        return []
    name = min(peers, key=lambda n: peers[n])
    pairs = list(zip(runs["reshard"], runs[name], strict=True))
    speed = [theirs["wall"] / ours["wall"] for ours, theirs in pairs]
    cpu = [theirs["cpu"] / ours["cpu"] for ours, theirs in pairs]
    good = "yes" if statistics.median(speed) >= 1 else "no"
    return [row(case, name, spread(speed), spread(cpu), good)]


def measure_speed(options: argparse.Namespace, place: Path) -> list[str]:
    """tokens/s, memory and CPU seconds against the peers."""
    pythons = {"reshard": sys.executable, "transformers": sys.executable}
    if options.litgpt:
        pythons["litgpt"] = str(options.litgpt)
    rows: list[str] = []
    verdicts: list[str] = []
    about: dict[str, Any] = {}
    for ranks, compiled in itertools.product(options.ranks, (False, True)):
        case = case_of(options, ranks, compiled)
        print(f"{case} ...", file=sys.stderr)
        runs, about = race(case, pythons, place, options.rounds, options.steps)
        rows += tell_race(case, runs, about)
        verdicts += verdict(case, runs)
    lines = [] if options.litgpt else ["litgpt is left out: no `--litgpt PYTHON` was given.", ""]
    mfu = ["MFU"] if rows[0].count("|") > 8 else []
    return [
        "## Speed", "",
        f"{about['parameters']:,} parameters, batch {options.batch} x {options.seq_len} for each rank, {options.dtype}, "
        f"{options.threads} threads in all, {options.steps} steps a round. `x time`: reshard's seconds / this one's, in one "
        "round; below 1 reshard is faster. Memory: peak of the rank that needs most, in brackets what is beyond the "
        "imports.", "", *lines,
        *table(["", "", "tokens/s: median (best, worst)", "x time", "CPU s a step", "x CPU", "MiB", *mfu], rows),
        "Target: at least 1.0 x the fastest peer.", "",
        *table(["", "fastest peer", "reshard's speed / its", "the same by CPU seconds", "target met"], verdicts),
    ]  # fmt: skip


def measure_loop(options: argparse.Namespace, place: Path) -> list[str]:
    """What the loop adds to forward, backward, clipping and optimizer: steps of both kinds take turns."""
    rows = []
    for ranks in options.ranks:
        case = case_of(options, ranks, False)
        print(f"loop, {case} ...", file=sys.stderr)
        own = place / f"loop-{ranks}"
        own.mkdir()
        (own / "tokens").symlink_to(place / "tokens")
        contestant = Contestant.start("reshard", sys.executable, case, own, observe=True)
        try:
            contestant.greet()
            for command in ("go", "bare"):
                contestant.run(2, command)
            kinds: Runs = {"go": [], "bare": []}
            for number in range(options.rounds * 5):
                for command in ("go", "bare") if number % 2 else ("bare", "go"):
                    kinds[command].append(contestant.run(1, command))
        finally:
            contestant.end()
        outside = [100 * (1 - run["inside"] / run["wall"]) for run in kinds["go"]]
        cells = []
        for key in ("wall", "cpu"):
            real, bare = (statistics.median(run[key] for run in kinds[command]) for command in ("go", "bare"))
            cells += [f"{real * 1e3:.1f}", f"{bare * 1e3:.1f}", f"{100 * (real - bare) / real:.2f}"]
        rows.append(row(case, spread(outside), *cells))
    return [
        "## What the loop adds", "",
        "Steps of the real loop (data, metrics, logging, checkpoint bookkeeping, agreement of ranks) and bare steps "
        "(zero_grad, forward, loss, backward, clipping, optimizer) on the same model in the same process take turns. "
        "`outside`: the part of a real step that its own clock saw outside of forward, backward, clipping and optimizer. "
        "Target: at most 2 % of the step.", "",
        *table(
            ["", "outside, %: median (best, worst)", "step, ms", "bare, ms", "more, %", "CPU ms", "bare", "more, %"], rows
        ),
    ]  # fmt: skip


def measure_start(options: argparse.Namespace, place: Path) -> list[str]:
    """From the start of `reshard train` to its first metrics line, and what it imports meanwhile."""
    print("start-up ...", file=sys.stderr)
    case = case_of(options, 1, False)
    kinds: dict[str, list[dict[str, float]]] = {}
    floor = []
    for number in range(max(2, options.rounds)):
        kind = "first run (tokenises)" if number == 0 else "later runs"
        own = place / f"start-{number}"
        own.mkdir()
        if number:
            (own / "tokens").symlink_to(place / "start-0/tokens")
        kinds.setdefault(kind, []).append(one_start(case, own))
        begin = time.perf_counter()
        subprocess.run([sys.executable, "-c", "import torch"], check=True)
        floor.append(time.perf_counter() - begin)
    rows = [
        row(kind, *(spread([run[key] for run in seen]) for key in ("first", "before", "setup", "step")))
        for kind, seen in kinds.items()
    ]
    own = place / "start-imports"
    own.mkdir()
    (own / "tokens").symlink_to(place / "start-0/tokens")
    packages = sorted(imports(case, own).items(), key=lambda item: -item[1])
    return [
        "## Start-up", "",
        "Seconds from the start of the process `reshard train` to its first line in metrics.jsonl. before: imports, "
        "config, tokens. set-up: model, optimizer, first weights. Target: at most 8 s. "
        f"`python -c 'import torch'` beside it: {spread(floor)} s.", "",
        *table(["", "to the first step", "before", "set-up", "first step"], rows),
        "Imports, by `python -X importtime` (seconds of the modules' own code, by package; slower under this option): "
        + ", ".join(f"{name} {seconds:.2f}" for name, seconds in packages[:8]) + ".", "",
    ]  # fmt: skip


def start_command(case: Case, place: Path, *options: str) -> list[str]:
    """`reshard train` for one step."""
    values = reshard_values(case, place)
    values["training"]["steps"] = 1
    values["checkpoint"] = {"enable_checkpoint": False}
    words = [sys.executable, *options, "-m", "reshard", "train"]
    for section, keys in values.items():
        for key, value in keys.items():
            words += [f"--{section}.{key}", str(value).lower() if isinstance(value, bool) else str(value)]
    return words


def one_start(case: Case, place: Path) -> dict[str, float]:
    """Start it once."""
    metrics, log = place / "run/metrics.jsonl", place / "log"
    environment = {**os.environ, "OMP_NUM_THREADS": str(case.threads)}
    began, at = time.perf_counter(), time.time()
    with log.open("wb") as errors:
        process = subprocess.Popen(start_command(case, place), env=environment, stdout=errors, stderr=errors)
    while process.poll() is None and not (metrics.exists() and metrics.stat().st_size):
        time.sleep(0.002)
    first = time.perf_counter() - began
    if process.wait():
        raise RuntimeError(f"reshard train failed:\n{log.read_text()[-1500:]}")
    event = json.loads((place / "run/events.jsonl").read_text().splitlines()[0])
    step = json.loads(metrics.read_text().splitlines()[0])["step_time_s"]
    before = datetime.fromisoformat(event["at"]).timestamp() - event["setup_s"] - at
    return {"first": first, "before": before, "setup": event["setup_s"], "step": step}


def imports(case: Case, place: Path) -> dict[str, float]:
    """Seconds of the modules' own code, by package, as Python counts them."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(case.threads)}
    said = subprocess.run(
        start_command(case, place, "-X", "importtime"), env=environment, capture_output=True, check=True
    )
    packages: dict[str, float] = {}
    for match in re.finditer(r"^import time:\s+(\d+) \|\s+\d+ \|\s*(\S+)", said.stderr.decode(), re.MULTILINE):
        package = match[2].partition(".")[0]
        packages[package] = packages.get(package, 0.0) + int(match[1]) / 1e6
    return packages


# -- the whole -----------------------------------------------------------------------------------------------------------


def case_of(options: argparse.Namespace, ranks: int, compiled: bool) -> Case:
    """The threads are shared out among the ranks."""
    threads = max(1, options.threads // ranks)
    return Case(options.size, options.batch, options.seq_len, options.dtype, threads, ranks, compiled)


def spread(values: list[float]) -> str:
    """Median (best, worst), smaller is better, or the least and the greatest."""
    return f"{statistics.median(values):.2f} ({min(values):.2f}, {max(values):.2f})"


def row(*cells: object) -> str:
    """One line of a Markdown table."""
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def table(header: Sequence[str], rows: Sequence[str]) -> list[str]:
    """A Markdown table."""
    return [row(*header), "|" + "---|" * len(header), *rows, ""]


def main() -> None:
    """Run what was asked for, print it, and write it down."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="6M", help="model, default 6M")
    parser.add_argument("--batch", type=int, default=2, help="sequences for each rank and step, default 2")
    parser.add_argument("--seq-len", type=int, default=512, help="tokens, default 512")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="bfloat16 on a GPU")
    parser.add_argument("--threads", type=int, default=2, help="of all ranks together, default 2")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="default 1 2")
    parser.add_argument("--rounds", type=int, default=7, help="measured rounds, default 7")
    parser.add_argument("--steps", type=int, default=5, help="steps of each contestant in a round, default 5")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="parts, default all")
    parser.add_argument("--litgpt", type=Path, help="a Python that has litgpt, and this one's torch")
    parser.add_argument("--out", default=str(PROJECT / "docs/benchmarks/train.md"), help="file, - for stdout only")
    parser.add_argument("--as-rank", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.as_rank:
        be_rank(json.loads(options.as_rank))
        return
    place = Path(tempfile.mkdtemp(prefix="benchmark-train-"))
    begin = time.perf_counter()
    try:
        (place / "tokens").mkdir()
        values = reshard_values(case_of(options, 1, False), place)
        words = [f"--training.cache_folder={place / 'tokens'}", f"--training.seq_len={options.seq_len}"]
        words += [f"--model.vocab_size={values['model']['vocab_size']}", f"--job.dump_folder={place}"]
        subprocess.run([sys.executable, "-m", "reshard", "tokenize", *words], check=True, stdout=subprocess.DEVNULL)
        parts = {"speed": measure_speed, "loop": measure_loop, "start": measure_start}
        lines = [line for part in options.only for line in parts[part](options, place)]
    finally:
        shutil.rmtree(place, ignore_errors=True)
    head = [
        f"{datetime.now(UTC):%Y-%m-%d}, {options.rounds} rounds, {os.cpu_count()} x {processor()}, Linux "
        f"{platform.release()}, {versions()}; load {os.getloadavg()[0]:.1f} at the end, "
        f"{(time.perf_counter() - begin) / 60:.0f} minutes.", "",
        f"    python benchmarks/train.py {' '.join(sys.argv[1:])}".rstrip(), "",
    ]  # fmt: skip
    text = "\n".join([*head, *lines])
    print(text)
    if options.out != "-":
        put_between_marks(Path(options.out), text, "train")


def versions() -> str:
    """Of the packages that matter, without importing them."""
    from importlib.metadata import version

    return ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))


if __name__ == "__main__":
    main()
