"""Too much, too long, broken: what happens to those who ask then."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import openai
import pytest

from hrm_text.contracts import UserError
from hrm_text.infer.server import worker
from hrm_text.infer.server.launch import listen
from tests.infer.server.fake import FAULT, Running, make_service, running

BODY: dict[str, Any] = {"prompt": "What is 12 + 7?", "max_tokens": 2000}


def wait(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.01)


def client_of(server: Running, **options: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", **{"max_retries": 0} | options)


@pytest.mark.parametrize("stream", [False, True])
def test_who_leaves_is_cancelled_within_a_second(tokenizer_dir: Path, stream: bool) -> None:
    with running(make_service(tokenizer_dir, seconds=0.02)) as server:
        sock = post(server, BODY | {"stream": stream, "n": 2})
        wait(lambda: len(server.engine.made) == 2)
        left = time.monotonic()
        sock.close()
        wait(lambda: len(server.engine.cancelled) == 2)
        assert all(when - left < 1 for _, when in server.engine.cancelled)
        wait(lambda: server.service.worker.num_open == 0)
        wait(lambda: b"hrm_text_cancelled_total 2.0" in server.service.metrics.text())


def test_a_stream_that_is_closed_is_cancelled(tokenizer_dir: Path) -> None:
    with running(make_service(tokenizer_dir, seconds=0.02)) as server, client_of(server) as client:
        with client.completions.create(model="echo", prompt="apple", stream=True) as stream:
            assert next(stream).choices[0].text == "a"
        wait(lambda: [number for number, _ in server.engine.cancelled] == [0])
        assert client.completions.create(model="echo", prompt="apple", max_tokens=5).choices[0].text == "apple"


def test_beyond_the_queue_one_is_told_when_to_come_again(tokenizer_dir: Path) -> None:
    with running(make_service(tokenizer_dir, seconds=0.01, max_queue=3)) as server, client_of(server) as client:
        sockets = [post(server, BODY), post(server, BODY | {"n": 2})]
        wait(lambda: len(server.engine.made) == 3)
        with pytest.raises(openai.RateLimitError, match="3 of at most 3 texts are waiting or being made") as error:
            client.completions.create(model="echo", prompt="apple")
        assert 1 <= int(error.value.response.headers["retry-after"]) <= 60
        with pytest.raises(openai.BadRequestError, match="4 texts .* makes at most 3"):
            client.completions.create(model="echo", prompt="apple", n=4)
        for sock in sockets:
            sock.close()
        wait(lambda: server.service.worker.num_open == 0)
        assert client.completions.create(model="echo", prompt="apple", max_tokens=1, n=3).choices[2].text == "a"
        assert len(server.engine.requests) == 6


def test_many_at_once_each_get_their_own(tokenizer_dir: Path) -> None:
    with running(make_service(tokenizer_dir, seconds=0.001)) as server, client_of(server) as client:

        def ask(number: int) -> str:
            prompt = f"number {number}."
            if number % 2:
                return client.completions.create(model="echo", prompt=prompt, max_tokens=len(prompt)).choices[0].text
            chunks = client.completions.create(model="echo", prompt=prompt, max_tokens=len(prompt), stream=True)
            return "".join(chunk.choices[0].text for chunk in chunks)

        with ThreadPoolExecutor(16) as pool:
            assert list(pool.map(ask, range(64))) == [f"number {number}." for number in range(64)]


def test_a_request_has_so_long(tokenizer_dir: Path) -> None:
    with running(make_service(tokenizer_dir, seconds=0.02, request_seconds=0.2)) as server:
        with client_of(server) as client:
            with pytest.raises(
                openai.InternalServerError, match=r"not finished after 0.2 s.*--request-seconds"
            ) as error:
                client.completions.create(model="echo", **BODY)
            assert error.value.status_code == 504 and error.value.code == "request_timeout"
            stream = client.completions.create(model="echo", stream=True, **BODY)
            assert next(stream).choices[0].text == "W"
            with pytest.raises(openai.APIError, match="not finished after 0.2 s"):
                list(stream)
            wait(lambda: len(server.engine.cancelled) == 2)
        # OpenAI's client repeats after 504, but not when it is told that this is no use.
        with client_of(server, max_retries=2) as client, pytest.raises(openai.InternalServerError):
            client.completions.create(model="echo", **BODY)
        assert len(server.engine.requests) == 3


def test_an_engine_that_breaks_is_asked_nothing_more(tokenizer_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    with running(make_service(tokenizer_dir, seconds=0.02)) as server, client_of(server) as client:
        with ThreadPoolExecutor(1) as pool, caplog.at_level(logging.ERROR, "hrm_text.server"):
            other = pool.submit(lambda: client.completions.create(model="echo", **BODY))
            wait(lambda: len(server.engine.made) == 1)
            assert plain(server, "/health")[0] == 200
            with pytest.raises(openai.InternalServerError, match="the engine failed while .*RuntimeError"):
                client.completions.create(model="echo", prompt=FAULT)
            with pytest.raises(openai.InternalServerError, match="the engine failed while .*RuntimeError"):
                other.result()
        assert "the device is gone" in caplog.text
        status, health = plain(server, "/health")
        assert status == 503 and health["status"] == "failed"
        with pytest.raises(openai.InternalServerError, match="the engine has failed") as error:
            client.completions.create(model="echo", prompt="apple")
        assert error.value.status_code == 503
        assert server.service.worker.num_open == 0


@pytest.mark.parametrize("limit", ["seconds", "pieces"])
def test_a_reader_that_stops_is_cut_off_and_holds_up_nobody(
    tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    monkeypatch.setattr(worker, "MOST_PIECES", 200 if limit == "pieces" else 10**9)
    service = make_service(tokenizer_dir, seconds=0.001, client_seconds=60 if limit == "pieces" else 0.3)
    body = BODY | {"max_tokens": 4000, "stream": True, "logprobs": 20, "n": 8}
    with (
        running(service) as server,
        client_of(server) as client,
        closing(post(server, body, receive_buffer=4096)) as sock,
    ):
        wait(lambda: bool(server.engine.requests))
        assert client.completions.create(model="echo", prompt="apple", max_tokens=5).choices[0].text == "apple"
        wait(lambda: len(server.engine.cancelled) == 8, seconds=15)
        assert service.worker.num_open == 0
        if limit == "seconds":
            wait(lambda: not server.server.server_state.tasks)
            sent = b""
            while piece := sock.recv(2**20):
                sent = sent[-100:] + piece
            assert not sent.endswith(b"0\r\n\r\n"), "an answer that looks whole"


def test_the_first_signal_lets_finish_and_ends_with_0(tokenizer_dir: Path) -> None:
    with Process(tokenizer_dir, "0.01") as process:
        with ThreadPoolExecutor(1) as pool:
            whole = pool.submit(plain, process, "/v1/completions", {"prompt": "apple", "max_tokens": 100})
            wait(lambda: plain(process, "/health")[1]["running"] == 1)
            process.popen.send_signal(signal.SIGTERM)
            wait(lambda: plain(process, "/health") == (503, {"status": "draining", "running": 1, "waiting": 0}))
            status, refused = plain(process, "/v1/completions", {"prompt": "pear"})
            assert status == 503 and "about to end" in refused["error"]["message"]
            status, answer = whole.result()
        assert status == 200 and answer["choices"][0]["text"] == "apple" * 20
        assert process.popen.wait(10) == 0
        assert "running texts may finish within 30 s: 1" in process.stderr() and "cut off" not in process.stderr()


@pytest.mark.parametrize("how", ["time", "signal"])
def test_what_does_not_finish_is_cut_off_with_a_word(tokenizer_dir: Path, how: str) -> None:
    with Process(tokenizer_dir, "0.05", "0.3" if how == "time" else "60") as process:
        with openai.OpenAI(base_url=f"{process.url}/v1", api_key="none", max_retries=0) as client:
            stream = client.completions.create(model="echo", prompt="apple", max_tokens=2000, stream=True)
            next(stream)
            process.popen.send_signal(signal.SIGTERM)
            if how == "signal":
                wait(lambda: plain(process, "/health")[0] == 503)
                process.popen.send_signal(signal.SIGTERM)
            with pytest.raises(openai.APIError, match="the server ended before the text did"):
                list(stream)
        assert process.popen.wait(10) == 0
        assert "texts cut off: 1" in process.stderr()


def test_a_port_in_use_is_told_at_once() -> None:
    with listen("127.0.0.1", 0) as sock:
        port = sock.getsockname()[1]
        with pytest.raises(UserError, match=f"cannot listen at 127.0.0.1 port {port}: .*in use.*another --port"):
            listen("127.0.0.1", port)
    with pytest.raises(UserError, match="no such address"):
        listen("no.such.host.invalid", 1)


# ----------------------------------------------------------------------------------------------------------------------


class Process:
    """A server in a process of its own."""

    def __init__(self, tokenizer_dir: Path, *options: str) -> None:
        self._errors = tokenizer_dir.parent / f"stderr-{time.monotonic_ns()}"
        with self._errors.open("wb") as errors:
            self.popen = subprocess.Popen(
                [sys.executable, "-m", "tests.infer.server.fake", str(tokenizer_dir), "0", *options],
                stdout=subprocess.PIPE,
                stderr=errors,
                cwd=Path(__file__).parents[3],
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )

    def __enter__(self) -> Process:
        assert self.popen.stdout is not None
        self.port = int(self.popen.stdout.readline())
        self.url = f"http://127.0.0.1:{self.port}"
        return self

    def __exit__(self, *_: object) -> None:
        self.popen.kill()
        self.popen.wait()
        assert self.popen.stdout is not None
        self.popen.stdout.close()

    def stderr(self) -> str:
        return self._errors.read_text()


def post(server: Running, body: dict[str, Any], receive_buffer: int | None = None) -> socket.socket:
    """Send a request and read nothing."""
    sock = socket.socket()
    if receive_buffer is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    sock.connect(("127.0.0.1", server.port))
    data = json.dumps(body).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    sock.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
    return sock


def plain(server: Running | Process, path: str, body: dict[str, Any] | None = None) -> tuple[int, Any]:
    """Status and body of one request on a connection of its own."""
    with openai.DefaultHttpxClient(base_url=server.url, timeout=20) as client:
        answer = client.get(path) if body is None else client.post(path, json=body)
        return answer.status_code, answer.json()
