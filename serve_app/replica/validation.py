"""The 400 of a model server for a body of the wrong shape, in a few sentences.

vLLM's own answer holds every error as a Python repr with the whole input in it: a body of 60 KB got
one of 22 MB.
"""

from __future__ import annotations

from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from starlette.responses import JSONResponse

from serve_app.errors import envelope

_SHOWN = 3
"""Errors that are said. A field that may be of several types has one for each."""


async def refuse(request: Request, error: Exception) -> JSONResponse:
    """A handler of FastAPI's for ``RequestValidationError``."""
    from vllm.entrypoints.serve.exception_handling.handlers.validation import clean_loc_for_param

    assert isinstance(error, RequestValidationError)
    said: dict[str, str] = {}
    for found in error.errors():
        # Classes among the parts are those of a union that the value might have been.
        at = tuple(p for p in found["loc"] if p != "body" and not str(p)[:1].isupper())
        where = clean_loc_for_param(at) if at else "the body"
        said.setdefault(f"{where}: {found['msg'][:300]}", _parameter(found) or where)
        if len(said) == _SHOWN:
            break
    message, param = "; ".join(said), next(iter(said.values()), None)
    return JSONResponse(envelope(message, "invalid_request_error", param=param), 400)


def _parameter(found: dict[str, Any]) -> str | None:
    """The parameter that a check of vLLM's own names."""
    return getattr((found.get("ctx") or {}).get("error"), "parameter", None)
