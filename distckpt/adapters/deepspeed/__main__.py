"""`python -m distckpt.adapters.deepspeed script.py ...` (or `-m module ...`): run it with `install()` called before.

DISTCKPT_DEEPSPEED=0 runs it as it is: so one command line serves both. DISTCKPT_DEEPSPEED=async saves in the
background: see `install(wait=False)`.
"""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

from distckpt.adapters.deepspeed.install import install


def main() -> None:
    """Run what the arguments name, as `python script.py ...` or `python -m module ...` would."""
    arguments = sys.argv[1:]
    if not arguments or arguments == ["-m"]:
        raise SystemExit("usage: python -m distckpt.adapters.deepspeed SCRIPT|-m MODULE [ARGUMENTS ...]")
    how = os.environ.get("DISTCKPT_DEEPSPEED", "1")
    if how not in {"0", "1", "async"}:
        raise SystemExit(f"DISTCKPT_DEEPSPEED={how}: 0, 1 or async is expected")
    if how != "0":
        install(wait=how != "async")
    if arguments[0] == "-m":
        sys.argv, sys.path[0] = arguments[1:], str(Path.cwd())
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = arguments, str(Path(arguments[0]).resolve().parent)
        runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    main()
