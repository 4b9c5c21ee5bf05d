"""`python -m distckpt.reshard`, which is `distckpt reshard`: any checkpoint that is read, as any that is written.

    python -m distckpt.reshard runs/first exported.safetensors --only model --dtype bfloat16
    python -m distckpt.reshard dcp_dir runs/next --step 4000 --world-size 8 --workers 4
    python -m distckpt.reshard runs/first s3://bucket/first --verify
    python -m distckpt.reshard runs/first tags --to deepspeed --zero-stage 3 --world-size 16 --dtype bf16
    srun python -m distckpt.reshard runs/first /shared/dcp --to dcp      # tasks share the files out

What SRC is is told by its content. Nothing is under DST before all of it is; one that was interrupted goes on where it
stopped when it is started again. Runs no code from SRC.
"""

from __future__ import annotations

import sys

from distckpt import cli


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit code (distckpt/cli.py lists them)."""
    return cli.main(["reshard", *(sys.argv[1:] if arguments is None else arguments)])


if __name__ == "__main__":
    sys.exit(main())
