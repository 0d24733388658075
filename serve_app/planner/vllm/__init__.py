"""vLLM 0.29's arithmetic: its defaults, memory budget, KV cache and limits on parallelism."""
