"""From shards and files of crystals to batches: plan, cache, reader, loader; labels, subsets and streams."""
