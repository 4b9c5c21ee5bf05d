"""Programs that train: the demo, and examples to copy from."""
