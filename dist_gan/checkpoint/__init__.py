"""Saves and loads checkpoints: the folder format, the reader that needs no run, the writer of all ranks, and retention."""
