"""How do I read a checkpoint of torchtitan's? What is in a step's directory, is it whole, and its weights as a model.

python examples/read_torchtitan.py outputs/checkpoint/step-1000 8B
python examples/read_torchtitan.py outputs/checkpoint/step-1000 8B --to out/hf       # and as a Hugging Face directory

The model has to be named (8B, llama3_1/70B, or a params.json): torchtitan's checkpoints do not say their heads and RoPE.
A name does not say whether RoPE was scaled: --rope-scaling llama3 for torchtitan 0.2, none for the start of 2025.
Nothing is unpickled that could run code, and every byte that is read is checked against the CRC32 that torch stored.
"""

import argparse
import sys
from math import prod
from pathlib import Path
from typing import Literal

import torch

import reshard
from reshard.model.llama import Llama
from reshard.model.spec import LlamaSpec


def read(directory: Path, name: str, rope_scaling: Literal["none", "llama3"] | None) -> Llama:
    """The model that a torchtitan step holds, its weights in the dtype they were saved in. Raises ReshardError."""
    report = reshard.inspect(directory, model=name, rope_scaling=rope_scaling)
    print(f"{directory}: {report['parameters']:,} parameters, {report['bytes'] / 1e6:,.1f} MB, {report['dtypes']}")
    for tensor, about in list(report["tensors"].items())[:3]:
        print(f"  {tensor:36} {about['shape']} {about['dtype']}")
    print(f"  ... {len(report['tensors'])} tensors")

    [verdict] = reshard.verify(directory)
    print(f"whole: {verdict.whole}, {verdict.bytes_checked / 1e6:,.1f} MB checked")
    if not verdict.whole:
        sys.exit("\n".join(f"{finding.file}: {finding.problem}" for finding in verdict.findings) or verdict.problem)

    # A full checkpoint of torchtitan's has its weights under `model`, as a weights-only one of early 2025 has.
    weights = {
        tensor: torch.empty(about["shape"], dtype=getattr(torch, about["dtype"]))
        for tensor, about in report["tensors"].items()
    }
    left = reshard.load(
        directory, {"model": weights}, strict=False
    )  # early ones have freqs_cis there, which we compute
    print(f"not taken: {len(left)} others, {', '.join(left[:3])} ...")

    with torch.device("meta"):
        model = Llama(LlamaSpec.from_dict(report["model"]))
    model.load_state_dict(weights, assign=True)
    model.init_rope(torch.arange(1024))  # for sequences of up to so many tokens; torchtitan stored this as freqs_cis
    return model.eval()


def main() -> None:
    """Read, say what is there, and let the model say something."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("model")
    parser.add_argument("--rope-scaling", choices=["none", "llama3"])
    parser.add_argument("--to", type=Path, help="also write a Hugging Face directory")
    given = parser.parse_args()
    model = read(given.directory, given.model, given.rope_scaling)
    print(f"parameters in the model: {sum(prod(p.shape) for p in model.parameters()):,}")
    with torch.no_grad():
        logits = model(torch.tensor([[1, 2, 3]]))[0, -1]
    print(f"after the tokens 1, 2, 3: token {int(logits.argmax())}, logit {float(logits.max()):.4f}")
    if given.to:
        told = {"model": given.model, "rope_scaling": given.rope_scaling}
        print(f"wrote {reshard.convert(given.directory, given.to, to='hf', **told)}")


if __name__ == "__main__":
    try:
        main()
    except reshard.ReshardError as error:
        sys.exit(f"error: {error}")
