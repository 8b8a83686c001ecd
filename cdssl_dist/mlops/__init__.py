"""Everything that talks to MLflow: tracking during training, the registry, and the formats of models there."""
