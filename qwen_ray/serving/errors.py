"""The one place where errors become HTTP: OpenAI's error body, a status, and Retry-After where coming back helps.

{"error": {"message": ..., "type": ..., "param": the field at fault or null, "code": ...}}
"""

from __future__ import annotations

import logging
import math
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from qwen_ray.core.errors import (
    InvalidRequest,
    NotReady,
    Overloaded,
    RequestError,
    RequestFailed,
    RequestTooLarge,
    Unauthorized,
)
from qwen_ray.serving.call import Call
from qwen_ray.serving.schema import NotBuilt
from qwen_ray.serving.sse import ClientGone

logger = logging.getLogger(__name__)

RETRY_SECONDS = 5.0  # of an error that does not know better


class Refused(HTTPException):
    """A request error while the body is read, in the one kind that FastAPI lets through there."""

    def __init__(self, error: RequestError, *, status: int | None = None) -> None:
        super().__init__(status or error.status, error.message, headers={"Connection": "close"})
        self.error = error


def error_body(error: RequestError) -> dict[str, Any]:
    param = None if error.param is None else _speakable(error.param)
    return {"error": {"message": _speakable(error.message), "type": error.kind, "param": param, "code": error.code}}


def _speakable(text: str) -> str:
    """What a client wrote may hold lone surrogates, which JSON can spell and UTF-8 cannot."""
    return text.encode("utf-8", "replace").decode()


def error_response(error: RequestError) -> JSONResponse:
    headers: dict[str, str] = {}
    if isinstance(error, Overloaded | NotReady):
        seconds = error.retry_after if isinstance(error, Overloaded) else RETRY_SECONDS
        headers["Retry-After"] = str(max(1, math.ceil(seconds)))
    if isinstance(error, Unauthorized):
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error_body(error), status_code=error.status, headers=headers)


def from_validation(error: RequestValidationError) -> RequestError:
    """The first thing that pydantic found, with the field's path as the client wrote it."""
    found = error.errors()
    # What a union's other members say of a list that is too long would mislead.
    first = next((one for one in found if one["type"] == "too_long"), found[0])
    if first["type"] == "json_invalid":
        reason = first.get("ctx", {}).get("error", first["msg"])
        return InvalidRequest(f"The body is not valid JSON: {reason}.", code="invalid_json")
    loc = [part for part in first["loc"] if part != "body"]
    # Members of a union stand in the path as type names; the field is what comes before them.
    path = loc[:1] if first["type"] in ("missing", "extra_forbidden") and len(loc) == 1 else _client_path(loc)
    param = ".".join(str(part) for part in path) or None
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, NotBuilt):
        return InvalidRequest(f"{cause}.", param=cause.param, code="unsupported_parameter")
    if first["type"] == "extra_forbidden":
        return InvalidRequest(f"Unknown field: {param}.", param=param, code="unknown_parameter")
    if first["type"] == "missing":
        return InvalidRequest(f"Missing required field: {param}.", param=param, code="missing_required_parameter")
    if not loc and first["type"] in ("model_attributes_type", "dict_type"):
        return InvalidRequest(
            "The body must be a JSON object, sent with the header Content-Type: application/json.", code="invalid_body"
        )
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "too_long":
        return RequestTooLarge(f"{param}: {message}.", param=param, code="too_long")
    return InvalidRequest(f"{param or 'The request'}: {message}.", param=param, code="invalid_value")


def _client_path(loc: list[Any]) -> list[Any]:
    """Without the parts that name a union's member: `prompt.list[str].0` is `prompt`."""
    path: list[Any] = []
    for part in loc:
        if (isinstance(part, str) and part in ("str", "int")) or "[" in str(part) or "TextPart" in str(part):
            break
        path.append(part)
    return path


def install(app: FastAPI) -> None:
    """Every error that leaves `app` has OpenAI's body."""

    async def on_request_error(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestError)
        Call.of(request.scope).outcome = error.code or error.kind
        return error_response(error)

    async def on_validation_error(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return await on_request_error(request, from_validation(error))

    async def on_http_exception(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        if isinstance(error, Refused):
            Call.of(request.scope).outcome = error.error.code or error.error.kind
            response = error_response(error.error)
            response.status_code = error.status_code
            response.headers.update(error.headers or {})
            return response
        phrase = HTTPStatus(error.status_code).phrase
        body = {
            "message": f"{phrase}: {request.method} {request.url.path}",
            "type": "invalid_request_error",
            "param": None,
            "code": phrase.lower().replace(" ", "_"),
        }
        Call.of(request.scope).outcome = body["code"]
        return JSONResponse({"error": body}, status_code=error.status_code, headers=error.headers)

    async def on_client_gone(_request: Request, _error: Exception) -> Response:
        return Response(status_code=499)  # as nginx calls it; only logs and metrics see it

    async def on_anything_else(_: Request, error: Exception) -> JSONResponse:
        logger.error("unexpected error", exc_info=error)
        return error_response(RequestFailed("Something went wrong here; the server's log has the details."))

    app.add_exception_handler(RequestError, on_request_error)
    app.add_exception_handler(RequestValidationError, on_validation_error)
    app.add_exception_handler(HTTPException, on_http_exception)
    app.add_exception_handler(ClientGone, on_client_gone)
    app.add_exception_handler(Exception, on_anything_else)
