from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from hrm_text.contracts import UserError
from hrm_text.infer.engine import DecodingEngine
from hrm_text.infer.requests import Piece, Request
from hrm_text.model.config import preset
from hrm_text.model.quantized import quantize_weights
from hrm_text.model.recurrence import build
from hrm_text.recipes import bench_decode as module
from hrm_text.recipes import decode_loads
from hrm_text.recipes.bench_decode import (
    DecodeConfig,
    as_table,
    bench_decode,
    mixed_table,
    requests_of,
    step_bytes,
    time_theirs,
)
from hrm_text.recipes.decode_loads import (
    Mixture,
    RandomModel,
    RandomRequests,
    RandomText,
    drained,
    engine_steps,
    mixed_window,
    steady,
)
from hrm_text.recipes.transformers_steps import Theirs

TINY = DecodeConfig(size="tiny", prompt=20, steps=6, warmup=2, device="cpu")


def test_both_systems_answer_the_same_prompts_with_the_same_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformers, as it is timed, says what the engine says: or it would be another model that is slower."""
    weights = build(preset("tiny"), seed=0).eval()
    theirs = Theirs(weights, torch.float32, torch.device("cpu"))
    asked = requests_of(TINY, batch=2, new=5, seed=3)
    ids = torch.tensor([request.turns[0].prefix_ids for request in asked])
    with torch.inference_mode():
        logits = theirs.model(ids, token_type_ids=torch.ones_like(ids)).logits[:, -1]
    torch.testing.assert_close(logits, weights.logits(ids, torch.tensor([20, 20]))[:, -1], rtol=1e-4, atol=1e-4)
    seen: list[tuple[int, ...]] = []
    monkeypatch.setattr(
        theirs.model, "generate", lambda ids, **options: seen.append((*ids.shape, options["max_new_tokens"]))
    )
    timing = time_theirs(TINY, theirs, batch=2)
    assert set(seen) == {(2, 20, 2), (2, 20, 10)}
    assert (timing.system, timing.batch) == ("transformers", 2)


def test_what_is_timed_is_a_step_of_the_whole_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    (first, second), mixed = bench_decode(TINY, [1, 3])
    assert mixed is None
    for timing, batch in ((first, 1), (second, 3)):
        assert timing.batch == batch
        assert timing.step_ms_min is not None and timing.step_ms_max is not None and timing.prefill_ms is not None
        assert timing.step_ms_min <= timing.step_ms <= timing.step_ms_max
        assert timing.tokens_per_second == pytest.approx(1e3 * batch / timing.step_ms)
        assert timing.prompt_tokens_per_second == pytest.approx(1e3 * batch * 20 / timing.prefill_ms)
        assert timing.prompt_tokens_per_second is not None and timing.forward_tokens_per_second is not None
        assert timing.prompts_share_of_forward == pytest.approx(
            timing.prompt_tokens_per_second / timing.forward_tokens_per_second
        )
    assert len(as_table([first, second]).columns) == 3


def test_every_step_makes_a_token_of_every_text() -> None:
    model = RandomModel(build(preset("tiny"), seed=0).eval(), RandomText())
    engine = DecodingEngine(model, max_batch=3, cache_tokens=400)
    for seed in (1, 2):  # the totals of an engine go on, what is told begins anew
        assert list(engine_steps(engine, requests_of(TINY, batch=3, new=4, seed=seed))) == [6, 9, 12]
    asked = [request for seed in (1, 2) for request in requests_of(TINY, batch=3, new=4, seed=seed)]
    assert len({request.turns[0].prefix_ids for request in asked}) == 6, "no prompt is known from another"


def test_the_bytes_of_a_step_are_counted_from_the_plan() -> None:
    config = preset("tiny")
    model = RandomModel(build(config, seed=0), RandomText())
    blocks = 8 * config.layers_per_stack * config.block_parameters
    head = config.vocab_size * config.hidden_size
    expected = 4 * (blocks + head) + 100 * config.cache_bytes_per_token(4)
    assert step_bytes(model, 100, torch.float32) == expected
    quantize_weights(model.module)
    assert blocks < step_bytes(model, 0, torch.float32) - 4 * head < 1.2 * blocks


# ------------------------------------------------------------------------------------------------------- mixed load ---


def small_engine(texts: int, **options: Any) -> DecodingEngine:
    model = RandomModel(build(preset("tiny", vocab_size=96), seed=0).eval(), RandomText())
    return DecodingEngine(model, max_batch=texts, page_size=4, **({"cache_tokens": 400} | options))


def test_texts_that_come_and_go_and_those_that_only_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_loads, "RESPONSES", (2, 9))
    changed = dataclasses.replace(TINY, mixed_steps=30)
    timings, mixed = bench_decode(changed, [], mixed=3)
    assert timings == [] and mixed is not None
    assert mixed.response_lengths == (2, 9) and mixed.preemptions == 0
    assert mixed.share_of_steady == pytest.approx(mixed.tokens_per_second / mixed.steady_tokens_per_second)
    assert mixed.drained_tokens_per_second == pytest.approx(mixed.drained_tokens / mixed.drained_seconds)
    assert 6 <= mixed.drained_tokens <= 27
    assert "in flight" in str(list(mixed_table(mixed).columns[0].cells))


def test_every_row_stays_busy_and_the_context_is_that_of_the_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, mixture = small_engine(3), Mixture(prompt=7, shortest=2, longest=12)
    lengths: list[list[int]] = []
    whole_step = engine.step

    def watched() -> list[Piece]:
        pieces = whole_step()
        lengths.append([text.total for text in engine._running.values()])
        return pieces

    monkeypatch.setattr(engine, "step", watched)
    window = mixed_window(engine, RandomRequests(96, seed=1), mixture, texts=3, steps=60, warmup=4)
    assert window.tokens == 3 * 60 + window.joined, "each row makes a token in each step, each prompt one more"
    assert window.joined > 15
    seen = [sum(each) for each in lengths if each][-60:]
    assert window.mean_context == pytest.approx(sum(seen) / 180, rel=0.02)
    assert not engine.has_work and engine.status.running == 0, "what was left has been cancelled"


def test_a_running_server_is_met_in_the_middle() -> None:
    """Its texts are longer than those that come, as long ones are there for longer, and at any point."""
    rng = np.random.Generator(np.random.Philox(0))
    mixture = Mixture(5, 16, 2000)
    met = np.array([mixture.in_flight(rng) for _ in range(4000)])
    come = np.array([mixture.response(rng) for _ in range(4000)])
    assert come.min() >= 16 and come.max() <= 2000 and come.mean() == pytest.approx(1008, rel=0.05)
    assert met[:, 1].min() >= 1 and met.sum(1).max() <= 2000
    assert met.sum(1).mean() == pytest.approx((np.arange(16, 2001) ** 2).mean() / 1008, rel=0.03)
    assert met[:, 0].mean() == pytest.approx(met[:, 1].mean(), rel=0.05)


def test_the_context_cuts_responses_and_a_prompt_must_fit() -> None:
    assert Mixture.within(4096, 256) == Mixture(256, 16, 2000)
    assert Mixture.within(300, 256) == Mixture(256, 16, 44)
    assert Mixture.within(257, 256) == Mixture(256, 1, 1)
    with pytest.raises(UserError, match="prompt: expected less than the context of 256"):
        Mixture.within(256, 256)


def test_a_steady_batch_has_the_context_that_it_is_to_have(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, requests = small_engine(2), RandomRequests(96, seed=2)
    asked: list[Request] = []
    make = requests.make

    def watched(*sizes: int) -> Request:
        asked.append(make(*sizes))
        return asked[-1]

    monkeypatch.setattr(requests, "make", watched)
    assert steady(engine, requests, context=40, texts=2, steps=10, warmup=3) > 0
    assert [request.num_prompt_tokens for request in asked] == [32, 32], "40 after 3 and half of 10 steps"
    tokens, seconds = drained(engine, requests, Mixture(4, 5, 5), texts=2)
    assert tokens == 10 and seconds > 0


def test_texts_that_do_not_fit_together_are_refused() -> None:
    with pytest.raises(UserError, match="mixed: 3 texts do not fit into the cache together"):
        mixed_window(small_engine(3, cache_tokens=40), RandomRequests(96, 0), Mixture(16, 4, 4), 3, steps=4)


# ---------------------------------------------------------------------------------------------------------- refused ---


def test_settings_that_cannot_be_had() -> None:
    with pytest.raises(UserError, match="mixed: expected at least 1 text, found 0"):
        bench_decode(TINY, [1], mixed=0)
    with pytest.raises(UserError, match="batch: expected at least 1, found 0"):
        bench_decode(TINY, [1, 0])
    with pytest.raises(UserError, match="unknown system 'vllm'"):
        module.bench_decode(TINY, [1], vs="vllm")
