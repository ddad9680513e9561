"""What one server has at hand: the model's format and limits, its worker, its keys."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from hrm_text.contracts import CONDITIONS, UserError
from hrm_text.data.prompt import PromptFormat
from hrm_text.infer.server.metrics import Metrics
from hrm_text.infer.server.worker import EngineWorker
from hrm_text.model.config import ModelConfig


class ServedModel(Protocol):
    """What the server needs of a model, beside its engine (``TextModel``)."""

    prompt_format: PromptFormat
    default_condition: str

    @property
    def config(self) -> ModelConfig: ...
    @property
    def vocab_size(self) -> int: ...


@dataclass(frozen=True)
class Limits:
    """What a client may take; seconds, bytes and places in the queue."""

    max_queue: int = 256
    """Texts that may be waiting or running together; beyond it clients are sent away with 429."""
    request_seconds: float = 300.0
    """For a request, from its last byte to the end of its text."""
    client_seconds: float = 30.0
    """For a client to send its request, or to take what it was sent."""
    drain_seconds: float = 30.0
    """For running requests when the server is told to end."""
    max_body: int = 2**20
    """Bytes of a request."""

    def __post_init__(self) -> None:
        for name in ("max_queue", "request_seconds", "client_seconds", "max_body"):
            if not getattr(self, name) > 0:
                raise UserError(f"--{name.replace('_', '-')} must be positive, found {getattr(self, name)}")
        if not self.drain_seconds >= 0:
            raise UserError(f"--drain-seconds must be 0 or more, found {self.drain_seconds}")


class Keys:
    """The keys that open a server; none, and it is open to all who reach it."""

    def __init__(self, keys: Sequence[str]) -> None:
        if not all(keys):
            raise UserError("an API key is empty; expected at least one character")
        # Digests are of one length: the time to compare says nothing about a key.
        self._digests = [_digest(key.encode()) for key in keys]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def opens(self, authorization: bytes) -> bool:
        """Whether a header ``Bearer KEY`` has one of the keys; all are compared, whichever fits."""
        scheme, _, key = authorization.partition(b" ")
        given = _digest(key.strip())
        fits = [hmac.compare_digest(given, digest) for digest in self._digests]
        return scheme.lower() == b"bearer" and any(fits)


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


@dataclass
class Service:
    """A model, its worker, and how to treat clients."""

    name: str
    model: ServedModel
    worker: EngineWorker
    metrics: Metrics
    condition: str
    """Of requests that name none."""
    limits: Limits = field(default_factory=Limits)
    keys: Keys = field(default_factory=lambda: Keys([]))
    host: str = "127.0.0.1"
    """The name or address that it was told to listen at."""
    drain_deadline: float | None = None
    """On the clock of time.monotonic, once the server was told to end: new requests are refused."""
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self.model.prompt_format.condition_ids(self.condition)

    @property
    def most_tokens(self) -> int:
        """Of a prompt and its text together: the context, or a cache that is smaller."""
        return min(self.model.config.max_position_embeddings, self.worker.status.cache_tokens)

    @property
    def conditions(self) -> list[str]:
        """The tags that the tokenizer knows."""
        known = []
        for tag in CONDITIONS:
            with contextlib.suppress(UserError):
                self.model.prompt_format.condition_ids(tag)
                known.append(tag)
        return known

    @property
    def status(self) -> Literal["ok", "draining", "failed"]:
        """failed: the engine is broken; draining: the server ends when what runs is done."""
        if self.worker.fault is not None:
            return "failed"
        return "ok" if self.drain_deadline is None else "draining"
