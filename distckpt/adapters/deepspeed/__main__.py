"""`python -m distckpt.adapters.deepspeed script.py ...`: run a script with `install()` called before it.

DISTCKPT_DEEPSPEED=0 runs it as it is: so one command line serves both.
"""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

from distckpt.adapters.deepspeed.install import install


def main() -> None:
    """Run the script that the arguments name, as `python script.py ...` would."""
    if len(sys.argv) < 2:
        raise SystemExit("usage: python -m distckpt.adapters.deepspeed SCRIPT [ARGUMENTS ...]")
    if os.environ.get("DISTCKPT_DEEPSPEED", "1") != "0":
        install()
    sys.argv = sys.argv[1:]
    sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
