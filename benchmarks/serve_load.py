"""Many clients at once for a while, watched from outside::

    python benchmarks/serve_load.py WEIGHTS_DIR --clients 200 --seconds 300 --json results.json
    python benchmarks/serve_load.py --url http://127.0.0.1:8000 --clients 20 --seconds 20

Starts `hrm-text serve` in a process of its own (or goes to one that runs) and keeps so many clients asking: short and
long texts, whole and streamed, completions and chats, and some that leave in the middle. A client that is sent away
with 429 comes back when it was told to. Fails on any other error. The clients are plain sockets in one event loop:
they are to take little from the machine they share with the server.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

ROOT = Path(__file__).parents[1]
LENGTHS = (4, 16, 64, 256)
"""Tokens at most, equally often."""
LEAVE = 0.05
"""Share of the streams that are left after their first piece."""
GIVE_UP_SECONDS = 330.0
SAMPLE_SECONDS = 1.0


@dataclass
class Seen:
    """What all clients together have seen."""

    finished: int = 0
    left: int = 0
    sent_away: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    tokens: int = 0
    first_seconds: list[float] = field(default_factory=list)
    """From a streamed request to its first text."""
    total_seconds: list[float] = field(default_factory=list)
    memory: list[tuple[float, int]] = field(default_factory=list)
    """Seconds since the begin, resident bytes of the server."""


class Gone(Exception):
    """The server closed the connection."""


class Connection:
    """One keep-alive connection; speaks as much HTTP as this server does."""

    def __init__(self, host: str, port: int) -> None:
        self.host, self.port = host, port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def post(self, path: str, body: dict[str, Any]) -> tuple[int, dict[str, str]]:
        """Send; status and headers of the answer. A connection that was idle for too long is made anew, once."""
        data = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: {self.host}\r\nContent-Type: application/json\r\n"
        for attempt in range(2):
            fresh = self._streams is None
            if self._streams is None:
                self._streams = await asyncio.open_connection(self.host, self.port)
            reader, writer = self._streams
            try:
                writer.write(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
                await writer.drain()
                status, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
                headers = dict(line.lower().split(": ", 1) for line in lines if line)
                return int(status.split()[1]), headers
            except (asyncio.IncompleteReadError, ConnectionError):
                await self.close()
                if fresh or attempt:
                    raise Gone from None
        raise Gone

    async def pieces(self, headers: dict[str, str]) -> AsyncIterator[bytes]:
        """The body, whole or chunk by chunk."""
        assert self._streams is not None
        reader, _ = self._streams
        try:
            if "content-length" in headers:
                yield await reader.readexactly(int(headers["content-length"]))
                return
            while size := int(await reader.readline(), 16):
                yield (await reader.readexactly(size + 2))[:-2]
            await reader.readexactly(2)
        except (asyncio.IncompleteReadError, ConnectionError, ValueError):
            await self.close()
            raise Gone from None

    async def close(self) -> None:
        if self._streams is not None:
            _, writer = self._streams
            self._streams = None
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()


async def client(number: int, address: tuple[str, int], end: float, end_token: int | None, seen: Seen) -> None:
    """Ask one thing after the other until the time is over."""
    draw = random.Random(number)
    connection = Connection(*address)
    try:
        while time.perf_counter() < end:
            path, body = question(draw, end_token)
            try:
                async with asyncio.timeout(GIVE_UP_SECONDS):
                    await ask(connection, path, body, draw.random() < LEAVE, seen)
            except (Gone, OSError, TimeoutError) as error:
                seen.errors[type(error).__name__] += 1
                await connection.close()
    finally:
        await connection.close()


def question(draw: random.Random, end_token: int | None) -> tuple[str, dict[str, Any]]:
    """A request: sums of a few or many numbers, so that prompts differ in length too."""
    text = " + ".join(str(draw.randrange(100)) for _ in range(draw.choice((2, 3, 8))))
    body: dict[str, Any] = {"max_tokens": draw.choice(LENGTHS), "temperature": draw.choice((0, 1))}
    if end_token is not None and draw.random() < 0.7:  # or a small model's texts would all be short
        body["logit_bias"] = {str(end_token): -100}
    if stream := draw.random() < 0.7:
        body |= {"stream": stream, "stream_options": {"include_usage": True}}
    if draw.random() < 0.5:
        return "/v1/completions", body | {"prompt": f"What is {text}?"}
    return "/v1/chat/completions", body | {"messages": [{"role": "user", "content": f"What is {text}?"}]}


async def ask(connection: Connection, path: str, body: dict[str, Any], leave: bool, seen: Seen) -> None:
    """One request to its end, and what came of it."""
    began = time.perf_counter()
    status, headers = await connection.post(path, body)
    answer = b""
    first = None
    async for piece in connection.pieces(headers):
        answer += piece
        if first is None and status == 200 and has_text(piece):
            first = time.perf_counter() - began
            if leave and body.get("stream"):
                break
    if status == 429:
        seen.sent_away += 1
        await asyncio.sleep(float(headers["retry-after"]))
    elif status != 200:
        seen.errors[f"{status} {answer[:200].decode(errors='replace')}"] += 1
    elif leave and body.get("stream") and first is not None:
        seen.left += 1
        await connection.close()
    elif body.get("stream") and not answer.endswith(b"data: [DONE]\n\n"):
        seen.errors[f"a stream that breaks off: {answer[-200:].decode(errors='replace')}"] += 1
    else:
        seen.finished += 1
        seen.total_seconds.append(time.perf_counter() - began)
        if body.get("stream") and first is not None:
            seen.first_seconds.append(first)
        seen.tokens += int(answer.rpartition(b'"completion_tokens":')[2].partition(b",")[0])


def has_text(piece: bytes) -> bool:
    """Whether a piece of an answer has text; the first of a chat has its role alone."""
    return (b'"content":"' in piece or b'"text":"' in piece) and b'"content":""' not in piece


async def watch(process: int, began: float, seen: Seen) -> None:
    """The server's memory, again and again (Linux)."""
    while True:
        status = dict(
            line.split(":", 1) for line in Path(f"/proc/{process}/status").read_text().splitlines() if ":" in line
        )
        seen.memory.append((time.perf_counter() - began, int(status["VmRSS"].split()[0]) * 1024))
        await asyncio.sleep(SAMPLE_SECONDS)


async def load(
    address: tuple[str, int], clients: int, seconds: float, end_token: int | None, process: int | None
) -> Seen:
    """All clients together."""
    seen = Seen()
    began = time.perf_counter()
    watching = asyncio.create_task(watch(process, began, seen)) if process is not None else None
    await asyncio.gather(*(client(number, address, began + seconds, end_token, seen) for number in range(clients)))
    if watching is not None:
        watching.cancel()
    return seen


def start(weights_dir: Path, options: Sequence[str], log: Path) -> tuple[subprocess.Popen[bytes], str]:
    """A server at any free port, once it answers; its log says which."""
    command = [sys.executable, "-m", "hrm_text", "serve", str(weights_dir), "--port", "0", *options]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stderr=output, stdout=output, cwd=ROOT)
    while True:
        text = log.read_text(errors="replace")
        if process.poll() is not None:
            raise SystemExit(f"the server ended with {process.returncode}:\n{text[-3000:]}")
        if "  API  " in text:
            return process, text.partition("  API ")[2].split("/v1")[0].strip()
        time.sleep(0.1)


def report(seen: Seen, clients: int, seconds: float) -> dict[str, Any]:
    """The figures."""
    memory = [resident for _, resident in seen.memory]
    places = (
        {share: memory[min(len(memory) - 1, int(share * len(memory)))] for share in (0.1, 0.5, 1.0)} if memory else {}
    )
    return {
        "clients": clients,
        "seconds": round(seconds, 1),
        "finished": seen.finished,
        "left_by_clients": seen.left,
        "sent_away_429": seen.sent_away,
        "errors": dict(seen.errors),
        "tokens_per_second": round(seen.tokens / seconds, 1),
        "first_text_seconds": quantiles(seen.first_seconds),
        "total_seconds": quantiles(seen.total_seconds),
        "resident_mib": {f"{share:.0%} of the time": round(value / 2**20, 1) for share, value in places.items()},
        "resident_mib_most": round(max(memory) / 2**20, 1) if memory else None,
    }


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """p50, p99 and the most, in seconds."""
    ordered = sorted(values)
    if not ordered:
        return {}
    return {
        name: round(ordered[min(len(ordered) - 1, int(share * len(ordered)))], 4)
        for name, share in (("p50", 0.5), ("p99", 0.99), ("most", 1.0))
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights_dir", type=Path, nargs="?", help="starts a server for this folder")
    parser.add_argument("--url", help="of a server that runs already; its memory is not watched")
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument(
        "--log", type=Path, default=Path(tempfile.gettempdir()) / "serve_load.log", help="what the server says"
    )
    parser.add_argument("--json", type=Path, help="write the figures there too")
    parser.add_argument("--serve", nargs=argparse.REMAINDER, default=[], help="options of `hrm-text serve`; comes last")
    options = parser.parse_args(arguments)
    if (options.weights_dir is None) == (options.url is None):
        parser.error("expected either a weights folder or --url")
    process, end_token, url = None, None, options.url
    if url is None:
        end_token = json.loads((options.weights_dir / "config.json").read_text())["eos_token_id"]
        process, url = start(options.weights_dir, options.serve, options.log)
    parts = urlsplit(url)
    began = time.perf_counter()
    ended = None
    try:
        address = (parts.hostname or "127.0.0.1", parts.port or 80)
        process_id = process.pid if process else None
        seen = asyncio.run(load(address, options.clients, options.seconds, end_token, process_id))
        figures = report(seen, options.clients, time.perf_counter() - began)
        if process is not None:
            process.send_signal(signal.SIGTERM)
            ended = figures["server_exit_code"] = process.wait(60)
    finally:
        if process is not None:
            process.kill()
            process.wait()
    print(json.dumps(figures, indent=2))
    if options.json is not None:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")
    return 1 if seen.errors or ended else 0


if __name__ == "__main__":
    sys.exit(main())
