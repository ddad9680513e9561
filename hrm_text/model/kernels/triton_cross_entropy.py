"""``cross_entropy.loss_rows`` in one Triton kernel: logits are read twice and their gradient is written over them.

A row is given many warps, so that few rows are open at a time and the second reading finds them in the cache: two rows
of 128 KiB (65,536 ids in bf16) on each of 132 multiprocessors are 33 MiB, of the 50 MiB that an H200 has.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


def loss_rows(logits_SV: Tensor, labels_S: Tensor, gradient: bool) -> tuple[Tensor, Tensor]:
    """As ``cross_entropy.loss_rows``: fp32 losses and long 0 or 1 [S]; logits become their gradient if ``gradient``."""
    rows, vocabulary = logits_SV.shape
    assert logits_SV.stride(1) == 1 and labels_S.is_contiguous()
    losses_S = torch.empty(rows, device=logits_SV.device, dtype=torch.float32)
    correct_S = torch.empty(rows, device=logits_SV.device, dtype=torch.long)
    if rows:
        block = min(8192, triton.next_power_of_2(vocabulary))
        with torch.cuda.device_of(logits_SV):
            cross_entropy_row[(rows,)](
                logits_SV,
                labels_S,
                losses_S,
                correct_S,
                logits_SV.stride(0),
                vocabulary,
                GRADIENT=gradient,
                BLOCK=block,
                num_warps=max(block // 512, 1),
            )
    return losses_S, correct_S


# The labels of a chunk may begin at any of a batch's supervised positions: their alignment must not compile anew.
@triton.jit(do_not_specialize=["labels"])
def cross_entropy_row(
    logits,
    labels,
    losses,
    correct,
    row_stride,
    vocabulary,
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program s: one row of logits, in blocks of BLOCK ids."""
    s = tl.program_id(0)
    logits += s.to(tl.int64) * row_stride
    label = tl.load(labels + s)
    at_label = tl.load(logits + label).to(tl.float32)

    most = float("-inf")
    total = 0.0
    beaten = 0  # 1 once another id would be chosen before the label
    for start in range(0, vocabulary, BLOCK):
        v_B = start + tl.arange(0, BLOCK)
        x_B = tl.load(logits + v_B, mask=v_B < vocabulary, other=float("-inf")).to(tl.float32)
        most_before = most
        most = tl.maximum(most, tl.max(x_B, 0))
        total = total * tl.exp(most_before - most) + tl.sum(tl.exp(x_B - most), 0)
        before_label_B = (x_B > at_label) | ((x_B == at_label) & (v_B < label))
        beaten = tl.maximum(beaten, tl.max(before_label_B.to(tl.int32), 0))
    tl.store(losses + s, tl.log(total) + (most - at_label))
    tl.store(correct + s, 1 - beaten)

    if GRADIENT:
        scale = 1.0 / total
        for start in range(0, vocabulary, BLOCK):
            v_B = start + tl.arange(0, BLOCK)
            x_B = tl.load(logits + v_B, mask=v_B < vocabulary, other=float("-inf")).to(tl.float32)
            d_B = tl.exp(x_B - most) * scale - (v_B == label).to(tl.float32)
            tl.store(logits + v_B, d_B.to(logits.dtype.element_ty), mask=v_B < vocabulary)
