"""A receiver of OTLP over HTTP, which keeps the spans. OpenTelemetry's own classes decode them."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)


@dataclass
class Span:
    """A span, as it came."""

    name: str
    trace_id: str
    span_id: str
    parent_id: str
    kind: int
    status: int
    start_s: float
    end_s: float
    trace_state: str
    attributes: dict[str, Any]
    resource: dict[str, Any]


@dataclass
class Receiver:
    """Answers each ``POST /v1/traces`` with ``status``, after ``delay_s``."""

    status: int = 200
    delay_s: float = 0.0
    spans: list[Span] = field(default_factory=list)
    posts: list[tuple[str, dict[str, str], bytes]] = field(default_factory=list)
    """Path, headers and body of each."""

    def __enter__(self) -> Self:
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                receiver.posts.append((self.path, dict(self.headers), body))
                time.sleep(receiver.delay_s)
                if receiver.status == 200:
                    receiver.spans += _decoded(body)
                answer = ExportTraceServiceResponse().SerializeToString()
                self.send_response(receiver.status)
                self.send_header("content-type", "application/x-protobuf")
                self.send_header("content-length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.shutdown()
        self._server.server_close()


def _decoded(body: bytes) -> list[Span]:
    return [
        Span(
            name=it.name,
            trace_id=it.trace_id.hex(),
            span_id=it.span_id.hex(),
            parent_id=it.parent_span_id.hex(),
            kind=it.kind,
            status=it.status.code,
            start_s=it.start_time_unix_nano / 1e9,
            end_s=it.end_time_unix_nano / 1e9,
            trace_state=it.trace_state,
            attributes=_values(it.attributes),
            resource=_values(of.resource.attributes),
        )
        for of in ExportTraceServiceRequest.FromString(body).resource_spans
        for scope in of.scope_spans
        for it in scope.spans
    ]


def _values(attributes: Any) -> dict[str, Any]:
    return {it.key: _value(it.value) for it in attributes}


def _value(value: Any) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_value(it) for it in value.array_value.values]
    return getattr(value, kind)
