"""Bytes by key, six verbs. Knows no tensors and no ranks."""
