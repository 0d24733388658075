"""What the gateway costs for each event and each request: ``python -m benchmarks.relay``."""
