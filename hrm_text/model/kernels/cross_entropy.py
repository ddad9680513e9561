"""``head.supervised_loss`` in chunks, so that the logits of all supervised positions never exist at once.

The gradients of the hidden states and of the weight are made in the forward pass, while a chunk's logits are there.
At XL (V = 65,536) the logits of 6,000 supervised positions are 2.4 GB in fp32 and as much again for their gradient;
a chunk of 2,048, which keeps the matrix units busy, is 0.27 GB in bf16, and its gradient is written over it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hrm_text.model.head import LossSums, Targets
from hrm_text.model.kernels import why_not_gpu, why_not_triton


def chunked_loss(hidden_TD: Tensor, weight_VD: Tensor, targets: Targets, chunk: int = 2048) -> LossSums:
    """Equal to ``head.supervised_loss``, with the logits of at most ``chunk`` positions at any time.

    The gradient can be asked for again (``retain_graph``), but not be differentiated. The weight's gradient is added up
    over chunks in fp32 and rounded once.
    """
    assert chunk > 0
    if torch.is_grad_enabled() and (hidden_TD.requires_grad or weight_VD.requires_grad):
        loss, correct_S = _ChunkedLoss.apply(hidden_TD, weight_VD, targets, chunk)
    else:
        loss, correct_S, _, _ = _in_chunks(hidden_TD, weight_VD, targets, chunk, hidden_grad=False, weight_grad=False)
    return LossSums.of(loss, correct_S, targets)


def loss_rows(logits_SV: Tensor, labels_S: Tensor, gradient: bool) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each row in fp32, and 1 where the label is the first of the largest logits: fp32 and long [S].

    Overwrites the logits: with softmax - onehot, the gradient of the sum of the losses, if ``gradient``.
    """
    rows_SV = logits_SV.float()  # the logits themselves if they are fp32
    most_S, choices_S = rows_SV.max(-1)
    rows_SV -= most_S[:, None]
    at_label_S = rows_SV.gather(1, labels_S[:, None]).squeeze(1)
    sums_S = rows_SV.exp_().sum(-1)
    if gradient:
        rows_SV /= sums_S[:, None]
        rows_SV.scatter_add_(1, labels_S[:, None], rows_SV.new_full((len(labels_S), 1), -1.0))
        logits_SV.copy_(rows_SV)
    return sums_S.log() - at_label_S, (choices_S == labels_S).long()


class _ChunkedLoss(torch.autograd.Function):
    """(loss [] fp32, correct [S] long) of hidden states and weight; the backward pass only scales and scatters."""

    @staticmethod
    def forward(ctx: Any, hidden_TD: Tensor, weight_VD: Tensor, targets: Targets, chunk: int) -> tuple[Tensor, Tensor]:
        hidden_grad, weight_grad = ctx.needs_input_grad[:2]
        loss, correct_S, d_hidden_SD, d_weight_VD = _in_chunks(
            hidden_TD, weight_VD, targets, chunk, hidden_grad=hidden_grad, weight_grad=weight_grad
        )
        ctx.save_for_backward(targets.positions_S, d_hidden_SD, d_weight_VD)
        ctx.hidden_shape, ctx.weight_dtype = hidden_TD.shape, weight_VD.dtype
        ctx.mark_non_differentiable(correct_S)
        return loss, correct_S

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor, _: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        positions_S, d_hidden_SD, d_weight_VD = ctx.saved_tensors
        d_loss_1 = d_loss.view(1)  # a tensor without dimensions would be rounded to bf16 before it is multiplied with
        d_hidden_TD, d_weight = None, None
        if d_hidden_SD is not None:
            scaled_SD = torch.mul(d_hidden_SD, d_loss_1, out=torch.empty_like(d_hidden_SD))
            d_hidden_TD = scaled_SD.new_zeros(ctx.hidden_shape).index_copy_(0, positions_S, scaled_SD)
        if d_weight_VD is not None:
            d_weight = torch.mul(d_weight_VD, d_loss_1, out=torch.empty_like(d_weight_VD, dtype=ctx.weight_dtype))
        return d_hidden_TD, d_weight, None, None


@torch.no_grad()
def _in_chunks(
    hidden_TD: Tensor, weight_VD: Tensor, targets: Targets, chunk: int, *, hidden_grad: bool, weight_grad: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Loss [] fp32, correct [S] long, and the gradients that are wanted: [S, D] as the states, [V, D] in fp32."""
    total, device = len(targets.labels_S), hidden_TD.device
    rows = _rows_on(device)
    losses_S = torch.empty(total, device=device, dtype=torch.float32)
    correct_S = torch.empty(total, device=device, dtype=torch.long)
    d_hidden_SD = hidden_TD.new_empty(total, hidden_TD.shape[1]) if hidden_grad else None
    d_weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if weight_grad else None
    buffer_CV = hidden_TD.new_empty(min(chunk, total), len(weight_VD))  # one for all: two chunks never live together
    for start in range(0, total, chunk):
        part = slice(start, min(start + chunk, total))
        hidden_CD = hidden_TD.index_select(0, targets.positions_S[part])
        logits_CV = torch.mm(hidden_CD, weight_VD.T, out=buffer_CV[: len(hidden_CD)])
        losses_S[part], correct_S[part] = rows(logits_CV, targets.labels_S[part], hidden_grad or weight_grad)
        if d_hidden_SD is not None:
            torch.mm(logits_CV, weight_VD, out=d_hidden_SD[part])
        if d_weight_VD is not None:
            _add_product(d_weight_VD, logits_CV.T, hidden_CD)
    return losses_S.sum(), correct_S, d_hidden_SD, d_weight_VD


def _add_product(sum_VD: Tensor, left_VC: Tensor, right_CD: Tensor) -> None:
    """sum += left @ right, the sum in fp32 and the product on the matrix units of the operands' dtype."""
    if left_VC.dtype == torch.float32:
        sum_VD.addmm_(left_VC, right_CD)
    elif _adds_in_fp32(sum_VD.device.type):
        torch.addmm(sum_VD, left_VC, right_CD, out_dtype=torch.float32, out=sum_VD)
    else:
        sum_VD += left_VC @ right_CD  # each chunk's product is rounded once


@functools.cache
def _rows_on(device: torch.device) -> Callable[[Tensor, Tensor, bool], tuple[Tensor, Tensor]]:
    """``loss_rows``, or where Triton runs the one kernel that equals it."""
    if why_not_gpu(device) or why_not_triton():
        return loss_rows
    from hrm_text.model.kernels import triton_cross_entropy

    return triton_cross_entropy.loss_rows


@functools.cache
def _adds_in_fp32(device_type: str) -> bool:
    """Whether ``addmm`` adds products of bf16 to an fp32 sum there: CUDA since PyTorch 2.10, others not (2.13)."""
    sums, ones = torch.zeros(16, 16, device=device_type), torch.ones(16, 16, device=device_type, dtype=torch.bfloat16)
    try:
        torch.addmm(sums, ones, ones, out_dtype=torch.float32, out=sums)
    except RuntimeError:  # NotImplementedError is one
        return False
    return True
