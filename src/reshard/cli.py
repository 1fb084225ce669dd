"""What did the user type? Parses, dispatches, sets the exit code. Imports no torch until a verb needs it.

Exit codes: 0 yes or done, 1 a checked "no", 2 cannot (bad input, with a sentence and a hint on stderr), 75 a training
that a signal has stopped (EX_TEMPFAIL of sysexits.h: the same command goes on).
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import click

from reshard.config import Config, config_to_toml, load_config, sections
from reshard.errors import RankLost, ReshardError, listed
from reshard.paths import local_path

logger = logging.getLogger("reshard")

# Verbs that take config keys: what click does not know is passed on as it was typed.
_KEYS = {"ignore_unknown_options": True, "allow_interspersed_args": True}
_ARGUMENTS = click.argument(
    "arguments", nargs=-1, type=click.UNPROCESSED, metavar="[CONFIG.toml] [--section.key value]..."
)
_ROPE_SCALING = click.option(
    "--rope-scaling", type=click.Choice(["none", "llama3"]),
    help="Is its RoPE scaled? Asked for where nothing says it, as of torchtitan's checkpoints.",
)  # fmt: skip
_JSON = click.option("--json", "as_json", is_flag=True, help="Report as JSON on stdout.")


class _LocalPath(click.Path):
    """A path as it was typed; the address of a store is refused before pathlib makes a path of it."""

    def convert(self, value: str | os.PathLike[str], param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """Raises CheckpointError for an address."""
        super().convert(local_path(value), param, ctx)
        return local_path(value)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="reshard", message="%(package)s %(version)s")
def cli() -> None:
    """Train Llama-family models and look after their checkpoints for the whole of a run."""


@cli.command(context_settings=_KEYS)
@_ARGUMENTS
def train(arguments: Sequence[str]) -> None:
    """Train; alone, or on every rank under torchrun.

    Resumes by itself from the newest checkpoint in the folder, on whatever layout this is. `reshard config --keys`
    lists all keys.
    """
    config = _config(arguments)
    if config.checkpoint.create_seed_checkpoint:
        _seed(config)
        return
    from reshard.commands.check import check
    from reshard.parallel.world import end_with_agent, place_from_environment

    end_with_agent()
    place = place_from_environment()
    _show_rank(place.rank, place.world_size)
    check(config, place.world_size)
    from reshard.train.loop import train as run

    outcome = run(config)
    if outcome.stopped:
        _end_stopped(outcome.stopped, alone=place.world_size == 1)
    if config.checkpoint.export and place.rank == 0 and outcome.checkpoint and outcome.step == config.training.steps:
        from reshard.commands.export import export

        for path in export(outcome.checkpoint, Path(config.job.dump_folder), config.checkpoint.export):
            logger.info("exported %s", path)


def _end_stopped(signal_name: str, *, alone: bool) -> None:
    """Tell whoever started this training that a signal has stopped it.

    A process on its own does so by its exit code. A rank of torchrun, which starts failed ranks again, exits 0, and writes
    the signal into the file that scripts/launch.py has made on this machine.
    """
    told = Path(os.environ.get("RESHARD_STOPPED", ""))
    if told.is_file():
        told.write_text(signal_name)
    if alone and "TORCHELASTIC_RUN_ID" not in os.environ:
        sys.exit(os.EX_TEMPFAIL)


@cli.command(context_settings=_KEYS)
@_ARGUMENTS
def seed(arguments: Sequence[str]) -> None:
    """Make step-0 on one CPU: the first weights, loadable on any layout."""
    _seed(_config(arguments))


def _seed(config: Config) -> None:
    from reshard.commands.seed import seed as run

    click.echo(run(config))


@cli.command(context_settings=_KEYS)
@_ARGUMENTS
@_JSON
def tokenize(arguments: Sequence[str], as_json: bool) -> None:
    """Tokenise the config's dataset ahead of the training."""
    config = _config(arguments)
    from reshard.commands.tokenize import run

    report = run(config)
    if as_json:
        click.echo(json.dumps(report))
    else:
        for key, value in report.items():
            click.echo(f"{key:22} {value}")


@cli.command(context_settings=_KEYS)
@_ARGUMENTS
@click.option(
    "--keys", is_flag=True, help="List every key with its type, default and meaning, and torchtitan's spellings."
)
@click.option("--check", "checking", is_flag=True, help="Refuse what `train` would refuse, print nothing else.")
@click.option(
    "--world-size", type=click.IntRange(min=1), envvar=["WORLD_SIZE", "NGPU"], default=1,
    help="Ranks to check for (default: WORLD_SIZE or NGPU, else 1).",
)  # fmt: skip
def config(arguments: Sequence[str], keys: bool, checking: bool, world_size: int) -> None:
    """Print the resolved config as TOML, check it, or list the keys."""
    if keys:
        _print_keys()
        return
    resolved = _config(arguments)
    if checking:
        from reshard.commands.check import check

        check(resolved, world_size)
    else:
        click.echo(config_to_toml(resolved), nl=False)


@cli.command()
@click.argument("path", type=_LocalPath(path_type=Path))
@click.option("--prompt", default="", help="Text to continue; none: from the beginning of a document.")
@click.option("--config", "config_path", type=_LocalPath(path_type=Path), help="Config that says model and tokenizer.")
@click.option("--model", "flavor", help="Flavor of a bare .pt, e.g. debugmodel or 8B.")
@_ROPE_SCALING
@click.option("--tokenizer", help="Tokenizer, as in model.tokenizer_path.")
@click.option("--max-tokens", type=click.IntRange(min=1), default=64, show_default=True, help="Tokens to generate.")
@click.option(
    "--temperature", type=click.FloatRange(min=0), default=0.0, show_default=True, help="0: always the likeliest."
)
@click.option(
    "--top-k", type=click.IntRange(min=0), default=0, show_default=True, help="Among so many only; 0: among all."
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the choice, where temperature is above 0.")
def generate(
    path: Path,
    prompt: str,
    config_path: Path | None,
    flavor: str | None,
    rope_scaling: Literal["none", "llama3"] | None,
    tokenizer: str | None,
    max_tokens: int,
    temperature: float,
    top_k: int,
    seed: int,
) -> None:
    """Continue a text with a checkpoint, in any format."""
    from reshard.commands.generate import run

    click.echo(prompt, nl=False)
    run(
        path, prompt, config_path=config_path, flavor=flavor, rope_scaling=rope_scaling, tokenizer=tokenizer,
        max_tokens=max_tokens, temperature=temperature, top_k=top_k, seed=seed, show=lambda text: click.echo(text, nl=False),
    )  # fmt: skip
    click.echo()


@cli.command(context_settings=_KEYS)
@_ARGUMENTS
@click.option("--world-size", type=click.IntRange(min=1), default=1, show_default=True, help="Ranks to plan for.")
@click.option(
    "--device", type=click.Choice(["cuda", "cpu"]), default="cuda", show_default=True,
    help="Of the ranks: on cuda, forward and backward are in bfloat16 unless the config says otherwise.",
)  # fmt: skip
@_JSON
def plan(arguments: Sequence[str], world_size: int, device: str, as_json: bool) -> None:
    """Who would hold what on N ranks, without them: mesh, memory of each rank, checkpoint size."""
    from reshard.commands.plan import run, table

    report = run(_config(arguments), world_size, device)
    click.echo(json.dumps(report) if as_json else "\n".join(table(report)))


@cli.command(context_settings=_KEYS)
@_ARGUMENTS
@click.option(
    "--layouts", required=True,
    help='E.g. "fsdp4;tp2;pp2:ZBVZeroBubble.fsdp2": rep, fsdp, cp, tp and pp with their degrees.',
)  # fmt: skip
@click.option("--steps", type=click.IntRange(min=1), default=3, show_default=True, help="Optimizer steps of each.")
@_JSON
def parity(arguments: Sequence[str], layouts: str, steps: int, as_json: bool) -> None:
    """Does every layout compute what one process computes? A few float64 steps of each. Exit 0 yes, 1 no, 2 cannot tell."""
    from reshard.commands.parity import exit_code, parse_layouts, run, table

    rows = run(_config(arguments), parse_layouts(layouts), steps=steps)
    if as_json:
        for row in rows:
            click.echo(json.dumps(asdict(row)))
    else:
        click.echo(table(rows))
    sys.exit(exit_code(rows))


@cli.command("eval")
@click.argument("path", type=_LocalPath(path_type=Path))
@click.option(
    "--data",
    help="Text to measure on: `stdlib`, a file or folder, or a dataset's name. Default: what it was trained on, held-out part.",
)
@click.option(
    "--config",
    "config_path",
    type=_LocalPath(path_type=Path),
    help="Config that says model and tokenizer, where PATH does not.",
)
@click.option("--model", "flavor", help="Flavor of a bare .pt, e.g. debugmodel or 8B.")
@_ROPE_SCALING
@click.option("--tokenizer", help="Tokenizer, as in model.tokenizer_path.")
@click.option("--seq-len", type=click.IntRange(min=1), help="Tokens per sequence. Default: the training's.")
@click.option("--sequences", type=click.IntRange(min=1), default=64, show_default=True, help="Sequences to measure on.")
@click.option("--batch-size", type=click.IntRange(min=1), default=8, show_default=True, help="Sequences at once.")
@click.option(
    "--cache-folder", type=click.Path(path_type=Path), help="Keep the text's tokens here. Default: they are not kept."
)
@_JSON
def evaluate(
    path: Path,
    data: str | None,
    config_path: Path | None,
    flavor: str | None,
    rope_scaling: Literal["none", "llama3"] | None,
    tokenizer: str | None,
    seq_len: int | None,
    sequences: int,
    batch_size: int,
    cache_folder: Path | None,
    as_json: bool,
) -> None:
    """Loss of a checkpoint, in any format, on held-out text, in nats per token."""
    from reshard.commands.evaluate import run

    report = run(
        path, data=data, config_path=config_path, flavor=flavor, rope_scaling=rope_scaling, tokenizer=tokenizer,
        seq_len=seq_len, sequences=sequences, batch_size=batch_size, cache_folder=cache_folder,
    )  # fmt: skip
    if as_json:
        click.echo(json.dumps(report))
    else:
        click.echo(
            f"held-out loss: {report['loss']:.4f} nats/token on {report['tokens']:,} tokens of {report['data']} "
            f"(unigram entropy {report['unigram_entropy']:.4f})"
        )


@cli.command()
@click.argument("path", type=_LocalPath(path_type=Path))
@click.option("--tensors", is_flag=True, help="List every tensor with shape, dtype and bytes.")
@click.option("--tensor", "name", metavar="NAME", help="One tensor: where it lies, its statistics and a histogram.")
@click.option("--tree", "as_tree", is_flag=True, help="The tensors' names as a tree, with sizes.")
@_JSON
@click.option("--model", help="What it is, where it does not say: FLAVOR, NAME/FLAVOR, a params.json or config.json.")
@_ROPE_SCALING
def inspect(
    path: Path,
    tensors: bool,
    name: str | None,
    as_tree: bool,
    as_json: bool,
    model: str | None,
    rope_scaling: Literal["none", "llama3"] | None,
) -> None:
    """What is in it? A checkpoint, a folder of them, or a model in any format: its origin, sizes and tensors."""
    from reshard.commands.inspect import answer

    report, lines = answer(path, model=model, rope_scaling=rope_scaling, tensor=name, tree=as_tree, tensors=tensors)
    click.echo(json.dumps(report) if as_json else "\n".join(lines))


@cli.command()
@click.argument("run_dir", type=_LocalPath(path_type=Path))
@click.option(
    "--output", type=_LocalPath(path_type=Path), help="The HTML file to write. Default: report.html in RUN_DIR."
)
@click.option("--png", is_flag=True, help="Also write each curve as a PNG file beside it.")
@click.option("--verify", "verifying", is_flag=True, help="Read every byte of every checkpoint, and report the times.")
@_JSON
def report(run_dir: Path, output: Path | None, png: bool, verifying: bool, as_json: bool) -> None:
    """How did the run go? RUN_DIR (its dump folder) as one HTML page: curves, layouts, checkpoints, exports."""
    from reshard.commands.report import bytes_to_verify, run
    from reshard.progress import progress_bar

    total = bytes_to_verify(run_dir) if verifying else None
    with progress_bar("verify", total, shown=verifying) as advance:
        written = run(run_dir, output, png=png, verify=verifying, advance=advance)
    click.echo(json.dumps([str(path) for path in written]) if as_json else "\n".join(map(str, written)))


@cli.command()
@click.argument("paths", nargs=-1, required=True, type=_LocalPath(path_type=Path))
@click.option(
    "--level",
    type=click.Choice(["files", "bytes"]),
    default="bytes",
    show_default=True,
    help="files: manifest, index, headers, names and sizes. bytes: also every byte that has a checksum.",
)
@_JSON
def verify(paths: Sequence[Path], level: Literal["files", "bytes"], as_json: bool) -> None:
    """Is it whole? Checkpoints, folders of them, foreign DCP; Hugging Face and Meta folders, safetensors, GGUF, .pt.

    Exit 0 yes, 1 no, 2 cannot tell. safetensors and GGUF have no checksums: yes means that sizes, index and headers fit.
    """
    from reshard.commands.verify import exit_code, run, size_of
    from reshard.progress import progress_bar

    verdicts = []
    total = sum(size_of(path) for path in paths) if level == "bytes" else None
    with progress_bar("verify", total, shown=level == "bytes") as advance:
        for path in paths:
            verdicts += run(path, level, advance)
    for verdict in verdicts:
        if as_json:
            click.echo(json.dumps(asdict(verdict)))
            continue
        answer = {True: "whole", False: "DAMAGED", None: "unknown"}[verdict.whole]
        size = f", {verdict.bytes_checked / 1e6:,.1f} MB checked" if verdict.bytes_checked else ""
        click.echo(f"{answer:8} {verdict.path}  {verdict.problem or verdict.what + size}")
        for finding in verdict.findings:
            writer = f" (written by rank {finding.rank})" if finding.rank is not None else ""
            click.echo(
                f"         {finding.file}{writer}: {finding.problem}" if finding.file else f"         {finding.problem}"
            )
            if finding.tensors:
                click.echo(f"         tensors: {listed(finding.tensors)}")
        for note in verdict.notes:
            click.echo(f"         note: {note}", err=True)
    sys.exit(exit_code(verdicts))


@cli.command()
@click.argument("source", type=_LocalPath(path_type=Path))
@click.argument("target", type=_LocalPath(path_type=Path))
@click.option(
    "--to",
    type=click.Choice(["dcp", "hf", "meta", "torch", "torchtune", "gguf"]),
    help="What to write. Default: by TARGET's name, .gguf or .pt, else a DCP checkpoint.",
)
@click.option("--model", help="What SOURCE is, if it does not say: FLAVOR, NAME/FLAVOR, a params.json or config.json.")
@click.option("--dtype", type=click.Choice(["float16", "bfloat16", "float32", "float64"]), help="Cast on the way.")
@_ROPE_SCALING
@click.option("--rope-scaling-factor", type=float, help="Instead of the release's, 32 for 3.2's 1B and 3B, else 8.")
@click.option("--tokenizer", type=_LocalPath(path_type=Path, exists=True), help="Instead of the one beside SOURCE.")
@click.option("--no-tokenizer", is_flag=True, help="The weights alone, where the tokenizer cannot be handed on.")
@click.option(
    "--max-memory", default="512MiB", show_default=True, help="Of anonymous memory, whatever the model's size."
)
@click.option("--workers", type=click.IntRange(1, 64), default=2, show_default=True, help="Threads that copy.")
@click.option("--shards", type=click.IntRange(1, 100), default=1, show_default=True, help="Files of a Meta export.")
@click.option("--max-shard-size", default="5GB", show_default=True, help="Of each file of a Hugging Face export.")
@click.option(
    "--names",
    type=click.Choice(["torchtune", "meta"]),
    default="torchtune",
    show_default=True,
    help="In a torchtune export: for FullModelTorchTuneCheckpointer or FullModelMetaCheckpointer.",
)
@click.option("--dry-run", is_flag=True, help="Say what would be written, and write nothing.")
@click.option("--verify", "verifying", is_flag=True, help="Read everything back and compare.")
@_JSON
def convert(
    source: Path,
    target: Path,
    to: str | None,
    model: str | None,
    dtype: str | None,
    rope_scaling: Literal["none", "llama3"] | None,
    rope_scaling_factor: float | None,
    tokenizer: Path | None,
    no_tokenizer: bool,
    max_memory: str,
    workers: int,
    shards: int,
    max_shard_size: str,
    names: Literal["torchtune", "meta"],
    dry_run: bool,
    verifying: bool,
    as_json: bool,
) -> None:
    """Weights from any format to any other: DCP, Meta, Hugging Face, torchtune, .pt, GGUF, in bounded memory."""
    from reshard.commands.convert import Options, describe_plan, plan_lines, run, target_format
    from reshard.commands.sources import open_source
    from reshard.formats.hf_config import parse_size

    options = Options(
        dtype=dtype, memory=parse_size(max_memory), workers=workers, shards=shards,
        max_shard_bytes=parse_size(max_shard_size), names=names, tokenizer=tokenizer,
        no_tokenizer=no_tokenizer, verify=verifying,
    )  # fmt: skip
    if dry_run:
        form = target_format(target, to)
        opened = open_source(
            source, model=model, rope_scaling=rope_scaling, rope_factor=rope_scaling_factor,
            rope_matters=form != "torch",
        )  # fmt: skip
        report = describe_plan(opened, target, form, options)
        click.echo(json.dumps(report) if as_json else "\n".join(plan_lines(report)))
        return
    run(source, target, to=to, model=model, rope_scaling=rope_scaling, rope_factor=rope_scaling_factor, options=options)
    click.echo(json.dumps({"path": str(target)}) if as_json else target)


@cli.command()
@click.argument("left", type=_LocalPath(path_type=Path))
@click.argument("right", type=_LocalPath(path_type=Path))
@click.option(
    "--model", help="What they are, where they do not say: FLAVOR, NAME/FLAVOR, a params.json or config.json."
)
@_ROPE_SCALING
@click.option("--any-dtype", is_flag=True, help="Equal numbers are enough.")
@click.option("--tolerance", type=click.FloatRange(min=0), default=0.0, help="Of the largest relative difference.")
@_JSON
def diff(
    left: Path,
    right: Path,
    model: str | None,
    rope_scaling: Literal["none", "llama3"] | None,
    any_dtype: bool,
    tolerance: float,
    as_json: bool,
) -> None:
    """Are these the same weights, in whatever format? Exit 0 yes, 1 no, 2 cannot tell."""
    from reshard.commands.diff import compare, lines
    from reshard.commands.sources import open_source
    from reshard.progress import progress_bar

    a, b = (open_source(path, model=model, rope_scaling=rope_scaling) for path in (left, right))
    with progress_bar("diff", sum(tensor.nbytes for tensor in a.tensors.values())) as advance:
        report = compare(a, b, advance)
    same = report.same(any_dtype=any_dtype, tolerance=tolerance)
    if as_json:
        click.echo(json.dumps({"same": same, **asdict(report)}))
    else:
        click.echo("\n".join([*lines(report), f"{'same' if same else 'DIFFERENT'}: {report.tensors} tensors compared"]))
    sys.exit(0 if same else 1)


def _config(arguments: Sequence[str]) -> Config:
    """The config that a verb's words describe; warnings go to the log."""
    words = list(arguments)
    path = words.pop(0) if words and not words[0].startswith("-") else None
    resolved, warnings = load_config(path, words)
    for warning in warnings:
        logger.warning("%s", warning)
    return resolved


def _print_keys() -> None:
    from reshard import compat

    for section, cls in sections().items():
        click.echo(f"[{section}]  # {(cls.__doc__ or '').strip()}")
        for key, field in cls.model_fields.items():
            kind = str(field.annotation).replace("typing.", "") if "[" in str(field.annotation) else None
            kind = kind or getattr(field.annotation, "__name__", str(field.annotation))
            click.echo(f"{key} = {json.dumps(field.default)}  # {kind}: {field.description}")
        click.echo()
    click.echo("# torchtitan's other keys")
    for key, meaning, reason in compat.rows():
        click.echo(f"# {key}: {meaning}{'; otherwise refused: ' + reason if reason else ''}")


def _set_up_logging(plain: bool) -> None:
    rank = int(os.environ.get("RANK", "0"))
    logging.captureWarnings(True)
    handler: logging.Handler
    if sys.stderr.isatty() and not plain and "NO_COLOR" not in os.environ:
        from rich.console import Console
        from rich.logging import RichHandler

        handler = RichHandler(
            console=Console(stderr=True), show_path=False, log_time_format="%H:%M:%S", highlighter=None
        )
        handler.setFormatter(logging.Formatter("%(message)s"))
    else:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logger.setLevel(logging.INFO if rank == 0 else logging.WARNING)


def _show_rank(rank: int, world_size: int) -> None:
    """With several ranks, say in each line which one speaks."""
    if world_size > 1:
        for handler in logging.getLogger().handlers:
            if isinstance(handler, logging.StreamHandler):
                handler.setFormatter(logging.Formatter(f"%(asctime)s [{rank}] %(message)s", "%H:%M:%S"))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 2 with one sentence and a hint for every ReshardError, no traceback."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    _set_up_logging(plain=any("disable_color_printing" in word for word in words))
    if words and words[0].startswith(("--job.config", "--job.config-file")):
        words.insert(0, "train")  # the specification's script passes no verb
    code = 0
    try:
        cli(words, standalone_mode=False)
    except click.exceptions.Exit as stop:
        code = stop.exit_code
    except click.ClickException as error:
        error.show()
        code = 2
    except click.Abort:
        code = 130
    except ReshardError as error:
        code = _fail(error)
    _leave(code)


def _leave(code: int) -> None:
    """End this process with an exit code; 0 just returns, for who called us from Python.

    Where it has met other ranks, without Python's own end: gloo's threads take the GIL to let go of the last tensors,
    and a thread that asks for it then ends the process by SIGABRT, after all has been done well (pytorch#179291).
    """
    if "WORLD_SIZE" in os.environ and "torch" in sys.modules:
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    if code:
        sys.exit(code)


def _fail(error: ReshardError) -> int:
    """Say it once: rank 0 for what all ranks know, the rank itself for what only it knows. Returns the exit code."""
    rank = int(os.environ.get("RANK", "0"))
    if rank == 0 or error.rank_local:
        click.echo(f"error: {error}" if rank == 0 else f"error on rank {rank}: {error}", err=True)
        if isinstance(error, RankLost):
            # torchrun looks at its workers every 0.1 s, and calls the lowest of those that it finds dead the root cause:
            # who only followed another rank has to outlive that look.
            time.sleep(1)
    else:
        # torchrun ends all ranks when the first one exits: leave rank 0 the time to speak.
        time.sleep(3)
    return 2
