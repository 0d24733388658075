"""How far one cluster goes: ``python -m benchmarks.scale``."""
