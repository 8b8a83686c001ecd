"""Checks of the manifests, over every rendered overlay, without a cluster: ``python -m k8s.check``."""
