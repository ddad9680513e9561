"""FlashAttention 3 or 4 in two passes, where one is installed.

Written from the signatures in their sources (``hopper/flash_attn_interface.py`` of 3, ``flash_attn/cute/interface.py``
of 4.0.0b36) and not run yet with either: the tests run it where one is installed.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util

import torch
from torch import Tensor

from hrm_text.model.attention import Spans
from hrm_text.model.kernels.two_pass import HALVES, Segments, TwoPassAttention, VarlenFunction

VERSION_3, VERSION_4 = "flash_attn_interface", "flash_attn.cute"
"""Modules: of FlashAttention 3, built from the folder hopper of its sources, and of the package flash-attn-4."""


class FlashAttention(TwoPassAttention):
    """Attention over a packed batch by ``flash_attn_varlen_func``, which aligns the diagonal at the bottom right."""

    name = "flash"
    dtypes = HALVES

    def __init__(self, spans: Spans, num_tokens: int, device: torch.device) -> None:
        module = installed_version(torch.cuda.get_device_capability(device))
        assert module is not None, "why_not comes first"
        super().__init__(flash_function(module), spans, num_tokens, device)


def installed_version(capability: tuple[int, int]) -> str | None:
    """The module to use on a GPU of this compute capability: version 3 is for Hopper alone, 4 for 9.0 and above."""
    if capability[0] == 9 and importlib.util.find_spec(VERSION_3):
        return VERSION_3
    # Asking for a submodule imports its parent, so ask for the parent first.
    if capability[0] >= 9 and importlib.util.find_spec("flash_attn") and importlib.util.find_spec(VERSION_4):
        return VERSION_4
    return None


@functools.cache
def flash_function(module: str) -> VarlenFunction:
    """The module's function in the form that two passes need."""
    flash_attn_varlen_func = importlib.import_module(module).flash_attn_varlen_func

    def attend(q: Tensor, k: Tensor, v: Tensor, segments: Segments, causal: bool) -> Tensor:
        # By name: the two versions order their parameters differently.
        y: Tensor | tuple[Tensor, ...] = flash_attn_varlen_func(
            q,
            k,
            v,
            cu_seqlens_q=segments.starts_q,
            cu_seqlens_k=segments.starts_k,
            max_seqlen_q=segments.longest_q,
            max_seqlen_k=segments.longest_k,
            causal=causal,
        )
        return y[0] if isinstance(y, tuple) else y  # version 4 and some builds of 3 return the log-sum-exp too

    return attend
