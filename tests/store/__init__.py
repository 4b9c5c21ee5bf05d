"""Stores: one suite for all, and what only a file system can get wrong."""
