"""Where the two tiers of a run lie."""

from __future__ import annotations

import pytest


@pytest.fixture
def near(tmp_path):
    return tmp_path / "nvme"


@pytest.fixture
def far(tmp_path):
    return tmp_path / "root"
