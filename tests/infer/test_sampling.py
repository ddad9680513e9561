from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hrm_text.infer.requests import Sampling
from hrm_text.infer.sampling import LEAST_LOGPROB, RowState, Sampler

CPU = torch.device("cpu")
FAST = settings(max_examples=100, deadline=None)


def random_logits(rows: int, vocab_size: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * 3


def draws(logits_V: Tensor, times: int, **sampling: float) -> npt.NDArray[np.int64]:
    """How often each id is drawn in so many independent draws: rows of one batch, each with a seed of its own."""
    rows = [RowState(Sampling(seed=seed, **sampling), [0]) for seed in range(times)]  # type: ignore[arg-type]
    chosen = Sampler(len(logits_V), CPU).choose(logits_V.expand(times, -1), rows)
    return np.bincount(chosen.token_ids.numpy(), minlength=len(logits_V))


def sequence(logits_V: Tensor, row: RowState, length: int) -> list[int]:
    sampler = Sampler(len(logits_V), CPU)
    return [int(sampler.choose(logits_V[None], [row]).token_ids) for _ in range(length)]


def kept_by(logits_V: Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> npt.NDArray[np.float64]:
    """The definition, in fp64: probabilities after the cuts, each on what the one before left."""
    x = logits_V.double().numpy() / temperature
    p = np.exp(x - x.max())
    order = np.lexsort((np.arange(len(p)), -x))  # likeliest first, then the lower id
    if top_k:
        p[order[top_k:]] = 0
    p /= p.sum()
    before = np.cumsum(p[order]) - p[order]
    if top_p < 1:
        p[order[before >= top_p - 1e-12]] = 0
    p[p < min_p * p.max()] = 0
    return p / p.sum()


def close_to(counts: npt.NDArray[np.int64], p: npt.NDArray[np.float64]) -> bool:
    """Chi-square: what has no probability never comes; the rest within 5 standard deviations of the statistic."""
    if counts[p == 0].any():
        return False
    expected = p * counts.sum()
    rare = expected < 5  # put together, as the limit does not hold for each
    counts, expected = (np.append(values[~rare], values[rare].sum()) for values in (counts, expected))
    statistic = ((counts - expected) ** 2 / (expected + 1e-9)).sum()
    freedom = max(len(expected) - 1, 1)
    return bool(statistic <= freedom + 5 * np.sqrt(2 * freedom))


# ----------------------------------------------------------------------------------------------------------- greedy ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_temperature_0_takes_the_likeliest_and_of_equals_the_lower_id(dtype: torch.dtype) -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0, 2.0], [3.0, 3.0, 3.0, 3.0], [-1.0, -2.0, -3.0, 0.0]], dtype=dtype)
    rows = [RowState(Sampling(), [0]) for _ in range(3)]
    assert Sampler(4, CPU).choose(logits, rows).token_ids.tolist() == [1, 0, 3]


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(logit_bias={1: 0.5}), Sampling(temperature=9.0)])
def test_ids_beyond_the_vocabulary_are_never_chosen(sampling: Sampling) -> None:
    """A model's rows of logits are rounded up."""
    logits = torch.full((200, 8), 50.0)
    logits[:, :5] = 0.0
    rows = [RowState(sampling, [0]) for _ in range(200)]
    chosen = Sampler(5, CPU).choose(logits, rows)
    assert int(chosen.token_ids.max()) < 5
    scored = Sampler(5, CPU).choose(logits[:1], [RowState(Sampling(logprobs=20), [0])])
    _, token, logprob, top = scored.scores()[0]
    assert token == 0 and [index for index, _ in top] == [0, 1, 2, 3, 4]
    assert [logprob, *(value for _, value in top)] == pytest.approx([np.log(0.2)] * 6)


class _Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.append(function.name().removeprefix("aten::"))
        return function(*args, **kwargs or {})


def test_a_greedy_batch_is_one_operation() -> None:
    """On a device, where the tokens stay; the meta device has no numbers, so the host cannot have looked at any."""
    rows = [RowState(Sampling(), [0]) for _ in range(4)]
    logits, sampler = torch.empty(4, 32, device="meta"), Sampler(30, torch.device("meta"))
    with _Operations() as operations:
        assert sampler.choose(logits, rows).token_ids.is_meta
    assert operations.names == ["slice.Tensor", "argmax"]


@pytest.mark.parametrize(
    ("samplings", "sorts"),
    [
        ([Sampling(temperature=1.0), Sampling(temperature=1.0, min_p=0.1)], 0),
        ([Sampling(temperature=1.0, top_k=3), Sampling(temperature=0.5, top_k=9), Sampling()], 1),
        ([Sampling(temperature=1.0, top_k=3), Sampling(temperature=0.5, top_p=0.9), Sampling(temperature=1.0)], 1),
    ],
)
def test_a_step_sorts_once_at_most_and_never_waits_for_the_device(samplings: list[Sampling], sorts: int) -> None:
    rows = [RowState(sampling, [0]) for sampling in samplings]
    with _Operations() as operations:
        Sampler(32, torch.device("meta")).choose(torch.empty(len(rows), 32, device="meta"), rows)
    assert sum(name in ("sort", "topk") for name in operations.names) == sorts


# ---------------------------------------------------------------------------------------------------- distributions ---


@pytest.mark.parametrize(
    ("sampling", "kept"),
    [
        ({}, {0, 1, 2, 3}),
        ({"top_p": 1e-9}, {0}),
        ({"top_p": 0.49}, {0}),
        ({"top_p": 0.6}, {0, 1}),
        ({"top_p": 0.8}, {0, 1, 2}),
        ({"top_p": 0.95}, {0, 1, 2, 3}),
        ({"top_k": 1}, {0}),
        ({"top_k": 3}, {0, 1, 2}),
        ({"top_k": 99}, {0, 1, 2, 3}),
        ({"min_p": 0.4}, {0, 1}),
        ({"min_p": 1.0}, {0}),
        ({"top_k": 3, "top_p": 0.8}, {0, 1}),  # of what top_k leaves, 0.75 / 0.9 is enough
        ({"top_k": 3, "top_p": 0.99, "min_p": 0.4}, {0, 1}),
    ],
)
def test_cuts_keep_what_they_say(sampling: dict[str, float], kept: set[int]) -> None:
    logits = torch.tensor([0.5, 0.25, 0.15, 0.1]).log()
    assert set(np.flatnonzero(draws(logits, 300, temperature=1.0, **sampling))) == kept


@pytest.mark.parametrize("min_p", [0.0, 0.05])
@pytest.mark.parametrize("top_p", [1.0, 0.7])
@pytest.mark.parametrize("top_k", [0, 5])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_draws_follow_the_definition(temperature: float, top_k: int, top_p: float, min_p: float) -> None:
    logits = random_logits(1, 40)[0]
    counts = draws(logits, 2000, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    expected = kept_by(logits, temperature, top_k, top_p, min_p)
    assert close_to(counts, expected)
    other = kept_by(logits, temperature * 1.6, top_k, top_p, min_p)
    assert (expected > 0).sum() == 1 or not close_to(counts, other)  # the bound is tight enough to tell


def test_a_stream_of_draws_follows_the_definition_too() -> None:
    logits = random_logits(1, 20)[0]
    tokens = sequence(logits, RowState(Sampling(temperature=1.0), [0]), 3000)
    assert close_to(np.bincount(tokens, minlength=20), kept_by(logits, 1.0, 0, 1.0, 0.0))


@FAST
@given(
    logits=st.lists(st.integers(-6, 6), min_size=2, max_size=30),
    temperature=st.sampled_from([0.3, 1.0, 2.0]),
    top_k=st.integers(0, 40),
    top_p=st.sampled_from([1.0, 0.9, 0.618, 0.2718, 0.01]),
    min_p=st.sampled_from([0.0, 0.033, 0.31]),
    bits=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_no_draw_leaves_what_the_definition_keeps(
    logits: list[int], temperature: float, top_k: int, top_p: float, min_p: float, bits: torch.dtype
) -> None:
    """Logits with many ties, which the lower id wins: the bounds of the draw, 0 and almost 1, are the hard places."""
    logits_V = torch.tensor(logits, dtype=torch.float32)
    expected = kept_by(logits_V, temperature, top_k, top_p, min_p)
    rows = []
    for number in [0.0, *np.linspace(0.001, 0.999, 60), 1 - 2**-53]:
        rows.append(RowState(Sampling(temperature, top_p, top_k=top_k, min_p=min_p), [0]))
        rows[-1].draw = partial(float, number)  # type: ignore[method-assign]
    x_BV = logits_V.to(bits).expand(len(rows), -1)
    found = set(Sampler(len(logits), CPU).choose(x_BV, rows).token_ids.tolist())
    assert found <= set(np.flatnonzero(expected))
    assert found >= set(np.flatnonzero(expected > 0.02))


def test_top_k_1_is_greedy() -> None:
    logits = random_logits(50, 30).bfloat16()
    rows = [RowState(Sampling(temperature=2.0, top_k=1, seed=seed), [0]) for seed in range(50)]
    assert Sampler(30, CPU).choose(logits, rows).token_ids.equal(logits.argmax(-1))


# ------------------------------------------------------------------------------------------------- bias and penalty ---


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_bias_is_added_to_the_logit(temperature: float) -> None:
    logits = random_logits(1, 30)[0]
    banned, wanted = int(logits.argmax()), int(logits.argmin())
    assert wanted == sequence(logits, RowState(Sampling(temperature, logit_bias={wanted: 100.0}), [0]), 1)[0]
    rows = [RowState(Sampling(temperature, seed=i, logit_bias={banned: -100.0}), [0]) for i in range(100)]
    tokens = Sampler(30, CPU).choose(logits.expand(100, -1), rows).token_ids
    assert banned not in tokens.tolist()
    assert logits[banned] == logits.max()  # what it was given is as it was


def test_a_bias_changes_the_distribution_as_adding_it_would() -> None:
    logits = random_logits(1, 20)[0]
    rows = [RowState(Sampling(1.0, seed=i, logit_bias={3: 2.5, 7: -1.0}), [0]) for i in range(3000)]
    counts = np.bincount(Sampler(20, CPU).choose(logits.expand(3000, -1), rows).token_ids, minlength=20)
    biased = logits.clone()
    biased[3] += 2.5
    biased[7] -= 1.0
    assert close_to(counts, kept_by(biased, 1.0, 0, 1.0, 0.0))
    assert not close_to(counts, kept_by(logits, 1.0, 0, 1.0, 0.0))


def test_a_penalty_counts_prompt_and_response_without_the_host() -> None:
    """Greedy, with a penalty so high that no token comes twice while one is left that is not there yet."""
    logits = torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0])
    assert sequence(logits, RowState(Sampling(repetition_penalty=100.0), [1, 1]), 4) == [0, 2, 3, 4]
    # Negative logits are multiplied: 4 would otherwise gain.
    assert sequence(-logits.flip(0), RowState(Sampling(repetition_penalty=2.5), [0]), 2) == [1, 0]


@FAST
@given(
    temperature=st.sampled_from([0.0, 1.0]),
    steps=st.lists(st.lists(st.integers(0, 3), unique=True, min_size=1, max_size=4), min_size=1, max_size=12),
)
def test_a_penalty_is_right_while_rows_come_and_go(temperature: float, steps: list[list[int]]) -> None:
    """Against the definition, with the tokens known to the host: in any order, paused, and without neighbours."""
    logits = random_logits(4, 12, 5)
    penalties = [1.0, 1.3, 2.0, 0.7]

    def row(number: int) -> RowState:
        asked = Sampling(temperature, seed=number, repetition_penalty=penalties[number], logprobs=number % 2 or None)
        return RowState(asked, [number, number + 1])

    rows = [row(number) for number in range(4)]
    plain = [RowState(Sampling(temperature, seed=number), [0]) for number in range(4)]
    seen = [{number, number + 1} for number in range(4)]
    sampler = Sampler(12, CPU)
    for numbers in steps:
        found = sampler.choose(logits[numbers], [rows[number] for number in numbers]).token_ids.tolist()
        for number, token in zip(numbers, found, strict=True):
            x = logits[number].clone()
            for index in seen[number]:
                x[index] = x[index] / penalties[number] if x[index] > 0 else x[index] * penalties[number]
            assert token == int(Sampler(12, CPU).choose(x[None], [plain[number]]).token_ids)
            seen[number].add(token)


# ----------------------------------------------------------------------------------------------------- independence ---

MIXED = (
    Sampling(),
    Sampling(temperature=1.0),
    Sampling(temperature=0.7, top_p=0.9),
    Sampling(temperature=1.5, top_k=7),
    Sampling(temperature=1.0, min_p=0.1, logprobs=3),
    Sampling(temperature=1.0, top_k=20, top_p=0.5, min_p=0.01, repetition_penalty=1.2),
    Sampling(repetition_penalty=1.5, logprobs=0),
    Sampling(logit_bias={3: -100.0, 5: 4.0}),
    Sampling(temperature=2.0, logit_bias={1: 3.0}, repetition_penalty=0.8, logprobs=20),
)


@pytest.mark.parametrize("vocab_size", [100, 3000])
def test_a_row_is_the_same_to_the_bit_in_any_company(vocab_size: int) -> None:
    """In another order, alone, with twenty neighbours: tokens and log-probabilities."""
    rng = np.random.default_rng(0)
    samplings = [*MIXED, *MIXED[1:4], *MIXED]
    steps = [random_logits(len(samplings), vocab_size, seed) for seed in range(4)]

    def run(orders: list[list[int]]) -> list[list[object]]:
        states = [RowState(sampling, [1, 2, 3]) for sampling in samplings]
        sampler = Sampler(vocab_size, CPU)
        found: list[list[object]] = [[] for _ in samplings]
        for logits, order in zip(steps, orders, strict=True):
            chosen = sampler.choose(logits[order], [states[number] for number in order])
            scores = {order[row]: (token, logprob, top) for row, token, logprob, top in chosen.scores()}
            for number, token in zip(order, chosen.token_ids.tolist(), strict=True):
                found[number].append((token, scores.get(number)))
        return found

    everyone = list(range(len(samplings)))
    together = run([everyone] * 4)
    assert together == run([rng.permutation(everyone).tolist() for _ in steps])
    for number in everyone:
        assert run([[number]] * 4)[number] == together[number]


def test_a_seed_is_a_text_and_a_row_that_paused_goes_on() -> None:
    logits = random_logits(1, 1000)[0] / 3

    def tokens(seed: int) -> list[int]:
        return sequence(logits, RowState(Sampling(temperature=1.0, seed=seed), [0]), 6)

    assert tokens(1) == tokens(1)
    assert len({tuple(tokens(seed)) for seed in (0, 1, 2, -1, 2**64, 10**30)}) == 6
    row = RowState(Sampling(temperature=1.0, seed=1), [0])
    first = sequence(logits, row, 2)
    sequence(logits, RowState(Sampling(temperature=1.0, seed=5), [0]), 3)
    assert first + sequence(logits, row, 4) == tokens(1)


# ------------------------------------------------------------------------------------------------ log-probabilities ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_log_probabilities_are_those_of_the_model_itself(dtype: torch.dtype) -> None:
    logits = random_logits(3, 50).to(dtype)
    sampling = Sampling(temperature=3.0, top_k=2, logit_bias={9: 100.0}, repetition_penalty=2.0, logprobs=4)
    rows = [RowState(Sampling(), [0]), RowState(sampling, [0]), RowState(Sampling(logprobs=0), [0])]
    chosen = Sampler(50, CPU).choose(logits, rows)
    expected = logits.double().log_softmax(-1)
    (first, token, logprob, top), (second, best, best_logprob, none) = chosen.scores()
    assert (first, token, second, best) == (1, 9, 2, int(logits[2].argmax()))
    assert none == []
    assert logprob == pytest.approx(float(expected[1, 9]), abs=1e-5)
    assert best_logprob == pytest.approx(float(expected[2].max()), abs=1e-5)
    order = sorted(range(50), key=lambda index: (-float(logits[1, index]), index))
    assert [index for index, _ in top] == order[:4]
    assert [value for _, value in top] == pytest.approx(expected[1, order[:4]].tolist(), abs=1e-5)


def test_of_equally_likely_tokens_the_lower_ids_are_reported() -> None:
    chosen = Sampler(300, CPU).choose(torch.zeros(1, 300), [RowState(Sampling(logprobs=5), [0])])
    (_, token, _, top) = chosen.scores()[0]
    assert [index for index, _ in top] == [0, 1, 2, 3, 4] and token == 0


# -------------------------------------------------------------------------------------------------- what goes wrong ---


def _broken(values: Sequence[float]) -> Tensor:
    return torch.tensor([values])


@pytest.mark.parametrize("sampling", MIXED, ids=range(len(MIXED)))
@pytest.mark.parametrize(
    ("logits", "allowed"),
    [
        (_broken([0.0, float("nan"), 1.0, 0, 0, -1e4]), {1}),
        (_broken([0.0, 0.0, float("inf"), 0, 0, -1e4]), {2}),
        (_broken([float("nan")] * 6), set(range(6))),
        (_broken([float("-inf")] * 6), set(range(6))),
        (_broken([3e38, -3e38, -3e38, -3e38, -3e38, -3e38]), {0}),
        (_broken([float("-inf"), 1.0, 1.0, float("-inf"), float("-inf"), float("-inf")]), {1, 2}),
    ],
)
def test_no_logits_crash_and_scores_can_be_sent(sampling: Sampling, logits: Tensor, allowed: set[int]) -> None:
    chosen = Sampler(6, CPU).choose(logits, [RowState(sampling, [5])])
    assert int(chosen.token_ids) in allowed
    assert json.dumps(chosen.scores(), allow_nan=False)
    assert all(value >= LEAST_LOGPROB for _, _, _, top in chosen.scores() for _, value in top)


@pytest.mark.parametrize("temperature", [1e-300, 1e-7, 1e7, 1e300])
@pytest.mark.parametrize("other", [{}, {"top_p": 0.999999}, {"top_p": 1e-300}, {"repetition_penalty": 1e300}])
def test_no_setting_that_is_allowed_crashes(temperature: float, other: dict[str, float]) -> None:
    sampling = Sampling(temperature, logit_bias={2: 1e300, 3: -1e300}, **other)  # type: ignore[arg-type]
    assert sequence(random_logits(1, 9)[0], RowState(sampling, [0]), 1) == [2] or temperature > 1


def test_the_extremes_of_temperature() -> None:
    logits = random_logits(1, 9)[0]
    assert draws(logits, 100, temperature=1e-300)[int(logits.argmax())] == 100
    assert close_to(draws(logits, 2000, temperature=1e300), np.full(9, 1 / 9))
