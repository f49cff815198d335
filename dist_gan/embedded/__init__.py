"""The embedded data set: shapes drawn by arithmetic, their shards, and the count of their modes in samples."""
