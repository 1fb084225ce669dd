"""Runs commands in forks of one process that has torch imported, which takes longer than most commands do.

On stdin a line of JSON for each: words (`reshard ...` or `python FILE ...`), cwd, out and err (files). The answer is its
exit code. The fixture `typed` in conftest.py is the other end.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
import traceback

import torch.distributed.checkpoint.state_dict  # noqa: F401  the slow part, once

import reshard.cli


def run(words: list[str]) -> int:
    """What the command would exit with."""
    try:
        if words[0] == "reshard":
            reshard.cli.main(words[1:])
        else:
            sys.argv = words[1:]
            runpy.run_path(words[1], run_name="__main__")
    except SystemExit as stop:
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        asked = json.loads(line)
        child = os.fork()
        if child == 0:
            for name, number in (("out", 1), ("err", 2)):
                os.dup2(os.open(asked[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            os.chdir(asked["cwd"])
            code = run(asked["words"])
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        _, status = os.waitpid(child, 0)
        answers.write(f"{os.waitstatus_to_exitcode(status)}\n")
        answers.flush()


if __name__ == "__main__":
    main()
