from __future__ import annotations

import pytest
import torch

from hrm_text.contracts import UserError
from hrm_text.infer.engine import DecodingEngine
from hrm_text.model.config import preset
from hrm_text.model.quantized import quantize_weights
from hrm_text.model.recurrence import build
from hrm_text.recipes import bench_decode as module
from hrm_text.recipes.bench_decode import (
    DecodeConfig,
    RandomModel,
    RandomText,
    Theirs,
    as_table,
    bench_decode,
    engine_steps,
    requests_of,
    step_bytes,
)

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
    timing = theirs.time(TINY, batch=2)
    assert set(seen) == {(2, 20, 2), (2, 20, 10)}
    assert (timing.system, timing.batch) == ("transformers", 2)


def test_what_is_timed_is_a_step_of_the_whole_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    (first, second) = bench_decode(TINY, [1, 3])
    for timing, batch in ((first, 1), (second, 3)):
        assert timing.batch == batch
        assert timing.step_ms_min is not None and timing.step_ms_max is not None and timing.prefill_ms is not None
        assert timing.step_ms_min <= timing.step_ms <= timing.step_ms_max
        assert timing.tokens_per_second == pytest.approx(1e3 * batch / timing.step_ms)
        assert timing.prompt_tokens_per_second == pytest.approx(1e3 * batch * 20 / timing.prefill_ms)
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


def test_settings_that_cannot_be_had() -> None:
    with pytest.raises(UserError, match="batch: expected at least 1, found 0"):
        bench_decode(TINY, [1, 0])
    with pytest.raises(UserError, match="unknown system 'vllm'"):
        module.bench_decode(TINY, [1], vs="vllm")
