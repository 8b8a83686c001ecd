"""From an encoder and labels to a model of a property: splits, scaling, training, baselines, prediction."""
