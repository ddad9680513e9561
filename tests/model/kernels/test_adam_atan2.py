"""The fused update against ``train.optimizer.update``, which defines it: on a GPU, or in Triton's interpreter."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from hrm_text.train.optimizer import AdamAtan2, split_

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from hrm_text.model.kernels import adam_atan2  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
B = adam_atan2.BLOCK
SHAPES = {"one": (1,), "short": (B - 1,), "block": (B,), "long": (2 * B + 3,), "matrix": (33, 65), "empty": (0, 4)}


def optimizers(dtype: torch.dtype) -> tuple[AdamAtan2, AdamAtan2]:
    """(fused, plain) of the same parameters, one of them not contiguous."""

    def made(fused: bool) -> AdamAtan2:
        generator = torch.Generator().manual_seed(0)
        values = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
        values["transposed"] = torch.randn(70, 20, generator=generator).T
        named = {name: nn.Parameter(value.to(DEVICE, dtype)) for name, value in values.items()}
        assert not named["transposed"].is_contiguous()
        return AdamAtan2(named.items(), lr=0.0, betas=(0.8, 0.97), weight_decay=0.3, ema_decay=0.9, fused=fused)

    return made(True), made(False)


@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_equal_the_definition(dtype: torch.dtype, grad_dtype: torch.dtype) -> None:
    """Gradients of many sizes, in another order of memory than the parameter, missing at times; steps not taken."""
    fused, plain = optimizers(dtype)
    generator = torch.Generator().manual_seed(1)
    for step in range(12):
        gradients = {
            name: (10.0 ** (-(step % 5)) * torch.randn(p.shape, generator=generator)).to(DEVICE, grad_dtype)
            for name, p in plain.parameters.items()
            if step % 4 or name not in ("one", "matrix", "transposed")
        }
        finite = torch.tensor(step not in (0, 7), device=DEVICE)
        for optimizer in (fused, plain):
            optimizer.lr = 0.003 * (1 + step % 3)
            optimizer.step(gradients, finite)
    assert fused.step_count == plain.step_count == 10
    ours, definition = fused.state_dict(), plain.state_dict()
    for group, atol in (("weights", 1e-6), ("ema", 1e-6), ("exp_avg", 1e-6), ("exp_avg_sq", 0.0)):
        for name in definition[group]:
            torch.testing.assert_close(ours[group][name], definition[group][name], rtol=2e-6, atol=atol)
    for name, parameter in plain.parameters.items():
        if dtype == torch.float32:
            torch.testing.assert_close(fused.parameters[name], parameter, rtol=2e-6, atol=1e-6)
        else:  # of the two fp32 weights, which differ in their last bits, each is rounded as the definition does it
            rounded, remainder = torch.empty_like(parameter), torch.empty_like(parameter, dtype=torch.int16)
            split_(ours["weights"][name], rounded, remainder)
            assert torch.equal(fused.parameters[name], rounded)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_update_changes_the_version_of_the_parameter(dtype: torch.dtype) -> None:
    """Else autograd would not notice a parameter that changed under it, nor a cache that is keyed by it."""
    fused, _ = optimizers(dtype)
    before = {name: p._version for name, p in fused.parameters.items()}
    fused.step()
    for name, parameter in fused.parameters.items():
        assert (parameter._version > before[name]) == bool(parameter.numel())


@triton.jit
def _atan2(y, x, angle, size, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    result = adam_atan2.atan2_of_positive(tl.load(y + i, mask=i < size), tl.load(x + i, mask=i < size))
    tl.store(angle + i, result, mask=i < size)


def angles(y: Tensor, x: Tensor) -> Tensor:
    result = torch.empty_like(y)
    _atan2[(triton.cdiv(len(y), 4096),)](y, x, result, len(y), BLOCK=4096)
    return result


def test_the_arc_tangent_is_within_two_units_in_the_last_place() -> None:
    generator = torch.Generator().manual_seed(0)
    ratio = torch.cat([torch.linspace(0, 2, 100_000), 10 ** torch.linspace(-30, 30, 100_000), torch.ones(1)])
    scale = 10 ** (6 * torch.rand(len(ratio), generator=generator) - 3)
    y, x = (ratio * scale).to(DEVICE), scale.to(DEVICE)
    y[::2] *= -1
    exact = torch.atan2(y.double(), x.double())
    unit = 2.0 ** (exact.abs().clamp(min=1e-37).log2().floor() - 23)
    assert float(((angles(y, x) - exact).abs() / unit).max()) <= 2


def test_the_arc_tangent_at_the_ends() -> None:
    y = torch.tensor([0.0, -0.0, 0.0, 3.0, -3.0, 1e-45, 1e38, 1e-30], device=DEVICE)
    x = torch.tensor([0.0, 0.0, 5.0, 0.0, 0.0, 0.0, 1e-38, 1e38], device=DEVICE)
    expected = torch.tensor([0.0, 0.0, 0.0, 1.0, -1.0, 1.0, 1.0, 0.0], device=DEVICE) * (math.pi / 2)
    torch.testing.assert_close(angles(y, x), expected, rtol=1e-7, atol=1e-45)
