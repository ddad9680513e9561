"""One connection: uvicorn's protocol, and limits on how long a client may keep it waiting.

uvicorn limits how long a connection may be idle between requests. A client can hold one in other ways: by sending
half a request, or by not reading the answer. Here each has ``client_seconds``; then the connection is cut, and the
application sees a client that has left.
"""

from __future__ import annotations

import asyncio

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol


class PatientConnection(H11Protocol):
    """HTTP/1.1 with limited patience; ``limited`` makes a class with a number of seconds."""

    client_seconds = 30.0

    _reading: asyncio.TimerHandle | None = None
    """Runs while the client owes the rest of a request."""
    _writing: asyncio.TimerHandle | None = None
    """Runs while the client does not take what it was sent."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch_reading()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch_reading()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch_reading()
        if self.transport.is_closing():
            self._abort_later()

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._abort_later()

    def shutdown(self) -> None:
        super().shutdown()
        if self.transport.is_closing():
            self._abort_later()

    def send_400_response(self, msg: str) -> None:
        super().send_400_response(msg)
        self._abort_later()

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._writing is None:
            self._writing = self._abort_later()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._writing is not None:
            self._writing.cancel()
            self._writing = None

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        for timer in (self._reading, self._writing):
            if timer is not None:
                timer.cancel()

    def _watch_reading(self) -> None:
        """The limit is on the whole request: a byte now and then does not put it off.

        The application limits a body that it reads, and answers (408); this comes a little later, for the head, and
        for what is left of a body that nobody reads.
        """
        owes = self.conn.their_state in (h11.IDLE, h11.SEND_BODY)
        if owes and self._reading is None:
            self._reading = self.loop.call_later(self.client_seconds + 1, self.transport.abort)
        elif not owes and self._reading is not None:
            self._reading.cancel()
            self._reading = None

    def _abort_later(self) -> asyncio.TimerHandle:
        # A transport that is closed sends what it has first: to a client that does not read, for ever.
        return self.loop.call_later(self.client_seconds, self.transport.abort)


def limited(client_seconds: float) -> type[PatientConnection]:
    """The protocol with its limit; uvicorn makes one for each connection, and knows no such argument."""
    return type("PatientConnection", (PatientConnection,), {"client_seconds": client_seconds})
