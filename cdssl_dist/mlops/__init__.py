"""All that speaks with MLflow: tracking while training, the registry, and the forms that models take there."""
