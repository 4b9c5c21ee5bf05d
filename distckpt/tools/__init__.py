"""What is done with checkpoints offline, by one process, in bounded memory."""
