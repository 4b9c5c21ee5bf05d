"""Frameworks that have a training loop, or a format, of their own: one module each, which imports its framework.

Nothing else here imports one of them, and none imports another.
"""
