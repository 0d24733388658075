"""Manifests from a config and a cluster profile. Pure: no network, and the same bytes each time."""
