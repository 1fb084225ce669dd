"""Is there room for what the run will save?"""

from __future__ import annotations

import shutil
from pathlib import Path

from reshard.checkpoint.state import dtype_from_name
from reshard.config import Config
from reshard.errors import StorageError
from reshard.model.spec import LlamaSpec, parameter_count


def check_space(folder: Path, spec: LlamaSpec, config: Config) -> None:
    """Raise StorageError where the disk has no room for one full checkpoint: weights and two moments."""
    needed = 3 * parameter_count(spec) * dtype_from_name(config.training.dtype).itemsize
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise StorageError(
            f"checkpoint folder `{folder}` has {free / 1e9:.2f} GB free, one checkpoint takes {needed / 1e9:.2f} GB",
            path=folder,
            hint="free some space, choose another --job.dump_folder, or --checkpoint.enable_checkpoint false",
        )
