"""``serve-app convert``: ours from a config of LiteLLM, Ray Serve LLM or ``vllm serve``.

Each format has a module, which reads a :class:`~serve_app.convert.source.Part` and fills a
:class:`~serve_app.convert.draft.Draft`. A key is understood, or the draft says why it is left out:
nothing of the source is lost in silence.
"""
