"""How do I use the engine in a training loop of my own? Plain PyTorch FSDP2; ten lines of it are about checkpoints.

torchrun --nproc-per-node 2 examples/fsdp2_loop.py checkpoints      # again, on any number of ranks: it goes on
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

import reshard

STEPS, EVERY = 20, 5


def train(folder: Path) -> None:
    """Learn y = sum(x), from where the newest checkpoint in the folder ends."""
    torch.manual_seed(0)
    model = fully_shard(nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 1)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    step = 0

    def state() -> dict:
        model_state, optimizer_state = get_state_dict(model, optimizer)
        return {"model": model_state, "optimizer": optimizer_state, "step": step}

    if newest := reshard.newest(folder):
        found = state()
        reshard.load(newest, found)
        set_state_dict(model, optimizer, model_state_dict=found["model"], optim_state_dict=found["optimizer"])
        step = found["step"]

    with reshard.AsyncSaver() as saver:
        while step < STEPS:
            step += 1
            torch.manual_seed(step * dist.get_world_size() + dist.get_rank())
            x = torch.randn(32, 64)
            loss = nn.functional.mse_loss(model(x), x.sum(1, keepdim=True))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step % EVERY == 0:
                saver.save(folder / f"step-{step}", state())
            if dist.get_rank() == 0:
                print(f"step {step} loss {loss.item():.4f}", flush=True)


if __name__ == "__main__":
    dist.init_process_group("gloo" if not torch.cuda.is_available() else "cpu:gloo,cuda:nccl")
    train(Path(sys.argv[1]))
    dist.destroy_process_group()
    os._exit(
        0
    )  # gloo's threads may still be letting go of tensors, which Python's own end would not survive (torch 2.13)
