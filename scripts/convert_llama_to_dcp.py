"""Meta's original Llama files to a DCP checkpoint: python3 scripts/convert_llama_to_dcp.py <input_dir> <output_dir>

Works in any Python: where reshard is not installed, it goes on in the .venv that `make install` made.
"""

import importlib.util
import logging
import os
import sys
from pathlib import Path

VENV_PYTHON = Path(__file__).resolve().parent.parent / ".venv" / "bin" / "python"

if not all(importlib.util.find_spec(name) for name in ("reshard", "torch", "click")):
    if "RESHARD_IN_VENV" in os.environ or not VENV_PYTHON.exists():
        print(f"error: reshard is not installed in {sys.prefix}\n\nhint: make install", file=sys.stderr)
        sys.exit(2)
    os.execve(VENV_PYTHON, [str(VENV_PYTHON), *sys.argv], os.environ | {"RESHARD_IN_VENV": "1"})  # noqa: S606

import click  # noqa: E402  only now is it sure to be there

from reshard.errors import ReshardError  # noqa: E402


@click.command()
@click.argument("input_dir", type=click.Path(path_type=Path))
@click.argument("output_dir", type=click.Path(path_type=Path))
@click.option("--max_seq_len", "--max-seq-len", type=int, help="Rows of freqs_cis; else accepted without effect.")
@click.option(
    "--with-freqs-cis",
    is_flag=True,
    help="Write what torchtitan loaded until July 2025: names under `model.`, and freqs_cis (131,072 rows, or "
    "--max_seq_len: as many as the training has positions).",
)
def main(input_dir: Path, output_dir: Path, max_seq_len: int | None, with_freqs_cis: bool) -> None:
    """Convert Meta's params.json and consolidated.NN.pth in INPUT_DIR to a committed DCP checkpoint OUTPUT_DIR."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("reshard").setLevel(logging.INFO)
    if max_seq_len is not None and not with_freqs_cis:
        logging.getLogger("reshard").info("--max_seq_len has no effect: the result trains at any sequence length")
    from reshard.commands.convert import import_meta

    rows = (max_seq_len or 131072) if with_freqs_cis else None
    try:
        click.echo(import_meta(input_dir, output_dir, freqs_cis_rows=rows))
    except ReshardError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
