"""Whether a model fits, on which GPUs, with which parallelism, for how many requests at once.

The arithmetic is vLLM 0.29's own. It needs only ``config.json`` and the tensors' names and shapes:
no weights are read, and neither vLLM nor torch is imported.

``model/`` describes a checkpoint; ``vllm/`` computes what vLLM does with it. ``vllm/`` imports
``model/``, never the other way round.

======================  ==========================================================
``model/metadata``      finds ``config.json`` and the list of tensors
``model/shape``         the sizes in ``config.json``: layers, heads, experts, windows
``model/derive``        the tensors that a config implies
``model/quantization``  how a weight matrix is stored, and which GPUs can run that
``model/tensors``       a tensor, and the bytes it takes
``model/names``         a tensor's layer, role and use, by its name
``vllm/defaults``       vLLM's defaults for the arguments that memory depends on
``vllm/sharding``       which part of a tensor a GPU holds, for TP, PP, EP
``vllm/kv_cache``       blocks and tokens, as ``vllm/v1/core/kv_cache_utils.py``
``vllm/memory``         the budget of one GPU
``vllm/parallelism``    which sizes of TP, PP, DP, EP and DCP a model can take
``hardware``            GPUs and EC2 instances
``choose``              the smallest TP×PP per GPU type, and the instances for it
``report``              tables, bars, a picture, JSON
``loading``             the checkpoint that a config's model names
``check_model``         checks of one model: for ``run``, ``check`` and ``validate``
``finding``             the result of one check
======================  ==========================================================
"""
