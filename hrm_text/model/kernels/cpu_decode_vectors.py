"""Products of rows of weights with texts in vector registers, from which decoding on a CPU is made.

Every number of a text is summed in one order, whatever the other texts of the batch and however many threads: vectors
of 8 partial sums along a row of weights, which are then added in pairs. So a text does not depend on its neighbours, to
the bit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic, overload

# B texts, K inputs and O outputs of a product. bf16 comes as uint16: numba knows no bf16, and its bits are the upper
# half of an fp32's.

LANES = 8
"""Numbers of a vector: 256 bits of fp32, the width of AVX2. Widths of products and heads must be multiples of it."""
_AT_ONCE = 4 * LANES
"""Numbers of a row between two jumps, and for which memory is asked once."""
_AHEAD = 512
"""How many numbers before they are needed memory is asked for."""

_LOOSE = {"reassoc", "contract", "nsz"}
"""What the compiler may do to sums: not what would change a quotient, or an infinity."""


def compiled(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """Compile on the first call, once for all processes where numba finds a folder for its cache."""

    def decorate(function: Callable[..., Any]) -> Any:
        common = {"nogil": True, "error_model": "numpy", "fastmath": _LOOSE, **options}
        try:
            return njit(cache=True, **common)(function)
        except RuntimeError:
            return njit(**common)(function)

    return decorate


# ------------------------------------------------------------------------------------------------------- vectors ---


def _load(builder: Any, pointer: Any, element: Any) -> Any:
    """8 numbers from memory as fp32: fp32 themselves, bf16 (uint16) or int8."""
    stored = {types.float32: ir.FloatType(), types.uint16: ir.IntType(16), types.int8: ir.IntType(8)}[element]
    vector = ir.VectorType(stored, LANES)
    loaded = builder.load(builder.bitcast(pointer, vector.as_pointer()), align=element.bitwidth // 8)
    floats, integers = ir.VectorType(ir.FloatType(), LANES), ir.VectorType(ir.IntType(32), LANES)
    if element == types.float32:
        return loaded
    if element == types.int8:
        return builder.sitofp(builder.sext(loaded, integers), floats)
    sixteen = ir.Constant(integers, [16] * LANES)
    return builder.bitcast(builder.shl(builder.zext(loaded, integers), sixteen), floats)


def _load_half(builder: Any, pointer: Any, odd: bool) -> Any:
    """Of 16 bf16 numbers those at even or at odd places as a vector of fp32.

    A shift or a mask of pairs; widening numbers in their order takes twice as many instructions.
    """
    integers = ir.VectorType(ir.IntType(32), LANES)
    pairs = builder.load(builder.bitcast(pointer, integers.as_pointer()), align=2)
    if odd:
        half = builder.and_(pairs, ir.Constant(integers, [0xFFFF0000] * LANES))
    else:
        half = builder.shl(pairs, ir.Constant(integers, [16] * LANES))
    return builder.bitcast(half, ir.VectorType(ir.FloatType(), LANES))


def _sum(builder: Any, vector: Any) -> Any:
    """The sum of 8 lanes, in pairs."""
    width = LANES
    while width > 1:
        width //= 2
        halves = [
            builder.shuffle_vector(
                vector, vector, ir.Constant(ir.VectorType(ir.IntType(32), width), [start + i for i in range(width)])
            )
            for start in (0, width)
        ]
        vector = builder.fadd(*halves)
    return builder.extract_element(vector, ir.Constant(ir.IntType(32), 0))


class _Loop:
    """``for k in range(start, end, step)``, with sums that every round hands to the next."""

    def __init__(self, builder: Any, start: Any, end: Any, step: int, sums: list[list[Any]]) -> None:
        self.builder, self.start, self.end, self.step, self.initial = builder, start, end, step, sums

    def __enter__(self) -> _Loop:
        builder = self.builder
        before = builder.block
        self.head, self.body, self.after = (builder.append_basic_block(name) for name in ("head", "body", "after"))
        builder.branch(self.head)
        builder.position_at_end(self.head)
        self.k = builder.phi(self.start.type)
        self.k.add_incoming(self.start, before)
        self.phis = [[builder.phi(total.type) for total in row] for row in self.initial]
        for phi, total in zip(_flat(self.phis), _flat(self.initial), strict=True):
            phi.add_incoming(total, before)
        builder.cbranch(builder.icmp_signed("<", self.k, self.end), self.body, self.after)
        builder.position_at_end(self.body)
        self.sums = [list(row) for row in self.phis]
        return self

    def __exit__(self, *error: object) -> None:
        builder = self.builder
        self.k.add_incoming(builder.add(self.k, ir.Constant(self.k.type, self.step)), builder.block)
        for phi, total in zip(_flat(self.phis), _flat(self.sums), strict=True):
            phi.add_incoming(total, builder.block)
        builder.branch(self.head)
        builder.position_at_end(self.after)
        self.sums = self.phis


def _flat(rows: list[list[Any]]) -> list[Any]:
    return [value for row in rows for value in row]


def _prefetch(builder: Any, pointer: Any) -> None:
    """Ask for what a pointer points at, which need not exist."""
    byte, number = ir.IntType(8).as_pointer(), ir.IntType(32)
    kind = ir.FunctionType(ir.VoidType(), [byte, number, number, number])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")
    builder.call(function, [builder.bitcast(pointer, byte), *(ir.Constant(number, value) for value in (0, 3, 1))])


def _dots(typingctx: Any, w: Any, o: Any, apart: Any, x: Any, b: Any, y: Any, rows: Any, texts: Any) -> Any:
    """y[b + j, r] = the product of w[r] and x[b + j] for j below ``texts``, r = o + i apart for i below ``rows``.

    w is [O, K] of fp32, bf16 or int8, x fp32 [B, K] as ``arranged`` for w, y fp32 [B, O]; rows and texts are literals.
    The sums stay in registers, which is why this is not a loop of numba's: rows * texts <= 12 of them leave room for
    what is loaded.
    """
    if not isinstance(rows, types.IntegerLiteral) or not isinstance(texts, types.IntegerLiteral):
        return None
    R, T = rows.literal_value, texts.literal_value

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        arrays = [context.make_array(signature.args[i])(context, builder, arguments[i]) for i in (0, 3, 5)]
        index = [context.cast(builder, arguments[i], signature.args[i], types.intp) for i in (1, 4)]
        between = context.cast(builder, arguments[2], signature.args[2], types.intp)
        word = index[0].type
        widths = [builder.extract_value(array.shape, 1) for array in arrays]

        def row(array: int, number: Any) -> Any:
            return builder.gep(arrays[array].data, [builder.mul(number, widths[array])])

        outputs = [builder.add(index[0], builder.mul(between, ir.Constant(word, i))) for i in range(R)]
        inputs = [builder.add(index[1], ir.Constant(word, j)) for j in range(T)]
        w_rows = [row(0, number) for number in outputs]
        x_rows = [row(1, number) for number in inputs]
        sums = [[ir.Constant(ir.VectorType(ir.FloatType(), LANES), [0.0] * LANES)] * T for _ in range(R)]
        whole = builder.and_(widths[0], ir.Constant(word, -_AT_ONCE))
        start = ir.Constant(word, 0)
        for end, step in ((whole, _AT_ONCE), (widths[0], LANES)):
            with _Loop(builder, start, end, step, sums) as loop:
                if step == _AT_ONCE:
                    for pointer in w_rows:
                        _prefetch(builder, builder.gep(pointer, [builder.add(loop.k, ir.Constant(word, _AHEAD))]))
                paired = signature.args[0].dtype == types.uint16 and step == _AT_ONCE
                for at in range(0, step, LANES):
                    k = builder.add(loop.k, ir.Constant(word, at))
                    if paired:
                        odd = at % (2 * LANES) > 0
                        pair = builder.sub(k, ir.Constant(word, LANES if odd else 0))
                        w_loaded = [_load_half(builder, builder.gep(row, [pair]), odd) for row in w_rows]
                    else:
                        w_loaded = [_load(builder, builder.gep(row, [k]), signature.args[0].dtype) for row in w_rows]
                    for j in range(T):
                        x_loaded = _load(builder, builder.gep(x_rows[j], [k]), types.float32)
                        for i in range(R):
                            product = builder.fmul(w_loaded[i], x_loaded, flags=("contract",))
                            loop.sums[i][j] = builder.fadd(loop.sums[i][j], product, flags=("contract",))
            start, sums = whole, loop.sums
        for i in range(R):
            for j in range(T):
                builder.store(_sum(builder, sums[i][j]), builder.gep(row(2, inputs[j]), [outputs[i]]))
        return context.get_dummy_value()

    return types.void(w, types.intp, types.intp, x, types.intp, y, rows, texts), generate


dots: Any = intrinsic(prefer_literal=True)(_dots)  # the compiler hands over the first argument by itself


def arranged(w: Any, x: Any) -> Any:
    """x [B, K] in the order in which ``dots`` reads it beside w; in compiled code alone."""
    raise NotImplementedError


@overload(arranged)
def _arranged(w: Any, x: Any) -> Any:
    def as_it_is(w: Any, x: Any) -> Any:
        return x

    def in_halves(w: Any, x: Any) -> Any:
        y = x.copy()
        for b in range(len(x)):
            for k in range(0, x.shape[1] // _AT_ONCE * _AT_ONCE, 2 * LANES):
                for i in range(LANES):
                    y[b, k + i] = x[b, k + 2 * i]
                    y[b, k + LANES + i] = x[b, k + 2 * i + 1]
        return y

    return in_halves if w.dtype == types.uint16 else as_it_is


def as_float(value: Any) -> Any:
    """A stored number as fp32; in compiled code alone."""
    raise NotImplementedError


@overload(as_float)
def _as_float(value: Any) -> Any:
    def widen(value: Any) -> Any:
        return np.float32(value)

    def widen_bf16(value: Any) -> Any:
        return np.uint32(np.uint32(value) << 16).view(np.float32)

    return widen_bf16 if value == types.uint16 else widen


@compiled()
def exponential(x: Any) -> Any:
    """e^x of an fp32 number, within 2 units of the last place; 0 below -87. A loop of it becomes vectors."""
    x = min(max(x, np.float32(-87.3)), np.float32(88.0))
    whole = np.floor(x * np.float32(1.44269504) + np.float32(0.5))
    rest = (x - whole * np.float32(0.693359375)) - whole * np.float32(-2.12194440e-4)  # log 2 in two parts
    series = np.float32(1.9875691500e-4)  # the polynomial of Cephes' expf
    series = series * rest + np.float32(1.3981999507e-3)
    series = series * rest + np.float32(8.3334519073e-3)
    series = series * rest + np.float32(4.1665795894e-2)
    series = series * rest + np.float32(1.6666665459e-1)
    series = series * rest + np.float32(5.0000001201e-1)
    series = series * rest * rest + rest + np.float32(1.0)
    return series * np.int32((np.int32(whole) + 127) << 23).view(np.float32)
