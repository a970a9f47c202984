"""Checkpoints of every format, in and out."""
