"""The routes that the gateway answers by itself, and the OpenAPI document of all routes.

They are a FastAPI app. Requests that are relayed to a model never pass through it.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Coroutine
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Query, Request, Response
from fastapi.openapi.utils import get_openapi
from fastapi.responses import PlainTextResponse
from pydantic import BaseModel, Field

from serve_app import __version__
from serve_app.config.document import RUN_ID
from serve_app.gateway import models, pace, static
from serve_app.gateway.callers import NOBODY, Caller
from serve_app.gateway.directory import Directory
from serve_app.gateway.errors import GatewayError
from serve_app.gateway.exposition import CONTENT_TYPE, Exposition
from serve_app.gateway.fleet import Fleet, Fleets, Starting, Versions, asleep, over_plan
from serve_app.gateway.keyring import Keyring
from serve_app.gateway.replicas import Board, Waiting
from serve_app.gateway.routes import RELAYED, Route
from serve_app.gateway.usage.record import Record
from serve_app.gateway.usage.report import PARAMETERS, UsageReport, report
from serve_app.gateway.versions import versions


class Error(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | int | None = Field(
        description="Of an error of the gateway: OpenAI's string code, such as `model_not_found`; "
        "branch on it. In an error of the model's server, which is relayed as it is, vLLM has an "
        "integer here: the HTTP status."
    )


class ErrorEnvelope(BaseModel):
    """The body of every error, as OpenAI has it; `/v1/messages` adds Anthropic's `type: error`."""

    error: Error


class Service(BaseModel):
    """What this is, for those who ask at ``/`` and are no browser."""

    service: Literal["serve_app"]
    version: str | None = None
    """serve_app's; for nobody without a key, where there are keys."""

    links: dict[str, str]


class Health(BaseModel):
    """The gateway process is up."""

    status: Literal["ok"]


class ModelStatus(BaseModel):
    """A deployed model, as Serve reports it."""

    status: str
    replicas: int
    """Replicas that run."""

    message: str
    """Why it is not running, or not as it was deployed, or that it holds more of its GPU than its
    part; empty while all is well."""

    starting: list[Starting]
    queued: int
    """Requests that wait in this gateway for a replica of it."""

    longest_wait_s: float
    """For how long the first of them has waited."""

    asleep: bool
    """Whether all its engines sleep."""


class Readiness(BaseModel):
    """Whether every model that shall be up is up."""

    run: str | None = None
    """Which run of ``serve-app run`` this is; absent elsewhere."""

    keys: str | None = None
    """Why the API keys in force are not those of their file; for an admin's key."""

    usage: str | None = None
    """Why ``usage_db`` lacks requests; for an admin's key, and where there are no keys."""

    status: Literal["ready", "not ready"]
    waiting_for: list[str]
    models: dict[str, ModelStatus]


class ModelCard(BaseModel):
    """One id that a request can name, as OpenAI and vLLM describe it."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["serve_app"] = "serve_app"
    root: str
    parent: str | None
    max_model_len: int | None
    permission: list[Any] = []


class ModelList(BaseModel):
    """All ids, also those of models that are scaled to zero."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


CALLER = "serve_app.caller"
"""Where an ASGI scope has the :class:`Caller`, or None where the gateway has no keys."""

_OPEN = ("/", "/health", "/ready")
_LINKS = {
    "models": "/v1/models",
    "ready": "/ready",
    "fleet": "/fleet",
    "usage": "/v1/usage",
    "metrics": "/metrics",
    "openapi": "/openapi.json",
}


_LOOK_S, _SCRAPE_S = 2.0, 5.0
"""Seconds between two looks of one page at the fleet, and at the metrics, while there are few."""

_AGE = "x-age-s"
"""Header of a shared page: seconds since it was made, with decimals, which Age cannot have."""

_MAX_AGE = re.compile(r"max-age=(\d{1,4})(?!\d)")


def is_open(path: str) -> bool:
    """Whether a route answers without a key, and then tells nothing of the models: probes have
    none, nor has a browser that opens the page."""
    return path in _OPEN or path.startswith(static.UNDER)


def build(
    directory: Directory,
    board: Board,
    keyring: Keyring | None,
    record: Record | None,
    waiting: Callable[[str], Waiting],
    exposition: Exposition,
    answer_error: Callable[[Request, Exception], Coroutine[Any, Any, Response]],
    *,
    page: bool,
) -> FastAPI:
    """The app.

    Args:
        waiting: tells what waits for a model, by its name.
        answer_error: makes an error's answer, as it is elsewhere in the gateway.
        page: whether browsers get the page.
    """
    app = FastAPI(
        title="serve_app",
        version=__version__,
        docs_url=None,  # its pages load scripts from a CDN
        redoc_url=None,
        redirect_slashes=False,
        exception_handlers={GatewayError: answer_error, Exception: answer_error},
    )
    absent: dict[int | str, dict[str, Any]] = {404: {"model": ErrorEnvelope}}
    not_ready: dict[int | str, dict[str, Any]] = {503: {"model": Readiness}}

    files = static.read() if page else {}

    @app.get(
        "/",
        summary="Show the page to a browser, and links to others",
        tags=_OWN,
        response_model=Service,
        response_model_exclude_unset=True,
        responses={200: {"content": {"text/html": {}}}, 304: _UNCHANGED},
    )
    async def root(request: Request, response: Response) -> Any:
        if page and "text/html" in request.headers.get("accept", ""):
            prefix = request.headers.get("x-forwarded-prefix", "")
            shown = static.below(files[static.INDEX], prefix)
            return shown.answer(request, vary=["accept", "x-forwarded-prefix"])
        response.headers["vary"] = "accept"
        known = request.scope[CALLER] is not NOBODY
        below = request.scope.get("root_path", "")
        return Service(
            service="serve_app",
            **({"version": __version__} if known else {}),
            links={name: below + path for name, path in _LINKS.items()},
        )

    @app.get(static.UNDER + "{name:path}", include_in_schema=False)
    async def file(name: str, request: Request) -> Response:
        if name not in files or name == static.INDEX:
            said = f"The page has no file {name[:200]}; GET / shows the page."
            raise GatewayError(404, said, "invalid_request_error", code="not_found")
        return files[name].answer(request)

    @app.get("/health", summary="Tell that the gateway is up", tags=_OWN)
    async def health() -> Health:
        return Health(status="ok")

    @app.get("/version", summary="Tell the gateway's versions, or a model's", tags=_OWN)
    async def version(
        model: Annotated[str | None, Query(description=_MODEL["description"])] = None,
    ) -> Versions:
        # A request that names a model is relayed and does not come here.
        return Versions(**versions())

    @app.get(
        "/ready",
        summary="Tell whether every model is up",
        tags=_OWN,
        response_model_exclude_unset=True,
        responses=not_ready,
    )
    async def ready(request: Request, response: Response) -> Readiness:
        readiness = _readiness(directory, board, keyring, record, waiting, request.scope[CALLER])
        response.status_code = 200 if readiness.status == "ready" else 503
        return readiness

    fleets = Fleets(directory, board, keyring, record, waiting)
    turns = pace.Pace(pace.affordable_per_s())

    @app.get(
        "/fleet",
        summary="Tell how each model is",
        tags=_OWN,
        response_model=Fleet,
        responses={304: _UNCHANGED},
    )
    async def fleet(request: Request) -> Response:
        seen = fleets.seen_by(request.scope[CALLER])
        headers = {
            "etag": seen.etag,
            "cache-control": "private, no-cache",
            pace.HEADER: f"{turns.next_s(_LOOK_S):.2f}",
        }
        if static.has(request, seen.etag):
            return Response(status_code=304, headers=headers)
        return Response(seen.body, headers=headers, media_type="application/json")

    @app.get("/v1/models/", include_in_schema=False)
    @app.get("/v1/models", summary="List the models", tags=_OWN)
    async def list_models(request: Request) -> ModelList:
        caller = request.scope[CALLER]
        listed = models.ids(directory, caller)
        return ModelList(data=[_card(directory, board, id, caller) for id in listed])

    @app.get("/v1/models/{id:path}", summary="Describe a model", tags=_OWN, responses=absent)
    async def retrieve_model(id: str, request: Request) -> ModelCard:
        return _card(directory, board, id, request.scope[CALLER])

    @app.get(
        "/v1/usage",
        summary="Sum up what was used",
        tags=_OWN,
        response_model_exclude_unset=True,
        responses=absent,
        openapi_extra={"parameters": PARAMETERS},
    )
    async def usage(request: Request) -> UsageReport:
        return await report(record, request.scope[CALLER], request.query_params)

    @app.get(
        "/metrics",
        summary="Tell Prometheus of the gateways, and of every replica's vLLM",
        tags=_OWN,
        response_class=PlainTextResponse,
    )
    async def metrics(request: Request) -> Response:
        # Prometheus asks for what is now; a page with charts says how old it may be.
        asked = _MAX_AGE.search(request.headers.get("cache-control", ""))
        if not asked:
            made = await exposition.page(request.scope[CALLER])
            return Response(made.plain, media_type=CONTENT_TYPE)
        made = await exposition.page(request.scope[CALLER], float(asked[1]))
        headers = {
            "vary": "accept-encoding",
            _AGE: f"{time.monotonic() - made.made:.2f}",
            pace.HEADER: f"{turns.next_s(_SCRAPE_S):.2f}",
        }
        if not static.takes_gzip(request):
            return Response(made.plain, headers=headers, media_type=CONTENT_TYPE)
        headers["content-encoding"] = "gzip"
        return Response(await made.packed(), headers=headers, media_type=CONTENT_TYPE)

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _document(app)
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
    return app


def _readiness(
    directory: Directory,
    board: Board,
    keyring: Keyring | None,
    record: Record | None,
    waiting: Callable[[str], Waiting],
    caller: Caller | None,
) -> Readiness:
    """The status is that of the whole fleet; the rest is what this caller may know of it."""
    found = directory.models()
    waiting_for = [m.name for m in found if m.must_be_up and not m.up]
    ready = bool(found) and not waiting_for
    if caller is not None:
        found = [m for m in found if caller.may_use(m.name, m)]
    known = {m.name for m in found}
    sees_all = caller is None or caller.admin
    problem = keyring.problem if keyring and sees_all else ""
    unrecorded = record.problem if record and sees_all else ""
    run = os.environ.get(RUN_ID)
    return Readiness(
        **({"run": run} if run else {}),
        **({"keys": problem} if problem else {}),
        **({"usage": unrecorded} if unrecorded else {}),
        status="ready" if ready else "not ready",
        waiting_for=[name for name in waiting_for if name in known],
        models={
            m.name: ModelStatus(
                status=m.status,
                replicas=m.replicas,
                message=m.message or over_plan(m.name, board),
                starting=[Starting(**start) for start in directory.starting(m)],
                queued=(waits := waiting(m.name)).requests,
                longest_wait_s=round(waits.longest_s, 1),
                asleep=asleep(board.replicas_of(m.name)),
            )
            for m in found
        },
    )


def _card(directory: Directory, board: Board, id: str, caller: Caller | None) -> ModelCard:
    model = models.find(directory, id, caller)
    return ModelCard(
        id=id,
        created=model.created,
        root=model.root,
        parent=model.name if id in model.adapters else None,
        max_model_len=model.max_model_len or board.max_model_len.get(model.name),
    )


# --- the document ------------------------------------------------------------------------------

_OWN: list[Any] = ["gateway"]
_UNCHANGED = {"description": "What If-None-Match names is still so."}
_ENVELOPE = {"$ref": "#/components/schemas/ErrorEnvelope"}
_ERROR = {
    "description": "An error of the gateway or of the model.",
    "content": {"application/json": {"schema": _ENVELOPE}},
}
_MODEL = {"type": "string", "description": "One of the ids that GET /v1/models lists."}
_NAMES_A_MODEL = {
    "type": "object",
    "required": ["model"],
    "properties": {"model": _MODEL},
    "additionalProperties": True,
}


def _document(app: FastAPI) -> dict[str, Any]:
    document = get_openapi(
        title=app.title,
        version=app.version,
        routes=app.routes,
        description="Every model of the cluster behind one endpoint. A request names its model; "
        "the bodies of requests and answers are those of the model's vLLM.",
    )
    for own in document["paths"].values():
        for operation in own.values():
            operation["responses"].pop("422", None)  # FastAPI's; no parameter is checked by it
            operation["responses"].setdefault("default", _ERROR)
    for route in RELAYED:
        path = document["paths"].setdefault(route.path, {})
        path.setdefault(route.method.lower(), _operation(route))
    return document


def _operation(route: Route) -> dict[str, Any]:
    parameters = re.findall(r"\{(\w+)\}", route.path)
    operation: dict[str, Any] = {
        "tags": ["models"],
        "summary": route.summary,
        "operationId": f"{route.method.lower()}{re.sub(r'[^a-z0-9]+', '_', route.path)}",
        "parameters": [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
            for name in parameters
        ],
        "responses": {
            "200": {"description": "The model's answer, or a stream of its events."},
            "default": _ERROR,
        },
    }
    if route.method == "GET" or parameters:
        operation["parameters"].append(
            # The id of a stored response tells which replica keeps it.
            {"name": "model", "in": "query", "required": not parameters, "schema": _MODEL}
        )
    else:
        kind = "multipart/form-data" if route.form else "application/json"
        operation["requestBody"] = {
            "required": True,
            "content": {kind: {"schema": _NAMES_A_MODEL}},
        }
    return operation
