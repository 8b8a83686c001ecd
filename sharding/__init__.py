"""Crystal databases → data sets of shards. See docs/format.md."""
