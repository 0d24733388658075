"""Many LLMs behind one OpenAI-compatible endpoint, on Ray Serve and vLLM."""

__version__ = "0.1.0"
