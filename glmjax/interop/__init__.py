"""Checkpoints of the official repositories, read and written."""
