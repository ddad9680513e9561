"""One step of Adam-atan2 with its moving average in one Triton kernel: ``train.optimizer.update`` in a single pass.

The step is bound by memory: a bf16 parameter with a bf16 gradient moves 34 bytes (parameter, remainder and three fp32
states in and out, gradient in), an fp32 one with an fp32 gradient 36. At the 3.6 TB/s of an H200 there is time for 270
instructions a weight; compiled for it the kernel has about 105, exact division and square root included.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


def update(
    parameter: Tensor,
    remainder: Tensor | None,
    gradient: Tensor | None,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    ema: Tensor,
    corrections_2: Tensor,
    finite: Tensor,
    *,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float],
    ema_decay: float,
) -> None:
    """Update a parameter and its state in place, or nothing at all where ``finite`` is False.

    parameter: fp32, or bf16 with an int16 ``remainder`` of the same shape, which together are an fp32 weight.
    gradient: bf16 or fp32; None is zero. exp_avg, exp_avg_sq, ema: fp32. corrections_2: fp32 [2], 1 - beta^t of both
    betas. finite: bool []. The tensors of the parameter's shape are dense, in one order of memory; another order of
    the gradient's costs a copy.
    """
    size = parameter.numel()
    if size == 0:
        return
    states = [exp_avg, exp_avg_sq, ema] + ([] if remainder is None else [remainder])
    assert all(state.stride() == parameter.stride() and state.shape == parameter.shape for state in states)
    if gradient is not None and gradient.stride() != parameter.stride():
        gradient = torch.empty_like(parameter, dtype=gradient.dtype).copy_(gradient)
    with torch.cuda.device_of(parameter):
        adam_atan2_update[(triton.cdiv(size, BLOCK),)](
            parameter.view(torch.int16) if remainder is not None else parameter,
            remainder,
            gradient,
            exp_avg,
            exp_avg_sq,
            ema,
            corrections_2,
            finite.view(torch.uint8),
            size,
            lr,
            1 - lr * weight_decay,
            betas[0],
            1 - betas[0],
            betas[1],
            1 - betas[1],
            1 - ema_decay,
            BLOCK=BLOCK,
        )
    # Whoever keeps what was computed from a parameter (its FP8 copy) learns from the version that it has changed.
    torch.autograd.graph.increment_version(parameter)


@triton.jit
def atan2_of_positive(y, x):
    """atan2(y, x) in fp32 for x >= 0, finite arguments; 0 for (0, 0). Within 2 units in the last place.

    Not CUDA's: this one also runs on AMD and in Triton's interpreter. atan(t) = t + t^3 P(t^2) on [0, 1] with P of
    degree 7, fitted by Remez exchange for the least relative error (1.7e-8); pi/2 - atan(1/t) beyond.
    """
    a = tl.abs(y)
    larger = tl.maximum(a, x)
    t = tl.div_rn(tl.minimum(a, x), tl.where(larger == 0.0, 1.0, larger))
    u = t * t
    p = 2.9206930194050074e-03
    p = p * u - 1.6367930918931961e-02
    p = p * u + 4.3211866170167923e-02
    p = p * u - 7.5522147119045258e-02
    p = p * u + 1.0666004568338394e-01
    p = p * u - 1.4211055636405945e-01
    p = p * u + 1.9993773102760315e-01
    p = p * u - 3.3333152532577515e-01
    angle = t + t * (u * p)
    # pi/2 is 1.57079637 - 4.37113883e-8
    angle = tl.where(a > x, (1.57079637 - angle) - 4.37113883e-8, angle)
    return tl.where(y < 0.0, -angle, angle)


# Pointers to single numbers: what their alignment happens to be must not compile anew.
@triton.jit(do_not_specialize=["corrections", "finite"])
def adam_atan2_update(
    parameter,
    remainder,
    gradient,
    exp_avg,
    exp_avg_sq,
    ema,
    corrections,
    finite,
    size,
    lr,
    shrinkage,
    beta1,
    beta1_rest,
    beta2,
    beta2_rest,
    ema_rest,
    BLOCK: tl.constexpr,
):
    """Program i: the i-th BLOCK of the parameter. A step that is not finite loads and stores nothing."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    taken = tl.load(finite) != 0
    active = (i < size) & taken

    # All loads come first: a store in between would hold back those behind it, which might read what it writes.
    m = tl.load(exp_avg + i, mask=active, other=0.0)
    v = tl.load(exp_avg_sq + i, mask=active, other=0.0)
    average = tl.load(ema + i, mask=active, other=0.0)
    if remainder is None:
        p = tl.load(parameter + i, mask=active, other=0.0)
    else:
        high = tl.load(parameter + i, mask=active, other=0).to(tl.int32)
        p = ((high << 16) + tl.load(remainder + i, mask=active, other=0).to(tl.int32)).to(tl.float32, bitcast=True)
    m = m * beta1
    v = v * beta2
    if gradient is not None:
        g = tl.load(gradient + i, mask=active, other=0.0).to(tl.float32)
        m += beta1_rest * g
        v += beta2_rest * g * g

    step_size = tl.div_rn(lr, tl.load(corrections, mask=taken, other=1.0))
    deviation = tl.sqrt_rn(v) * tl.div_rn(1.0, tl.sqrt_rn(tl.load(corrections + 1, mask=taken, other=1.0)))
    p = p * shrinkage - step_size * atan2_of_positive(m, deviation)
    average += ema_rest * (p - average)

    tl.store(exp_avg + i, m, mask=active)
    tl.store(exp_avg_sq + i, v, mask=active)
    tl.store(ema + i, average, mask=active)
    if remainder is None:
        tl.store(parameter + i, p, mask=active)
    else:
        bits = p.to(tl.int32, bitcast=True)
        high = (bits + 0x8000) >> 16
        tl.store(parameter + i, high.to(tl.int16), mask=active)
        tl.store(remainder + i, (bits - (high << 16)).to(tl.int16), mask=active)
