"""How does a run get its first weights on one CPU? `reshard seed`: step-0, weights only, for any layout."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from torch import Tensor

from reshard.checkpoint.layout import named_steps, set_aside_before, step_directory
from reshard.checkpoint.lock import own_folder
from reshard.checkpoint.ranks import Ranks
from reshard.checkpoint.save import refuse_existing, save_weights
from reshard.checkpoint.state import Box, Piece, dtype_from_name, row_cuts
from reshard.config import Config
from reshard.errors import LayoutError, NotACheckpoint, listed
from reshard.model.build import spec_of
from reshard.model.init import initial_rows
from reshard.model.spec import LlamaSpec, parameter_shapes
from reshard.parallel.dims import resolve_layout
from reshard.parallel.world import place_from_environment

logger = logging.getLogger(__name__)


def seed(config: Config) -> Path:
    """Write <dump_folder>/<folder>/step-0 with the weights that training itself would start from. Returns its path.

    One process: more are refused. Memory: one chunk of one tensor. Weights are in training.dtype; export_dtype and
    model_weights_only do not apply. Raises LayoutError, StorageError; NotACheckpoint where step-0 exists, or steps of a run,
    which goes on from these.
    """
    place = place_from_environment()
    if place.world_size != 1:
        raise LayoutError(
            f"a seed checkpoint is made by one process, but {place.world_size} were started",
            hint="NGPU=1, or `reshard seed`",
        )
    resolve_layout(config, 1)  # refuses degrees above 1
    spec = spec_of(config)
    directory = step_directory(config.checkpoint_folder, 0)
    with own_folder(config.checkpoint_folder, Ranks()):
        refuse_existing(directory)
        _refuse_trained(config)
        manifest = save_weights(
            directory,
            seed_pieces(spec, config.training.rng_seed, config.training.dtype),
            step=0,
            source={"kind": "seed", "rng_seed": config.training.rng_seed},
            config=config.model_dump(),
            spec=spec,
        )
    logger.info("seed checkpoint %s: %d tensors, %.1f MB", directory, len(manifest.tensors), manifest.bytes / 1e6)
    return directory


def _refuse_trained(config: Config) -> None:
    """A seed would be without effect beside steps that a run goes on from; beside broken ones it would hide what was lost."""
    folder = config.checkpoint_folder
    steps = [path.name for path, step in named_steps(folder) if step > 0 and path.is_dir() and any(path.iterdir())]
    steps += [path.name for path in set_aside_before(folder)]
    if steps:
        raise NotACheckpoint(
            f"`{folder}` holds {listed(steps)} of a run that has trained: no step-0 was made, it would not begin anew with it",
            path=folder,
            hint="to begin another run, with both `reshard seed` and `reshard train`: "
            f"--checkpoint.folder {config.checkpoint.folder}-2",
        )


def seed_pieces(spec: LlamaSpec, rng_seed: int, dtype: str) -> Iterator[Piece]:
    """First values of every parameter, chunk by chunk; a tied model's output is the embedding again."""
    shapes = parameter_shapes(spec)
    names = {name: name for name in shapes}
    if spec.tied:
        names["output.weight"] = "tok_embeddings.weight"
    for name, origin in names.items():
        shape = shapes[origin]
        for cut in row_cuts(Box((0,) * len(shape), shape), dtype_from_name(dtype).itemsize):
            yield Piece(
                fqn=name,
                shape=shape,
                offsets=cut.offsets,
                sizes=cut.sizes,
                dtype=dtype,
                read=partial(_rows, spec, rng_seed, origin, cut, dtype),
            )


def _rows(spec: LlamaSpec, rng_seed: int, name: str, cut: Box, dtype: str) -> Tensor:
    start = cut.offsets[0]
    return initial_rows(spec, rng_seed, name, start, start + cut.sizes[0]).to(dtype_from_name(dtype))
