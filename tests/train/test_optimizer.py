from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from hrm_text.contracts import UserError
from hrm_text.settings import from_mapping
from hrm_text.train.config import Override
from hrm_text.train.optimizer import AdamAtan2, joined, split_

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
without_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
both_paths = pytest.mark.parametrize("fused", [False, pytest.param(True, marks=without_triton)])
SHAPES = {"embedding": (5, 3), "block.weight": (4, 4), "bias": (7,)}


def parameters(dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: nn.Parameter(torch.randn(shape, generator=generator).to(DEVICE, dtype)) for name, shape in SHAPES.items()
    }


def gradients(steps: int, scale: float = 1.0) -> list[dict[str, Tensor | None]]:
    """Gradients of very different sizes; the embedding has none for the first third and at every seventh step."""
    generator = torch.Generator().manual_seed(1)
    result: list[dict[str, Tensor | None]] = []
    for step in range(steps):
        grads: dict[str, Tensor | None] = {
            name: scale * 10.0 ** (index * 3 - 4) * torch.randn(shape, generator=generator)
            for index, (name, shape) in enumerate(SHAPES.items())
        }
        if step < steps // 3 or step % 7 == 0:
            grads["embedding"] = None
        result.append(grads)
    return result


def train(optimizer: AdamAtan2, grads: Sequence[dict[str, Tensor | None]], lr: float | None = None) -> None:
    for step_grads in grads:
        for name, parameter in optimizer.parameters.items():
            grad = step_grads[name]
            parameter.grad = None if grad is None else grad.to(DEVICE, parameter.dtype)
        if lr is not None:
            optimizer.lr = lr
        optimizer.step()


def scalar_oracle(
    p: float, grads: Sequence[float], lrs: Sequence[float], b1: float, b2: float, decay: float, ema_decay: float
) -> tuple[float, float, float, float]:
    """The formula of the specification for one weight, in float64: (p, m, v, ema)."""
    m = v = 0.0
    ema = p
    for t, (g, lr) in enumerate(zip(grads, lrs, strict=True), start=1):
        p *= 1 - lr * decay
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g * g
        p -= lr / (1 - b1**t) * math.atan2(m, math.sqrt(v) / math.sqrt(1 - b2**t))
        ema = ema_decay * ema + (1 - ema_decay) * p
    return p, m, v, ema


@both_paths
def test_fifty_steps_are_those_of_the_scalar_formula(fused: bool) -> None:
    b1, b2, decay, ema_decay = 0.8, 0.97, 0.3, 0.9
    params = parameters()
    start = {name: p.detach().double().flatten().tolist() for name, p in params.items()}
    optimizer = AdamAtan2(params.items(), lr=0.0, betas=(b1, b2), weight_decay=decay, ema_decay=ema_decay, fused=fused)
    grads = gradients(50)
    lrs = [0.01 * (1 + step % 5) for step in range(50)]
    for step_grads, lr in zip(grads, lrs, strict=True):
        train(optimizer, [step_grads], lr)

    state = optimizer.state_dict()
    for name, shape in SHAPES.items():
        expected = torch.empty(4, math.prod(shape), dtype=torch.float64)
        for index in range(math.prod(shape)):
            series = [0.0 if (g := step[name]) is None else float(g.flatten()[index]) for step in grads]
            expected[:, index] = torch.tensor(
                scalar_oracle(start[name][index], series, lrs, b1, b2, decay, ema_decay), dtype=torch.float64
            )
        p, m, v, ema = expected.view(4, *shape)
        torch.testing.assert_close(params[name].detach().double().cpu(), p, rtol=2e-6, atol=2e-6)
        torch.testing.assert_close(
            state["exp_avg"][name].double().cpu(), m, rtol=1e-5, atol=float(m.abs().max()) * 1e-6
        )
        torch.testing.assert_close(state["exp_avg_sq"][name].double().cpu(), v, rtol=1e-5, atol=0)
        torch.testing.assert_close(optimizer.ema_weights()[name].double().cpu(), ema, rtol=2e-6, atol=2e-6)


def test_a_weight_without_gradient_only_decays() -> None:
    params = parameters()
    before = {name: p.detach().clone() for name, p in params.items()}
    optimizer = AdamAtan2(params.items(), lr=0.1, weight_decay=0.5)
    optimizer.step()
    for name, parameter in params.items():
        torch.testing.assert_close(parameter.detach(), before[name] * 0.95)


def test_a_missing_gradient_equals_a_zero_gradient() -> None:
    missing, zero = (AdamAtan2(parameters().items(), lr=0.01) for _ in range(2))
    grads = gradients(20)
    filled: list[dict[str, Tensor | None]] = [
        {n: torch.zeros(SHAPES[n]) if g is None else g for n, g in step.items()} for step in grads
    ]
    train(missing, grads)
    train(zero, filled)
    for name in SHAPES:
        assert torch.equal(missing.parameters[name], zero.parameters[name])
        assert torch.equal(missing.ema_weights()[name], zero.ema_weights()[name])


def test_the_update_does_not_depend_on_the_scale_of_the_gradient() -> None:
    plain, scaled = (AdamAtan2(parameters().items(), lr=0.01) for _ in range(2))
    train(plain, gradients(30))
    train(scaled, gradients(30, scale=1000.0))
    for name in SHAPES:
        torch.testing.assert_close(plain.parameters[name], scaled.parameters[name], rtol=1e-5, atol=1e-6)


def test_the_first_step_moves_every_weight_by_almost_the_learning_rate() -> None:
    optimizer = AdamAtan2(parameters().items(), lr=0.01, weight_decay=0.0)
    before = optimizer.parameters["bias"].detach().clone()
    train(optimizer, [{name: torch.full(shape, 1e-12) for name, shape in SHAPES.items()}])
    # m = (1 - b1) g against sqrt(v) / sqrt(1 - b2) = |g|
    moved = 0.01 * math.atan(0.1) / 0.1
    torch.testing.assert_close(
        before - optimizer.parameters["bias"].detach(), torch.full((7,), moved, device=DEVICE), rtol=1e-3, atol=0
    )


@both_paths
def test_bf16_parameters_are_the_rounded_copy_of_fp32_weights_that_lose_nothing(fused: bool) -> None:
    half = AdamAtan2(parameters(torch.bfloat16).items(), lr=1e-4, fused=fused)
    full = AdamAtan2(((n, nn.Parameter(p.detach().float())) for n, p in half.parameters.items()), lr=1e-4, fused=fused)
    grads = [{n: None if g is None else g.bfloat16().float() for n, g in step.items()} for step in gradients(40)]
    before = {name: p.detach().clone() for name, p in half.parameters.items()}
    train(half, grads)
    train(full, grads)
    master = half.state_dict()["weights"]
    for name, parameter in half.parameters.items():
        assert parameter.dtype == torch.bfloat16
        assert master[name].dtype == half.ema_weights()[name].dtype == torch.float32
        assert torch.equal(master[name], full.parameters[name])
        assert torch.equal(half.ema_weights()[name], full.ema_weights()[name])
        assert torch.equal(parameter, master[name].bfloat16())  # no tie among these
    # Steps of 1e-4 vanish in bf16 one by one and add up in fp32: that is what the remainder is for.
    assert not torch.equal(half.parameters["bias"], before["bias"])


@given(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=50))
def test_parameter_and_remainder_are_the_weight_to_the_bit(bits: list[int]) -> None:
    """Whatever 32 bits it has: infinities, NaNs and the largest numbers, which round to infinity, included."""
    weight = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    parameter, remainder = torch.empty(len(bits), dtype=torch.bfloat16), torch.empty(len(bits), dtype=torch.int16)
    split_(weight, parameter, remainder)
    assert torch.equal(joined(parameter, remainder).view(torch.int32), weight.view(torch.int32))
    ordinary = weight.isfinite()
    nearest = weight.bfloat16()
    ties = remainder == -(2**15)
    assert torch.equal(parameter[ordinary & ~ties], nearest[ordinary & ~ties])
    # Midway between two, the one farther from zero; "nearest" takes the even one.
    assert bool((parameter.float().abs() > weight.abs())[ordinary & ties].all())


@both_paths
def test_a_step_that_is_not_finite_changes_nothing(fused: bool) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        optimizer = AdamAtan2(parameters(dtype).items(), lr=0.01, fused=fused)
        bad = {name: torch.full(shape, math.nan, device=DEVICE, dtype=dtype) for name, shape in SHAPES.items()}
        for taken in range(3):
            before = snapshot(optimizer)
            optimizer.step(bad, finite=torch.tensor(False, device=DEVICE))
            assert all(torch.equal(x, y) for x, y in zip(before, snapshot(optimizer), strict=True))
            assert optimizer.step_count == taken
            train(optimizer, gradients(1))
        following = AdamAtan2(parameters(dtype).items(), lr=0.01, fused=fused)
        for _ in range(3):
            for name, grad in gradients(1)[0].items():
                following.parameters[name].grad = None if grad is None else grad.to(DEVICE, dtype)
            following.step(finite=torch.tensor(True, device=DEVICE))
        assert all(torch.equal(x, y) for x, y in zip(snapshot(following), snapshot(optimizer), strict=True))


def snapshot(optimizer: AdamAtan2) -> list[Tensor]:
    """All that a step may change."""
    state = optimizer.state_dict()
    groups = ("weights", "exp_avg", "exp_avg_sq", "ema")
    values = [state["step"], *optimizer.parameters.values(), *(x for key in groups for x in state[key].values())]
    return [value.detach().clone() for value in values]


@both_paths
def test_overrides_are_the_settings_of_an_optimizer_of_their_own(fused: bool) -> None:
    overrides = [
        Override(match="*", lr_scale=3.0),
        Override(match="block.*", lr_scale=0.5, weight_decay=0.0),
        Override(match="bias", weight_decay=0.7),
    ]
    mixed = AdamAtan2(parameters().items(), lr=0.01, overrides=overrides, fused=fused)
    train(mixed, gradients(10), lr=0.02)
    for name, lr, weight_decay in (("embedding", 0.06, 0.1), ("block.weight", 0.01, 0.0), ("bias", 0.02, 0.7)):
        alone = AdamAtan2(parameters().items(), lr=0.0, weight_decay=weight_decay, fused=fused)
        train(alone, gradients(10), lr=lr)
        assert torch.equal(mixed.parameters[name], alone.parameters[name])
        assert torch.equal(mixed.ema_weights()[name], alone.ema_weights()[name])


def test_an_override_of_nothing_is_refused() -> None:
    with pytest.raises(UserError, match=r"'norm\*' matches none of the 3 parameters, .* such as '(embedding|b.*)'"):
        AdamAtan2(parameters().items(), lr=0.1, overrides=[Override(match="norm*")])


@pytest.mark.parametrize("bad", [{"lr_scale": -1.0}, {"weight_decay": float("nan")}, {"lr_scale": float("inf")}])
def test_an_override_out_of_range_is_refused(bad: dict[str, float]) -> None:
    with pytest.raises(UserError, match=next(iter(bad))):
        from_mapping(Override, {"match": "*", **bad}, "here")


def test_dtypes_that_cannot_be_trained_are_refused() -> None:
    for dtype in (torch.float16, torch.float64):
        with pytest.raises(UserError, match=f"'embedding' is {dtype}"):
            AdamAtan2(parameters(dtype).items(), lr=0.1)


def test_fp32_parameters_have_no_second_copy() -> None:
    optimizer = AdamAtan2(parameters().items(), lr=0.1)
    weights = optimizer.state_dict()["weights"]
    assert all(weights[name].data_ptr() == p.data_ptr() for name, p in optimizer.parameters.items())


@both_paths
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_restored_optimizer_continues_to_the_bit(dtype: torch.dtype, fused: bool) -> None:
    grads = gradients(30)
    whole = AdamAtan2(parameters(dtype).items(), lr=0.01, fused=fused)
    train(whole, grads)

    first = AdamAtan2(parameters(dtype).items(), lr=0.01, fused=fused)
    train(first, grads[:17])
    weights = {name: p.detach().clone() for name, p in first.parameters.items()}
    second = AdamAtan2(parameters(dtype, seed=9).items(), lr=0.01, fused=fused)
    for name, parameter in second.parameters.items():
        parameter.data.copy_(weights[name])
    second.load_state_dict(first.state_dict())
    train(second, grads[17:])

    assert second.step_count == 30
    for name in SHAPES:
        assert torch.equal(whole.parameters[name], second.parameters[name])
        for group in ("exp_avg", "exp_avg_sq", "ema"):
            assert torch.equal(whole.state_dict()[group][name], second.state_dict()[group][name])


def test_fp32_parameters_take_the_master_weights_of_a_bf16_run() -> None:
    half = AdamAtan2(parameters(torch.bfloat16).items(), lr=1e-4)
    train(half, gradients(10))
    full = AdamAtan2(parameters(seed=3).items(), lr=1e-4)
    full.load_state_dict(half.state_dict())
    for name, parameter in full.parameters.items():
        assert torch.equal(parameter, half.state_dict()["weights"][name])


def test_state_of_another_model_is_refused_before_anything_changes() -> None:
    optimizer = AdamAtan2(parameters().items(), lr=0.01)
    train(optimizer, gradients(3))
    wide = {**parameters(), "bias": nn.Parameter(torch.ones(8, device=DEVICE))}
    fewer = {name: p for name, p in parameters().items() if name != "bias"}
    other = {**fewer, "norm": nn.Parameter(torch.ones(2, device=DEVICE))}
    before = {name: p.detach().clone() for name, p in optimizer.parameters.items()}
    cases = {
        "'bias' has shape \\[8\\], expected \\[7\\]": AdamAtan2(wide.items(), lr=0.01).state_dict(),
        "weights of 'bias' is missing": AdamAtan2(fewer.items(), lr=0.01).state_dict(),
        "weights of unknown parameter 'norm'": AdamAtan2(other.items(), lr=0.01).state_dict(),
        "no 'step'": {k: v for k, v in optimizer.state_dict().items() if k != "step"},
    }
    for message, state in cases.items():
        with pytest.raises(UserError, match=message):
            optimizer.load_state_dict(state)
    assert optimizer.step_count == 3
    assert all(torch.equal(before[name], p) for name, p in optimizer.parameters.items())


def test_bf16_parameters_take_the_weights_of_an_fp32_run() -> None:
    full = AdamAtan2(parameters().items(), lr=1e-4)
    train(full, gradients(10))
    half = AdamAtan2(parameters(torch.bfloat16, seed=3).items(), lr=1e-4)
    half.load_state_dict(full.state_dict())
    for name, weight in half.state_dict()["weights"].items():
        assert torch.equal(weight, full.parameters[name])


def test_weights_and_averages_change_places_and_back() -> None:
    optimizer = AdamAtan2(parameters().items(), lr=0.1, ema_decay=0.9)
    train(optimizer, gradients(3))
    weights = {name: p.detach().clone() for name, p in optimizer.parameters.items()}
    averages = {name: average.clone() for name, average in optimizer.ema_weights().items()}
    optimizer.exchange_averages()
    assert all(torch.equal(p, averages[name]) for name, p in optimizer.parameters.items())
    optimizer.exchange_averages()
    assert all(torch.equal(p, weights[name]) for name, p in optimizer.parameters.items())
    assert all(torch.equal(average, averages[name]) for name, average in optimizer.ema_weights().items())


def test_frozen_shared_and_absent_parameters_are_refused() -> None:
    shared = nn.Parameter(torch.ones(2))
    for named, message in (
        ([("z", nn.Parameter(torch.ones(2), requires_grad=False))], "'z' is frozen"),
        ([("a", shared), ("b", shared)], "one name"),
        ([], "at least one"),
    ):
        with pytest.raises(ValueError, match=message):
            AdamAtan2(named, lr=0.1)


def test_numbers_out_of_range_are_refused() -> None:
    params = parameters()
    for bad in ({"lr": -1.0}, {"betas": (0.9, 1.0)}, {"ema_decay": 1.5}, {"weight_decay": float("nan")}):
        with pytest.raises(ValueError, match="found lr="):
            AdamAtan2(params.items(), **{"lr": 0.1, **bad})  # type: ignore[arg-type]


def test_zero_grad_drops_the_gradients() -> None:
    optimizer = AdamAtan2(parameters().items(), lr=0.1)
    train(optimizer, gradients(1))
    optimizer.zero_grad()
    assert all(p.grad is None for p in optimizer.parameters.values())
