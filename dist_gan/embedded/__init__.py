"""The embedded data set: pictures of shapes that the program draws, their shards, and the count of modes in samples."""
