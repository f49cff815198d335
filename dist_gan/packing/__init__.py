"""Making shards: images from folders, archives and stores become WebDataset shards with a manifest."""
