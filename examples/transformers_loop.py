"""How do I use the engine around a Hugging Face model? A small Llama of transformers', trained, saved, resumed, on CPU.

python examples/transformers_loop.py checkpoints        # again: it goes on from its newest checkpoint
python examples/transformers_loop.py checkpoints 20     # to step 20

`train` is an ordinary PyTorch loop; `state`, `load` and `saver.save` are all that the engine adds. Under FSDP2 they stay
as they are (fsdp2_loop.py), so a run that was saved by one process goes on with eight.
"""

import sys
from pathlib import Path

import torch
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from transformers import LlamaConfig, LlamaForCausalLM

import reshard

EVERY, SEQ_LEN, BATCH = 5, 32, 4
TEXT = torch.tensor(list(Path(__file__).read_bytes()))  # it learns to write itself, byte by byte


def batch(step: int) -> torch.Tensor:
    """Token ids [BATCH, SEQ_LEN] of a step. A function of the step alone, so a resume reads on where the run was."""
    starts = torch.randint(len(TEXT) - SEQ_LEN, (BATCH,), generator=torch.Generator().manual_seed(step))
    return torch.stack([TEXT[start : start + SEQ_LEN] for start in starts])


def train(folder: Path, steps: int) -> None:
    """Train to step `steps`, from the newest checkpoint of the folder if it has one."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=SEQ_LEN,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    step = 0

    def state() -> dict:
        model_state, optimizer_state = get_state_dict(model, optimizer)
        return {"model": model_state, "optimizer": optimizer_state, "step": step, "config": config.to_json_string()}

    if newest := reshard.newest(folder):
        found = state()
        reshard.load(newest, found)
        set_state_dict(model, optimizer, model_state_dict=found["model"], optim_state_dict=found["optimizer"])
        step = found["step"]
        print(f"resumed from {newest}")

    with reshard.AsyncSaver() as saver:
        while step < steps:
            step += 1
            tokens = batch(step)
            loss = model(input_ids=tokens, labels=tokens).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            print(f"step {step} loss {loss.item():.4f}")
            if step % EVERY == 0 or step == steps:
                saver.save(folder / f"step-{step}", state())


if __name__ == "__main__":
    train(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 10)
