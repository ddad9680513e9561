"""Each pass against its equation in float64, differentiated by autograd: on a GPU, or in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton", reason="the kernels are written in Triton, which is not installed")

from hrm_text.model.kernels import elementwise

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# The interpreter cuts bf16 off where a GPU rounds.
DTYPES = [torch.float32, *([torch.bfloat16] if DEVICE.type == "cuda" else [])]
EPS = 1e-3

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
# No tokens, fewer than a program takes, and more; widths that are a power of two, and not.
each_size = pytest.mark.parametrize(("tokens", "width"), [(0, 16), (5, 64), (37, 48), (3, 1536)])


def draw(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def exact(x: Tensor) -> Tensor:
    """A leaf of the same values in float64."""
    return x.detach().double().requires_grad_()


def assert_equal(found: Tensor, expected: Tensor) -> None:
    """Up to one rounding to the dtype, and sums in fp32."""
    if found.dtype == torch.bfloat16:
        torch.testing.assert_close(found.double(), expected.detach(), rtol=2**-7, atol=1e-5)
    else:
        torch.testing.assert_close(found.double(), expected.detach(), rtol=1e-5, atol=1e-6)


@each_dtype
@each_size
def test_rms_norm(tokens: int, width: int, dtype: torch.dtype) -> None:
    x_TD = draw(tokens, width, dtype=dtype, seed=0) * 10 ** torch.linspace(-2, 2, tokens, device=DEVICE)[:, None]
    x_TD = x_TD.to(dtype)
    before = x_TD.clone()
    y_TD, rstd_T, same = elementwise.rms_norm(x_TD, EPS)
    x = exact(x_TD)
    y = F.rms_norm(x, (width,), eps=EPS)
    assert_equal(y_TD, y)
    assert rstd_T.dtype == torch.float32
    assert_equal(rstd_T, (x.square().mean(1) + EPS).rsqrt())
    assert torch.equal(x_TD, before) and same is x_TD

    dy_TD, residual_TD = draw(tokens, width, dtype=dtype, seed=1), draw(tokens, width, dtype=dtype, seed=2)
    y.backward(dy_TD.double())
    assert x.grad is not None
    # What comes in of a row, by the factor of its norm, is the measure of its gradient's error; y was rounded.
    scale_T = rstd_T.double() * dy_TD.double().norm(dim=1) + 1e-6
    for residual in (None, residual_TD):
        found_TD = elementwise.rms_norm_gradient(dy_TD, y_TD, rstd_T, residual)
        expected_TD = x.grad if residual is None else x.grad + residual.double()
        assert found_TD.dtype == dtype
        allowed_T = (1e-6 if dtype == torch.float32 else 1e-2) * (scale_T + expected_TD.norm(dim=1))
        assert ((found_TD.double() - expected_TD).norm(dim=1) <= allowed_T).all()


@each_size
def test_rms_norm_gives_a_copy_and_a_multiple(tokens: int, width: int) -> None:
    """The residual stream begins as a copy; FP8 wants the rows times a power of two, and takes it out again."""
    x_TD, dy_TD = (draw(tokens, width, dtype=torch.float32, seed=seed) for seed in (0, 1))
    y_TD, rstd_T, copy_TD = elementwise.rms_norm(x_TD, EPS, copy=True)
    assert torch.equal(copy_TD, x_TD) and (not tokens or copy_TD.data_ptr() != x_TD.data_ptr())
    times8_TD, again_T, _ = elementwise.rms_norm(x_TD, EPS, scale=8.0)
    assert torch.equal(times8_TD, 8 * y_TD) and torch.equal(again_T, rstd_T)
    expected = elementwise.rms_norm_gradient(dy_TD, y_TD, rstd_T)
    torch.testing.assert_close(elementwise.rms_norm_gradient(dy_TD, times8_TD, rstd_T, scale=8.0), expected)
    strided = torch.cat([x_TD, x_TD], 1)[:, :width]
    assert torch.equal(elementwise.rms_norm(strided, EPS)[0], y_TD)


@each_dtype
@pytest.mark.parametrize(("tokens", "heads", "width"), [(0, 2, 16), (5, 4, 16), (37, 3, 32)])
def test_rotation_is_in_place_and_of_these_heads_alone(tokens: int, heads: int, width: int, dtype: torch.dtype) -> None:
    """The heads lie between others, as q and k do between gate and v."""
    whole_TNH = draw(tokens, heads + 3, width, dtype=dtype, seed=0)
    angle = draw(tokens, width // 2, dtype=torch.float32, seed=1) * 3
    before, (cos, sin) = whole_TNH.clone(), (angle.cos(), angle.sin())
    elementwise.rotate_in_place(whole_TNH[:, 2:-1], (cos, sin))
    c, s = cos.double()[:, None], sin.double()[:, None]
    first, second = before[:, 2:-1].double().chunk(2, -1)
    assert_equal(whole_TNH[:, 2:-1], torch.cat([first * c - second * s, second * c + first * s], -1))
    assert torch.equal(whole_TNH[:, :2], before[:, :2]) and torch.equal(whole_TNH[:, -1], before[:, -1])


@each_dtype
@each_size
def test_swiglu(tokens: int, width: int, dtype: torch.dtype) -> None:
    gu_TI, dh_TI = 4 * draw(tokens, 2 * width, dtype=dtype, seed=0), draw(tokens, width, dtype=dtype, seed=1)
    gu = exact(gu_TI)
    g, u = gu.chunk(2, 1)
    h = F.silu(g) * u
    h.backward(dh_TI.double())
    assert gu.grad is not None
    h_TI = elementwise.swiglu(gu_TI)
    assert_equal(h_TI, h)
    dgu_TI, again_TI = elementwise.swiglu_gradient(gu_TI, dh_TI, None)
    assert_equal(dgu_TI, gu.grad)
    assert torch.equal(again_TI, h_TI)
    untouched = torch.full_like(h_TI, 7.0)
    dgu_TI, kept_TI = elementwise.swiglu_gradient(gu_TI, dh_TI, untouched)
    assert kept_TI is untouched and (untouched == 7).all()
    assert_equal(dgu_TI, gu.grad)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # NumPy's word, under the interpreter
def test_swiglu_of_large_gates_is_finite() -> None:
    gu_TI = torch.tensor([[-200.0, 200.0, -1e4, 1e4] * 2], device=DEVICE)
    dgu_TI, h_TI = elementwise.swiglu_gradient(gu_TI, torch.ones(1, 4, device=DEVICE), None)
    torch.testing.assert_close(h_TI, torch.tensor([[0.0, 200.0**2, 0.0, 1e8]], device=DEVICE))
    torch.testing.assert_close(dgu_TI, torch.tensor([[0.0, 200.0, 0.0, 1e4, 0.0, 200.0, 0.0, 1e4]], device=DEVICE))


@each_dtype
@pytest.mark.parametrize(("tokens", "heads", "width"), [(0, 2, 16), (5, 2, 16), (37, 3, 32)])
def test_gate_from_its_product_alone(tokens: int, heads: int, width: int, dtype: torch.dtype) -> None:
    """z = sigmoid(gate) * y; the gate and its gradient are parts of larger tensors, and y is not kept."""
    parts_T4NH = draw(tokens, 4, heads, width, dtype=dtype, seed=0)
    gate_TNH = parts_T4NH[:, 0]
    y, gate = exact(draw(tokens, heads, width, dtype=dtype, seed=1)), exact(gate_TNH)
    z_TNH = (y * gate.sigmoid()).detach().to(dtype)
    dz_TNH = draw(tokens, heads, width, dtype=dtype, seed=2)
    # The equation of the rounded z: y is what gives it exactly.
    y = exact(z_TNH.double() / gate.detach().sigmoid())
    (y * gate.sigmoid()).backward(dz_TNH.double())
    assert y.grad is not None and gate.grad is not None
    dparts_T4NH = torch.full_like(parts_T4NH, 7.0)
    dy_TNH, delta_NT = elementwise.gate_gradient(dz_TNH, z_TNH, gate_TNH, dparts_T4NH[:, 0])
    assert_equal(dy_TNH, y.grad)
    assert_equal(dparts_T4NH[:, 0], gate.grad)
    assert (dparts_T4NH[:, 1:] == 7).all()
    assert delta_NT.dtype == torch.float32
    torch.testing.assert_close(delta_NT.double(), (y.grad * y.detach()).sum(-1).T, rtol=1e-5, atol=1e-4)
