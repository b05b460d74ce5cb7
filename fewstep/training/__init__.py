"""The training loop and what it keeps: turns, optimizers, checkpoints, logs."""
