"""Settings that every test shares."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

os.environ.setdefault("OMP_NUM_THREADS", "1")

# no deadline: the machines that run this share their cores, and pytest-timeout tells a hang from a slow example
settings.register_profile("distckpt", deadline=None, max_examples=50, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("distckpt")
