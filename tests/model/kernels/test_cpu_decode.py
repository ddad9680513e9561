from __future__ import annotations

import copy
from typing import Any

import numba
import pytest
import torch
from torch import Tensor

from hrm_text.model.config import preset
from hrm_text.model.kernels import cpu_decode
from hrm_text.model.kernels.cpu_decode import CompiledDecoding, speed_up_decoding, why_not, with_threads
from hrm_text.model.paged import PagedKeyValues, quantize
from hrm_text.model.quantized import quantize_weights
from hrm_text.model.recurrence import RecurrentLM, build

PAGES_OF_A_TEXT, PAGE_SIZE, VOCAB = 3, 16, 96
CPU = torch.device("cpu")


def small(**changes: Any) -> RecurrentLM:
    # 3 heads of 24 and an inner width of 200: no power of two, rows that are left over by every grouping.
    sizes = {"num_heads": 3, "head_dim": 24, "hidden_size": 72, "inner_multiple": 8}
    return build(preset("tiny", vocab_size=VOCAB, max_position_embeddings=64, **sizes, **changes), seed=4)


def filled(model: RecurrentLM, texts: int, dtype: torch.dtype) -> tuple[PagedKeyValues, Tensor, Tensor]:
    """A cache with something in every page, the texts' tables and lengths; a text's do not depend on their number."""
    pages = 8 * PAGES_OF_A_TEXT + 1
    cache = PagedKeyValues.allocate(model.config, pages, PAGE_SIZE, CPU, dtype)
    generator = torch.Generator().manual_seed(1)
    for store, scales in ((cache.keys, cache.key_scales), (cache.values, cache.value_scales)):
        x = torch.randn(store.shape, generator=generator)
        if scales is None:
            store.copy_(x)
        else:
            integers, found = quantize(x)
            store.copy_(integers)
            scales.copy_(found)
    table = torch.randperm(pages - 1, generator=generator).view(-1, PAGES_OF_A_TEXT) + 1
    lengths = torch.tensor([1, 16, 17, 48, 33, 2, 31, 47])
    return cache, table[:texts], lengths[:texts]


def step(
    model: RecurrentLM, cache: PagedKeyValues, table: Tensor, lengths: Tensor, rows: slice = slice(None)
) -> Tensor:
    ids = torch.arange(20, 20 + len(lengths))
    with torch.inference_mode():
        hidden = model(ids[rows], lengths[rows] - 1, CompiledDecoding(cache, table[rows], lengths[rows]))
        return model.lm_head(hidden)


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected.float()).abs().max() / expected.float().abs().max())


@pytest.mark.parametrize(
    ("weights", "stored"),
    [("float32", torch.float32), ("bfloat16", torch.bfloat16), ("int8", torch.int8)],
)
@pytest.mark.parametrize("norm", ["magic", "post", "pre"])
def test_a_step_equals_the_definition(weights: str, stored: torch.dtype, norm: str) -> None:
    model = small(norm=norm)
    if weights == "int8":
        quantize_weights(model)
    elif weights == "bfloat16":
        model = model.to(torch.bfloat16)
    definition, exact = copy.deepcopy(model), copy.deepcopy(model).float()
    if weights == "int8":
        exact = definition
    speed_up_decoding(model)
    for texts in (1, 6):
        cache, table, lengths = filled(model, texts, stored)
        expected = step(exact, copy.deepcopy(cache), table, lengths)
        found = step(model, cache, table, lengths)
        if weights == "bfloat16":
            own = step(definition, filled(model, texts, stored)[0], table, lengths)
            # Both round; the loops less often.
            assert relative(found, expected) < min(0.02, 1.2 * relative(own, expected))
        else:
            # A key on the edge between two integers may fall to either side.
            assert relative(found, expected) < (1e-5 if weights == "float32" else 2e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_text_does_not_depend_on_its_neighbours_nor_on_threads(dtype: torch.dtype) -> None:
    model = small().to(dtype)
    speed_up_decoding(model)
    cache, table, lengths = filled(model, 7, dtype)
    torch.set_num_threads(2)
    together = step(model, cache, table, lengths)
    for row in range(7):
        alone = step(model, cache, table, lengths, slice(row, row + 1))
        assert torch.equal(alone, together[row : row + 1])
    torch.set_num_threads(1)
    assert torch.equal(step(model, cache, table, lengths), together)


def test_a_step_sees_its_own_text_alone() -> None:
    model = small()
    speed_up_decoding(model)
    cache, table, lengths = filled(model, 4, torch.float32)
    before = step(model, cache, table, lengths)
    cache.values[:, table[1, 0], :, 3] += 1.0  # within text 1, whose length is 16
    cache.values[:, table[2, 1], :, 1] += 1.0  # the first place behind text 2, whose length is 17
    changed = (step(model, cache, table, lengths) != before).any(-1)
    assert changed.tolist() == [False, True, False, False]


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.int8, torch.float16])
def test_attention_reads_the_pages_where_they_lie(stored: torch.dtype) -> None:
    model = small()
    cache, table, lengths = filled(model, 5, stored)
    q = torch.randn(5, 3, 24, generator=torch.Generator().manual_seed(7))
    for slot in (0, 5):
        found = cpu_decode.attend(cache, slot, q, table, lengths)
        assert relative(found, cache.attend(slot, q, table, lengths)) < 1e-5


def test_the_step_runs_in_the_compiled_loops_and_a_prompt_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small()
    ids, prefixes = torch.arange(12, 44)[None], torch.tensor([16])
    expected = model.logits(ids, prefixes)
    cache, table, lengths = filled(model, 2, torch.float32)
    speed_up_decoding(model)
    step(model, cache, table, lengths)

    def refuse() -> None:
        raise RuntimeError("the loops were asked")

    monkeypatch.setattr(cpu_decode, "with_threads", refuse)
    with pytest.raises(RuntimeError, match="the loops were asked"):
        step(model, cache, table, lengths)
    monkeypatch.setattr(cpu_decode, "MOST_TEXTS", 1)
    assert torch.equal(model.logits(ids, prefixes), expected)


def test_odd_widths_stay_with_pytorch() -> None:
    model = build(preset("tiny", vocab_size=VOCAB, max_position_embeddings=64, num_heads=3, head_dim=18))
    assert why_not(model.config) == "widths must be multiples of 8, and the model has 54"
    speed_up_decoding(model)
    cache, table, lengths = filled(model, 2, torch.float32)
    assert step(model, cache, table, lengths).isfinite().all()


@torch.no_grad()
@pytest.mark.parametrize("kind", ["bf16", "int8"])
def test_a_bf16_prompt_is_computed_in_fp32_where_bf16_is_slow(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small()
    if kind == "int8":
        quantize_weights(model)
    exact = copy.deepcopy(model)
    for module in (model, exact):
        module.lm_head.bfloat16()
        module.model.bfloat16() if kind == "bf16" else module.model.embed_tokens.bfloat16()
    exact.float()
    ids, prefixes = torch.randint(VOCAB, (2, 30), generator=torch.Generator().manual_seed(2)), torch.tensor([9, 30])
    expected = exact.logits(ids, prefixes)
    errors = []
    for slow in (False, True):
        monkeypatch.setattr(cpu_decode, "bf16_is_slow", lambda slow=slow: slow)
        speed_up_decoding(model)
        errors.append(float((model.logits(ids, prefixes) - expected).norm() / expected.norm()))
    assert errors[1] < errors[0] < 0.05


def test_pytorch_keeps_the_threads_it_was_told_to_take(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    monkeypatch.setattr(numba, "set_num_threads", lambda _: torch.set_num_threads(before + 1))
    with_threads()
    assert torch.get_num_threads() == before
