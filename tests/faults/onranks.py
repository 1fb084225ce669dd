"""What do the ranks of the fault tests do beside training? Called by name in processes of zygote.py."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from faults.loading import Destination, load_plain


def save_plainly(source: str, target: str) -> None:
    """torch.distributed.checkpoint.save of what a checkpoint of ours holds, sharded over these ranks as FSDP2 does."""
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    whole = Destination.of(Path(source))
    load_plain(Path(source), whole)
    state: dict[str, dict[str, object]] = {}
    for name, tensor in whole.tensors.items():
        part, _, rest = name.partition(".")
        sharded: DTensor | object = distribute_tensor(tensor, mesh, [Shard(0)]) if tensor.ndim else tensor
        state.setdefault(part, {})[rest] = sharded
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(state, checkpoint_id=target)
    dist.destroy_process_group()
