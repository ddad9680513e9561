"""The thread that drives the engine, and what the event loop sees of it.

The engine knows one thread. Callers live in the event loop: what they ask goes over in a list, what is made comes back
into a queue of each caller's own. Nothing here blocks the loop, and no caller can hold up another.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Protocol

from hrm_text.contracts import UserError
from hrm_text.infer.requests import Piece, Request
from hrm_text.infer.server import errors
from hrm_text.infer.server.metrics import Metrics

MOST_PIECES = 4096
"""That may wait for a reader: a client that does not read is cut off before its stream fills the memory."""
LONGEST_RETRY = 60
"""Seconds that a client is sent away for at most."""
UNKNOWN_RETRY = 5
"""Seconds, while nothing has ended that would tell how fast things go."""

log = logging.getLogger("hrm_text.server")


class StepStatus(Protocol):
    """What the engine says of itself."""

    @property
    def running(self) -> int: ...
    @property
    def waiting(self) -> int: ...
    @property
    def cache_tokens(self) -> int: ...
    @property
    def cache_tokens_used(self) -> int: ...
    @property
    def generated_tokens_total(self) -> int: ...
    @property
    def prompt_tokens_total(self) -> int: ...
    @property
    def cached_prompt_tokens_total(self) -> int: ...
    @property
    def preemptions_total(self) -> int: ...
    @property
    def steps_total(self) -> int: ...


class StepEngine(Protocol):
    """What the worker needs of an engine (``DecodingEngine``)."""

    def submit(self, request: Request) -> int:
        """A number for the request; UserError if it can never run."""
        ...

    def cancel(self, request: int) -> None:
        """Stop a request; one that is unknown or finished is ignored."""
        ...

    def step(self) -> list[Piece]:
        """One decoding step."""
        ...

    @property
    def has_work(self) -> bool: ...
    @property
    def status(self) -> StepStatus: ...


class Generation:
    """The texts of one call, as they are made. Close it, and whatever is unfinished is cancelled."""

    def __init__(self, worker: EngineWorker, requests: Sequence[Request], seconds: float) -> None:
        loop = asyncio.get_running_loop()
        self.requests = requests
        self._worker = worker
        self._seconds = seconds
        self._deadline = loop.time() + seconds
        self._loop = loop
        self._news: deque[tuple[int, Piece]] = deque()
        self._changed = asyncio.Event()
        self._accepted = False
        self._error: Exception | None = None
        self._unfinished = set(range(len(requests)))
        self._last_news = {number: (time.perf_counter(), 0) for number in self._unfinished}

    @property
    def num_unfinished(self) -> int:
        """Texts that the engine may still work on."""
        return len(self._unfinished)

    async def accepted(self) -> None:
        """Wait until the engine has taken all; raises UserError for what can never run."""
        await self._until(lambda: self._accepted)

    async def pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        """(number of the request, piece) as they come; raises ApiError when the time is over or the engine fails."""
        left = len(self.requests)
        while left:
            await self._until(lambda: bool(self._news))
            number, piece = self._news.popleft()
            left -= piece.finish_reason is not None
            yield number, piece

    async def _until(self, there: Callable[[], bool]) -> None:
        try:
            async with asyncio.timeout_at(self._deadline):
                while self._error is None and not there():
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            self._error = errors.took_too_long(self._seconds)
        if self._error is None and self._loop.time() > self._deadline:  # it never had to wait: its reader is slow
            self._error = errors.took_too_long(self._seconds)
        if self._error is not None:
            raise self._error

    def accept(self) -> None:
        """The engine has taken all."""
        self._accepted = True
        self._changed.set()

    def put(self, number: int, piece: Piece) -> bool:
        """News of one text; whether it was the last."""
        if number not in self._unfinished:  # cancelled meanwhile
            return False
        self._measure(number, piece)
        if len(self._news) >= MOST_PIECES:
            self.fail(errors.ApiError(503, "the client does not read what it is sent", type="server_error"))
            self.close()
            return False
        self._news.append((number, piece))
        self._changed.set()
        if piece.finish_reason is None:
            return False
        self._unfinished.discard(number)
        return True

    def _measure(self, number: int, piece: Piece) -> None:
        now = time.perf_counter()
        before, tokens = self._last_news[number]
        if piece.num_tokens > tokens:
            metrics = self._worker.metrics
            if tokens:
                metrics.token_seconds.observe((now - before) / (piece.num_tokens - tokens))
            else:
                metrics.first_token_seconds.observe(now - before)
            self._last_news[number] = now, piece.num_tokens

    def fail(self, error: Exception) -> None:
        """Whoever waits for news gets this error instead."""
        self._error = self._error or error
        self._changed.set()

    def close(self) -> None:
        """Nobody will read on."""
        self._worker.forget(self, len(self._unfinished))
        self._unfinished.clear()

    def __enter__(self) -> Generation:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class EngineWorker:
    """Drives an engine in a thread of its own while there is work, and sleeps while there is none.

    All methods belong to the event loop's thread, and to one event loop.
    """

    def __init__(self, engine: StepEngine, metrics: Metrics, max_queue: int) -> None:
        """``max_queue``: texts that may be waiting or running together; beyond it, callers are sent away."""
        self.metrics = metrics
        self.max_queue = max_queue
        self.fault: BaseException | None = None
        """What the engine failed with: then it is asked nothing more, for nobody knows what state it is in."""
        self.status: StepStatus = engine.status
        """Of the engine, after its last step."""
        self._engine = engine
        self._open: set[Generation] = set()
        self._finish_times: deque[float] = deque(maxlen=64)
        self._loop: asyncio.AbstractEventLoop | None = None
        # Shared by the two threads, under the condition:
        self._condition = threading.Condition()
        self._asked: list[Callable[[], None]] = []
        self._stopping = False
        # The thread's own:
        self._owners: dict[int, tuple[Generation, int]] = {}
        self._numbers: dict[Generation, list[int]] = {}
        metrics.watch(lambda: self.status)
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def num_open(self) -> int:
        """Texts that are waiting or being made."""
        return sum(generation.num_unfinished for generation in self._open)

    def check_room(self, count: int) -> None:
        """See whether so many texts could be asked for now; it costs next to nothing.

        Raises:
            UserError: these are more than the queue has places for.
            ApiError: they are too many just now (429), or the engine has failed (503).
        """
        if self.fault is not None:
            raise _broken()
        if count > self.max_queue:
            raise UserError(
                f"{count} texts (prompts times n) are asked for at once, and this server makes at most "
                f"{self.max_queue}; ask for fewer"
            )
        num_open = self.num_open
        if num_open + count > self.max_queue:
            retry = self._retry_seconds(num_open + count - self.max_queue)
            raise errors.overloaded(num_open, self.max_queue, retry)

    def open(self, requests: Sequence[Request], seconds: float) -> Generation:
        """Ask for some texts, of which all must be done within ``seconds``.

        Raises:
            UserError, ApiError: as ``check_room``.
        """
        self.check_room(len(requests))
        self._loop = asyncio.get_running_loop()
        generation = Generation(self, requests, seconds)
        if not self._hand_over(lambda: self._submit(generation)):
            raise _broken()
        self._open.add(generation)
        return generation

    def forget(self, generation: Generation, num_unfinished: int) -> None:
        """A caller is gone: stop what it asked for."""
        self._open.discard(generation)
        if num_unfinished and self._hand_over(lambda: self._cancel(generation)):
            self.metrics.cancelled.inc(num_unfinished)

    def fail_all(self, error: Exception) -> None:
        """Every caller gets this error."""
        for generation in self._open:
            generation.fail(error)

    def stop(self) -> None:
        """End the thread after its step; what runs is dropped. From any thread."""
        with self._condition:
            self._stopping = True
            self._condition.notify()
        self._thread.join(timeout=10)

    def _retry_seconds(self, places: int) -> int:
        """When so many places will be free, by how fast texts ended lately."""
        now, times = time.monotonic(), self._finish_times
        while times and now - times[0] > LONGEST_RETRY:
            times.popleft()
        seconds = places * (now - times[0]) / len(times) if times else UNKNOWN_RETRY
        return max(1, min(LONGEST_RETRY, math.ceil(seconds)))

    def _hand_over(self, command: Callable[[], None]) -> bool:
        """Have the thread do something; False if it has ended."""
        with self._condition:
            if self.fault is None:
                self._asked.append(command)
                self._condition.notify()
            return self.fault is None

    def _receive(self, news: list[tuple[Generation, int, Piece]]) -> None:
        for generation, number, piece in news:
            if generation.put(number, piece):
                self._finish_times.append(time.monotonic())

    # The thread -------------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._work():
                pass
        except BaseException as fault:
            log.exception("the engine failed; requests are refused from now on")
            with self._condition:
                self.fault = fault
            self._tell(self.fail_all, errors.engine_failed(fault))

    def _work(self) -> bool:
        """What was asked, and one step; False when it is time to end."""
        with self._condition:
            while not (self._asked or self._engine.has_work or self._stopping):
                self._condition.wait()
            asked, self._asked = self._asked, []
            if self._stopping:
                return False
        for command in asked:
            command()
        pieces = self._engine.step()
        self.status = self._engine.status
        news = [(*self._owners[piece.request], piece) for piece in pieces if piece.request in self._owners]
        for generation, _, piece in news:
            if piece.finish_reason is not None:
                del self._owners[piece.request]
                self._numbers[generation].remove(piece.request)
                if not self._numbers[generation]:
                    del self._numbers[generation]
        if news:
            self._tell(self._receive, news)
        return True

    def _submit(self, generation: Generation) -> None:
        numbers = self._numbers[generation] = []
        try:
            for index, request in enumerate(generation.requests):
                number = self._engine.submit(request)
                self._owners[number] = generation, index
                numbers.append(number)
        except UserError as error:
            self._cancel(generation)
            self._tell(generation.fail, error)
        else:
            self._tell(generation.accept)

    def _cancel(self, generation: Generation) -> None:
        for number in self._numbers.pop(generation, ()):
            del self._owners[number]
            self._engine.cancel(number)

    def _tell(self, function: Callable[..., None], *arguments: object) -> None:
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
                self._loop.call_soon_threadsafe(function, *arguments)


def _broken() -> errors.ApiError:
    return errors.unavailable("the engine has failed; the server's log says more", "engine_failed")
