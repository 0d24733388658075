"""Checks manifests without a cluster, by the API server's, KubeRay's and our own rules."""
