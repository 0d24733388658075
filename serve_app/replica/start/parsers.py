"""Whether the parser of tool calls fits the model's tokenizer: some look for a token of their own.

vLLM makes it anew for each request, so with a wrong one a model would start, and then answer 500
to each chat. The parser of reasoning is made at the start by vLLM itself.
"""

from __future__ import annotations

from argparse import Namespace
from typing import TYPE_CHECKING

from serve_app.errors import UserError

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def refuse_unfit(args: Namespace, config: VllmConfig) -> None:
    """Make it once, as ``vllm/entrypoints/openai/chat_completion/serving.py`` does.

    Args:
        args: the engine's arguments, as vLLM's parser has read them.

    Raises:
        UserError: it does not work with this tokenizer; its own sentence.
    """
    from vllm.parser import ParserManager
    from vllm.tokenizers import cached_tokenizer_from_config

    name = args.enable_auto_tool_choice and args.tool_call_parser
    tokenizer = cached_tokenizer_from_config(config.model_config) if name else None
    if tokenizer is None:
        return
    parser = ParserManager.get_tool_parser(name, True, config.model_config.model)
    try:
        if parser is not None:
            parser(tokenizer)
    except Exception as error:
        raise UserError(
            f"engine.tool_call_parser '{name}' does not fit this model's tokenizer, and each chat "
            f"would fail: {error}; choose the parser that the model's card names"
        ) from None
