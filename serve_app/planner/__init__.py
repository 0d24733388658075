"""Know before you pay: does a model fit, on which GPUs, split how, for how many users at once.

The arithmetic is vLLM 0.29's own, done from ``config.json`` and the tensors' names and shapes
alone: no weights are read, and neither vLLM nor torch is imported. One idea per module:

=================  ============================================================
``metadata``       where ``config.json`` and the tensor list come from
``model_shape``    what ``config.json`` says: layers, heads, experts, windows
``quantization``   how a weight matrix is stored, and which GPUs can run that
``tensors``        the tensors that a config implies; how many bytes one takes
``sharding``       which part of a tensor a GPU holds, for TP, PP, EP
``kv_cache``       blocks and tokens, as ``vllm/v1/core/kv_cache_utils.py``
``engine``         vLLM's defaults for the arguments that memory depends on
``memory``         the budget of one GPU
``parallelism``    which sizes of TP, PP, DP, EP and DCP a model can take
``hardware``       GPUs and EC2 instances
``choose``         the smallest TP×PP per GPU type, and the instances for it
``report``         tables, bars, JSON
``checks``         the production checklist of ``serve-app check``
``cluster``        the nodes, GPUs and secrets of a cluster at hand
=================  ============================================================
"""
