"""Text to batches, on the host, in numpy. Nothing here imports jax."""
