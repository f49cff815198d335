"""One process of a run: checks before the start, the run itself, and its end with outcome file, message and exit code."""
