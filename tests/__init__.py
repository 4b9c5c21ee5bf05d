"""Tests of distckpt: the tree mirrors the package, and each name is one sentence of behaviour."""
