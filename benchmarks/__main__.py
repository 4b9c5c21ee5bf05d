"""`python -m benchmarks index|throughput|reshard-offline|all`: prints a table each, and the machine it ran on."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys

import torch

from benchmarks import index, reshard_offline, throughput


def main() -> int:
    """Run the benchmarks that the command line names."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("which", choices=["index", "throughput", "reshard-offline", "all"])
    parser.add_argument("--folder", default=".", help="where to write: the disk that is measured")
    parser.add_argument("--rounds", type=int, default=5, help="rounds; each runs every program once, in turn")
    parser.add_argument("--gb", type=float, default=0.5, help="size of what reshard-offline converts")
    asked = parser.parse_args()
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, torch {torch.__version__}"
    )
    if asked.which in {"index", "all"}:
        index.run()
    if asked.which in {"throughput", "all"}:
        throughput.run(asked.folder, asked.rounds)
    if asked.which in {"reshard-offline", "all"}:
        ratios = reshard_offline.run(asked.folder, asked.rounds, int(asked.gb * 1000))
        print(json.dumps({"bench": "reshard-offline", "ratios": ratios}))
    return 0


sys.exit(main())
