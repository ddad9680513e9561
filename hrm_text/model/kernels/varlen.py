"""PyTorch's variable-length attention, in two passes. FlashAttention 2 is inside; nothing has to be installed."""

from __future__ import annotations

import functools
import importlib
import inspect
from typing import Any

import torch
from torch import Tensor

from hrm_text.model.attention import Spans
from hrm_text.model.kernels.two_pass import HALVES, Segments, TwoPassAttention, VarlenFunction


class VarlenAttention(TwoPassAttention):
    """Attention over a packed batch by ``torch.nn.attention.varlen.varlen_attn``.

    With causal masking and fewer queries than keys, the kernel aligns the diagonal at the bottom right, as
    FlashAttention has since version 2.1 and as ``torch.nn.attention.bias`` relies on.
    """

    name = "varlen"
    dtypes = HALVES

    def __init__(self, spans: Spans, num_tokens: int, device: torch.device) -> None:
        function = varlen_function()
        assert function is not None, "why_not comes first"
        super().__init__(function, spans, num_tokens, device)


@functools.cache
def varlen_function() -> VarlenFunction | None:
    """PyTorch's function in the form that two passes need; None where this PyTorch has none, or one of another form.

    Causal masking is asked for by ``window_size`` in recent releases (2.12, 2.13) and was by ``is_causal`` in 2.10.
    """
    try:
        varlen_attn = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    except (ImportError, AttributeError):
        return None
    parameters = inspect.signature(varlen_attn).parameters
    if "window_size" in parameters:
        # How many neighbours are seen to the left and to the right, -1 for all of them.
        options: dict[bool, dict[str, Any]] = {False: {"window_size": (-1, -1)}, True: {"window_size": (-1, 0)}}
    elif "is_causal" in parameters:
        options = {False: {"is_causal": False}, True: {"is_causal": True}}
    else:
        return None

    def attend(q: Tensor, k: Tensor, v: Tensor, segments: Segments, causal: bool) -> Tensor:
        y: Tensor = varlen_attn(
            q, k, v, segments.starts_q, segments.starts_k, segments.longest_q, segments.longest_k, **options[causal]
        )
        return y

    return attend
