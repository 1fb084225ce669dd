"""What does torchtune make of a recipe's sections? Run inside torchtune's own environment; knows nothing of reshard.

usage: formats_torchtune_reads.py RECIPE.yaml TOKENS.npy LOGITS.npy
"""

import sys

import numpy as np
import torch
from omegaconf import OmegaConf
from torchtune import config

recipe, tokens, logits = sys.argv[1:]
torch.set_num_threads(1)
sections = OmegaConf.load(recipe)
checkpointer = config.instantiate(sections.checkpointer)
weights = checkpointer.load_checkpoint()["model"]
model = config.instantiate(sections.model)
model.load_state_dict(weights, strict=True)
model.eval().to(torch.float32)
with torch.inference_mode():
    found = model(torch.from_numpy(np.load(tokens)))
np.save(logits, found.float().numpy())
