"""Know before you pay: does a model fit, on which GPUs, split how, for how many users at once.

The arithmetic is vLLM 0.29's own, done from ``config.json`` and the tensors' names and shapes
alone: no weights are read, and neither vLLM nor torch is imported. One idea per module:

==========================  ===========================================================
``model/metadata``          where ``config.json`` and the tensor list come from
``model/shape``, ``derive`` what ``config.json`` says: layers, heads, experts, windows
``model/quantization``      how a weight matrix is stored, and which GPUs can run that
``model/tensors``           the tensors that a config implies; how many bytes one takes
``vllm/sharding``           which part of a tensor a GPU holds, for TP, PP, EP
``vllm/kv_cache``           blocks and tokens, as ``vllm/v1/core/kv_cache_utils.py``
``vllm/defaults``           vLLM's defaults for the arguments that memory depends on
``vllm/memory``             the budget of one GPU; ``allocator`` rounds as torch's does
``vllm/parallelism``        which sizes of TP, PP, DP, EP and DCP a model can take
``hardware``                GPUs and EC2 instances
``loading``                 from a config's model to what can be planned
``choose``                  the smallest TP×PP per GPU type, and the instances for it
``report``, ``plot``        tables, bars, JSON; the bars as a picture
``check_model``             one model judged: for ``run``, ``check`` and ``validate``
``finding``                 what a check says
==========================  ===========================================================
"""
