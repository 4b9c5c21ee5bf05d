"""`python -m distckpt`: the same as `distckpt`."""

import sys

from distckpt.cli import main

if __name__ == "__main__":
    sys.exit(main())
