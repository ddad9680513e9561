"""A training step upon given weights: it begins at them exactly, and adapters are trained in the same way."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor

from hrm_text.data.loader import LoaderStep
from hrm_text.model.config import ModelConfig
from hrm_text.model.lora import LoraConfig, merged
from hrm_text.model.recurrence import build
from hrm_text.settings import from_mapping
from hrm_text.train.config import ExecutionConfig, OptimizerConfig
from hrm_text.train.execution import chosen
from hrm_text.train.step import TrainingStep

RandomStep = Callable[..., LoaderStep]


@pytest.fixture
def model_config() -> ModelConfig:
    values = {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "head_dim": 16, "inner_multiple": 16}
    return from_mapping(ModelConfig, values | {"vocab_size": 256, "max_position_embeddings": 64}, "test")


@pytest.fixture
def initial(model_config: ModelConfig) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in build(model_config, seed=7).state_dict().items()}


def training(
    model: ModelConfig, initial: dict[str, Tensor] | None, dtype: str = "float32", rank: int = 0, **optimizer: object
) -> TrainingStep:
    settings = from_mapping(OptimizerConfig, {"lr": {"peak": 1e-2}, "ema_decay": 0.9} | optimizer, "test")
    execution = chosen(from_mapping(ExecutionConfig, {"device": "cpu", "dtype": dtype}, "test"), model)
    lora = from_mapping(LoraConfig, {"rank": rank}, "test") if rank else None
    return TrainingStep(model, settings, execution, seed=1, initial=initial, lora=lora)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_begins_at_the_weights_to_the_last_bit(
    model_config: ModelConfig, initial: dict[str, Tensor], dtype: str
) -> None:
    step = training(model_config, initial, dtype)
    state = step.state()
    for name, weight in initial.items():
        kept = weight.to(step.dtype) if name == "model.z_L_init" else weight  # a buffer lies in the dtype of the run
        assert torch.equal(state[f"weights/{name}"].float(), kept.float()), name
        if name != "model.z_L_init":
            assert torch.equal(state[f"ema/{name}"], weight), name
            assert not state[f"exp_avg/{name}"].any() and not state[f"exp_avg_sq/{name}"].any()
    assert int(state["step"]) == 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapters_begin_at_the_same_loss(
    model_config: ModelConfig, initial: dict[str, Tensor], dtype: str, random_step: RandomStep
) -> None:
    batches = random_step(1)
    # Ties between two bf16 numbers are rounded in two ways: away from zero behind a remainder, to even elsewhere.
    initial = {name: weight.to(torch.bfloat16).float() for name, weight in initial.items()}
    weights, adapters = training(model_config, initial, dtype), training(model_config, initial, dtype, rank=4)
    first, same = weights.run(batches, 5, 1e-2), adapters.run(batches, 5, 1e-2)
    assert torch.equal(first, same)
    # And then they part: one has moved every weight, the other only its adapters.
    assert not torch.equal(weights.run(batches, 5, 1e-2), adapters.run(batches, 5, 1e-2))
    assert {name.rpartition(".")[2] for name in adapters.optimizer.parameters} == {"lora_A", "lora_B"}
    for name, parameter in adapters.model.named_parameters():
        assert torch.equal(parameter, initial[name].to(adapters.dtype)) == ("layers" not in name), name


def test_several_micro_batches_are_one_step_for_adapters(
    model_config: ModelConfig, initial: dict[str, Tensor], random_step: RandomStep
) -> None:
    one, two = random_step(1), random_step(2)
    supervised, samples = one.supervised + two.supervised, one.samples + two.samples
    both = LoaderStep([*one.batches, *two.batches], supervised, samples, one.tokens + two.tokens)
    step = training(model_config, initial, rank=4)
    step.run(both, 5, 1e-2)
    parts = []
    for batches in (one, two):
        part = training(model_config, initial, rank=4)
        assert part.adapters is not None
        part.loss(batches.batches[0], 5).loss.backward()
        of_weights = {name: p.grad for name, p in part.model.named_parameters() if p.grad is not None}
        parts.append(part.adapters.gradients(of_weights))
    for name in step.optimizer.parameters:
        total = (parts[0][name] + parts[1][name]) / supervised
        torch.testing.assert_close(step.state()[f"exp_avg/{name}"], 0.1 * total, rtol=1e-4, atol=1e-9, msg=name)
    assert all(p.grad is None for p in step.model.parameters())


def test_a_step_that_is_not_finite_changes_no_adapter(
    model_config: ModelConfig, initial: dict[str, Tensor], random_step: RandomStep
) -> None:
    step = training(model_config, initial, rank=4)
    step.run(random_step(1), 5, 1e-2)
    before = {name: tensor.clone() for name, tensor in step.state().items()}
    weights = {name: p.detach().clone() for name, p in step.model.named_parameters()}
    step.model.lm_head.weight.data[0, 0] = float("inf")
    assert step.run(random_step(2), 5, 1e-2)[5] == 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in step.state().items())
    assert all(torch.equal(p, weights[name]) for name, p in step.model.named_parameters() if name != "lm_head.weight")


def test_averaged_and_restored_weights_are_those_of_the_adapters(
    model_config: ModelConfig, initial: dict[str, Tensor], random_step: RandomStep
) -> None:
    step = training(model_config, initial, rank=4)
    for seed in (1, 2, 3):
        step.run(random_step(seed), 5, 1e-2)
    state = {name: tensor.clone() for name, tensor in step.state().items()}
    assert not any(name.endswith(("z_L_init", "lm_head.weight")) for name in state)
    lora = from_mapping(LoraConfig, {"rank": 4}, "test")
    expected = {
        group: merged(initial, {n.removeprefix(group): t for n, t in state.items() if n.startswith(group)}, lora,
                      model_config) for group in ("weights/", "ema/")
    }  # fmt: skip
    with step.averaged_weights():
        assert all(torch.equal(p, expected["ema/"][name]) for name, p in step.model.named_parameters())
    assert all(torch.equal(p, expected["weights/"][name]) for name, p in step.model.named_parameters())
    assert not torch.equal(expected["weights/"][name := "model.L_module.layers.0.attn.o_proj.weight"],
                           expected["ema/"][name])  # fmt: skip

    def fill(tensors: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, tensor in tensors.items():
                tensor.copy_(state[name])

    other = training(model_config, initial, rank=4)
    other.restore(fill)
    assert all(torch.equal(p, expected["weights/"][name]) for name, p in other.model.named_parameters())
    assert torch.equal(other.run(random_step(4), 5, 1e-2), step.run(random_step(4), 5, 1e-2))
    assert all(torch.equal(tensor, step.state()[name]) for name, tensor in other.state().items())


def test_overrides_reach_adapters_by_name(
    model_config: ModelConfig, initial: dict[str, Tensor], random_step: RandomStep
) -> None:
    step = training(model_config, initial, rank=4, overrides=[{"match": "*.lora_A", "lr_scale": 0.0}])
    before = {name: p.detach().clone() for name, p in step.optimizer.parameters.items()}
    step.run(random_step(1), 5, 1e-2)
    for name, parameter in step.optimizer.parameters.items():
        assert torch.equal(parameter, before[name]) == name.endswith("lora_A"), name
