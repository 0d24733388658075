"""A trace through a real fleet: the client's span, the gateway's, and vLLM's."""

from __future__ import annotations

from pathlib import Path

import httpx
from harness import servers
from harness.otlp import Receiver, Span
from harness.processes import eventually, free_port
from harness.servers import CHAT, Cluster

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


def ask(cluster: Cluster, traceparent: str) -> None:
    body = {"model": CHAT, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 5}
    url = f"{cluster.base_url}/v1/chat/completions"
    headers = {"traceparent": traceparent}
    httpx.post(url, json=body, headers=headers, timeout=120).raise_for_status()


def test_the_engines_span_is_a_child_of_the_gateways(tmp_path: Path) -> None:
    with Receiver() as receiver:
        chat = servers.chat_application()
        chat["args"]["engine"]["otlp_traces_endpoint"] = f"{receiver.url}/v1/traces"
        chat["args"]["env"]["OTEL_EXPORTER_OTLP_TRACES_PROTOCOL"] = "http/protobuf"
        config = servers.document(free_port(), chat)
        config["applications"][-1]["args"]["otlp_endpoint"] = receiver.url

        def of_the_trace() -> list[Span]:
            return [span for span in receiver.spans if span.trace_id == TRACE]

        with servers.running(config, tmp_path, "python") as cluster:
            ask(cluster, f"00-{'a' * 32}-{PARENT}-00")
            for _ in range(4):  # of two front ends each gets some
                ask(cluster, f"00-{TRACE}-{PARENT}-01")
            assert eventually(lambda: len(of_the_trace()) >= 8, 30), of_the_trace()
        spans = of_the_trace()
        gateways = {span.span_id: span for span in spans if span.parent_id == PARENT}
        engines = [span for span in spans if span.parent_id != PARENT]
        assert len(gateways) == 4
        assert sorted(span.parent_id for span in engines) == sorted(gateways)
        assert len({span.attributes["serve_app.replica"] for span in gateways.values()}) == 2
        for engine in engines:
            gateway = gateways[engine.parent_id]
            assert gateway.start_s <= engine.start_s <= engine.end_s <= gateway.end_s
            assert (
                engine.attributes["gen_ai.usage.prompt_tokens"],
                engine.attributes["gen_ai.usage.completion_tokens"],
            ) == (
                gateway.attributes["gen_ai.usage.input_tokens"],
                gateway.attributes["gen_ai.usage.output_tokens"],
            )
        assert "a" * 32 not in {span.trace_id for span in receiver.spans}
