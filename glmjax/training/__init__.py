"""Training: loss, optimizer, step, metrics, checkpoints and the loop."""
