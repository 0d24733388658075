"""Traces: a span of OpenTelemetry for each request to a model that its caller may use.

It continues the client's trace (W3C's ``traceparent``), and the model's server continues it: vLLM's
span is a child of this one. The span ends when the request's entry is in the ledger, with the
tokens. Threads of OpenTelemetry's send it; a receiver that is slow or away costs spans, not
requests.

Names of attributes: OpenTelemetry's semantic conventions for generative AI and for HTTP servers,
and ``serve_app.*`` for what these do not have.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import threading
import time
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.sdk.trace.sampling import Decision, ParentBased, TraceIdRatioBased
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import (
    NonRecordingSpan,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    TraceFlags,
    get_current_span,
    set_span_in_context,
)
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from serve_app import __version__
from serve_app.gateway import routes
from serve_app.gateway.ledger import Entry
from serve_app.gateway.relay import Request
from serve_app.gateway.stages import Call, Outcome

logger = logging.getLogger("ray.serve")

SESSION_HEADER = b"x-session-id"
_MAX_SESSION = 200
"""Characters; Langfuse drops a longer one."""

_MAX_TEXT = 16_384
"""Characters of a prompt that a span has at most: its latest ones. A queue of 2,048 spans, the
library's default, is then tens of MB."""

_MAX_READ = 2**20
"""Bytes up to which a body is read for its prompt."""

_CLOSE_S = 5.0
_REMIND_S = 60.0

_UNSET = Status()
_W3C = TraceContextTextMapPropagator()
_HEADERS = {b"traceparent": "traceparent", b"tracestate": "tracestate"}

_OPERATIONS = {
    "/v1/chat/completions": "chat",
    "/v1/chat/completions/batch": "chat",
    "/v1/completions": "text_completion",
    "/v1/responses": "chat",
    "/v1/messages": "chat",
    "/v1/embeddings": "embeddings",
    "/v2/embed": "embeddings",
}
"""``gen_ai.operation.name`` where the conventions have one; else the path's end (``rerank``)."""


@dataclass
class _Begun:
    """What is known of a span. Times are nanoseconds since the epoch."""

    context: SpanContext
    parent: SpanContext | None
    start_ns: int
    end_ns: int = 0
    """When the answer ended; the tokens are told a moment later."""

    name: str = ""
    status: Status = _UNSET
    attributes: dict[str, Any] = field(default_factory=dict)


class Traces:
    """The stage that begins each span, and the ledger's listener that ends it."""

    def __init__(self, endpoint: str, sample_ratio: float, content: bool) -> None:
        """``endpoint`` as in :class:`serve_app.config.settings.GatewayConfig`, like the others."""
        _speak_as_serve()
        self._content = content
        self._sampler = ParentBased(TraceIdRatioBased(sample_ratio))
        self._ids = RandomIdGenerator()
        name = os.environ.get("OTEL_SERVICE_NAME", "serve_app")
        self._of: dict[str, Any] = {
            "resource": Resource.create({"service.name": name, "service.version": __version__}),
            "instrumentation_scope": InstrumentationScope("serve_app.gateway", __version__),
            "kind": SpanKind.SERVER,
        }
        self._exporter = OTLPSpanExporter(endpoint=_url(endpoint))
        self._processor = BatchSpanProcessor(self._exporter)
        self._begun: dict[str, _Begun] = {}

    async def admit(self, call: Call) -> Call:
        carrier: dict[str, Any] = {}
        headers = []
        for name, value in call.request.headers:
            if known := _HEADERS.get(name):
                carrier.setdefault(known, []).append(value.decode("latin-1"))
            else:
                headers.append((name, value))
        if len(carrier.get("traceparent", ())) > 1:
            carrier = {}  # W3C: then there is none
        came = _W3C.extract(carrier)
        parent = get_current_span(came).get_span_context()
        trace_id = parent.trace_id if parent.is_valid else self._ids.generate_trace_id()
        sampled = self._sampler.should_sample(came, trace_id, "")
        context = SpanContext(
            trace_id,
            self._ids.generate_span_id(),
            is_remote=False,
            trace_flags=TraceFlags(sampled.decision is Decision.RECORD_AND_SAMPLE),
            trace_state=sampled.trace_state,
        )
        if context.trace_flags.sampled:
            start_ns = time.time_ns() - _ns(time.perf_counter() - call.arrived)
            self._begun[call.id] = _Begun(context, parent if parent.is_valid else None, start_ns)
        onward: dict[str, str] = {}
        _W3C.inject(onward, set_span_in_context(NonRecordingSpan(context)))
        ours = [(name.encode(), value.encode()) for name, value in onward.items()]
        request = replace(call.request, headers=headers, ours=[*call.request.ours, *ours])
        return replace(call, request=request)

    def ended(self, call: Call, outcome: Outcome) -> None:
        begun = self._begun.get(call.id)
        if begun is None:
            return
        request = call.request
        begun.end_ns = begun.start_ns + _ns(outcome.ended - call.arrived)
        path = request.path
        route = routes.told(path)
        operation = _operation(path) if route == path else "stored_response"
        begun.name = f"{operation} {call.named}"
        found = begun.attributes
        found |= {
            "gen_ai.operation.name": operation,
            "gen_ai.provider.name": "vllm",
            "gen_ai.request.model": call.named,
            "http.route": route,
            "http.response.status_code": outcome.status,
            "serve_app.request_id": request.id,
            "serve_app.end": outcome.end,
            "serve_app.queued_s": outcome.queued_s,
        }
        if call.caller:
            found["user.id"] = call.caller.name
        if session := dict(request.headers).get(SESSION_HEADER):
            found["session.id"] = session.decode("utf-8", "replace")[:_MAX_SESSION]
        if outcome.front_end:
            found["gen_ai.response.model"] = call.model.name
            found["serve_app.replica"] = outcome.front_end
        if outcome.retries:
            found["serve_app.retries"] = outcome.retries
        if outcome.streamed and outcome.first_byte is not None:
            waited = outcome.first_byte - call.arrived
            found["gen_ai.request.stream"] = True
            found["gen_ai.response.time_to_first_chunk"] = waited
            # Langfuse takes it from here alone.
            first = datetime.fromtimestamp(begun.start_ns / 1e9 + waited, UTC)
            found["langfuse.observation.completion_start_time"] = first.isoformat()
        if self._content and (prompt := _prompt(request)):
            found["gen_ai.input.messages"] = prompt
        if outcome.status >= 400:
            found["error.type"] = str(outcome.status)
        if outcome.status >= 500:
            begun.status = Status(StatusCode.ERROR, outcome.end)

    def entered(self, entry: Entry) -> None:
        begun = self._begun.pop(entry.id, None)
        if begun is None:
            return
        if usage := entry.usage:
            begun.attributes |= {
                "gen_ai.usage.input_tokens": usage.prompt_tokens,
                "gen_ai.usage.cache_read.input_tokens": usage.cached_tokens,
                "gen_ai.usage.output_tokens": usage.completion_tokens,
            }
        self._send(begun)

    def _send(self, begun: _Begun) -> None:
        # Not by the SDK's Tracer: its span guards each attribute with a lock, for 20 µs of a CPU.
        span = ReadableSpan(
            begun.name,
            begun.context,
            begun.parent,
            attributes=begun.attributes,
            status=begun.status,
            start_time=begun.start_ns,
            end_time=begun.end_ns,
            **self._of,
        )
        self._processor.on_end(span)

    def close(self) -> None:
        """Send what there is, within a few seconds. Not for the event loop."""
        for begun in self._begun.values():
            if begun.end_ns:  # answered, and still made in the background
                self._send(begun)
        # By itself the library takes half a minute where the receiver is away.
        sending = threading.Thread(target=self._processor.shutdown, daemon=True)
        sending.start()
        sending.join(_CLOSE_S)
        if sending.is_alive():
            self._exporter.shutdown()  # type: ignore[no-untyped-call]


def _url(endpoint: str) -> str:
    """Where spans are posted, by the rule for OTEL_EXPORTER_OTLP_ENDPOINT; a whole URL stays."""
    base = endpoint.rstrip("/")
    return base if base.endswith("/v1/traces") else f"{base}/v1/traces"


def _ns(seconds: float) -> int:
    return int(seconds * 1e9)


def _operation(path: str) -> str:
    return _OPERATIONS.get(path) or path.rpartition("/")[2]


def _prompt(request: Request) -> str:
    """The prompt as ``gen_ai.input.messages`` has it: JSON of messages with parts of text.

    Images and sounds are left out. Empty where there is no text, or too much around it.
    """
    if len(request.body) > _MAX_READ:
        return ""
    found: Any = None
    with contextlib.suppress(ValueError, RecursionError):
        found = json.loads(request.body)
    if not isinstance(found, dict):
        return ""
    asked = next((found[it] for it in ("messages", "input", "prompt") if found.get(it)), None)
    if isinstance(asked, list) and asked and not isinstance(asked[0], dict | str):
        return ""  # tokens, of which there can be a million
    room, kept = _MAX_TEXT, []
    for message in reversed(asked if isinstance(asked, list) else [asked]):
        role, content = "user", message
        if isinstance(message, dict):
            role, content = str(message.get("role", role))[:100], message.get("content")
        text = _text(content)[-room:]
        if text:
            kept.append({"role": role, "parts": [{"type": "text", "content": text}]})
        room -= len(text)
        if not room:
            break
    # Only ASCII: half a surrogate pair could not be sent.
    return json.dumps(kept[::-1]) if kept else ""


def _text(content: Any) -> str:
    if isinstance(content, list):
        parts = [it.get("text") if isinstance(it, dict) else it for it in content]
        return "\n".join(it for it in parts if isinstance(it, str))
    return content if isinstance(content, str) else ""


class _Once(logging.Handler):
    """What the library logs, in Serve's log; of each of its modules once a minute."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._said: dict[str, float] = {}

    def emit(self, record: logging.LogRecord) -> None:
        now = time.monotonic()
        if now - self._said.get(record.name, float("-inf")) >= _REMIND_S:
            self._said[record.name] = now
            logger.warning(f"otlp_endpoint: {record.getMessage()}")


def _speak_as_serve() -> None:
    library = logging.getLogger("opentelemetry")
    if not any(isinstance(it, _Once) for it in library.handlers):
        library.addHandler(_Once())
        library.propagate = False
