"""Ways to look at an encoder and at a run: embeddings, probes, maps and reports."""
