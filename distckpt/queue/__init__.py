"""The queue of runs: several models in order, so many at a time, through crashes and reboots. See docs/queue.md.

spec     what the TOML file says
standing where each run is, derived from its own registry and events
runner   starts what is to run, and starts again what crashed
table    what `status` shows
cluster  the same file as a SLURM array
"""
