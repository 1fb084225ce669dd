"""Which Llama lies in a single .pt, and how is one written? A dict of tensors under Meta's or torchtune's names.

Read: those names, torchtitan's, and Hugging Face's (pytorch_model.bin), flat or under "model". Such a file says nothing
of heads, RoPE and epsilon: somebody has to. Written: what torch.save would have, without holding it in memory.
"""

from __future__ import annotations

from pathlib import Path

from reshard.errors import TensorMismatch
from reshard.formats.cast import cast
from reshard.formats.dialects import (
    EMBEDDING,
    OUTPUT,
    Told,
    canonical_tensors,
    check_scaling_is_said,
    dialect_of,
    told,
)
from reshard.formats.hf import about_of, assets_beside, tokenizer_problem
from reshard.formats.hf_config import CONFIG, read_json, spec_from_config
from reshard.formats.output import Copy, Output, whole
from reshard.formats.protocol import Source
from reshard.formats.torch_pt import open_pt
from reshard.formats.torch_save import Saved, lay_out
from reshard.model.names import HUGGING_FACE, META, Dialect, canonical_names, foreign_name
from reshard.model.spec import LlamaSpec, parameter_shapes

# Beside {"model": ...} in what dcp_to_torch makes of a full checkpoint.
_OF_TRAINING = {"optimizer", "lr_scheduler", "dataloader", "train_state"}


def open_torch(path: Path, model: Told | None) -> Source:
    """The model in a .pt, .pth or .bin; of one under Hugging Face's names the config.json beside it says which it is.

    Raises FormatError (nobody says which model it is; not such a file), TensorMismatch.
    """
    file = open_pt(path)
    config = None
    if dialect_of(file.tensors) is HUGGING_FACE and (path.parent / CONFIG).is_file():
        config = read_json(path.parent / CONFIG)
        said = Told(spec_from_config(config, path.parent / CONFIG))
    else:
        said = told(path, model)
    if _OF_TRAINING & set(file.beside):
        check_scaling_is_said(path, said, trained=True)
    if file.others:
        canonical_names(
            [*file.tensors, *file.others], dialect_of(file.tensors), path=path
        )  # no weight is anything else
        raise TensorMismatch(f"{path} holds what is no tensor", path=path, unexpected=list(file.others))
    tensors, spec = canonical_tensors(file.tensors, path, said)
    provenance = {
        "kind": "import",
        "format": "torch",
        "path": path.name,
        "files": [{"name": path.name, "bytes": file.nbytes}],
    }
    if config is not None:
        assets_of, problem = assets_beside(path.parent), tokenizer_problem(path.parent)
        return Source(path, spec, tensors, provenance, assets_of, about_of(config), problem)
    assets = {"tokenizer.model": path.parent / "tokenizer.model"} if (path.parent / "tokenizer.model").is_file() else {}
    return Source(path, spec, tensors, provenance, assets)


def plan_torch(
    source: Source,
    spec: LlamaSpec,
    file: str,
    *,
    dialect: Dialect = META,
    dtype: str | None = None,
    tied_output: bool = True,
) -> Output:
    """One .pt. tied_output: a tied model's output is in it, as a second name of the embedding's numbers."""
    names = [*parameter_shapes(spec), *([OUTPUT] if spec.tied and tied_output else [])]
    storages = {name: EMBEDDING if name == OUTPUT and spec.tied else name for name in names}
    tensors = {name: cast(source.tensors[name], dtype) for name in dict.fromkeys(storages.values())}
    saved = [
        Saved(foreign_name(name, dialect), t.shape, t.dtype, t.nbytes, storages[name])
        for name in names
        for t in [tensors[storages[name]]]
    ]
    out, offsets = lay_out(file, saved)
    copies = tuple(Copy(tensor, (whole(file, offsets[name], tensor),)) for name, tensor in tensors.items())
    return Output("torch", (out,), copies, alone=True)
