from __future__ import annotations

from typing import Any

import pytest

from hrm_text.contracts import UserError
from hrm_text.model.config import PRESETS, RECURRENCE, ModelConfig, preset
from hrm_text.model.weights import empty
from hrm_text.settings import from_mapping


@pytest.mark.parametrize(
    ("size", "billions", "cache_bytes"),
    [
        ("B", 0.30, 196_608),
        ("L", 0.69, 491_520),
        ("XL", 1.18, 786_432),
        ("XXL", 3.27, 2_064_384),
        ("XXL_wide", 3.08, 1_310_720),
    ],
)
def test_the_papers_sizes_have_the_papers_parameters_and_cache(size: str, billions: float, cache_bytes: int) -> None:
    config = preset(size)
    assert round(config.num_parameters / 1e9, 2) == billions
    assert config.cache_bytes_per_token() == cache_bytes


@pytest.mark.parametrize("size", list(PRESETS))
@pytest.mark.parametrize("architecture", list(RECURRENCE))
def test_the_counted_parameters_are_those_of_the_module(size: str, architecture: str) -> None:
    config = preset(size, architecture=architecture)
    assert config.num_parameters == sum(parameter.numel() for parameter in empty(config).parameters())


def test_the_released_model_has_its_published_shape() -> None:
    config = preset("XL")
    assert (config.intermediate_size, config.attention_size, config.num_calls, config.num_cache_slots) == (
        4096,
        1536,
        8,
        128,
    )
    assert config.stacks == {"L": 16, "H": 16}
    assert config.embedding_std == pytest.approx(1536**-0.5)


@pytest.mark.parametrize(
    ("architecture", "stacks", "calls", "k"),
    [
        ("hrm", {"L": 4, "H": 4}, 8, 5),
        ("trm", {"S": 8}, 4, 2),
        ("trm_match_recurrence", {"S": 4}, 8, 5),
        ("rins", {"L": 4, "H": 4}, 8, 5),
        ("looped", {"S": 8}, 4, 2),
        ("transformer", {"S": 8}, 1, 1),
    ],
)
def test_each_architecture_has_its_own_recurrence(architecture: str, stacks: Any, calls: int, k: int) -> None:
    config = preset("S", architecture=architecture)
    assert (config.stacks, config.num_calls, config.bp_steps) == (stacks, calls, k)
    assert config.num_cache_slots == calls * next(iter(stacks.values()))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "hmr"}, "architecture"),
        ({"architecture": "looped", "H_cycles": 2}, "H_cycles = 2 means nothing to architecture 'looped'"),
        ({"architecture": "transformer", "cycles": 2}, "cycles = 2 means nothing"),
        ({"num_layers": 3}, "num_layers must be even"),
        ({"head_dim": 31}, "head_dim must be even"),
        ({"hidden_size": 0}, "hidden_size must be positive"),
        ({"bp_steps": 9}, "bp_steps must be 2 to 8"),
        ({"bp_steps": 1}, "bp_steps must be 2 to 8"),
        ({"hiden_size": 64}, "unknown key 'hiden_size'; did you mean 'hidden_size'"),
    ],
)
def test_a_bad_setting_is_one_clear_error(changes: dict[str, Any], message: str) -> None:
    values = {"num_layers": 2, "hidden_size": 64, "num_heads": 2} | changes
    with pytest.raises(UserError, match=message):
        from_mapping(ModelConfig, values, "config.yaml: model")


def test_an_unknown_size_or_setting_of_a_preset_is_named() -> None:
    with pytest.raises(UserError, match="unknown size 'XLL'; the sizes are tiny, .*did you mean 'XL'"):
        preset("XLL")
    with pytest.raises(UserError, match=r"preset\('B'\): unknown key 'num_layer'; did you mean 'num_layers'"):
        preset("B", num_layer=3)


def test_a_short_recurrence_backpropagates_through_all_it_has() -> None:
    assert preset("tiny", H_cycles=1, L_cycles=1).bp_steps == 2
    assert preset("tiny", architecture="rins", cycles=2).bp_steps == 3
