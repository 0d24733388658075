"""What can be measured only where GPUs are: ``python -m benchmarks.h200`` (docs/benchmarks.md)."""
