"""What tests of commands at URIs share."""

from __future__ import annotations

import pytest

from tests.store import servers


@pytest.fixture(scope="module")
def bucket():
    """A bucket of moto, by what the environment says."""
    found = servers.start("moto").bucket()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in found.environment.items():
            patch.setenv(name, value)
        yield found
