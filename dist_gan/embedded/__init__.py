"""The embedded data set: pictures of shapes that the program draws, their shards, and the judge that counts the modes of
the data set in generated images."""
