"""Would this config run? Everything that can be refused before a rank is started, without torch."""

from __future__ import annotations

from reshard.config import Config, check_checkpointing
from reshard.errors import LayoutError
from reshard.model.build import spec_of
from reshard.parallel.dims import check_fit, plan_batches, resolve_layout
from reshard.text.sources import open_source
from reshard.text.tokenizers import check_tokenizer


def check(config: Config, world_size: int) -> None:
    """Refuse what `train` on this many ranks would refuse. Raises ConfigError, LayoutError, DataError or FormatError."""
    seeding = config.checkpoint.create_seed_checkpoint
    if seeding and world_size != 1:
        raise LayoutError(
            f"a seed checkpoint is made by one process, but {world_size} are to be started",
            hint="NGPU=1, or `reshard seed`",
        )
    layout = resolve_layout(config, world_size)
    spec = spec_of(config)
    if seeding:  # needs neither text nor tokenizer
        return
    check_checkpointing(config)
    if config.checkpoint.export:
        from reshard.commands.export import check_exports

        check_exports(config.checkpoint.export, spec)
    check_fit(layout, spec, config)
    if config.training.global_batch_size > 0:
        plan_batches(layout, config, config.training.global_batch_size)
    open_source(config.training)
    check_tokenizer(config.model.tokenizer_path, spec.vocab_size)
