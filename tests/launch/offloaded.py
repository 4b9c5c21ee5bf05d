"""launch.train_deepspeed without DeepSpeed's own kernels, which need a compiler."""

from __future__ import annotations

from tests import deepspeeds

if __name__ == "__main__":
    deepspeeds.preload()
    from launch import train_deepspeed

    train_deepspeed.main()
