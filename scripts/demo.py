"""What is the whole job? Seed, train, change the layout, export, evaluate: each step is a command that you could type.

`make demo` runs it: a Llama of 6.6 million parameters on real text, on two CPU cores, in two to four minutes.
tests/proof/layouts/test_demo_layouts.py takes the settings from here.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CONFIG = "train_configs/debug_model.toml"
FOLDER = "outputs/demo"
STOP_AFTER = 90  # the step at which the layout changes
STEPS = 150  # as in CONFIG; the last one is saved as weights only
HELD_OUT = "--sequences 128"

SEED = (
    "--checkpoint.enable_checkpoint --checkpoint.create_seed_checkpoint --training.data_parallel_replicate_degree 1 "
    "--training.data_parallel_shard_degree 1 --training.tensor_parallel_degree 1 "
    "--experimental.pipeline_parallel_degree 1 --experimental.context_parallel_degree 1"
)
SAVE = "--checkpoint.enable_checkpoint"
TENSOR_PARALLEL = "--parallelism.tensor_parallel_degree 2"
WEIGHTS_LAST = "--checkpoint.model_weights_only --checkpoint.export_dtype bfloat16"


def main() -> None:
    """Run the demo from an empty folder."""
    os.chdir(ROOT)
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    shutil.rmtree(FOLDER, ignore_errors=True)
    began = time.monotonic()
    checkpoints, exported = f"{FOLDER}/checkpoint", f"{FOLDER}/checkpoint.pt"
    where = f"--job.dump_folder {FOLDER}"

    say("1. A seed checkpoint: the first weights, made by one process, for any layout")
    run(f"NGPU=1 CONFIG={CONFIG} ./run_llama_train.sh {SEED} {where}")

    say(f"2. Train it with two processes that share the model (FSDP), and stop after step {STOP_AFTER}")
    run(f"NGPU=2 CONFIG={CONFIG} ./run_llama_train.sh {SAVE} {where} --training.stop_after {STOP_AFTER}")

    say(
        "3. Go on with another layout: tensor parallel. Nothing is converted. The last step is weights only, in bfloat16"
    )
    run(f"NGPU=2 CONFIG={CONFIG} ./run_llama_train.sh {SAVE} {where} {TENSOR_PARALLEL} {WEIGHTS_LAST}")

    say("4. One file for torchtune and everybody else, by torch's own tool")
    run(f"python -m torch.distributed.checkpoint.format_utils dcp_to_torch {checkpoints}/step-{STEPS} {exported}")

    say("5. Text that was not trained on: the seed, and the exported file")
    seed = report(f"reshard eval {checkpoints}/step-0 {HELD_OUT} --json")
    result = report(f"reshard eval {exported} --config {CONFIG} --data stdlib {HELD_OUT} --json")

    curve = draw(Path(FOLDER), seed, result)
    say(f"Done in {time.monotonic() - began:.0f} s")
    print(f"held-out loss: {seed['loss']:.4f} -> {result['loss']:.4f}   nats per token, {result['tokens']:,} tokens")
    print(f"unigram entropy: {result['unigram_entropy']:.4f}   the loss of knowing only how often each byte occurs")
    print(f"checkpoints: {checkpoints}/step-*")
    print(f"loss curve:  {curve}")
    print(f"export:      {exported}")
    if not result["loss"] < result["unigram_entropy"]:
        sys.exit("the held-out loss is not below the unigram entropy, which it should be")


def say(text: str) -> None:
    """A heading between two commands."""
    print(
        f"\n\033[1m{text}\033[0m" if sys.stdout.isatty() and "NO_COLOR" not in os.environ else f"\n{text}", flush=True
    )


def run(command: str) -> None:
    """Print a command, run it, show its output as it comes."""
    print(f"$ {command}", flush=True)
    done = subprocess.run(["bash", "-c", command], check=False)
    if done.returncode:
        sys.exit(f"the command ended with exit code {done.returncode}")


def report(command: str) -> dict[str, Any]:
    """The same for a command that answers in JSON; its answer."""
    print(f"$ {command}", flush=True)
    done = subprocess.run(["bash", "-c", command], check=False, stdout=subprocess.PIPE, text=True)
    print(done.stdout, end="", flush=True)
    if done.returncode:
        sys.exit(f"the command ended with exit code {done.returncode}")
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def draw(folder: Path, seed: dict[str, Any], result: dict[str, Any]) -> Path:
    """The loss curve as a PNG, with the change of layout and the held-out losses; its path."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    figure, axes = plt.subplots(figsize=(9, 5), layout="constrained")
    axes.plot([s["step"] for s in steps], [s["loss"] for s in steps], label="training loss")
    axes.plot([0, STEPS], [seed["loss"], result["loss"]], "o", color="tab:orange", label="held-out loss")
    axes.axhline(result["unigram_entropy"], color="tab:gray", linestyle=":", label="unigram entropy of the text")
    axes.axvline(STOP_AFTER + 0.5, color="tab:red", linestyle="--")
    for shift, side, layout in ((-1, "right", "FSDP, 2 ranks"), (2, "left", "tensor parallel, 2 ranks")):
        axes.text(STOP_AFTER + shift, 0.95 * max(s["loss"] for s in steps), layout, ha=side, color="tab:red")
    axes.set(xlabel="step", ylabel="loss, nats per token", title="One run, two layouts")
    axes.legend(loc="center right")
    axes.grid(alpha=0.3)
    path = folder / "loss.png"
    figure.savefig(path, dpi=120)
    return path


if __name__ == "__main__":
    main()
