"""Does pretraining pay? Cells, samples, statistics and tables of a study."""
