"""What does torchtune make of a checkpoint.pt? Run inside torchtune's own environment; knows nothing of reshard.

usage: torchtune_reads.py REQUEST.json, with checkpoint_dir, output_dir, builder, arguments, model_type, tokens, logits
"""

import importlib
import json
import sys

import numpy as np
import torch
from torchtune.training import FullModelMetaCheckpointer

with open(sys.argv[1]) as file:
    request = json.load(file)

torch.set_num_threads(1)
checkpointer = FullModelMetaCheckpointer(
    checkpoint_dir=request["checkpoint_dir"],
    checkpoint_files=["checkpoint.pt"],
    model_type=request["model_type"],
    output_dir=request["output_dir"],
)
weights = checkpointer.load_checkpoint()["model"]
package, _, name = request["builder"].rpartition(".")
model = getattr(importlib.import_module(package), name)(**request["arguments"])
model.load_state_dict(weights, strict=True)
model.eval().to(torch.float32)
with torch.inference_mode():
    logits = model(torch.from_numpy(np.load(request["tokens"])))
np.save(request["logits"], logits.float().numpy())
