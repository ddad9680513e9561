from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from hrm_text.contracts import UserError
from hrm_text.model.config import preset
from hrm_text.model.quantized import Int8Linear, quantize_weights
from hrm_text.model.recurrence import build

TINY = preset("tiny", vocab_size=96, max_position_embeddings=64)


def random_linear(outputs: int = 96, inputs: int = 256) -> nn.Linear:
    linear = nn.Linear(inputs, outputs, bias=False)
    with torch.no_grad():
        linear.weight.copy_(torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(2)))
    return linear


@torch.no_grad()
def test_a_product_is_within_one_percent() -> None:
    linear, x = random_linear(), torch.randn(64, 256, generator=torch.Generator().manual_seed(3))
    expected, found = linear(x), Int8Linear.of(linear)(x)
    error = float((found - expected).norm() / expected.norm())
    assert 0.001 < error < 0.01  # it is rounded, and no more than that


def test_the_largest_of_a_row_becomes_127_and_halves_go_to_the_even() -> None:
    linear = nn.Linear(4, 2, bias=False)
    linear.weight = nn.Parameter(torch.tensor([[127.0, 0.5, 1.5, -2.5], [0.0, 0.0, 0.0, 0.0]]))
    layer = Int8Linear.of(linear)
    assert layer.weight.tolist() == [[127, 0, 2, -2], [0, 0, 0, 0]]
    assert layer.scale[0] == 1.0


@torch.no_grad()
def test_rows_are_scaled_by_themselves() -> None:
    linear = random_linear()
    before = Int8Linear.of(linear)
    linear.weight[5] *= 1000
    after = Int8Linear.of(linear)
    assert torch.equal(before.weight, after.weight)
    assert torch.equal(before.scale[:5], after.scale[:5])
    assert after.scale[5] > 900 * before.scale[5]


@torch.no_grad()
def test_blocks_are_quantised_and_head_and_embedding_are_not() -> None:
    model = build(TINY, seed=1)
    plain = copy.deepcopy(model)
    quantize_weights(model)
    assert torch.equal(model.lm_head.weight, plain.lm_head.weight)
    assert torch.equal(model.model.embed_tokens.weight, plain.model.embed_tokens.weight)
    for name in model.config.stacks:
        assert not any(isinstance(module, nn.Linear) for module in model.model.stack(name).modules())
        assert sum(isinstance(module, Int8Linear) for module in model.model.stack(name).modules()) == 4
    ids, prefixes = torch.arange(12, 44)[None], torch.tensor([16])
    expected, found = plain.logits(ids, prefixes), model.logits(ids, prefixes)
    assert 0 < float((found - expected).norm() / expected.norm()) < 0.1


def test_weights_are_quantised_once() -> None:
    model = build(TINY)
    quantize_weights(model)
    with pytest.raises(UserError, match="in int8 already"):
        quantize_weights(model)
