from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from hrm_text.model.attention import PlainAttention, Spans
from hrm_text.model.block import Block, GatedAttention, Stack, SwiGLU, rms_norm, rotary_table, rotate
from hrm_text.model.config import ModelConfig, preset


def tiny(**changes: Any) -> ModelConfig:
    return preset("tiny", vocab_size=64, **changes)


def plain(length: int, prefix: int) -> PlainAttention:
    spans = Spans.of_samples(torch.tensor([length]), torch.tensor([prefix]))
    return PlainAttention(spans, length, torch.device("cpu"))


def test_the_norm_divides_by_the_root_mean_square() -> None:
    x = torch.tensor([[3.0, -4.0], [0.0, 0.0]])
    torch.testing.assert_close(rms_norm(x, 1e-6), torch.tensor([[3.0, -4.0], [0.0, 0.0]]) / math.sqrt(12.5))
    assert rms_norm(x.bfloat16(), 1e-6).dtype == torch.bfloat16


def test_rotary_positions_turn_half_split_pairs() -> None:
    """Against complex numbers: pair i of (first half, second half) is turned by position * theta^(-2i / H)."""
    positions = torch.tensor([0, 1, 7])
    x = torch.randn(3, 2, 4, 8, generator=torch.Generator().manual_seed(0))
    frequency = 10_000.0 ** (-torch.arange(4) * 2 / 8)
    turn = torch.polar(torch.ones(3, 4), positions[:, None] * frequency)
    turned = torch.complex(x[..., :4], x[..., 4:]) * turn[:, None, None]
    expected = torch.cat([turned.real, turned.imag], -1)
    torch.testing.assert_close(rotate(x, rotary_table(positions, 8, 10_000.0)), expected)


def test_attention_scores_depend_on_distance_alone() -> None:
    q, k = torch.randn(2, 1, 1, 1, 32, generator=torch.Generator().manual_seed(0)).unbind(0)

    def score(i: int, j: int) -> float:
        tables = [rotary_table(torch.tensor([place]), 32, 10_000.0) for place in (i, j)]
        return float((rotate(q, tables[0]) * rotate(k, tables[1])).sum())

    assert score(9, 4) == pytest.approx(score(105, 100), rel=1e-4)
    assert score(9, 4) != pytest.approx(score(9, 5), rel=1e-4)


def test_the_fused_projection_holds_gate_query_key_value_in_this_order() -> None:
    torch.manual_seed(0)
    config = tiny()
    module, x = GatedAttention(config), torch.randn(5, 64)
    gate, q, k, v = (F.linear(x, w).view(5, 2, 32) for w in module.gqkv_proj.weight.chunk(4))
    table = rotary_table(torch.arange(5), 32, 10_000.0)
    q, k = (rotate(y.unsqueeze(1), table).squeeze(1) for y in (q, k))
    expected = module.o_proj((gate.sigmoid() * plain(5, 2)(q, k, v, 0)).flatten(1))
    torch.testing.assert_close(module(x, table, plain(5, 2), 0), expected)


def test_swiglu_gates_with_its_first_half() -> None:
    torch.manual_seed(0)
    module, x = SwiGLU(tiny()), torch.randn(5, 64)
    gate, up = (F.linear(x, w) for w in module.gate_up_proj.weight.chunk(2))
    torch.testing.assert_close(module(x), module.down_proj(gate * gate.sigmoid() * up))


def test_the_norm_switch_places_the_norms() -> None:
    x, table, attention = torch.randn(5, 64), rotary_table(torch.arange(5), 32, 10_000.0), plain(5, 2)
    stacks = {norm: Stack(tiny(norm=norm), 2) for norm in ("pre", "post", "magic")}
    for stack in stacks.values():
        stack.load_state_dict(stacks["pre"].state_dict())
    out = {norm: stack(x, table, attention, 0) for norm, stack in stacks.items()}

    def norm(y: torch.Tensor) -> torch.Tensor:
        return rms_norm(y, 1e-6)

    pre = post = x
    for layer in stacks["pre"].layers:
        assert isinstance(layer, Block)
        pre = pre + layer.attn(norm(pre), table, attention, 0)
        pre = pre + layer.mlp(norm(pre))
        post = norm(post + layer.attn(post, table, attention, 0))
        post = norm(post + layer.mlp(post))
    torch.testing.assert_close(out["pre"], pre)
    torch.testing.assert_close(out["magic"], norm(pre))
    torch.testing.assert_close(out["post"], post)
    assert not torch.allclose(out["post"], out["magic"], atol=1e-2)


def test_each_layer_of_a_stack_asks_the_cache_under_a_slot_of_its_own() -> None:
    asked: list[int] = []

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, slot: int) -> torch.Tensor:
        asked.append(slot)
        return v

    Stack(tiny(), 3)(torch.randn(5, 64), rotary_table(torch.arange(5), 32, 10_000.0), attend, 12)
    assert asked == [12, 13, 14]
