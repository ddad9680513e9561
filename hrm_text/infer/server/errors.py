"""What goes wrong, in the form in which OpenAI's clients read it."""

from __future__ import annotations

import math
from collections.abc import Mapping

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from hrm_text.contracts import UserError
from hrm_text.infer.server.responses import ErrorBody, ErrorDetail

NO_RETRY = {"x-should-retry": "false"}
"""OpenAI's clients repeat a request after 408, 409, 429 and all from 500 on, unless this header says not to."""

GONE = 499
"""How an answer is counted whose client did not wait for it."""


class ApiError(Exception):
    """An answer that is an error: what the client is told."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.body = ErrorBody(error=ErrorDetail(message=message, type=type, param=param, code=code))
        self.headers = dict(headers or {})

    def response(self) -> Response:
        """The error as an answer of its own."""
        return Response(self.body.model_dump_json(), self.status, self.headers, media_type="application/json")

    def json(self) -> str:
        """The error as an event within a stream, whose status has long been sent."""
        return self.body.model_dump_json()


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """400: something in the request that the client can mend."""
    return ApiError(400, message, param=param, code=code)


def overloaded(open_requests: int, most: int, retry_seconds: int) -> ApiError:
    """429: the queue is full."""
    return ApiError(
        429,
        f"the server is busy: {open_requests} of at most {most} texts are waiting or being made; "
        f"try again in {retry_seconds} s",
        type="rate_limit_error",
        code="queue_full",
        headers={"Retry-After": str(retry_seconds)},
    )


def unavailable(message: str, code: str, retry_seconds: float | None = None) -> ApiError:
    """503: the server is on its way out, or its engine has failed; without a number of seconds, for good."""
    headers = NO_RETRY if retry_seconds is None else {"Retry-After": str(max(1, math.ceil(retry_seconds)))}
    return ApiError(503, message, type="server_error", code=code, headers=headers)


def engine_failed(fault: BaseException) -> ApiError:
    """500: a request was running when the engine failed."""
    return ApiError(
        500,
        f"the engine failed while it made this text ({type(fault).__name__}); the server's log says more. "
        "It answers nothing further until it is started again",
        type="server_error",
        code="engine_failed",
        headers=NO_RETRY,
    )


def took_too_long(seconds: float) -> ApiError:
    """504: the request's time is over."""
    return ApiError(
        504,
        f"the text was not finished after {seconds:g} s, the server's limit for a request; ask for fewer tokens, "
        "or have the server started with a larger --request-seconds",
        type="timeout_error",
        code="request_timeout",
        headers=NO_RETRY,
    )


def no_such_model(found: str, served: str) -> ApiError:
    """404: another model is asked for than the one there is."""
    return ApiError(
        404, f"model {found[:100]!r} is not served here; {served!r} is", param="model", code="model_not_found"
    )


def handle_errors(app: FastAPI) -> None:
    """Every error of every route in the one form."""

    async def api(_: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        return error.response()

    async def users(_: Request, error: Exception) -> Response:
        return bad_request(str(error)).response()

    async def http(_: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        code = {404: "unknown_url", 405: "method_not_allowed"}.get(error.status_code)
        return ApiError(error.status_code, error.detail, code=code, headers=error.headers).response()

    async def gone(_: Request, error: Exception) -> Response:
        return Response(status_code=GONE)  # nobody is there to read it

    async def bug(_: Request, error: Exception) -> Response:
        message = f"a fault of the server's ({type(error).__name__}); its log says more"
        return ApiError(500, message, type="server_error", headers=NO_RETRY).response()

    app.add_exception_handler(ApiError, api)
    app.add_exception_handler(UserError, users)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(ClientDisconnect, gone)
    app.add_exception_handler(Exception, bug)
