"""Manifests for Kubernetes; ``k8s.check`` checks them."""
