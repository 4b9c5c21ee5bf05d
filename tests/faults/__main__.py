"""The fault campaigns, one after another, each with its share of the time: `make torture SECONDS=3600 SEED=7`.

    python -m tests.faults --seconds 3600 --seed 7 [CAMPAIGN ...]

Each runs in a process of its own, prints its figures, and fails the whole if anything was found.
"""

from __future__ import annotations

import argparse
import importlib
import subprocess
import sys
import time

CAMPAIGNS = {
    "damage": 2,
    "fuzz": 2,
    "interleavings": 2,
    "guided": 3,
    "kills": 6,
    "endurance": 3,
    "errors": 3,
    "power": 2,
    "lost_ranks": 3,
    "requests": 2,
}
"""Module of this package, which has `campaign(seed, seconds) -> Tally` -> its share of the time."""


def run(name: str, seed: int, seconds: float) -> bool:
    """Run one campaign here. Whether it found nothing."""
    started = time.monotonic()
    tally = importlib.import_module(f"tests.faults.{name}").campaign(seed, seconds)
    print(f"{name} (seed {seed}, {time.monotonic() - started:.0f} s)\n{tally}", flush=True)
    return not tally.problems and tally.cases > 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("campaigns", nargs="*", metavar="CAMPAIGN", help=f"of {', '.join(CAMPAIGNS)}; all if none")
    parser.add_argument("--seconds", type=float, default=600, help="for all of them together")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    if unknown := set(given.campaigns) - CAMPAIGNS.keys():
        parser.error(f"no campaign called {', '.join(sorted(unknown))}; there are {', '.join(CAMPAIGNS)}")
    names = given.campaigns or list(CAMPAIGNS)
    if len(names) == 1:
        return not run(names[0], given.seed, given.seconds)
    share = given.seconds / sum(CAMPAIGNS[name] for name in names)
    failed = []
    for name in names:
        options = [name, "--seconds", str(share * CAMPAIGNS[name]), "--seed", str(given.seed)]
        ended = subprocess.run([sys.executable, "-m", "tests.faults", *options], check=False)
        if ended.returncode:
            failed.append(f"{name} (exit {ended.returncode})")
    print("FAILED: " + ", ".join(failed) if failed else f"all of {', '.join(names)} passed")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
