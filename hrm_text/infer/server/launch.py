"""Listening, and ending: uvicorn with our connections, and signals that let running requests finish."""

from __future__ import annotations

import contextlib
import ipaddress
import json
import socket
import time
from collections.abc import Callable
from types import FrameType

import uvicorn

from hrm_text.contracts import UserError
from hrm_text.infer.server import errors
from hrm_text.infer.server.app import create_app
from hrm_text.infer.server.connection import limited
from hrm_text.infer.server.service import Service

LAST_WORDS_SECONDS = 3
"""For answers that are all made, but not all sent, when the server ends."""


def listen(host: str, port: int) -> socket.socket:
    """A socket at an address, before anything slow is done; UserError if that cannot be had. Port 0: any free one."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (OSError, OverflowError) as error:
        raise UserError(f"--host {host} --port {port}: no such address ({error})") from None
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        # Two sockets may be bound to one port, as long as neither listens.
        sock.listen(2048)
    except (OSError, OverflowError) as error:
        sock.close()
        raise UserError(f"cannot listen at {host} port {port}: {error}. Choose another --port, or 0 for any") from None
    return sock


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server that listens there."""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


class Server(uvicorn.Server):
    """The first signal: nothing new is taken, and what runs may finish. The second: the end."""

    def __init__(self, service: Service, tell: Callable[[str], None]) -> None:
        config = uvicorn.Config(
            create_app(service),
            http=limited(service.limits.client_seconds),
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="error",  # what clients send is not worth a line each
            access_log=False,
            proxy_headers=False,
            server_header=False,
            # Clients that keep connections and ask nothing must not use up all files: uvicorn answers 503 beyond this.
            limit_concurrency=4 * service.limits.max_queue + 64,
            timeout_graceful_shutdown=LAST_WORDS_SECONDS,
        )
        super().__init__(config)
        self._service = service
        self._tell = tell

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal. What it means is done in ``on_tick``, for a signal comes at any moment."""
        if self._service.drain_deadline is None:
            self._service.drain_deadline = time.monotonic() + self._service.limits.drain_seconds
        else:
            self.force_exit = True

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: whether it is time to end."""
        deadline, worker = self._service.drain_deadline, self._service.worker
        if deadline is None:
            return await super().on_tick(counter)
        if not self._draining:
            self._draining = True
            self._tell(
                f"ending; running texts may finish within {deadline - time.monotonic():.0f} s: {worker.num_open}"
            )
        if worker.num_open and (self.force_exit or time.monotonic() > deadline):
            self._tell(f"texts cut off: {worker.num_open}")
            worker.fail_all(errors.unavailable("the server ended before the text did", "draining", 1))
            self.should_exit = True
        if not worker.num_open:
            self.should_exit = True
        return await super().on_tick(counter)

    _draining = False


def serve(service: Service, sock: socket.socket, tell: Callable[[str], None]) -> None:
    """Serve at a socket until SIGTERM or Ctrl-C, and what was running then has ended."""
    try:
        Server(service, tell).run([sock])
    finally:
        service.worker.stop()


def introduce(service: Service, sock: socket.socket, tell: Callable[[str], None], warn: Callable[[str], None]) -> None:
    """What is served, where, and how to ask."""
    name, port = service.host, sock.getsockname()[1]
    if not is_loopback(name) and not service.keys:
        warn(f"everyone who reaches {name} port {port} can use this server: give it an --api-key, or --host 127.0.0.1")
    address = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(name, f"[{name}]" if ":" in name else name)
    url = f"http://{address}:{port}"
    config = service.model.config
    key = " -H 'Authorization: Bearer KEY'" if service.keys else ""
    body = json.dumps({"prompt": "What is 12 + 7?", "max_tokens": 64})
    tell(
        f"serving {service.name}: {config.num_parameters:,} parameters, context {config.max_position_embeddings:,}, "
        f"condition {service.condition}; cache for {service.worker.status.cache_tokens:,} tokens"
    )
    tell(f"  try it    {url}/")
    tell(f"  API       {url}/v1  (OpenAI's: completions, chat/completions, models)")
    tell(f"  curl {url}/v1/completions -H 'Content-Type: application/json'{key} -d '{body}'")
