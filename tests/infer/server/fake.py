"""An engine that says a prompt back, letter by letter, as slowly as one likes; and a server with it.

python -m tests.infer.server.fake TOKENIZER_DIR PORT [SECONDS_PER_STEP] [DRAIN_SECONDS]
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hrm_text.contracts import UserError
from hrm_text.data.prompt import PromptFormat
from hrm_text.data.tokenizer import load_tokenizer, tokenizer_info
from hrm_text.infer.requests import Piece, Request, TokenScore
from hrm_text.infer.server.launch import Server, listen, serve
from hrm_text.infer.server.metrics import Metrics
from hrm_text.infer.server.service import Keys, Limits, Service
from hrm_text.infer.server.worker import EngineWorker
from hrm_text.model.config import ModelConfig, preset

CONTEXT = 4096
FAULT = "break, engine"
"""A prompt that the engine does not survive."""


@dataclass(frozen=True)
class Status:
    running: int
    waiting: int
    cache_tokens: int = CONTEXT
    cache_tokens_used: int = 0
    generated_tokens_total: int = 0
    prompt_tokens_total: int = 0
    cached_prompt_tokens_total: int = 0
    preemptions_total: int = 0
    steps_total: int = 0


@dataclass
class Model:
    prompt_format: PromptFormat
    config: ModelConfig
    default_condition: str = "direct"

    @property
    def vocab_size(self) -> int:
        return 320


@dataclass
class Echo:
    """One letter of the prompt a step, over and over until max_new_tokens; a stop text ends it."""

    prompt_format: PromptFormat
    seconds: float = 0.0
    requests: list[Request] = field(default_factory=list)
    """All there ever were; the number of a request is its place."""
    cancelled: list[tuple[int, float]] = field(default_factory=list)
    made: dict[int, int] = field(default_factory=dict)
    steps: int = 0

    def submit(self, request: Request) -> int:
        if request.cycles is not None and request.cycles.h_cycles > 8:
            raise UserError("h_cycles: too many for the cache")
        number = len(self.requests)
        self.requests.append(request)
        self.made[number] = 0
        return number

    def cancel(self, request: int) -> None:
        if self.made.pop(request, None) is not None:
            self.cancelled.append((request, time.monotonic()))

    @property
    def has_work(self) -> bool:
        return bool(self.made)

    @property
    def status(self) -> Status:
        return Status(running=len(self.made), waiting=0, steps_total=self.steps)

    def step(self) -> list[Piece]:
        time.sleep(self.seconds)
        self.steps += 1
        pieces = [self._piece(number) for number in self.made]
        for piece in pieces:
            if piece.finish_reason is not None:
                del self.made[piece.request]
        return pieces

    def _piece(self, number: int) -> Piece:
        request = self.requests[number]
        source = self.prompt_format.decode(request.turns[-1].prefix_ids) or "."
        if source == FAULT:
            raise RuntimeError("the device is gone")
        place = self.made[number]
        letter = source[place % len(source)]
        self.made[number] = place + 1
        if letter in request.stop:
            return Piece(number, num_tokens=place + 1, finish_reason="stop")
        scores: tuple[TokenScore, ...] = ()
        if (top := request.sampling.logprobs) is not None:
            others = tuple((other, "abcdefghijklmnopqrstuvwxyz"[other % 26], -1.0 - other) for other in range(top))
            scores = (TokenScore(5, letter, -0.5, others),)
        reason = "length" if place + 1 == request.max_new_tokens else None
        return Piece(number, letter, scores, place + 1, reason, num_cached_tokens=1)  # type: ignore[arg-type]


@dataclass
class Running:
    """A server in a thread of this process."""

    service: Service
    engine: Any
    server: Server
    port: int
    said: list[str]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


def make_service(
    tokenizer_dir: Path, seconds: float = 0.0, keys: Sequence[str] = (), context: int = CONTEXT, **limits: Any
) -> Service:
    prompt_format = PromptFormat(load_tokenizer(tokenizer_dir), tokenizer_info(tokenizer_dir))
    config = preset("tiny", vocab_size=512, max_position_embeddings=context)
    metrics, limit = Metrics(), Limits(**limits)
    worker = EngineWorker(Echo(prompt_format, seconds), metrics, limit.max_queue)
    return Service("echo", Model(prompt_format, config), worker, metrics, "direct", limit, Keys(keys))


@contextmanager
def running(service: Service) -> Iterator[Running]:
    """Serve at a free port until the block ends."""
    sock = listen("127.0.0.1", 0)
    said: list[str] = []
    server = Server(service, said.append)
    thread = threading.Thread(target=server.run, args=([sock],))
    thread.start()
    while not server.started:
        time.sleep(0.005)
    try:
        yield Running(service, service.worker._engine, server, sock.getsockname()[1], said)
    finally:
        server.should_exit = server.force_exit = True
        thread.join(timeout=20)
        service.worker.stop()
        sock.close()
        assert not thread.is_alive()


if __name__ == "__main__":
    tokenizer, port, *rest = sys.argv[1:]
    own = make_service(Path(tokenizer), float(rest[0] if rest else 0), drain_seconds=float(rest[1] if rest[1:] else 30))
    with listen("127.0.0.1", int(port)) as listening:
        print(listening.getsockname()[1], flush=True)
        serve(own, listening, lambda text: print(text, file=sys.stderr, flush=True))
