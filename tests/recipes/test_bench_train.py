from __future__ import annotations

import statistics
from typing import Any

import numpy as np
import pytest
import torch

from hrm_text.contracts import IGNORE_INDEX, UserError
from hrm_text.model.attention import prefix_mask
from hrm_text.recipes import bench_train as module
from hrm_text.recipes.bench_attention import visible_pairs
from hrm_text.recipes.bench_train import (
    NUM_BATCHES,
    NUM_SEEDS,
    BenchConfig,
    Contender,
    as_table,
    bench_train,
    spans_of,
    synthetic_batch,
    typical_seeds,
)
from hrm_text.train.step import TrainingStep

TINY = BenchConfig(size="tiny", tokens=128, device="cpu")


def test_two_configurations_take_turns_on_batches_that_change(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[tuple[str, int, int]] = []
    pairs: dict[bytes, int] = {}

    def run(training: TrainingStep, step: Any, k: int, lr: float) -> torch.Tensor:
        [batch] = step.batches
        starts, prefixes = torch.from_numpy(batch.sample_starts), torch.from_numpy(batch.prefix_lengths)
        pairs[batch.sample_starts.tobytes()] = int(prefix_mask(starts, prefixes, step.tokens).sum())
        ran.append((training.execution.attention, step.tokens, k))
        return torch.zeros(6)

    monkeypatch.setattr(TrainingStep, "run", run)
    first, second = bench_train(TINY, ["attention=plain", "k=2"], steps=5, warmup=2)
    assert [attention for attention, _, _ in ran] == ["grouped"] * 2 + ["plain"] * 2 + ["grouped", "plain"] * 5
    assert {(attention, k) for attention, _, k in ran} == {("grouped", 5), ("plain", 2)}
    assert len({tokens for _, tokens, _ in ran}) > 1
    assert ran[4:][::2] != ran[4:][1::2] and [t for _, t, _ in ran[4::2]] == [t for _, t, _ in ran[5::2]]
    for timing in (first, second):
        assert timing.steps == 5
        assert timing.step_ms_min <= timing.step_ms <= timing.step_ms_max
        assert timing.tokens_per_second == pytest.approx(1e3 * timing.tokens_per_step / timing.step_ms)
        assert timing.tokens_per_second < timing.budget_per_second
        assert timing.attention_flops_per_step == pytest.approx(4 * 32 * 2 * statistics.mean(pairs.values()))
        assert timing.mfu is None and timing.ms_by_part is None
    assert (second.settings["attention"], second.settings["k"], second.settings["recompute"]) == ("plain", 2, "none")
    assert len(as_table([first, second]).columns) == 4


def test_a_synthetic_batch_is_one_of_the_trainer() -> None:
    step = synthetic_batch(TINY, 300, seed=1)
    [batch] = step.batches
    assert (step.tokens, step.samples, step.supervised) == (batch.num_tokens, batch.num_samples, batch.num_supervised)
    assert len(batch.input_ids) == batch.num_tokens <= 128
    assert batch.input_ids.max() < 300 and batch.labels.max() < 300
    lengths = np.diff(batch.sample_starts)
    for start, length, prefix in zip(batch.sample_starts, lengths, batch.prefix_lengths, strict=False):
        assert list(batch.position_ids[start : start + length]) == list(range(length))
        asked = batch.labels[start : start + length] != IGNORE_INDEX
        assert list(asked) == [position >= prefix - 1 for position in range(length)]
    assert not np.array_equal(synthetic_batch(TINY, 300, seed=2).batches[0].sample_starts, batch.sample_starts)


def test_the_batches_are_those_with_typical_attention() -> None:
    config = BenchConfig(tokens=2048)
    pairs = [visible_pairs(spans_of(config, seed)) for seed in range(NUM_SEEDS)]
    taken = typical_seeds(config)
    far = max(abs(pairs[seed] - statistics.median(pairs)) for seed in taken)
    assert len(set(taken)) == NUM_BATCHES
    assert all(abs(pairs[seed] - statistics.median(pairs)) >= far for seed in set(range(NUM_SEEDS)) - set(taken))
    assert max(pairs) > 1.5 * min(pairs[seed] for seed in taken), "or any batch would do"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"compare": ["attention=plan"]}, "--compare: attention: Input should be 'auto', 'plain'"),
        ({"compare": ["steps=3"]}, "--compare: unknown key 'steps'"),
        ({"steps": 0}, "steps: expected at least 1, found 0"),
        ({"parts": True}, "parts: kernels are profiled on CUDA alone"),
        ({"compare": ["k=9"]}, "K = 9 is out of range for hrm"),
        ({"compare": ["distribution=none"]}, "unknown distribution 'none'"),
    ],
)
def test_what_cannot_be_timed_is_an_error(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        bench_train(TINY, **arguments)


def test_too_little_memory_says_what_takes_less(monkeypatch: pytest.MonkeyPatch) -> None:
    class TooLarge(Contender):
        def __init__(self, *_: Any) -> None:
            raise torch.OutOfMemoryError

    monkeypatch.setattr(module, "Contender", TooLarge)
    with pytest.raises(UserError, match=r"tiny at 128 tokens \(recompute none\).* Take --recompute full, .*--size\.$"):
        bench_train(TINY)
    with pytest.raises(UserError, match="or time one configuration at a time"):
        bench_train(TINY, ["k=2"])
