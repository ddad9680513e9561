"""A decoding step equals the model's own forward pass over a paged cache: on a GPU, or in Triton's interpreter."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hrm_text.model.block import Block, rotary_table, rotate
from hrm_text.model.config import ModelConfig
from hrm_text.model.paged import PagedKeyValues, quantize
from hrm_text.model.recurrence import RecurrentLM, build

pytest.importorskip("triton", reason="the kernels are written in Triton, which is not installed")

from hrm_text.model.kernels.decode import (
    Arrivals,
    Attend,
    DecodeStep,
    Fragments,
    Matrix,
    Settings,
    Sizes,
    Vector,
    Weight,
    attend,
    multiply,
    row_blocks,
    why_not_decode,
)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

PAGE, PAGES_EACH = 8, 3
VECTOR, MATRIX = Vector(32, 32, 1, 1), Matrix(64, 32, 2, 1)
SPLIT = dataclasses.replace(MATRIX, block_k=16, splits=2, ahead=1)
ON_CORES = Settings(VECTOR, VECTOR, VECTOR, VECTOR, Attend(8, 1, 2, 4, 3))
ON_TENSOR_CORES = Settings(SPLIT, SPLIT, MATRIX, SPLIT, Attend(16, 1, 1, 16, 3))
# Of 8 tokens beside 16 rows of W and of 16 beside 8; columns shared by warps, by programs, and by both.
FRAGMENTS, SPLIT_FRAGMENTS = Fragments(16, 2, 1, 2), Fragments(8, 1, 2, 1, splits=2)
IN_FRAGMENTS = Settings(SPLIT_FRAGMENTS, FRAGMENTS, FRAGMENTS, SPLIT_FRAGMENTS, Attend(16, 1, 1, 16, 3))
ALL = pytest.mark.parametrize(
    "settings", [ON_CORES, ON_TENSOR_CORES, IN_FRAGMENTS], ids=["cores", "tensor-cores", "fragments"]
)
MULTIPLIES_BF16 = pytest.mark.skipif(
    DEVICE.type != "cuda", reason="Triton's interpreter cannot multiply matrices of bf16; needs a GPU"
)


def config(architecture: Any = "transformer", num_layers: int = 1, **others: Any) -> ModelConfig:
    """24 and 64 columns: the tiles of the settings above do not divide the first."""
    return ModelConfig(
        architecture=architecture,
        vocab_size=32,
        max_position_embeddings=PAGE * PAGES_EACH,
        hidden_size=24,
        num_layers=num_layers,
        num_heads=2,
        head_dim=16,
        inner_multiple=8,
        **others,
    )


def model_of(config: ModelConfig, dtype: torch.dtype = torch.float32) -> RecurrentLM:
    return build(config, seed=1, device=DEVICE.type, dtype=dtype).requires_grad_(False)


class PagedAttention:
    """The definition: write, then attend."""

    def __init__(self, cache: PagedKeyValues, table_BM: Tensor, positions_B: Tensor) -> None:
        self.cache, self.table_BM, self.positions_B = cache, table_BM, positions_B

    def __call__(self, q_TNH: Tensor, k_TNH: Tensor, v_TNH: Tensor, slot: int) -> Tensor:
        pages = self.table_BM[torch.arange(len(q_TNH), device=DEVICE), self.positions_B // self.cache.page_size]
        self.cache.write(slot, pages, self.positions_B % self.cache.page_size, k_TNH, v_TNH)
        return self.cache.attend(slot, q_TNH, self.table_BM, self.positions_B + 1)


def cache_of(
    config: ModelConfig, texts: int, dtype: torch.dtype, seed: int = 0, page: int = PAGE, pages_each: int = PAGES_EACH
) -> tuple[PagedKeyValues, Tensor]:
    """A cache full of noise, and the tables of some texts, whose pages lie in disorder; page 0 is nobody's."""
    generator = torch.Generator().manual_seed(seed)
    pages = texts * pages_each + 1
    cache = PagedKeyValues.allocate(config, pages, page, DEVICE, dtype)
    for store, scales in ((cache.keys, cache.key_scales), (cache.values, cache.value_scales)):
        noise = torch.randn(store.shape, generator=generator)
        if scales is None:
            store.copy_(noise)
        else:
            integers, its_scales = quantize(noise)
            store.copy_(integers)
            scales.copy_(its_scales)
    table = 1 + torch.randperm(pages - 1, generator=generator).view(texts, pages_each)
    return cache, table.to(DEVICE)


def tensors_of(cache: PagedKeyValues) -> list[Tensor]:
    return [x for x in (cache.keys, cache.values, cache.key_scales, cache.value_scales) if x is not None]


def batch_of(texts: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Ids, and positions at both ends of a page and elsewhere, with room for one more."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(32, (texts,), generator=generator)
    positions = torch.tensor([0, PAGE - 1, 2 * PAGE, PAGE, 3 * PAGE - 2]).repeat(texts)[:texts]
    return ids.to(DEVICE), positions.to(DEVICE)


def error(x: Tensor, exact: Tensor) -> float:
    return float((x.double() - exact.double()).norm() / exact.double().norm())


def steps(
    model: RecurrentLM,
    settings: Settings | None,
    texts: int,
    cache_dtype: torch.dtype,
    config: ModelConfig | None = None,
    count: int = 2,
) -> tuple[list[Tensor], PagedKeyValues]:
    """Some steps, and the cache they leave: by the kernels, or by the definition where there are no settings."""
    config = config or model.config
    plain = copy.copy(model.model)
    plain.config = config
    step = DecodeStep(model, texts, settings=settings)
    cache, table = cache_of(config, texts, cache_dtype)
    ids, positions = batch_of(texts)
    states = []
    for index in range(count):
        at = positions + index
        with pytest.MonkeyPatch.context() as patch:
            if settings is None:
                states.append(plain(ids, at, PagedAttention(cache, table, at)))
            else:
                patch.setattr(Block, "forward", None)  # it is not by falling back that the two are equal
                states.append(step(ids, at, cache, table, config))
        ids = (ids * 7 + 3) % 32
    return states, cache


def check(
    model: RecurrentLM,
    settings: Settings,
    texts: int,
    cache_dtype: torch.dtype = torch.float32,
    *,
    tolerance: float = 1e-6,
    **how: Any,
) -> None:
    expected, expected_cache = steps(model, None, texts, cache_dtype, **how)
    found, cache = steps(model, settings, texts, cache_dtype, **how)
    for exact, ours in zip(expected, found, strict=True):
        assert error(ours, exact) < 5 * tolerance
    for exact, ours in zip(tensors_of(expected_cache), tensors_of(cache), strict=True):
        if exact.dtype == torch.int8:  # where a number lies between two integers, rounding in fp32 decides
            assert (exact.int() - ours.int()).abs().max() <= 1 and (exact != ours).float().mean() < 1e-3
        else:
            assert error(ours, exact) < tolerance


@pytest.mark.parametrize(
    "model",
    [
        config("hrm", num_layers=2, H_cycles=2, L_cycles=1),
        config("trm", H_cycles=1, L_cycles=2),
        config("rins", num_layers=2, cycles=2),
        config("rins", num_layers=2, cycles=1, norm="pre"),
        config("looped", cycles=2, init="normal"),
        config("transformer", norm="pre"),
    ],
    ids=lambda model: f"{model.architecture}-{model.norm}",
)
def test_architectures_and_norms(model: ModelConfig) -> None:
    check(model_of(model), ON_TENSOR_CORES, 3, count=1)


@pytest.mark.parametrize("texts", [1, 2])
def test_one_and_two_texts_on_the_cores(texts: int) -> None:
    """Two steps: the second reads what the first wrote, and meets counts that the first left."""
    check(model_of(config()), ON_CORES, texts)


@pytest.mark.parametrize(
    ("split", "whole"), [(SPLIT, MATRIX), (SPLIT_FRAGMENTS, FRAGMENTS)], ids=["tensor-cores", "fragments"]
)
def test_more_texts_than_a_tile_has_tokens(split: Any, whole: Any) -> None:
    narrow = dataclasses.replace(split, tokens=16)
    wide = dataclasses.replace(whole, tokens=16)
    check(model_of(config()), Settings(wide, narrow, wide, narrow, Attend(16, 1, 1, 16, 3)), 17, count=1)


@pytest.mark.parametrize("settings", [ON_CORES, ON_TENSOR_CORES], ids=["cores", "tensor-cores"])
def test_8_bit_caches(settings: Settings) -> None:
    check(model_of(config()), settings, 2, torch.int8, count=1)


class Int8(nn.Module):
    """A linear layer of integers with a scale for each row."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        integers, scales = quantize(weight)
        self.weight, self.scale = nn.Buffer(integers), nn.Buffer(scales)

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.weight * self.scale[:, None]).to(x.dtype).T


@ALL
def test_8_bit_weights(settings: Settings) -> None:
    model = model_of(config())
    for layer in model.model.stack("S").layers:
        assert isinstance(layer, Block)
        for module in (layer.attn, layer.mlp):
            for name, linear in list(module.named_children()):
                assert isinstance(linear, nn.Linear)
                module.add_module(name, Int8(linear.weight))
    # On the cores x is rounded to 2^-15 of the largest of some columns, which may be three times as large as most are.
    check(model, settings, 2, count=1, tolerance=3 * 2**-15 if settings is ON_CORES else 1e-6)


def test_other_cycles_than_the_models() -> None:
    model = model_of(config("trm", H_cycles=1, L_cycles=1))
    check(model, ON_TENSOR_CORES, 1, config=dataclasses.replace(model.config, H_cycles=2), count=1)


@pytest.mark.parametrize(
    ("settings", "dtype"),
    [
        pytest.param(ON_CORES, torch.float16, id="cores-fp16"),
        pytest.param(ON_CORES, torch.bfloat16, id="cores-bf16"),
        pytest.param(ON_TENSOR_CORES, torch.float16, id="tensor-cores-fp16"),
        pytest.param(IN_FRAGMENTS, torch.float16, id="fragments-fp16"),
        pytest.param(ON_TENSOR_CORES, torch.bfloat16, id="tensor-cores-bf16", marks=MULTIPLIES_BF16),
        pytest.param(IN_FRAGMENTS, torch.bfloat16, id="fragments-bf16", marks=MULTIPLIES_BF16),
    ],
)
def test_in_half_precision_a_step_is_as_near_to_fp32_as_the_definition(settings: Settings, dtype: torch.dtype) -> None:
    model = model_of(config(), dtype)
    (exact,), _ = steps(copy.deepcopy(model).float(), None, 2, torch.float32, count=1)
    (expected,), _ = steps(model, None, 2, dtype, count=1)
    (found,), _ = steps(model, settings, 2, dtype, count=1)
    # The interpreter cuts bf16 off where a GPU rounds.
    cut = dtype == torch.bfloat16 and DEVICE.type == "cpu"
    assert error(found, exact) <= (4 if cut else 1.5) * error(expected, exact)


@ALL
def test_a_text_gets_the_same_bits_in_any_company(settings: Settings) -> None:
    model = model_of(config())
    step = DecodeStep(model, 3, settings=settings)
    cache, table = cache_of(model.config, 3, torch.float32)
    ids, positions = batch_of(3)
    together = step(ids, positions, cache, table)
    alone = step(ids[1:2], positions[1:2], cache, table[1:2])
    assert torch.equal(together[1:2], alone)
    ids[0] = (ids[0] + 1) % 32
    changed = step(ids, positions, cache, table)
    assert torch.equal(together[1:], changed[1:]) and (together[0] != changed[0]).any()


def test_a_row_without_a_text_does_no_harm() -> None:
    """It writes to page 0 alone, and the texts beside it get what they get without it."""
    model = model_of(config())
    step = DecodeStep(model, 4, settings=ON_TENSOR_CORES)
    (cache, table), (other, _) = (cache_of(model.config, 2, torch.float32) for _ in range(2))
    ids, positions = batch_of(2)
    expected = step(ids, positions, cache, table)
    padded = [torch.cat([x, x.new_zeros(2, *x.shape[1:])]) for x in (ids, positions, table)]
    found = step(padded[0], padded[1], other, padded[2])
    assert torch.equal(found[:2], expected) and found.isfinite().all()
    for ours, exact in zip(tensors_of(other), tensors_of(cache), strict=True):
        assert torch.equal(ours[:, 1:], exact[:, 1:]) and not torch.equal(ours[:, 0], exact[:, 0])


def in_steps(x_BK: Tensor, block_k: int) -> Tensor:
    """x as ``decode_vector_int8`` rounds it: in steps of 2^-14 of the power of two below the largest of its group.

    A group are the same 16 columns of every tile.
    """
    batch, columns = x_BK.shape
    tiles = -(-columns // block_k)
    # On the CPU, whose powers of two are exact: half a step is rounded to the even one.
    padded = nn.functional.pad(x_BK.double().cpu(), (0, tiles * block_k - columns)).view(batch, tiles, -1, 16)
    largest = padded.abs().amax((1, 3), keepdim=True).clamp(min=2.0**-112)
    step = 2.0 ** (largest.log2().floor() - 14)
    step = torch.where((largest / step).round() >= 2**15, 2 * step, step)
    rounded = (padded / step).round() * step
    assert ((rounded - padded).abs() <= largest * 2**-15).all()
    return rounded.view(batch, -1)[:, :columns].to(x_BK.device)


def as_read(x_BK: Tensor, sizes: Sizes, weight: Weight) -> Tensor:
    """x as the kernel of a product sees it."""
    if weight.scale is None or not isinstance(sizes, Vector):
        return x_BK.double()
    return in_steps(x_BK, min(sizes.block_k, max(16, 1 << (x_BK.shape[1] - 1).bit_length())))


def arrivals(room: int = 1 << 15) -> Arrivals:
    """Room full of what must not be read."""
    parts = torch.full((room,), torch.nan, device=DEVICE)
    return Arrivals(parts, torch.zeros(64, dtype=torch.int32, device=DEVICE))


@pytest.mark.parametrize("integer", [False, True], ids=["fp32", "int8"])
@pytest.mark.parametrize(
    ("norm", "pair", "residual"), [(True, False, False), (True, True, False), (False, False, True)]
)
@pytest.mark.parametrize(
    "sizes",
    [Vector(8, 32, 2, 1), Matrix(16, 16, 2, 1, tokens=4), Fragments(16, 2, 1, 1)],
    ids=["vector", "matrix", "fragments"],
)
def test_products_of_odd_sizes(sizes: Sizes, norm: bool, pair: bool, residual: bool, integer: bool) -> None:
    texts, rows, columns = 3, 20, 72
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(texts, columns, generator=generator).to(DEVICE)
    matrix = torch.randn(rows * (1 + pair), columns, generator=generator).to(DEVICE)
    before = torch.randn(texts, rows, generator=generator).to(DEVICE)
    weight = Weight(matrix, None)
    if integer:
        integers, scales = quantize(matrix)
        weight, matrix = Weight(integers, scales), integers.double() * scales.double()[:, None]
    rstd = (x.double().square().mean(1, keepdim=True) + 1e-6).rsqrt() if norm else 1.0
    expected = rstd * as_read(x, sizes, weight) @ matrix.double().T
    if pair:
        gate, up = expected.chunk(2, dim=1)
        expected = nn.functional.silu(gate) * up
    if residual:
        expected = expected + before
    splits = [1] if isinstance(sizes, Vector) else [1, 3, 8]
    meeting = arrivals()
    for count in [*splits, splits[-1]]:
        chosen = sizes if isinstance(sizes, Vector) else dataclasses.replace(sizes, splits=count, ahead=count % 4)
        out = before.clone() if residual else torch.full_like(before, torch.nan)
        squares = x.square().sum(1)[None] if norm else torch.full((row_blocks(chosen, rows), texts), torch.nan)
        squares = squares.to(DEVICE)
        how: Any = {"eps": 1e-6 if norm else None, "pair": pair, "residual": residual}
        multiply(x, weight, out, chosen, meeting, **how, squares=squares)
        assert error(out, expected) < 1e-6
        if residual and not isinstance(chosen, Vector):
            assert error(squares.sum(0), out.double().square().sum(1)) < 1e-6
        assert not meeting.counts.any()


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # the interpreter's, of what is none
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_integers_of_any_size(dtype: torch.dtype) -> None:
    """Groups of zeros, tiny and large ones; rounding up over a power of two; and what is not finite stays so."""
    columns, sizes = 64, Vector(4, 64, 1, 1)
    generator = torch.Generator().manual_seed(0)
    factors = torch.tensor([0.0, 2.0**-14, 1.0, 2.0**13]).repeat_interleave(16)
    x = torch.randn(1, columns, generator=generator) * factors
    x[0, 40] = 8 - 2**-18  # in fp32 the next whole number of steps is 2^15
    x = x.to(DEVICE, dtype)
    integers = torch.randint(-127, 128, (4, columns), generator=generator, dtype=torch.int8).to(DEVICE)
    weight = Weight(integers, torch.ones(4, device=DEVICE))
    for group in range(4):
        part = torch.zeros_like(x)
        part[:, 16 * group :][:, :16] = x[:, 16 * group :][:, :16]
        out = torch.full((1, 4), torch.nan, device=DEVICE)
        multiply(part, weight, out, sizes, arrivals())
        expected = in_steps(part, 64) @ integers.double().T
        assert (out - expected).abs().max() <= 1e-6 * expected.abs().max(), group
    for value in (torch.inf, -torch.inf, torch.nan):
        spoilt = x.clone()
        spoilt[0, 5] = value
        multiply(spoilt, weight, out, sizes, arrivals())
        assert not out.isfinite().any()


@pytest.mark.parametrize("weight_bytes", [2, 1])
@pytest.mark.parametrize("texts", [1, 4, 16, 32, 64])
def test_products_in_the_sizes_of_the_tables(texts: int, weight_bytes: int) -> None:
    """With the columns of an XL, so that all stages of a pipeline are full; again and again on a GPU, in bf16."""
    chosen, on_gpu = Settings.of(texts, weight_bytes), DEVICE.type == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    meeting = arrivals(1 << 22)
    few = 8 if isinstance(chosen.o, Vector) and not on_gpu else 64  # many programs of a row or two take long here
    for sizes, rows, columns, how in (
        (chosen.gqkv, 3 * few, 1536, {"eps": 1e-6}),
        (chosen.o, few, 1536, {"residual": True}),
        (chosen.gate_up, few, 1536, {"eps": 1e-6, "pair": True}),
        (chosen.down, few, 4096, {"residual": True}),
    ):
        options: Any = how
        generator = torch.Generator().manual_seed(rows + columns)
        x = torch.randn(texts, columns, generator=generator).to(DEVICE, dtype)
        matrix = torch.randn(rows * (1 + options.get("pair", False)), columns, generator=generator).to(DEVICE) / 40
        weight = Weight(matrix.to(dtype), None)
        exact = weight.matrix.double()
        if weight_bytes == 1:
            weight = Weight(*quantize(matrix))
            exact = weight.matrix.double() * weight.scale.double()[:, None]  # type: ignore[union-attr]
        rstd = (x.double().square().mean(1, keepdim=True) + 1e-6).rsqrt() if "eps" in options else 1.0
        expected = rstd * as_read(x, sizes, weight) @ exact.T
        if "pair" in options:
            gate, up = expected.chunk(2, dim=1)
            expected = nn.functional.silu(gate) * up
        squares = x.double().square().sum(1)[None].float()
        if "residual" in options:
            squares = x.new_empty(row_blocks(sizes, rows), texts, dtype=torch.float32)
        for _ in range(20 if on_gpu else 1):
            out = torch.zeros(texts, rows, dtype=dtype, device=DEVICE)
            multiply(x, weight, out, sizes, meeting, squares=squares, **options)
            assert error(out, expected) < (4e-3 if on_gpu else 2e-6), sizes


@pytest.mark.parametrize("cache_dtype", [torch.float16, torch.int8], ids=str)
@pytest.mark.parametrize(
    "sizes",
    [Attend(8, 1, 1, 8, 3), Attend(4, 1, 4, 4, 3), Attend(4, 1, 4, 8, 3)],
    ids=["whole", "split", "more-split-the-longer"],
)
def test_attention_alone(sizes: Attend, cache_dtype: torch.dtype) -> None:
    """Lengths at the ends of tiles, pages and splits; tokens behind a text's newest one are NaN, and not read."""
    heads, width, page, pages_each = 2, 16, 8, 3
    positions = torch.tensor([0, 4, 5, 8, 17, 23], device=DEVICE)
    texts = len(positions)
    model = dataclasses.replace(config(), num_heads=heads, head_dim=width)
    (expected_cache, table), (cache, _) = (
        cache_of(model, texts, cache_dtype, page=page, pages_each=pages_each) for _ in range(2)
    )
    if cache_dtype != torch.int8:
        for store in (cache.keys, cache.values):
            for text, position in enumerate(positions.tolist()):
                flat = store[0, table[text]].transpose(1, 2).flatten(0, 1)
                flat[position:] = torch.nan
                store[0, table[text]] = flat.unflatten(0, (pages_each, page)).transpose(1, 2)
    gqkv = torch.randn(texts, 4, heads, width, generator=torch.Generator().manual_seed(5)).to(DEVICE)
    gate, q, k, v = gqkv.unbind(1)
    turned = rotate(torch.stack([q, k], 1), rotary_table(positions, width, 10_000.0))
    y = PagedAttention(expected_cache, table, positions)(turned[:, 0], turned[:, 1], v, 0)
    expected = gate.sigmoid() * y
    cos, sin = (x.flatten(1) for x in rotary_table(torch.arange(page * pages_each, device=DEVICE), width, 10_000.0))
    meeting = arrivals()
    for _ in range(2):
        z = torch.full((texts, heads * width), torch.nan, device=DEVICE)
        attend(gqkv.flatten(1), z, cache, 0, table, positions, (cos, sin), sizes, meeting)
        # The definition rounds what it reads to the dtype of the query, which is fp32 here.
        assert error(z.view_as(expected), expected) < 1e-5
        assert not meeting.counts.any()
    for text, position in enumerate(positions.tolist()):
        ours, exact = (c.gather(0, table[text], position + 1, torch.float32) for c in (cache, expected_cache))
        assert all(error(a, b) < 1e-3 for a, b in zip(ours, exact, strict=True))


def test_the_tables_have_sizes_for_any_number_of_texts() -> None:
    for weight_bytes in (1, 2, 4):
        for texts in (1, 2, 3, 16, 17, 64, 1000):
            settings = Settings.of(texts, weight_bytes)
            products = (settings.gqkv, settings.o, settings.gate_up, settings.down)
            # A program of ``decode_vector`` makes the sums of every text: for many it would have no registers left.
            assert all(isinstance(sizes, Vector) == (texts <= 4) for sizes in products)


def test_where_there_are_no_kernels() -> None:
    assert why_not_decode(config(), DEVICE) is None
    assert "post" in str(why_not_decode(config(norm="post"), DEVICE))
    assert "head_dim" in str(why_not_decode(dataclasses.replace(config(), head_dim=24), DEVICE))
