"""The requests, ready to copy, that ``serve-app run`` prints once the models are up."""

from __future__ import annotations

import json
import os

from serve_app.config.document import API_KEY, Fleet
from serve_app.config.environment import environment
from serve_app.local import endpoint as endpoints
from serve_app.local.endpoint import Endpoint
from serve_app.planner.model import runner

_QUESTION = "What is the capital of France?"


def how_to_ask(fleet: Fleet, endpoint: Endpoint) -> str:
    """A curl command and an OpenAI SDK snippet, for the first model of each kind."""
    base = f"{endpoint.url}/v1"
    pools = {
        name: runner.pools(model.model, model.engine, os.environ | environment(model))
        for name, model in fleet.models.items()
    }
    chat = next((name for name, is_pooling in pools.items() if not is_pooling), None)
    embed = next((name for name, is_pooling in pools.items() if is_pooling), None)
    lines = [f"\nThe OpenAI endpoint is {base}\n"]
    if endpoints.goes_through_proxy(endpoint.url):
        lines += [
            "# this shell sends HTTP through a proxy, which does not know this machine:",
            f"export no_proxy={endpoints.without_proxy(endpoint.host)['no_proxy']}\n",
        ]
    has_keys = fleet.gateway is not None and fleet.gateway.keys is not None
    key, header = '"-"', ""
    if has_keys:
        key = f'os.environ["{API_KEY}"]'
        header = f' -H "authorization: Bearer ${API_KEY}"'
        lines += [
            "# with a key of yours; serve-app keys new makes one (docs/gateway.md)",
            f"export {API_KEY}=sk-…\n",
        ]
    if chat:
        body = {
            "model": chat,
            "messages": [{"role": "user", "content": _QUESTION}],
            "temperature": 0,  # with sampling a small model soon generates nonsense, and much of it
        }
        lines += [
            f"curl -gs {base}/chat/completions -H 'content-type: application/json'{header} \\",
            f"  -d '{json.dumps(body)}'\n",
        ]
    lines += ["import os"] if has_keys else []
    lines += ["from openai import OpenAI", f'client = OpenAI(base_url="{base}", api_key={key})']
    if chat:
        lines += [
            "answer = client.chat.completions.create(",
            f'    model="{chat}",',
            f'    messages=[{{"role": "user", "content": "{_QUESTION}"}}],',
            "    temperature=0,",
            ")",
            "print(answer.choices[0].message.content)",
        ]
    if embed:
        lines += [
            f'vector = client.embeddings.create(model="{embed}", input="Paris")',
            "print(len(vector.data[0].embedding))",
        ]
    beside = "Ctrl-C ends it. In another terminal: serve-app status, logs, reload, stop."
    return "\n".join([*lines, f"\n{beside}"])
