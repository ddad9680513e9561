"""Choosing the next token from logits."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from hrm_text.contracts import UserError


@dataclass(frozen=True)
class Sampling:
    """How to choose: temperature 0 is greedy; top_p keeps the likeliest ids that together reach that probability."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"temperature must be 0 (greedy) or positive, found {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p must be above 0 and at most 1, found {self.top_p}")


class Sampler:
    """Draws for several requests, each from a random stream of its own: a request's text ignores its neighbours."""

    def __init__(self, sampling: Sampling, num_requests: int) -> None:
        self.sampling = sampling
        self.generators = [
            torch.Generator().manual_seed(stream_seed(sampling.seed, request)) for request in range(num_requests)
        ]

    def choose(self, logits_BV: Tensor, requests: list[int]) -> list[int]:
        """The next id of each row of logits; row b belongs to request ``requests[b]``."""
        if self.sampling.temperature == 0:
            return logits_BV.argmax(-1).tolist()
        probabilities_BV = (logits_BV.float().cpu() / self.sampling.temperature).softmax(-1)
        if self.sampling.top_p < 1:
            ordered, ids = probabilities_BV.sort(-1, descending=True)
            # Reached before this id: so the first always stays.
            surplus = ordered.cumsum(-1) - ordered >= self.sampling.top_p
            probabilities_BV = torch.zeros_like(ordered).scatter(-1, ids, ordered.masked_fill(surplus, 0.0))
        return [
            int(torch.multinomial(row, 1, generator=self.generators[request]))
            for row, request in zip(probabilities_BV, requests, strict=True)
        ]


def stream_seed(seed: int, request: int) -> int:
    """A seed of 32 bits, all that PyTorch's generator on a CPU takes in, that differs with seed and request."""
    return int.from_bytes(hashlib.sha256(f"{seed} {request}".encode()).digest()[:4], "little")
