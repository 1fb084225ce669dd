"""Makes a golden checkpoint of the format version that this reshard writes:  python tests/golden/make.py TARGET

Once for each version, by two real ranks; what it made is kept for ever as tests/golden/v<version>. Never make one anew: a
golden checkpoint is a promise to those who have such files, not a test of today's writer.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))

from golden.content import COLUMN_SHARDED, ROW_SHARDED, TENSORS, raw


def be_rank(target: Path) -> None:
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    from reshard.checkpoint.ranks import Ranks
    from reshard.checkpoint.save import About, save

    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    state: dict[str, dict[str, torch.Tensor]] = {}
    for name, (shape, dtype) in TENSORS.items():
        tensor = torch.frombuffer(bytearray(raw(name)), dtype=getattr(torch, dtype)).reshape(shape)
        if name in (*ROW_SHARDED, *COLUMN_SHARDED):
            tensor = distribute_tensor(tensor, mesh, [Shard(0 if name in ROW_SHARDED else 1)])
        part, _, rest = name.partition(".")
        state.setdefault(part, {})[rest] = tensor
    about = About(
        step=7,
        kind="full",
        source={"kind": "train", "from": None},
        parent="0123456789abcdef",
        layout={"dp_replicate": 1, "dp_shard": 2, "cp": 1, "tp": 1, "pp": 1},
        config={"optimizer": {"lr": 0.002, "eps": 1e-08}, "job": {"description": "golden: äöü"}},
        model={"dim": 5, "norm_eps": 1e-05},
        data={"dataset": "nothing", "rng_seed": 0},
        train_state={"step": 7, "tokens_seen": 1000},
    )
    save(target, state, about, Ranks(dist.group.WORLD))
    dist.destroy_process_group()


def main() -> None:
    target = Path(sys.argv[1])
    if "RANK" in os.environ:
        be_rank(target)
        return
    common = {
        **os.environ,
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29777",
        "OMP_NUM_THREADS": "1",
    }
    words = [sys.executable, __file__, str(target)]
    ranks = [subprocess.Popen(words, env={**common, "RANK": str(rank)}) for rank in range(2)]
    sys.exit(max(rank.wait() for rank in ranks))


if __name__ == "__main__":
    main()
