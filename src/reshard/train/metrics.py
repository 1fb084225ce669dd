"""What is reported, and where? One JSON line a step, one a notable event, a console line now and then."""

from __future__ import annotations

import json
import logging
import resource
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from reshard.config import Config
from reshard.errors import ConfigError

logger = logging.getLogger(__name__)

# Dense bfloat16 peak of one device, FLOP/s, from the vendors' data sheets. MFU is only shown for these.
PEAK_FLOPS = {
    "A100": 312e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
}


class Journal:
    """A file of JSON lines that restarts append to. A torn last line is closed, never joined with the next one."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "a+b")  # noqa: SIM115  open for the whole run
        if self._file.tell() > 0:
            self._file.seek(-1, 2)
            if self._file.read(1) != b"\n":
                self._file.write(b"\n")

    def write(self, record: dict[str, Any]) -> None:
        """Append one record; floats keep every digit (repr)."""
        self._file.write(json.dumps(record).encode() + b"\n")
        self._file.flush()

    def close(self) -> None:
        """No more records."""
        self._file.close()


def read_journal(path: Path) -> list[dict[str, Any]]:
    """All whole records of a journal, in the order of writing. Lines torn by a crash are left out."""
    records = []
    for line in path.read_bytes().splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            records.append(record)
    return records


def last_of_each_step(records: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """Step -> its last record: after a restart from an older checkpoint the later one counts."""
    return {record["step"]: record for record in records}


class Reporter:
    """Rank 0's metrics.jsonl, events.jsonl, console and TensorBoard; on the other ranks it does nothing."""

    def __init__(
        self, config: Config, *, first: bool, device_name: str, flops_per_token: float, world_size: int
    ) -> None:
        self._config, self._first = config, first
        self._flops_per_token, self._world_size = flops_per_token, world_size
        self._peak = next((flops for name, flops in PEAK_FLOPS.items() if name in device_name), None)
        self._tensorboard: Any = None
        self._mark = time.perf_counter()
        if not first:
            return
        folder = Path(config.job.dump_folder)
        self._metrics, self._events = Journal(folder / "metrics.jsonl"), Journal(folder / "events.jsonl")
        if config.metrics.enable_tensorboard:
            self._tensorboard = _tensorboard(folder / config.metrics.save_tb_folder)

    def start_clock(self) -> None:
        """A step begins now."""
        self._mark = time.perf_counter()

    def step(self, *, step: int, loss: float, grad_norm: float, lr: float, tokens_seen: int, tokens: int) -> None:
        """Report one optimizer step. tokens: of the whole global batch."""
        now = time.perf_counter()
        seconds, self._mark = now - self._mark, now
        if not self._first:
            return
        record = {
            "step": step,
            "loss": loss,
            "grad_norm": grad_norm,
            "lr": lr,
            "tokens_seen": tokens_seen,
            "tokens_per_s": tokens / seconds,
            "step_time_s": seconds,
            "memory_gib": memory_gib(),
        }
        if self._peak is not None:
            record["mfu"] = self._flops_per_token * tokens / seconds / (self._peak * self._world_size)
        self._metrics.write(record)
        if self._tensorboard is not None:
            for name, value in record.items():
                if name != "step":
                    self._tensorboard.add_scalar(name, value, step)
        if step == 1 or step % self._config.metrics.log_freq == 0 or step == self._config.training.steps:
            mfu = f"  mfu {record['mfu']:.1%}" if "mfu" in record else ""
            logger.info(
                "step %d  loss %.4f  norm %.3f  lr %.2e  %s tokens/s  %.2f GiB%s",
                step, loss, grad_norm, lr, f"{tokens / seconds:,.0f}", record["memory_gib"], mfu,
            )  # fmt: skip

    def event(self, name: str, /, **values: Any) -> None:
        """Record a start, save, load, validation or rollback."""
        if self._first:
            self._events.write({"event": name, "at": datetime.now(UTC).isoformat(timespec="milliseconds"), **values})
        if name == "validation" and self._tensorboard is not None:
            self._tensorboard.add_scalar("validation_loss", values["loss"], values["step"])

    def close(self) -> None:
        """Flush and close the files."""
        if not self._first:
            return
        self._metrics.close()
        self._events.close()
        if self._tensorboard is not None:
            self._tensorboard.close()


def memory_gib() -> float:
    """Peak memory of this process: of the CUDA device where one is used, else resident."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return float(torch.cuda.max_memory_allocated() / 2**30)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB on Linux, bytes on macOS
    return float(peak / (2**30 if sys.platform == "darwin" else 2**20))


def _tensorboard(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ConfigError(
            "metrics.enable_tensorboard needs TensorBoard, which is not installed",
            key="metrics.enable_tensorboard",
            hint="pip install 'reshard[tensorboard]'",
        ) from None
    return SummaryWriter(str(folder))
