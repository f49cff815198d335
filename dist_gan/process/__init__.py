"""The life of one process: checks before the start, the run, and its end in one sentence, one file and one exit code."""
