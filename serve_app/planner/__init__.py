"""Whether a model fits, on which GPUs, with which parallelism, for how many requests at once.

The arithmetic is vLLM 0.29's own. It needs only ``config.json`` and the tensors' names and shapes:
no weights are read, and neither vLLM nor torch is imported.

``model/`` describes a checkpoint; ``vllm/`` computes what vLLM does with it. ``vllm/`` imports
``model/``, never the other way round.
"""
