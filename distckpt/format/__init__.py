"""What is on disk, as values. Pure: no torch, no numpy, no I/O. docs/format.md says it in words."""
