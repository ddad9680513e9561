"""Loads for an engine that need no data: random weights and prompts, a steady batch, and texts that come and go."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hrm_text.contracts import UserError
from hrm_text.infer.engine import DecodingEngine
from hrm_text.infer.requests import Request, Sampling, Turn
from hrm_text.model.config import ModelConfig
from hrm_text.model.recurrence import RecurrentLM

RESPONSES = (16, 2000)
"""Fewest and most tokens of a response of a mixed load; each number is as likely."""

AHEAD = 4
"""Requests that wait, so that a row which becomes free is taken in the next step."""


class RandomText:
    """A format without a tokenizer: nothing ends a response, and no token has a text."""

    eoa_id = -1

    def decode(self, ids: Sequence[int]) -> str:
        """Nothing."""
        return ""


@dataclass(frozen=True)
class RandomModel:
    """What an engine needs of a model, with random weights and no tokenizer."""

    module: RecurrentLM
    prompt_format: RandomText

    @property
    def config(self) -> ModelConfig:
        """The model's configuration."""
        return self.module.config

    @property
    def vocab_size(self) -> int:
        """All entries."""
        return self.config.vocab_size


class RandomRequests:
    """Requests of random ids, no two alike, and the same for the same seed."""

    def __init__(self, vocab_size: int, seed: int) -> None:
        self.vocab_size = vocab_size
        self.rng = np.random.Generator(np.random.Philox(seed))

    def make(self, prompt: int, new: int, said: int = 0) -> Request:
        """A prompt of so many tokens, behind it ``said`` of its response, and ``new`` that are to come."""
        ids = self.rng.integers(0, self.vocab_size, prompt + said).tolist()
        return Request((Turn(tuple(ids[:prompt]), tuple(ids[prompt:])),), new, Sampling())


def engine_steps(engine: DecodingEngine, requests: Sequence[Request]) -> Iterator[int]:
    """Run requests to their end; after each step, the tokens made since the beginning."""
    before = engine.status.generated_tokens_total
    for request in requests:
        engine.submit(request)
    while engine.has_work:
        engine.step()
        yield engine.status.generated_tokens_total - before


# ------------------------------------------------------------------------------------------------------- mixed load ---


@dataclass(frozen=True)
class Mixture:
    """Prompts of one length, and responses whose lengths are drawn."""

    prompt: int
    shortest: int
    longest: int

    @staticmethod
    def within(context: int, prompt: int) -> Mixture:
        """Responses as long as the context has room for, and no longer than ``RESPONSES`` says.

        Raises:
            UserError: the prompt leaves no room.
        """
        room = context - prompt
        if room < 1:
            raise UserError(f"prompt: expected less than the context of {context:,} tokens, found {prompt:,}")
        shortest, longest = (min(bound, room) for bound in RESPONSES)
        return Mixture(prompt, shortest, longest)

    def response(self, rng: np.random.Generator) -> int:
        """Tokens of a response."""
        return int(rng.integers(self.shortest, self.longest + 1))

    def in_flight(self, rng: np.random.Generator) -> tuple[int, int]:
        """(tokens said, tokens to come) of a text that is met in a server that has been running for long.

        Longer responses are met more often, in proportion, and at any of their tokens.
        """
        lengths: npt.NDArray[np.int64] = np.arange(self.shortest, self.longest + 1)
        length = int(rng.choice(lengths, p=lengths / lengths.sum()))
        said = int(rng.integers(length))
        return said, length - said


@dataclass(frozen=True)
class Window:
    """What was seen of a mixed load while every row was taken."""

    seconds: float
    tokens: int
    """New ones, of all texts."""
    joined: int
    """Texts that ended, each followed by another, whose prompt was computed in between."""
    mean_context: float
    """Tokens of a text, over all texts and steps."""
    preemptions: int
    """How often a text gave its memory to another: more than none, and it is memory that was measured."""


def mixed_window(
    engine: DecodingEngine, requests: RandomRequests, mixture: Mixture, texts: int, steps: int, warmup: int = 8
) -> Window:
    """Run ``steps`` steps of ``texts`` texts in flight; as one ends the next joins, and its prompt counts as time.

    The texts of the beginning are at points as they are met in a running server. What is left is cancelled.

    Raises:
        UserError: the cache has no room for them all.
    """
    texts_in = InFlight(engine)
    for _ in range(texts):
        said, new = mixture.in_flight(requests.rng)
        texts_in.submit(requests.make(mixture.prompt, new, said))
    for _ in range(AHEAD):
        texts_in.submit(requests.make(mixture.prompt, mixture.response(requests.rng)))

    def step() -> int:
        ended = texts_in.step()
        for _ in range(ended):
            texts_in.submit(requests.make(mixture.prompt, mixture.response(requests.rng)))
        return ended

    for _ in range(2 * texts):  # prompts that are too many for one pass are computed in several steps
        step()
        if engine.status.running >= texts:
            break
    else:
        raise too_many(engine, texts)
    for _ in range(warmup):
        step()
    before, joined, contexts, started = engine.status, 0, 0, time.perf_counter()
    for _ in range(steps):
        joined += step()
        contexts += texts_in.context
    seconds, after = time.perf_counter() - started, engine.status
    texts_in.cancel()
    return Window(
        seconds=seconds,
        tokens=after.generated_tokens_total - before.generated_tokens_total,
        joined=joined,
        mean_context=contexts / (steps * texts),
        preemptions=after.preemptions_total - before.preemptions_total,
    )


class InFlight:
    """The requests that an engine has, and how far they are."""

    def __init__(self, engine: DecodingEngine) -> None:
        self.engine = engine
        self._starts: dict[int, int] = {}  # request -> tokens that it begins with, in the order of submission
        self._ended_tokens = engine.status.generated_tokens_total  # of texts that are no longer there

    def submit(self, request: Request) -> None:
        """One more."""
        self._starts[self.engine.submit(request)] = request.num_prompt_tokens

    def step(self) -> int:
        """Take a step; how many ended."""
        ended = [piece for piece in self.engine.step() if piece.finish_reason is not None]
        for piece in ended:
            del self._starts[piece.request]
            self._ended_tokens += piece.num_tokens
        return len(ended)

    @property
    def context(self) -> int:
        """Tokens of all texts that are being made; those that wait are the last to have come."""
        status = self.engine.status
        running = itertools.islice(self._starts.values(), len(self._starts) - status.waiting)
        return sum(running) + status.generated_tokens_total - self._ended_tokens

    def cancel(self) -> None:
        """End them all."""
        for number in list(self._starts):
            self.engine.cancel(number)
        while self.engine.has_work:
            self.engine.step()


def drained(engine: DecodingEngine, requests: RandomRequests, mixture: Mixture, texts: int) -> tuple[int, float]:
    """(new tokens, seconds) of exactly so many texts from the first prompt to the last token; none joins."""
    asked = [requests.make(mixture.prompt, mixture.response(requests.rng)) for _ in range(texts)]
    started = time.perf_counter()
    *_, tokens = engine_steps(engine, asked)
    return tokens, time.perf_counter() - started


def steady(
    engine: DecodingEngine, requests: RandomRequests, context: int, texts: int, steps: int, warmup: int = 8
) -> float:
    """New tokens per second of ``texts`` equal texts without their prompts; in the middle they have ``context`` tokens.

    Of a context too short for so many steps it is as near to it as can be.

    Raises:
        UserError: the cache has no room for them all.
    """
    new = warmup + steps + 2 + texts  # their prompts may take as many steps as there are texts
    prompt = min(context - warmup - steps // 2, engine.model.config.max_position_embeddings - new)
    seen = [
        (time.perf_counter(), tokens)
        for tokens in engine_steps(engine, [requests.make(max(1, prompt), new) for _ in range(texts)])
        if engine.status.running == texts
    ]
    if len(seen) <= warmup + steps:
        raise too_many(engine, texts)
    (started, before), (ended, after) = seen[warmup], seen[warmup + steps]
    return (after - before) / (ended - started)


def too_many(engine: DecodingEngine, texts: int) -> UserError:
    """What to say where some would only wait for the memory of others."""
    return UserError(
        f"mixed: {texts} texts do not fit into the cache together, which has room for "
        f"{engine.status.cache_tokens:,} tokens: take fewer, or kv_cache int8"
    )


def warm_up(engine: DecodingEngine, requests: RandomRequests, prompt: int, texts: int) -> None:
    """Meet every size of batch once, and one or two prompts at a time: what is made on first use is made."""
    for count in (1, 2):
        list(engine_steps(engine, [requests.make(prompt, 2) for _ in range(count)]))
    list(engine_steps(engine, [requests.make(prompt, 1 + number) for number in range(texts)]))
