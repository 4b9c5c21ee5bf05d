"""Measurements beside the peers, in one run: `python -m benchmarks --help`. Figures stand in benchmarks/README.md."""
