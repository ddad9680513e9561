"""What becomes of numbers in FP8: on a GPU, or in Triton's interpreter with fp32 in its place.

The interpreter forgets to carry when it rounds to FP8 (0.99 becomes 0.5). With fp32 for FP8, all that is left to test,
the scales, the layouts and what is multiplied with what, has to be exact.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from hrm_text.model.attention import PlainAttention, Spans
from hrm_text.model.config import ModelConfig
from hrm_text.model.recurrence import RecurrentLM, build

pytest.importorskip("triton", reason="the kernels are written in Triton, which is not installed")

from hrm_text.model.kernels import elementwise, float8, float8_passes, fused
from hrm_text.model.kernels.float8 import LARGEST, Matrix, Rows
from hrm_text.model.kernels.triton_attention import TritonAttention

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"
HAS_PRODUCTS = ON_GPU and torch.version.hip is None and torch.cuda.get_device_capability() >= (8, 9)

FLOAT8 = torch.float8_e4m3fn if ON_GPU else torch.float32
STEP = 2.0**-4 if ON_GPU else 0.0
"""Largest relative error of a number in e4m3, which has three bits behind the point."""
LEAST = 2.0**-6 if ON_GPU else 0.0
"""The smallest number of e4m3 with all of its bits; those below are LEAST / 8 apart."""
FP32 = 1e-6
"""Relative error of what is computed in fp32 on the way."""


@pytest.fixture(autouse=True)
def exact_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (float8, float8_passes):
        monkeypatch.setattr(module, "FLOAT8", FLOAT8)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def read(rows: Rows) -> Tensor:
    """The numbers that they stand for."""
    return rows.values_TC.float() * rows.inverse_T[:, None]


def assert_power_of_two(x: Tensor) -> None:
    assert x.dtype == torch.float32
    mantissa, _ = torch.frexp(x)
    assert (mantissa == 0.5).all()


def assert_near(rows: Rows, exact_TC: Tensor) -> None:
    """As near as e4m3 is, with the row's scale a power of two that brings the largest number just below 448."""
    assert rows.values_TC.dtype == FLOAT8
    assert_power_of_two(rows.inverse_T)
    largest_T = exact_TC.abs().amax(1)
    scaled_T = (largest_T / rows.inverse_T)[largest_T > 0]
    assert ((scaled_T > LARGEST / 2 * (1 - FP32)) & (scaled_T <= LARGEST * (1 + FP32))).all()
    assert (rows.inverse_T[largest_T == 0] == 1).all()
    allowed_TC = (STEP + FP32) * exact_TC.abs() + LEAST / 8 * rows.inverse_T[:, None]
    assert ((read(rows) - exact_TC).abs() <= allowed_TC).all()


@pytest.mark.parametrize(("tokens", "width"), [(0, 16), (37, 48), (5, 64)])
def test_rows_of_any_size_and_of_zeros(tokens: int, width: int) -> None:
    x_TC = draw(tokens, width) * 10 ** torch.linspace(-12, 12, tokens, device=DEVICE)[:, None]
    x_TC[2:4] = 0
    if tokens:
        x_TC[1, 1:] = 0  # one number alone
    assert_near(float8.quantise_rows(x_TC), x_TC)


def test_no_row_saturates_whatever_its_largest_number() -> None:
    """Those that a power of two brings to 448, to just below and to just above."""
    edge = LARGEST * 2.0 ** torch.arange(-30, 30, device=DEVICE)
    above, below = torch.nextafter(edge, edge * 2), torch.nextafter(edge, edge / 2)
    x_TC = torch.stack([torch.cat([edge, above, below]), torch.ones(180, device=DEVICE)], 1).repeat(1, 8).contiguous()
    rows = float8.quantise_rows(x_TC)
    assert rows.values_TC.float().isfinite().all()
    assert_near(rows, x_TC)


@pytest.mark.filterwarnings("ignore:invalid value encountered", "ignore:divide by zero")  # NumPy's, interpreted
@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_what_is_not_finite_does_not_become_a_number(bad: float) -> None:
    """Else a step that has to be skipped would be taken."""
    x_TC = draw(3, 16)
    x_TC[1, 5] = bad
    found = read(float8.quantise_rows(x_TC))
    assert not found[1, 5].isfinite()
    assert found[[0, 2]].isfinite().all()


@pytest.mark.parametrize("width", [24, 64, 1536, 4096])
def test_normed_rows_fit_whatever_was_normed(width: int) -> None:
    """All in one number is the worst: it becomes sqrt(width)."""
    scale = float8.norm_scale(width)
    assert LARGEST / 2 < scale * width**0.5 <= LARGEST
    x_TD = torch.zeros(2, width, device=DEVICE)
    x_TD[0, 3], x_TD[1] = -1e6, 1e-3
    n_TD, _, _ = elementwise.rms_norm(x_TD, 1e-12, dtype=FLOAT8, scale=scale)
    expected = torch.zeros(2, width, device=DEVICE)
    expected[0, 3], expected[1] = -(width**0.5), 1
    found = read(float8_passes.normed_rows(n_TD))
    assert ((found - expected).abs() <= (STEP + FP32) * expected.abs()).all()


@pytest.mark.parametrize("tokens", [16, 37, 130])
def test_transposed_rows_are_not_rounded_again(tokens: int) -> None:
    """One scale for all rows, that of the largest; behind the last token zeros, to a multiple of 16."""
    x_TC = draw(tokens, 48) * 2 ** torch.linspace(-9, 3, tokens, device=DEVICE)[:, None]
    rows = float8.quantise_rows(x_TC)
    y_CT, largest = float8.transposed(rows)
    assert y_CT.dtype == FLOAT8 and y_CT.shape == (48, -(-tokens // 16) * 16)
    assert (y_CT[:, tokens:].float() == 0).all()
    assert largest.shape == () and largest == rows.inverse_T.max()
    found, expected = y_CT[:, :tokens].float().T * largest, read(rows)
    whole = expected.abs() >= LEAST * largest
    assert torch.equal(found[whole], expected[whole])
    assert ((found - expected).abs() <= LEAST / 8 * largest).all()
    assert (expected[whole] != 0).any()


def test_transposed_rows_of_one_scale_are_the_same_numbers() -> None:
    values_TC = draw(37, 48).to(FLOAT8)
    rows = Rows(values_TC, torch.full((37,), 0.25, device=DEVICE))
    y_CT, inverse = float8.transposed(rows, one_scale=True)
    assert inverse == 0.25
    assert torch.equal(y_CT[:, :37].float(), values_TC.float().T)
    assert (y_CT[:, 37:].float() == 0).all()


def test_swiglu_and_its_gradient() -> None:
    gu_TI, dh_TI = 3 * draw(7, 2 * 48), draw(7, 48, seed=1)
    gu_TI[2] = 0
    h = float8.swiglu(gu_TI)
    assert_near(h, elementwise.swiglu(gu_TI))
    dgu_TI, _ = elementwise.swiglu_gradient(gu_TI, dh_TI, None)
    dgu, again = float8.swiglu_gradient(gu_TI, dh_TI, None)
    assert_near(dgu, dgu_TI)
    assert torch.equal(read(again), read(h)) and again is not h
    dgu, kept = float8.swiglu_gradient(gu_TI, dh_TI, h)
    assert_near(dgu, dgu_TI)
    assert kept.values_TC is h.values_TC


def test_a_weight_has_one_scale_and_two_layouts() -> None:
    weight_OI = 0.02 * draw(192, 128)
    matrix = Matrix.like(weight_OI)
    matrix.follow(weight_OI)
    assert len({*matrix.inverse_O.tolist(), *matrix.inverse_I.tolist()}) == 1
    assert (matrix.inverse_O.shape, matrix.inverse_I.shape) == ((192,), (128,))
    assert torch.equal(matrix.values_OI.float(), matrix.transposed_IO.float().T)
    flat = Rows(matrix.values_OI.view(1, -1), matrix.inverse_O[:1])
    assert_near(flat, weight_OI.view(1, -1))


def test_a_weight_is_turned_again_when_it_has_changed_and_only_then() -> None:
    weight_OI = torch.nn.Parameter(draw(64, 128))
    matrix = Matrix.like(weight_OI)

    def turned(weight_OI: Tensor) -> bool:
        """Whether it is turned: what was there before is wiped out."""
        matrix.values_OI.zero_()
        matrix.follow(weight_OI)
        return bool(matrix.values_OI.float().any())

    assert turned(weight_OI)
    assert not turned(weight_OI)
    with torch.no_grad():
        weight_OI.mul_(-2)
    assert turned(weight_OI)
    assert torch.equal(matrix.values_OI.float().sign(), weight_OI.detach().sign())
    assert not turned(weight_OI)
    torch.autograd.graph.increment_version(weight_OI)  # as the optimizer's kernel does
    assert turned(weight_OI)
    weight_OI.data = weight_OI.data.clone()
    assert turned(weight_OI)
    assert not turned(weight_OI)


# ------------------------------------------------------------------------------------------------- products, models ---


def plain_product(x: Rows, weight: Matrix, *, back: bool = False) -> Tensor:
    values, inverse = (weight.transposed_IO, weight.inverse_I) if back else (weight.values_OI, weight.inverse_O)
    return read(x) @ (values.float() * inverse[:, None]).T


def plain_product_along_rows(dy_OT: tuple[Tensor, Tensor], x_IT: tuple[Tensor, Tensor]) -> Tensor:
    return (dy_OT[0].float() * dy_OT[1]) @ (x_IT[0].float() * x_IT[1]).T


@pytest.mark.skipif(not HAS_PRODUCTS, reason="FP8 products need an NVIDIA GPU of compute capability 8.9")
def test_products_are_those_of_the_numbers_that_are_stood_for() -> None:
    x_TI, dy_TO, weight_OI = draw(37, 64), 1e-3 * draw(37, 128, seed=1), 0.1 * draw(128, 64, seed=2)
    matrix, x, dy = Matrix.like(weight_OI), float8.quantise_rows(x_TI), float8.quantise_rows(dy_TO)
    matrix.follow(weight_OI)
    sides = float8.transposed(dy), float8.transposed(x)
    for found, expected in (
        (float8.product(x, matrix), plain_product(x, matrix)),
        (float8.product(dy, matrix, back=True), plain_product(dy, matrix, back=True)),
        (float8.product_along_rows(*sides), plain_product_along_rows(*sides)),
    ):
        assert found.dtype == torch.bfloat16
        assert float((found.float() - expected).norm() / expected.norm()) < 1e-2


SPANS = Spans.of_samples(torch.tensor([7, 5]), torch.tensor([3, 0]))
TOKENS = 14  # two of them padding


def outcome(model: RecurrentLM, fused_blocks: bool) -> dict[str, Tensor]:
    """The final state and every gradient, in fp32."""
    ids = torch.arange(TOKENS, device=DEVICE) % 32
    positions = torch.cat([torch.arange(7), torch.arange(5), torch.arange(2)]).to(DEVICE)
    attention = (TritonAttention if fused_blocks else PlainAttention)(SPANS, TOKENS, DEVICE)
    hidden = model(ids, positions, attention)
    wanted = draw(TOKENS, model.config.hidden_size, seed=5).to(hidden.dtype)
    wanted[12:] = 0  # nothing asks anything of padding
    for _ in range(2):  # gradients add up
        hidden.backward(wanted, retain_graph=True)
    found = {name: p.grad.float() for name, p in model.named_parameters() if p.grad is not None}
    return {"hidden": hidden.detach().float()[:12], **found}


@pytest.mark.parametrize("recompute", ["none", "some", "full"])
def test_a_model_in_fp8_is_near_the_plain_one(recompute: fused.Recompute, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU it is the plain one: with fp32 for FP8, and products of the numbers that are stood for."""
    if not ON_GPU:
        monkeypatch.setattr(float8, "product", plain_product)
        monkeypatch.setattr(float8, "product_along_rows", plain_product_along_rows)
        monkeypatch.setattr(fused, "why_not_float8", lambda config, device: None)
    elif not HAS_PRODUCTS:
        pytest.skip("FP8 products need an NVIDIA GPU of compute capability 8.9")
    config = ModelConfig(
        architecture="transformer", vocab_size=32, max_position_embeddings=16, hidden_size=64, num_layers=3,
        num_heads=2, head_dim=32, inner_multiple=64,
    )  # fmt: skip
    exact = build(config, seed=1, device=DEVICE.type)
    model = copy.deepcopy(exact).to(torch.bfloat16 if ON_GPU else torch.float32)
    fused.fuse(model, recompute=recompute, fp8=True)
    expected, found = outcome(exact, False), outcome(model, True)
    assert found.keys() == expected.keys()
    for name, exact_x in expected.items():
        error = float((found[name] - exact_x).norm() / exact_x.norm())
        assert 1e-3 < error < 0.2 if ON_GPU else error < 1e-5, f"{name}: {error}"
