"""The whole gateway beside others: ``python -m benchmarks.gateway``."""
