"""One decoding step in a handful of kernels a block: a new token for each of several texts over a paged cache.

The definition is ``RecurrentLM.forward`` with an attention that writes to and reads from ``paged.PagedKeyValues``. A
block is five kernels (gqkv; attention with rotation, cache write and gate; o_proj; gate and up with their SwiGLU; down)
and a stack ends in one more. A step does no more than launch them: nothing waits for the device, and what it allocates
depends on the number of texts alone, so that it can be captured in a CUDA graph.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import triton
from torch import Tensor, nn

from hrm_text.model.block import Block, rotary_table
from hrm_text.model.config import ModelConfig
from hrm_text.model.kernels.decode_attention import decode_attention
from hrm_text.model.kernels.decode_fragments import decode_fragments
from hrm_text.model.kernels.decode_integers import decode_vector_int8
from hrm_text.model.kernels.decode_linear import decode_enter, decode_exit, decode_matrix, decode_vector
from hrm_text.model.kernels.elementwise import row_warps
from hrm_text.model.kernels.fused import why_not_fused
from hrm_text.model.kernels.triton_attention import precision_of, shared_memory
from hrm_text.model.paged import PagedKeyValues
from hrm_text.model.plan import plan
from hrm_text.model.recurrence import RecurrentLM

# B texts, D width, A width of all heads together, N heads, H head width, I inner width, M pages a text at most;
# R rows and K columns of a matrix

# --------------------------------------------------------------------------------------------------------- settings ---


@dataclass(frozen=True)
class Vector:
    """Sizes of ``decode_vector`` and ``decode_vector_int8``."""

    rows: int
    block_k: int
    ahead: int
    """Tiles of a program's rows that are under way before it waits for the kernel before it."""
    warps: int


@dataclass(frozen=True)
class Matrix:
    """Sizes of ``decode_matrix``."""

    rows: int
    """Of W in a tile; of a pair of halves as many of each as the other."""
    block_k: int
    stages: int
    """Depth of the software pipeline; less where shared memory is short."""
    warps: int
    splits: int = 1
    """Programs that share the columns of a row."""
    ahead: int = 0
    """Tiles that a program reads to registers ahead of the wait."""
    tokens: int = 64
    """Most tokens of a tile; a power of 2."""


@dataclass(frozen=True)
class Fragments:
    """Sizes of ``decode_fragments``."""

    rows: int
    """Of W in a program, of both halves of a pair together; a power of 2, at least 8 (16 of a pair)."""
    warps: int
    """Each with its share of the columns."""
    ahead: int
    """Tiles of W, 64 bytes of each row for each warp, that are under way at once, from before the wait on."""
    near: int
    """Tiles of x that are under way at once."""
    splits: int = 1
    """Programs that share the columns of a row."""
    tokens: int = 64
    """Most tokens of a tile; a power of 2."""


@dataclass(frozen=True)
class Attend:
    """Sizes of ``decode_attention``."""

    tile: int
    """Tokens of a tile."""
    warps: int
    splits: int
    """Programs that share the tokens of a text and head, at most; a power of 2."""
    least: int
    """Cached tokens that are worth one program more."""
    stages: int
    """Depth of the software pipeline: one tile less is read before the wait for the kernel in front."""


Product = Literal["gqkv", "o", "gate_up", "down"]
Sizes = Vector | Matrix | Fragments

PRODUCTS: dict[tuple[Product, int, int], Sizes] = {
    # (product, most texts, bytes of a weight): the first that fits counts.
    ("gqkv", 4, 2): Vector(2, 512, 2, 1),
    ("o", 4, 2): Vector(2, 512, 3, 2),
    ("gate_up", 4, 2): Vector(1, 512, 2, 1),
    ("down", 4, 2): Vector(4, 1024, 4, 2),
    ("gqkv", 4, 1): Vector(4, 512, 2, 1),
    ("o", 4, 1): Vector(4, 2048, 1, 4),
    ("gate_up", 4, 1): Vector(2, 512, 3, 1),
    ("down", 4, 1): Vector(4, 4096, 1, 8),
    ("gqkv", 16, 2): Matrix(64, 128, 6, 4),
    ("o", 16, 2): Matrix(64, 128, 2, 4, splits=4, ahead=2),
    ("gate_up", 16, 2): Matrix(64, 128, 5, 4, ahead=1),
    ("down", 16, 2): Matrix(64, 128, 2, 4, splits=8, ahead=4),
    ("gqkv", 16, 1): Fragments(8, 4, 3, 3),
    ("o", 16, 1): Fragments(8, 4, 6, 6),
    ("gate_up", 16, 1): Fragments(16, 2, 4, 4),
    ("down", 16, 1): Matrix(64, 128, 2, 4, splits=8, ahead=4),
    ("gqkv", 256, 2): Matrix(64, 128, 5, 4),
    ("o", 256, 2): Matrix(64, 128, 3, 8, splits=4, ahead=1),
    ("gate_up", 256, 2): Matrix(64, 64, 8, 4),
    ("down", 256, 2): Matrix(64, 128, 5, 8, splits=4),
    ("gqkv", 32, 1): Matrix(32, 128, 10, 4),
    ("o", 32, 1): Matrix(64, 256, 2, 4, splits=6),
    ("gate_up", 32, 1): Matrix(32, 256, 5, 4),
    ("down", 32, 1): Matrix(32, 128, 8, 4, splits=4),
    ("gqkv", 256, 1): Matrix(64, 128, 8, 8),
    ("o", 256, 1): Matrix(64, 128, 3, 8, splits=4, ahead=1),
    ("gate_up", 256, 1): Matrix(64, 128, 6, 4),
    ("down", 256, 1): Matrix(64, 128, 6, 8, splits=4),
}
"""Sizes for the weights of one block of an XL.

For ``decode_vector_int8`` block_k is 512 for each warp: then every thread has 16 columns of a tile and all rows of its
program, no column is made into integers twice, and nothing moves between threads before the last sums.
"""

ATTENTION: dict[int, Attend] = {
    2: Attend(16, 1, 32, 16, 2), 4: Attend(8, 1, 16, 8, 3), 8: Attend(8, 1, 16, 8, 2), 16: Attend(8, 1, 8, 8, 2),
    32: Attend(8, 1, 4, 64, 2), 256: Attend(16, 2, 4, 384, 3),
}  # fmt: skip
"""Most texts -> sizes; there are N programs for each text and split."""


@dataclass(frozen=True)
class Settings:
    """The sizes of a step's kernels for some number of texts and bytes of a weight."""

    gqkv: Sizes
    o: Sizes
    gate_up: Sizes
    down: Sizes
    attention: Attend

    def __post_init__(self) -> None:
        kinds = {isinstance(sizes, Vector) for sizes in (self.gqkv, self.o, self.gate_up, self.down)}
        assert len(kinds) == 1, "a vector's products leave no squares for a matrix's"

    @staticmethod
    def of(batch: int, weight_bytes: int) -> Settings:
        """The tables' sizes; weights of 4 bytes, which are for tests, have those of 2."""
        most = min((each for each in ATTENTION if each >= batch), default=max(ATTENTION))
        products: tuple[Product, ...] = ("gqkv", "o", "gate_up", "down")
        gqkv, o, gate_up, down = (_sizes(product, batch, min(weight_bytes, 2)) for product in products)
        return Settings(gqkv, o, gate_up, down, ATTENTION[most])


def _sizes(product: Product, batch: int, weight_bytes: int) -> Sizes:
    fitting = {
        most: sizes for (name, most, width), sizes in PRODUCTS.items() if (name, width) == (product, weight_bytes)
    }
    return fitting[min((most for most in fitting if most >= batch), default=max(fitting))]


# --------------------------------------------------------------------------------------------------------- launches ---


class Weight(NamedTuple):
    """A matrix [R, K], and of an integer one the fp32 scale [R] of its rows."""

    matrix: Tensor
    scale: Tensor | None


class Arrivals(NamedTuple):
    """What programs that share a result meet in."""

    parts: Tensor
    """fp32: room for what each of them found."""
    counts: Tensor
    """int32 zeros: how many have arrived. Whoever comes last sets its count back to zero."""


def multiply(
    x_BK: Tensor,
    weight: Weight,
    out_BR: Tensor,
    sizes: Sizes,
    arrivals: Arrivals,
    *,
    eps: float | None = None,
    pair: bool = False,
    residual: bool = False,
    squares: Tensor | None = None,
    pdl: bool = False,
) -> None:
    """out = x W^T: of norm(x) if an eps is given, silu(first half) * second half with pair, added with residual.

    squares: fp32 [any number, B]. With an eps, all but ``decode_vector`` need those of x, added up in that many parts;
    with residual they fill it with those of out, in ``row_blocks`` parts. ``decode_vector`` has no use for it.
    """
    (matrix, scale), (batch, rows, columns) = weight, (*out_BR.shape, x_BK.shape[1])
    assert matrix.shape == (rows * (1 + pair), columns) and all(t.is_contiguous() for t in (x_BK, matrix, out_BR))
    flags: dict[str, Any] = {
        "NORM": eps is not None, "PAIR": pair, "RESIDUAL": residual, "SCALED": scale is not None, "PDL": pdl
    }  # fmt: skip
    operands = (x_BK, matrix, matrix if scale is None else scale)
    how: tuple[int, ...]
    if isinstance(sizes, Vector):
        block_r, block_k = min(sizes.rows, triton.next_power_of_2(rows)), _columns(sizes, columns)
        how = (batch, rows, columns, block_r, block_k, min(sizes.ahead, triton.cdiv(columns, block_k)))
        programs = (triton.cdiv(rows, block_r),)
        if scale is not None and columns % 4 == 0:  # whose rows are whole words
            del flags["SCALED"]
            decode_vector_int8[programs](
                x_BK, matrix.view(torch.int32), scale, out_BR, eps or 0.0, *how,
                DP4A=is_nvidia(matrix.device), **flags, **options(sizes.warps, pdl),
            )  # fmt: skip
        else:
            decode_vector[programs](*operands, out_BR, eps or 0.0, *how, **flags, **options(sizes.warps, pdl))
        return
    assert squares is not None or not (residual or eps is not None)
    squares = arrivals.parts[None] if squares is None else squares
    block_r, block_b = _rows(sizes, rows * (1 + pair)), token_block(sizes, batch)
    if isinstance(sizes, Fragments):
        lane = 16 // matrix.element_size()
        width = 4 * lane * sizes.warps
        splits = min(sizes.splits, triton.cdiv(columns, width))
        tiles = triton.cdiv(columns, width * splits)
        kernel, how = decode_fragments, (lane, sizes.warps, splits, min(sizes.ahead, tiles), min(sizes.near, tiles))
    else:
        block_k = _columns(sizes, columns)
        splits = min(sizes.splits, triton.cdiv(columns, block_k))
        ahead = min(sizes.ahead, triton.cdiv(triton.cdiv(columns, block_k), splits))
        stage = block_k * (block_r * matrix.element_size() + block_b * x_BK.element_size())
        shared_bytes = shared_memory(matrix.device)
        room = max(1, shared_bytes - ahead * stage) if shared_bytes else 0
        kernel, how = decode_matrix, (block_k, splits, depth(sizes.stages, stage, room), ahead)
    kernel[(triton.cdiv(rows, block_r // (1 + pair)), splits, triton.cdiv(batch, block_b))](
        *operands, squares, out_BR, squares, *arrivals, batch, eps or 0.0, rows, columns,
        block_r, block_b, *how, len(squares), triton.next_power_of_2(len(squares)),
        PRECISION=precision_of(x_BK), **flags, **options(sizes.warps, pdl),
    )  # fmt: skip


def row_blocks(sizes: Sizes, rows: int) -> int:
    """Into how many blocks a product that is not a pair cuts its rows."""
    return 1 if isinstance(sizes, Vector) else triton.cdiv(rows, _rows(sizes, rows))


def _rows(sizes: Matrix | Fragments, rows: int) -> int:
    return min(sizes.rows, max(16, triton.next_power_of_2(rows)))


def _columns(sizes: Vector | Matrix, columns: int) -> int:
    return min(sizes.block_k, max(16, triton.next_power_of_2(columns)))


def depth(stages: int, stage_bytes: int, shared_bytes: int) -> int:
    """As many stages as shared memory has room for, beside the little that other things take."""
    room = shared_bytes - 4096
    return stages if shared_bytes == 0 else max(1, min(stages, room // stage_bytes))


def token_block(sizes: Matrix | Fragments, batch: int) -> int:
    """Tokens of a tile: tensor cores take 16 with profit, or 8 if they have 16 rows beside them."""
    least = 8 if isinstance(sizes, Fragments) and sizes.rows >= 16 else 16
    return min(sizes.tokens, max(least, triton.next_power_of_2(batch)))


def options(warps: int, pdl: bool) -> dict[str, Any]:
    """What a launch takes beside its arguments; Triton's interpreter knows nothing of PDL."""
    return {"num_warps": warps, **({"launch_pdl": True} if pdl else {})}


def attend(
    gqkv_BX: Tensor,
    z_BA: Tensor,
    cache: PagedKeyValues,
    slot: int,
    table_BM: Tensor,
    positions_B: Tensor,
    rotary: tuple[Tensor, Tensor],
    sizes: Attend,
    arrivals: Arrivals,
    *,
    pdl: bool = False,
) -> None:
    """Write a block's new keys and values to their pages, and sigmoid(gate) * attention to z."""
    _, _, heads, page, width = cache.keys.shape
    batch = len(gqkv_BX)
    keys, values = cache.keys[slot], cache.values[slot]
    scales = (keys, values)
    if cache.key_scales is not None and cache.value_scales is not None:
        scales = (cache.key_scales[slot], cache.value_scales[slot])
    room = batch * heads * sizes.splits
    parts, summaries = arrivals.parts[: room * width], arrivals.parts[room * width :]
    decode_attention[(heads, batch, sizes.splits)](
        gqkv_BX, keys, values, *scales, table_BM, positions_B, *rotary, z_BA, parts, summaries, arrivals.counts,
        math.log2(math.e) / math.sqrt(width), table_BM.stride(0), heads, width, page, sizes.tile, sizes.splits,
        sizes.least, sizes.stages, cache.key_scales is not None, pdl,
        **options(sizes.warps, pdl),
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- step ---


def why_not_decode(config: ModelConfig, device: torch.device) -> str | None:
    """Why a model has no ``DecodeStep`` on a device, in words; None: it has."""
    return why_not_fused(config, device)


class DecodeStep:
    """A decoding step of a model for up to ``max_batch`` texts.

    The model's weights are those at the time of construction: change them in place or make another step. An integer
    matrix has its scales beside it (``weight`` [R, K] int8, ``scale`` [R] fp32).
    """

    def __init__(
        self, model: RecurrentLM, max_batch: int, *, settings: Settings | None = None, pdl: bool | None = None
    ) -> None:
        """settings: for every number of texts, in the place of the tables'. pdl: None, where the GPU has it."""
        assert why_not_decode(model.config, model.lm_head.weight.device) is None
        config = self.config = model.config
        self.max_batch = max_batch
        self.embedding, self.fast = model.model.embed_tokens.weight.detach(), model.model.z_L_init
        self.device = self.embedding.device
        self.pdl = has_pdl(self.device) if pdl is None else pdl
        self.stacks = {name: [_weights(layer) for layer in model.model.stack(name).layers] for name in config.stacks}
        self._settings = settings
        positions = torch.arange(config.max_position_embeddings, device=self.device)
        cos, sin = rotary_table(positions, config.head_dim, config.rope_theta)
        self.rotary = (cos.flatten(1), sin.flatten(1))
        rows = max(4 * config.attention_size, config.intermediate_size, config.hidden_size)
        self._counts = torch.zeros(max_batch * rows, dtype=torch.int32, device=self.device)

    def settings(self, batch: int) -> Settings:
        """The sizes of the kernels for a number of texts."""
        matrix = next(iter(self.stacks.values()))[0][0].matrix
        return self._settings or Settings.of(batch, matrix.element_size())

    def __call__(
        self,
        ids_B: Tensor,
        positions_B: Tensor,
        cache: PagedKeyValues,
        table_BM: Tensor,
        config: ModelConfig | None = None,
    ) -> Tensor:
        """The final state [B, D] of one new token of each text, whose keys and values enter the cache.

        positions_B: how many tokens of each text are in the cache already, which is the new one's position. table_BM:
        the pages of each text. config: the model's, or one that differs in its cycles. A row that holds no text has
        position 0 and a table of zeros: it writes to page 0, which no text may own.
        """
        config = config or self.config
        batch, width = len(ids_B), config.hidden_size
        assert batch <= self.max_batch and all(x.is_contiguous() for x in (ids_B, positions_B, table_BM))
        sizes = self.settings(batch)
        x_BD, z_H_BD, z_L_BD = (self._empty(batch, width) for _ in range(3))
        states = {"z_H": z_H_BD, "z_L": z_L_BD}
        scratch = Scratch(
            self._empty(batch, 4 * config.attention_size),
            self._empty(batch, config.attention_size),
            self._empty(batch, config.intermediate_size),
            Arrivals(self._empty(_room(sizes, batch, config), dtype=torch.float32), self._counts),
            *(
                self._empty(number, batch, dtype=torch.float32)
                for number in (1, row_blocks(sizes.o, width), row_blocks(sizes.down, width))
            ),
        )
        steps = plan(config)
        norm = {"D": width, "BLOCK_D": triton.next_power_of_2(width), "PDL": self.pdl}
        with torch.cuda.device_of(x_BD):
            decode_enter[(batch,)](
                ids_B, self.embedding, self.fast, z_H_BD, z_L_BD, x_BD, scratch.entered, 1 / config.embedding_std,
                BOTH=len(steps[0].reads) == 2, **norm, num_warps=row_warps(width),
            )  # fmt: skip
            for index, step in enumerate(steps):
                for layer, weights in enumerate(self.stacks[step.stack]):
                    slot = index * config.layers_per_stack + layer
                    place = Place(cache, slot, table_BM, positions_B, self.rotary)
                    decode_block(
                        x_BD, scratch.after_down if layer else scratch.entered, weights, place, sizes, scratch,
                        config.norm_eps, pdl=self.pdl,
                    )  # fmt: skip
                last = index == len(steps) - 1
                reads = (step.writes,) if last else steps[index + 1].reads
                # Every plan's call reads what the one before it wrote, and at most one state beside it.
                assert step.writes in reads and len(reads) <= 2
                other = next((states[name] for name in reads if name != step.writes), x_BD)
                decode_exit[(batch,)](
                    x_BD, states[step.writes], other, scratch.entered, config.norm_eps,
                    NORM=last or config.norm == "magic", BOTH=len(reads) == 2, **norm,
                    **options(row_warps(width), self.pdl),
                )  # fmt: skip
        return states[steps[-1].writes]

    def _empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.embedding.dtype, device=self.device)


class Scratch(NamedTuple):
    """What the kernels of a block hand to each other."""

    gqkv: Tensor
    """[B, 4 A]"""
    z: Tensor
    """[B, A]"""
    h: Tensor
    """[B, I]"""
    arrivals: Arrivals
    entered: Tensor
    """fp32 [1, B]: the squares of what enters a stack, added up."""
    after_o: Tensor
    """fp32 [row blocks, B]: those of the residual stream behind o_proj, of each block of its rows."""
    after_down: Tensor


class Place(NamedTuple):
    """Where a block's keys and values are, as ``attend`` takes it."""

    cache: PagedKeyValues
    slot: int
    table_BM: Tensor
    positions_B: Tensor
    rotary: tuple[Tensor, Tensor]


def decode_block(
    x_BD: Tensor,
    squares: Tensor,
    weights: tuple[Weight, ...],
    place: Place,
    sizes: Settings,
    scratch: Scratch,
    eps: float,
    *,
    pdl: bool,
) -> None:
    """``block.Block`` in five kernels; x, whose squares are given, becomes its output."""
    gqkv, o, gate_up, down = weights
    arrivals, after_o = scratch.arrivals, scratch.after_o
    multiply(x_BD, gqkv, scratch.gqkv, sizes.gqkv, arrivals, eps=eps, squares=squares, pdl=pdl)
    attend(scratch.gqkv, scratch.z, *place, sizes.attention, arrivals, pdl=pdl)
    multiply(scratch.z, o, x_BD, sizes.o, arrivals, residual=True, squares=after_o, pdl=pdl)
    multiply(x_BD, gate_up, scratch.h, sizes.gate_up, arrivals, eps=eps, pair=True, squares=after_o, pdl=pdl)
    multiply(scratch.h, down, x_BD, sizes.down, arrivals, residual=True, squares=scratch.after_down, pdl=pdl)


def _room(sizes: Settings, batch: int, config: ModelConfig) -> int:
    """fp32 numbers that the kernel with the most parts of a result needs."""
    attention = config.num_heads * sizes.attention.splits * (config.head_dim + 2)
    products = (
        (sizes.gqkv, 4 * config.attention_size),
        (sizes.o, config.hidden_size),
        (sizes.gate_up, 2 * config.intermediate_size),
        (sizes.down, config.hidden_size),
    )
    split = [rows * each.splits for each, rows in products if not isinstance(each, Vector) and each.splits > 1]
    return batch * max(attention, *split, 0)


def _weights(block: nn.Module) -> tuple[Weight, ...]:
    """gqkv, o, gate and up, down."""
    assert isinstance(block, Block)
    modules = (block.attn.gqkv_proj, block.attn.o_proj, block.mlp.gate_up_proj, block.mlp.down_proj)
    return tuple(Weight(module.weight.detach(), getattr(module, "scale", None)) for module in modules)


def is_nvidia(device: torch.device) -> bool:
    """Whether a device is a GPU of NVIDIA."""
    return device.type == "cuda" and torch.version.hip is None


def has_pdl(device: torch.device) -> bool:
    """Whether a GPU knows programmatic dependent launch: NVIDIA's, from Hopper on."""
    return is_nvidia(device) and torch.cuda.get_device_capability(device) >= (9, 0)
