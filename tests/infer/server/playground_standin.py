"""A server of the playground page without a model: the same answers every time, and errors on demand.

What the prompt holds decides: ``[busy]`` 429, ``[bad]`` 400, ``[slow]`` never ends, ``[long]`` 4,000 tokens,
``[unbroken]`` no spaces, ``[drop]`` the connection closes in the middle, ``[held]`` several tokens a chunk, and text
that comes later than its tokens, ``[plain]`` no log-probabilities.
"""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any

import hrm_text
from hrm_text.infer.server.page import policy_of

PAGE = Path(hrm_text.__file__).parent / "infer" / "server" / "playground.html"
MODEL = {
    "id": "stand-in",
    "context": 4096,
    "h_cycles": 2,
    "l_cycles": 3,
    "max_calls": 12,
    "conditions": ["direct", "cot", "noisy", "synth"],
    "default_condition": "direct",
    "parameters": 113_000_000,
    "has_cycles": True,
}
KEY = "a secret"

PART = "\ufffd"
"""What a token reads that ends within a character."""
ANSWER: list[tuple[str, str, float]] = [
    # token, the text that is final with it, probability
    ("Fifty", "Fifty", 0.62), ("-", "-", 0.97), ("seven", "seven", 0.998), (" and", " and", 0.81),
    (" thirty", " thirty", 0.93), ("-", "-", 0.999), ("eight", "eight", 0.99), (" make", " make", 0.41),
    (" ninety", " ninety", 0.9), ("-", "-", 0.99), ("five", "five", 0.88), (".", ".", 0.96), (" ", " ", 0.07),
    (PART, "", 0.3), (PART, "", 0.9), (PART, "🙂", 0.6), ("\n\n", "\n\n", 0.5), ("So", "So", 0.22),
    (" in", " in", 0.04), (" K", " K", 0.35), (PART, "", 0.8), ("ö", "ö", 0.97), ("ln", "ln", 0.99),
    (" one", " one", 0.11), (" wr", " wr", 0.72), ("ites", "ites", 0.99), (":", ":", 0.64), ("\n", "\n", 0.77),
    ("  ", "  ", 0.55), ("<b>", "<b>", 0.02), ("95", "95", 0.94), ("</b>", "</b>", 0.9), ("  ", "  ", 0.3),
    ("|", "|", 0.2), (" 数", " 数", 0.015), (PART, "", 0.2), ("を", "を", 0.9), ("逆", "逆", 0.4), ("に", "に", 0.7),
    (" " + PART, "", 0.2), (PART, "", 0.6), (PART, " 👩", 0.7), ("\u200d", "\u200d", 0.9), (PART, "", 0.8),
    ("🔬", "🔬", 0.8), (".", ".", 0.9), ("", "", 0.93),
]  # fmt: skip
"""Of a character in parts, the last may read as the character or as a part: both occur."""
TEXT = "".join(text for _, text, _ in ANSWER)


def chunks(prompt: str) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """The text of every chunk and its tokens, with their offsets in characters."""
    answer = ANSWER
    if "[long]" in prompt:
        words = ["The ", "recur", "rence ", "goes ", "round ", "again", ", ", "slow ", "and ", "fast", ".\n"]
        answer = [(word, word, 0.05 + (i * 37 % 95) / 100) for i, word in enumerate(words * 364)][:4000]
    if "[slow]" in prompt:
        answer = [(f"word{i} ", f"word{i} ", 0.5) for i in range(100_000)]
    if "[unbroken]" in prompt:
        answer = [("abcdefgh", "abcdefgh", 0.4)] * 60
    held, waiting, per_chunk = "", [], 3 if "[held]" in prompt else 1
    offset = 0
    for number, (token, text, probability) in enumerate(answer, start=1):
        shares = {" maybe": 0.5, "\n": 0.3, " ": 0.15, "<i>": 0.04}
        top = {other: math.log((1 - probability) * share) for other, share in shares.items()}
        top[token] = math.log(probability)
        waiting.append({"token": token, "logprob": math.log(probability), "top": top, "offset": offset})
        offset += len(token)
        held += text
        if number % per_chunk == 0 or number == len(answer):
            # Text that is held back comes a chunk after its tokens, as where a stop text could begin.
            late = held[-2:] if "[held]" in prompt and number < len(answer) else ""
            yield held.removesuffix(late), waiting
            held, waiting = late, []


class Standin(ThreadingHTTPServer):
    """Serves on a free port of this machine, in threads, within ``with``."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests: list[dict[str, Any]] = []
        self.paths: list[str] = []
        self.keys: list[str | None] = []
        self.hung_up = threading.Event()
        """Set when a browser closed a stream that had not ended."""
        self.needs_key = False
        self.delay_s = 0.0

    @property
    def origin(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def __enter__(self) -> Standin:
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    server: Standin

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the tests look at what came."""

    def do_GET(self) -> None:
        self.server.paths.append(self.path)
        if self.path == "/":
            page = PAGE.read_bytes()
            self.answer(200, page, "text/html; charset=utf-8", {"Content-Security-Policy": policy_of(page.decode())})
        elif self.path == "/v1/models" and self.allowed():
            self.json(200, {"object": "list", "data": [MODEL]})
        elif self.path != "/v1/models":
            self.json(404, {"error": {"message": f"nothing at {self.path}"}})

    def do_POST(self) -> None:
        self.server.paths.append(self.path)
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self.allowed():
            return
        self.server.requests.append(body)
        prompt = body["prompt"]
        if "[busy]" in prompt:
            message = "the server is busy: 64 of at most 64 texts are waiting or being made; try again in 1 s"
            self.json(429, {"error": {"message": message}}, {"Retry-After": "1"})
        elif "[bad]" in prompt:
            self.json(400, {"error": {"message": "The prompt has 5000 tokens, the context 4096: shorten <b>it</b>."}})
        else:
            try:
                self.stream(prompt)
            except OSError:
                self.server.hung_up.set()

    def stream(self, prompt: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        self.wfile.write(b": hello\n\n")
        count = 0
        for text, tokens in chunks(prompt):
            count += len(tokens)
            if "[drop]" in prompt and count == 6:
                return
            logprobs = {
                "tokens": [token["token"] for token in tokens],
                "token_logprobs": [token["logprob"] for token in tokens],
                "top_logprobs": [token["top"] for token in tokens],
                "text_offset": [token["offset"] for token in tokens],
            }
            self.event({"choices": [{"index": 0, "text": text, "logprobs": None if "[plain]" in prompt else logprobs}]})
            time.sleep(0.02 if "[slow]" in prompt else self.server.delay_s)
        self.event({"choices": [{"index": 0, "text": "", "logprobs": None, "finish_reason": "stop"}]})
        usage = {"prompt_tokens": 24, "completion_tokens": count, "prompt_tokens_details": {"cached_tokens": 16}}
        self.event({"choices": [], "usage": usage})
        self.wfile.write(b"data: [DONE]\n\n")

    def event(self, value: dict[str, Any]) -> None:
        data = b"data: " + json.dumps(value, ensure_ascii=False).encode() + b"\n\n"
        # In two writes, so that the page meets events that are cut, and within the first character that has more bytes.
        wide = next((place for place, byte in enumerate(data) if byte >= 0x80), None)
        cut = len(data) // 2 if wide is None else wide + 1
        self.wfile.write(data[:cut])
        self.wfile.flush()
        if wide is not None:
            time.sleep(0.005)  # or the two would arrive as one
        self.wfile.write(data[cut:])
        self.wfile.flush()

    def allowed(self) -> bool:
        key = self.headers["Authorization"]
        self.server.keys.append(key)
        if self.server.needs_key and key != f"Bearer {KEY}":
            self.json(401, {"error": {"message": "No valid API key."}})
            return False
        return True

    def json(self, status: int, value: dict[str, Any], headers: dict[str, str] | None = None) -> None:
        self.answer(status, json.dumps(value).encode(), "application/json", headers or {})

    def answer(self, status: int, body: bytes, kind: str, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)
