"""What the server measures, for Prometheus; every server has a registry of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)

_GAUGES = {
    "running": "Texts being made",
    "waiting": "Texts that wait for their turn in the engine",
    "cache_tokens": "Tokens that the cache has room for",
    "cache_tokens_used": "Tokens whose keys and values are in use",
}
_COUNTERS = {
    "generated_tokens": "Tokens made",
    "prompt_tokens": "Tokens of prompts",
    "cached_prompt_tokens": "Of them, those whose keys and values were there from an earlier request",
    "preemptions": "Texts that gave way to others for want of room in the cache, and were taken up again",
    "steps": "Decoding steps",
}
"""What the engine counts itself (EngineStatus)."""


class Metrics:
    """Counters and histograms of one server."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        own: dict[str, Any] = {"namespace": "hrm_text", "registry": self._registry}
        self.requests = Counter("requests", "Answers sent", ["endpoint", "status"], **own)
        self.request_seconds = Histogram(
            "request_seconds",
            "From the head of a request to the end of its answer",
            ["endpoint"],
            buckets=_SECONDS,
            **own,
        )
        self.first_token_seconds = Histogram(
            "first_token_seconds", "From a request to the first token of its text", buckets=_SECONDS, **own
        )
        self.token_seconds = Histogram("token_seconds", "From one token of a text to the next", buckets=_SECONDS, **own)
        self.cancelled = Counter("cancelled", "Texts that were stopped before their end, their clients gone", **own)
        for name in ("/v1/completions", "/v1/chat/completions"):
            self.requests.labels(name, "200")  # a rate needs a zero to begin with

    def watch(self, status: Callable[[], Any]) -> None:
        """Report an engine's own numbers too; ``status`` gives its newest."""
        self._registry.register(_EngineNumbers(status))

    def text(self) -> bytes:
        """All of it, in Prometheus's text format."""
        return generate_latest(self._registry)


class _EngineNumbers:
    """The engine counts for itself; here its numbers are read when somebody asks."""

    def __init__(self, status: Callable[[], Any]) -> None:
        self._status = status

    def collect(self) -> Iterator[Metric]:
        status = self._status()
        for name, what in _GAUGES.items():
            yield GaugeMetricFamily(f"hrm_text_{name}", what, value=getattr(status, name))
        for name, what in _COUNTERS.items():
            yield CounterMetricFamily(f"hrm_text_{name}", what, value=getattr(status, f"{name}_total"))
