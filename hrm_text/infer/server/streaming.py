"""An answer that is sent while it is made."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from hrm_text.infer.server.answering import Answering
from hrm_text.infer.server.errors import ApiError
from hrm_text.infer.server.gate import unless_gone
from hrm_text.infer.server.worker import Generation


class EventStream(Response):
    """Server-sent events; when the client leaves, what is still being made for it is cancelled."""

    media_type = "text/event-stream"

    def __init__(self, generation: Generation, answering: Answering, include_usage: bool) -> None:
        """The generation is the stream's from now on, to close."""
        self.status_code = 200
        self.background = None
        self.init_headers({"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})  # proxies are not to wait for more
        self._generation = generation
        self._events = events(generation, answering, include_usage)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._generation, contextlib.suppress(ClientDisconnect):
            await unless_gone(receive, self._send_all(send))

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async with contextlib.aclosing(self._events):
            async for event in self._events:
                await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def events(generation: Generation, answering: Answering, include_usage: bool) -> AsyncGenerator[bytes, None]:
    """The answer in server-sent events. An error is an event too, and the last: the status was sent long ago."""
    if include_usage:
        answering.head["usage"] = None  # as OpenAI does it: all chunks have the field, and the last a value
    try:
        for chunk in answering.opening():
            yield _event(chunk.model_dump_json(exclude_unset=True))
        async for number, piece in generation.pieces():
            answering.see(number, piece)
            for chunk in answering.chunks(number, piece):
                yield _event(chunk.model_dump_json(exclude_unset=True))
        if include_usage:
            yield _event(answering.closing(answering.usage()).model_dump_json(exclude_unset=True))
        yield _event("[DONE]")
    except ApiError as error:
        yield _event(error.json())


def _event(data: str) -> bytes:
    return f"data: {data}\n\n".encode()
