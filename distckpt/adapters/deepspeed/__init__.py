"""The drop-in for DeepSpeed: an unchanged script's save_checkpoint and load_checkpoint are ours. See docs/deepspeed.md.

from distckpt.adapters import deepspeed; deepspeed.install()     in the script
python -m distckpt.adapters.deepspeed script.py ...              before it; also under deepspeed --module, torchrun -m
"""

from distckpt.adapters.deepspeed.install import install

__all__ = ["install"]
