"""Checkpoints: their folder format, the reader that needs no run, the writer of all ranks, and retention."""
