"""A framework that is not installed is told with what installs it."""

from __future__ import annotations

import importlib
import sys

import pytest


@pytest.mark.parametrize(
    ("module", "needs", "extra"),
    [
        ("transformers", "transformers", "hf"),
        ("accelerate", "accelerate.data_loader", "accelerate"),
        ("lightning", "lightning_fabric.plugins", "lightning"),
    ],
)
def test_an_integration_says_what_it_needs(monkeypatch, module, needs, extra):
    monkeypatch.setitem(sys.modules, needs.partition(".")[0], None)
    monkeypatch.setitem(sys.modules, needs, None)
    monkeypatch.delitem(sys.modules, f"distckpt.integrations.{module}", raising=False)
    with pytest.raises(ImportError, match=rf"pip install 'distckpt\[{extra}\]'"):
        importlib.import_module(f"distckpt.integrations.{module}")
