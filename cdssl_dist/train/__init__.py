"""A pretraining run: the loop of a rank, engine, guard, checkpoints, what a run writes down, and Ray above it."""
