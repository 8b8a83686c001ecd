"""A pretraining run: training loop, engine, guard, checkpoints, logs, and the Ray layer above them."""
