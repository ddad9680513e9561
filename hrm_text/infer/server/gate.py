"""Before a request is read: who may come in. And the reading itself, within limits of size and time."""

from __future__ import annotations

import asyncio
import ipaddress
import time
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hrm_text.infer.server import errors
from hrm_text.infer.server.errors import GONE, ApiError
from hrm_text.infer.server.service import Limits, Service

ENDPOINTS = ("/", "/health", "/metrics", "/v1/models", "/v1/completions", "/v1/chat/completions", "/openapi.json")
"""As they are counted; all other paths are one, so that nobody can fill the registry with names."""


class Gate:
    """Refuses and counts (an ASGI application around another).

    Without keys, a request's Host must be localhost, an address, or the name the server was told to listen at. A web
    page can make its own name lead to 127.0.0.1 (DNS rebinding) and so would reach, through the browser of somebody
    who looks at it, a server that listens there alone; the browser then still says the page's name in Host.
    """

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = GONE
        began = time.perf_counter()

        async def send_and_see(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message.setdefault("headers", []).append((b"x-content-type-options", b"nosniff"))
            await send(message)

        try:
            self._check(scope)
            await self._app(scope, receive, send_and_see)
        except ApiError as error:  # of the check's alone: the application turns its own into answers
            await error.response()(scope, receive, send_and_see)
        except Exception:  # a bug, which is answered further out
            status = 500
            raise
        finally:
            path = scope["path"]
            if path.startswith("/v1/models/"):
                path = "/v1/models"
            endpoint = path if path in ENDPOINTS else "other"
            self._service.metrics.requests.labels(endpoint, str(status)).inc()
            self._service.metrics.request_seconds.labels(endpoint).observe(time.perf_counter() - began)

    def _check(self, scope: Scope) -> None:
        service, path = self._service, scope["path"]
        headers = Headers(scope=scope)
        if not service.keys and not is_local_name(headers.get("host", ""), service.host):
            raise ApiError(
                403,
                f"Host {headers.get('host', '')[:100]!r} is refused, since a web page could be behind it: this server "
                "has no API key, so call it by localhost or by its address, or start it with --api-key",
                code="host_refused",
            )
        if path == "/metrics" or path.startswith("/v1"):
            if service.keys and not service.keys.opens(headers.get("authorization", "").encode("latin-1")):
                raise ApiError(
                    401,
                    "a key is needed: send the header Authorization: Bearer KEY, with a key that this server knows",
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )
            if service.drain_deadline is not None and path != "/metrics":
                left = service.drain_deadline - time.monotonic()
                raise errors.unavailable("the server is about to end and takes nothing new", "draining", left)


def is_local_name(host: str, own: str) -> bool:
    """Whether a Host header is localhost, an address, or ``own``; its port does not matter."""
    name = host[1:].partition("]")[0] if host.startswith("[") else host.rpartition(":")[0] or host
    if name.lower() in ("localhost", own.lower()):
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


# ----------------------------------------------------------------------------------------------------------------------


async def read_body(request: Request, limits: Limits) -> bytes:
    """The body of a request in JSON; ApiError if it is of another kind, too large, or too slow.

    Another kind is refused since browsers send JSON to another site only after asking it, which this one never allows.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, f"expected the header Content-Type: application/json, found {kind[:60]!r}", code="not_json")
    too_large = ApiError(
        413,
        f"the request is larger than {limits.max_body} bytes, the server's limit (--max-body)",
        code="request_too_large",
    )
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and (len(declared) > 18 or int(declared) > limits.max_body):
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(limits.client_seconds):
            async for piece in request.stream():
                body += piece
                if len(body) > limits.max_body:
                    raise too_large
    except TimeoutError:
        raise ApiError(
            408, f"the request was not complete after {limits.client_seconds:g} s", code="slow_client"
        ) from None
    return bytes(body)


Result = TypeVar("Result")


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of ``work``; if the client leaves before, the work is cancelled, and ClientDisconnect is raised.

    The request's body must have been read.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
