"""Accelerated attention. Each form equals ``attention.PlainAttention``; the best one for a device is picked here."""

from __future__ import annotations

from typing import Literal

import torch

from hrm_text.contracts import UserError
from hrm_text.model.attention import Attention, PlainAttention, Spans
from hrm_text.model.kernels.grouped import GroupedAttention

BACKENDS = ("plain", "grouped", "flex")


def pick_backend(device: torch.device) -> Literal["grouped", "flex"]:
    """The best backend for training on a device: FlexAttention on CUDA, groups of similar length elsewhere."""
    return "flex" if device.type == "cuda" else "grouped"


def packed_attention(spans: Spans, num_tokens: int, device: torch.device, backend: str = "grouped") -> Attention:
    """Attention over one packed batch of ``num_tokens`` tokens, padding included, on ``device``."""
    match backend:
        case "plain":
            return PlainAttention(spans, num_tokens, device)
        case "grouped":
            return GroupedAttention(spans, num_tokens, device)
        case "flex":
            from hrm_text.model.kernels.flex import FlexAttention

            return FlexAttention(spans, num_tokens, device)
        case _:
            raise UserError(f"unknown attention backend {backend!r}; the backends are {', '.join(BACKENDS)}")
