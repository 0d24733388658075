"""Know before you pay: does a model fit, on which GPUs, split how, for how many users at once.

The arithmetic is vLLM 0.29's own, done from ``config.json`` and the tensors' names and shapes
alone: no weights are read, and neither vLLM nor torch is imported.

``model/`` is what a checkpoint says, ``vllm/`` what vLLM makes of it; imports go from ``vllm/`` to
``model/`` and not back.

======================  ==========================================================
``model/metadata``      where ``config.json`` and the tensor list come from
``model/shape``         what ``config.json`` says: layers, heads, experts, windows
``model/derive``        the tensors that a config implies
``model/quantization``  how a weight matrix is stored, and which GPUs can run that
``model/tensors``       a tensor, and the bytes it takes
``model/names``         what a tensor's name tells: its layer, its part, its use
``vllm/defaults``       vLLM's defaults for the arguments that memory depends on
``vllm/sharding``       which part of a tensor a GPU holds, for TP, PP, EP
``vllm/kv_cache``       blocks and tokens, as ``vllm/v1/core/kv_cache_utils.py``
``vllm/memory``         the budget of one GPU
``vllm/parallelism``    which sizes of TP, PP, DP, EP and DCP a model can take
``hardware``            GPUs and EC2 instances
``choose``              the smallest TP×PP per GPU type, and the instances for it
``report``              tables, bars, a picture, JSON
``loading``             from a config's model to what can be planned
``check_model``         one model judged: for ``run``, ``check`` and ``validate``
``finding``             what a check says
======================  ==========================================================
"""
