from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from hrm_text.model.attention import Spans
from hrm_text.model.config import ModelConfig
from hrm_text.model.kernels import packed_attention
from hrm_text.model.lora import LoraConfig, merged
from hrm_text.model.recurrence import RecurrentLM, build
from hrm_text.settings import from_mapping
from hrm_text.train.lora import Adapters
from hrm_text.train.optimizer import AdamAtan2

LORA = {"rank": 3, "alpha": 6.0}


@pytest.fixture
def model_config() -> ModelConfig:
    values = {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "head_dim": 16, "inner_multiple": 16}
    return from_mapping(ModelConfig, values | {"vocab_size": 256, "max_position_embeddings": 64}, "test")


def adapters_of(model: RecurrentLM, base: dict[str, Tensor], seed: int = 0, **changes: object) -> Adapters:
    lora = from_mapping(LoraConfig, LORA | changes, "test")
    return Adapters(dict(model.named_parameters()), base, lora, model.config, seed)


def loss_of(model: nn.Module, weights: dict[str, Tensor]) -> Tensor:
    """The mean of squares of what the model makes of 11 ids with these weights."""
    generator = torch.Generator().manual_seed(5)
    ids, positions = torch.randint(0, 256, (11,), generator=generator), torch.arange(11)
    attention = packed_attention(Spans.of_samples(torch.tensor([11]), torch.tensor([4])), 11, torch.device("cpu"))
    hidden = functional_call(model, weights, (ids, positions, attention, 8))
    target = torch.randn(hidden.shape, generator=generator).to(hidden.dtype)
    return (hidden - target).square().mean()


def shaken(adapters: Adapters) -> None:
    """B as it may be in the middle of a run."""
    generator = torch.Generator().manual_seed(3)
    for name, parameter in adapters.parameters.items():
        if name.endswith("lora_B"):
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    adapters.apply()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_run_begins_as_its_base_model_to_the_bit(model_config: ModelConfig, dtype: torch.dtype) -> None:
    base = dict(build(model_config, seed=1).named_parameters())
    model = build(model_config, seed=2, dtype=dtype)
    adapters_of(model, {name: weight.detach() for name, weight in base.items()})
    for name, parameter in model.named_parameters():
        is_adapted = "layers" in name
        assert torch.equal(parameter, base[name].to(dtype)) == is_adapted, name
        assert parameter.requires_grad == is_adapted


def test_gradients_are_those_of_autograd_through_w_plus_s_b_a(model_config: ModelConfig) -> None:
    model = build(model_config, seed=1)
    base = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    adapters = adapters_of(model, base)
    shaken(adapters)
    exact = copy.deepcopy(model).double()
    leaves = {name: p.detach().double().requires_grad_() for name, p in adapters.parameters.items()}
    weights = {name: weight.double() for name, weight in base.items()}
    for name, s in adapters.scales.items():
        weights[name] = weights[name] + s * leaves[name + ".lora_B"] @ leaves[name + ".lora_A"]
    loss_of(exact, weights).backward()

    loss_of(model, {}).backward()
    found = adapters.gradients({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert found.keys() == leaves.keys()
    for name, leaf in leaves.items():
        assert leaf.grad is not None
        size = leaf.grad.abs().max().item()
        torch.testing.assert_close(found[name].double(), leaf.grad, rtol=0, atol=1e-4 * size, msg=name)
        assert size > 0
    # The calls of a stack are in the scale: L runs six times and H twice.
    by_stack = {name.split(".")[1]: s for name, s in adapters.scales.items()}
    assert by_stack == {"L_module": pytest.approx(2 / 6), "H_module": pytest.approx(2 / 2)}


def test_a_step_is_that_of_the_optimizer_on_a_and_b(model_config: ModelConfig) -> None:
    model = build(model_config, seed=1)
    base = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    adapters = adapters_of(model, base)
    shaken(adapters)
    settings = {"lr": 1e-2, "weight_decay": 0.1, "ema_decay": 0.9}
    leaves = {name: nn.Parameter(p.detach().double().float()) for name, p in adapters.parameters.items()}
    brute, ours = AdamAtan2(leaves.items(), **settings), AdamAtan2(adapters.parameters.items(), **settings)  # type: ignore[arg-type]
    for _ in range(3):
        weights = dict(base)
        for name, s in adapters.scales.items():
            weights[name] = base[name] + s * leaves[name + ".lora_B"] @ leaves[name + ".lora_A"]
        brute.zero_grad()
        loss_of(copy.deepcopy(model), weights).backward()
        brute.step()

        model.zero_grad()
        loss_of(model, {}).backward()
        ours.step(adapters.gradients({name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
        adapters.apply()
    for name, leaf in leaves.items():
        torch.testing.assert_close(adapters.parameters[name], leaf, rtol=1e-3, atol=2e-5, msg=name)
    lora = from_mapping(LoraConfig, LORA, "test")
    averaged = ours.ema_weights()
    for live, context in ((adapters.parameters, None), (averaged, adapters.applied(averaged))):
        expected = merged(base, dict(live), lora, model_config)
        if context is not None:
            context.__enter__()
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, expected[name]), name
        if context is not None:
            context.__exit__(None, None, None)
    assert all(torch.equal(p, merged(base, dict(adapters.parameters), lora, model_config)[name])
               for name, p in model.named_parameters())  # fmt: skip


def test_rounding_never_adds_up_and_the_base_is_kept_exactly(model_config: ModelConfig) -> None:
    """bf16 parameters are W + s B A, rounded once, after however many steps there and back."""
    base = {name: weight.detach() for name, weight in build(model_config, seed=1).named_parameters()}
    model = build(model_config, seed=1, dtype=torch.bfloat16)
    adapters = adapters_of(model, base)
    first = {name: p.detach().clone() for name, p in model.named_parameters()}
    for _ in range(20):
        shaken(adapters)
        assert any(not torch.equal(p, first[name]) for name, p in model.named_parameters())
        for name, parameter in adapters.parameters.items():
            if name.endswith("lora_B"):
                parameter.data.zero_()
        adapters.apply()
    assert all(torch.equal(p, first[name]) for name, p in model.named_parameters())
    # A base that was stored in bf16 is kept in bf16, for half of the memory.
    rounded = {name: weight.bfloat16().float() for name, weight in base.items()}
    kinds = {weight.dtype for weight in adapters_of(model, rounded)._base.values()}
    assert kinds == {torch.bfloat16}
    assert {weight.dtype for weight in adapters._base.values()} == {torch.float32}


def test_a_depends_on_the_seed_alone(model_config: ModelConfig) -> None:
    base = {name: weight.detach() for name, weight in build(model_config, seed=1).named_parameters()}

    def drawn(seed: int, dtype: torch.dtype) -> dict[str, nn.Parameter]:
        return adapters_of(build(model_config, seed=9, dtype=dtype), base, seed).parameters

    one, same, other = drawn(0, torch.float32), drawn(0, torch.bfloat16), drawn(1, torch.float32)
    for name in one:
        assert torch.equal(one[name], same[name])
        assert torch.equal(one[name], other[name]) == name.endswith("lora_B")
    a = torch.cat([p.flatten() for name, p in one.items() if name.endswith("o_proj.weight.lora_A")])
    assert a.std().item() == pytest.approx(32**-0.5, rel=0.2)


def test_a_weight_without_a_gradient_gives_its_adapter_none(model_config: ModelConfig) -> None:
    model = build(model_config, seed=1)
    base = {name: weight.detach() for name, weight in model.named_parameters()}
    adapters = adapters_of(model, base)
    name = next(iter(adapters.scales))
    gradients = adapters.gradients({name: torch.ones_like(base[name]), "lm_head.weight": torch.ones(256, 32)})
    assert set(gradients) == {name + ".lora_A", name + ".lora_B"}


@pytest.mark.parametrize("match", ["model.*_module.layers.*", "*.attn.*"])
def test_fused_blocks_give_the_same_gradients(match: str) -> None:
    """Their backward pass writes the gradients of the matrices itself: on a GPU, or in Triton's interpreter."""
    pytest.importorskip("triton", reason="the kernels are written in Triton, which is not installed")
    from hrm_text.model.kernels.fused import fuse
    from hrm_text.model.kernels.triton_attention import TritonAttention

    device = "cuda" if torch.cuda.is_available() else "cpu"
    sizes = {"hidden_size": 24, "num_layers": 2, "num_heads": 2, "head_dim": 16, "inner_multiple": 8, "H_cycles": 1}
    values = sizes | {"L_cycles": 1, "vocab_size": 32, "max_position_embeddings": 64}
    plain = build(from_mapping(ModelConfig, values, "test"), seed=1, device=device)
    base = {name: weight.detach().clone() for name, weight in plain.named_parameters()}
    spans = Spans.of_samples(torch.tensor([7, 5]), torch.tensor([3, 0]))
    positions = torch.cat([torch.arange(7), torch.arange(5)]).to(device)
    ids = torch.randint(32, (12,), generator=torch.Generator().manual_seed(0)).to(device)
    wanted = torch.randn(12, 24, generator=torch.Generator().manual_seed(2)).to(device)
    found = []
    for fused in (False, True):
        model = copy.deepcopy(plain)
        if fused:
            fuse(model, recompute="some")
        adapters = adapters_of(model, base, match=[match])
        shaken(adapters)
        attention = TritonAttention(spans, 12, torch.device(device))
        (model(ids, positions, attention, 2) * wanted).sum().backward()
        found.append(adapters.gradients({name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
    assert found[0].keys() == found[1].keys() == adapters.parameters.keys()
    for name, gradient in found[0].items():
        size = gradient.abs().max().item()
        assert size > 0
        torch.testing.assert_close(found[1][name], gradient, rtol=0, atol=2e-4 * size, msg=name)
