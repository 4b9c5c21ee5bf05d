"""The run: what a training job keeps across its launches, from its checkpoints to its place in the data."""
