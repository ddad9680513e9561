from __future__ import annotations

import pytest
import torch

from hrm_text.contracts import UserError
from hrm_text.model.config import ModelConfig, preset
from hrm_text.model.lora import LoraConfig, adapted, merged, num_calls, scale
from hrm_text.model.weights import empty
from hrm_text.settings import from_mapping

L_WEIGHT, H_WEIGHT = "model.L_module.layers.0.attn.o_proj.weight", "model.H_module.layers.0.mlp.down_proj.weight"


def lora(**values: object) -> LoraConfig:
    return from_mapping(LoraConfig, {"rank": 16} | values, "test")


def shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in empty(config).named_parameters()}


def test_a_weight_is_used_as_often_as_the_plan_calls_its_stack() -> None:
    hrm, looped = preset("tiny", H_cycles=2, L_cycles=3), preset("tiny", architecture="looped", cycles=4)
    assert [num_calls(hrm, name) for name in (L_WEIGHT, H_WEIGHT)] == [6, 2]
    assert num_calls(looped, "model.S_module.layers.1.attn.gqkv_proj.weight") == 4
    assert num_calls(hrm, "lm_head.weight") == num_calls(hrm, "model.embed_tokens.weight") == 1


@pytest.mark.parametrize(("calls", "divisor"), [("divide", 6), ("root", 6**0.5), ("ignore", 1)])
def test_the_scale_is_alpha_over_rank_and_over_what_calls_say(calls: str, divisor: float) -> None:
    config = preset("tiny", H_cycles=2, L_cycles=3)
    assert scale(lora(rank=8, alpha=4.0, calls=calls), config, L_WEIGHT) == pytest.approx(0.5 / divisor)
    assert scale(lora(rank=8, alpha=4.0, calls=calls), config, "lm_head.weight") == 0.5


def test_patterns_choose_the_matrices() -> None:
    every = shapes(preset("tiny"))
    blocks = [name for name in every if "layers" in name]
    assert adapted(lora(), every) == blocks
    assert len(blocks) == 8 and len(every) == 10
    attention = adapted(lora(match=["*.attn.*", "lm_head.*"]), every)
    assert attention == [name for name in every if ".attn." in name or name == "lm_head.weight"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"match": ["*.attn.qkv*"]}, r"lora.match: '\*.attn.qkv\*' matches none of the 10 weights, such as 'model"),
        ({"match": []}, "lora.match: no pattern, expected at least one"),
        ({"rank": 65}, r"lora.rank is 65, but 'model.H_module.layers.0.attn.gqkv_proj.weight' \[256, 64\] has rank 64"),
    ],
)
def test_what_cannot_be_adapted_is_an_error(values: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        adapted(lora(**values), shapes(preset("tiny")))


def test_merging_adds_the_scaled_product_and_leaves_the_rest() -> None:
    config, settings = preset("tiny"), lora(rank=2, alpha=6.0)
    torch.manual_seed(0)
    base = {L_WEIGHT: torch.randn(64, 64), H_WEIGHT: torch.randn(64, 192)}
    a, b = torch.randn(2, 64), torch.randn(64, 2)
    result = merged(base, {L_WEIGHT + ".lora_A": a, L_WEIGHT + ".lora_B": b}, settings, config)
    expected = base[L_WEIGHT].double() + 3.0 / 6 * b.double() @ a.double()
    torch.testing.assert_close(result[L_WEIGHT].double(), expected, rtol=0, atol=1e-6)
    assert result[H_WEIGHT] is base[H_WEIGHT]
    zero = merged(base, {L_WEIGHT + ".lora_A": a, L_WEIGHT + ".lora_B": torch.zeros(64, 2)}, settings, config)
    assert torch.equal(zero[L_WEIGHT], base[L_WEIGHT])


def test_an_adapter_that_does_not_fit_is_an_error() -> None:
    config, base = preset("tiny"), {L_WEIGHT: torch.zeros(64, 64)}
    a, b = torch.zeros(2, 64), torch.zeros(64, 2)
    with pytest.raises(UserError, match="lora_B' is missing"):
        merged(base, {L_WEIGHT + ".lora_A": a}, lora(), config)
    with pytest.raises(UserError, match="cannot be merged: 'model.H_module.*' is missing"):
        merged(base, {H_WEIGHT + ".lora_A": a, H_WEIGHT + ".lora_B": b}, lora(), config)
    with pytest.raises(UserError, match=r"shapes \[64, 2\] and \[2, 63\], which do not fit a weight of \[64, 64\]"):
        merged(base, {L_WEIGHT + ".lora_A": a[:, 1:], L_WEIGHT + ".lora_B": b}, lora(), config)
