"""Measurements of serve_app against what it stands beside. See docs/benchmarks.md."""
