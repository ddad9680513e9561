from __future__ import annotations

from collections import Counter

import pytest
import torch

from hrm_text.contracts import UserError
from hrm_text.infer.sampling import Sampler, Sampling

LOGITS = torch.tensor([0.5, 0.25, 0.15, 0.1]).log()


def draws(sampling: Sampling, times: int = 2000) -> Counter[int]:
    sampler = Sampler(sampling, 1)
    return Counter(sampler.choose(LOGITS[None], [0])[0] for _ in range(times))


def test_temperature_0_takes_the_likeliest() -> None:
    assert draws(Sampling(), 10) == {0: 10}


def test_draws_follow_the_probabilities_and_the_temperature() -> None:
    counts = draws(Sampling(temperature=1.0))
    for index, probability in enumerate([0.5, 0.25, 0.15, 0.1]):
        assert counts[index] / 2000 == pytest.approx(probability, abs=0.04)
    sharp = draws(Sampling(temperature=0.5))  # p^2, normalised: 0.25 / 0.345
    assert sharp[0] / 2000 == pytest.approx(0.25 / 0.345, abs=0.04)


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [(0.01, {0}), (0.49, {0}), (0.6, {0, 1}), (0.8, {0, 1, 2}), (0.95, {0, 1, 2, 3}), (1.0, {0, 1, 2, 3})],
)
def test_top_p_keeps_the_likeliest_that_reach_it(top_p: float, kept: set[int]) -> None:
    assert set(draws(Sampling(temperature=1.0, top_p=top_p), 300)) == kept


def test_a_request_draws_the_same_whatever_its_neighbours() -> None:
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    together, alone = (Sampler(Sampling(temperature=1.0, seed=3), 3) for _ in range(2))
    for _ in range(20):
        assert together.choose(logits, [0, 1, 2])[2] == alone.choose(logits[2:], [2])[0]


def test_seeds_and_requests_have_streams_of_their_own() -> None:
    logits = torch.zeros(1, 1000)

    def sequence(seed: int, request: int) -> list[int]:
        sampler = Sampler(Sampling(temperature=1.0, seed=seed), 2)
        return [sampler.choose(logits, [request])[0] for _ in range(5)]

    assert sequence(1, 0) == sequence(1, 0)
    assert len({tuple(sequence(seed, request)) for seed in (0, 1, 2) for request in (0, 1)}) == 6


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": -0.1}, "temperature must be 0 .greedy. or positive, found -0.1"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1, found 0.0"),
        ({"top_p": 1.1}, "top_p"),
    ],
)
def test_a_value_out_of_range_is_one_clear_error(values: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Sampling(temperature=values.get("temperature", 0.0), top_p=values.get("top_p", 1.0))
