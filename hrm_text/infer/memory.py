"""How much memory the cache may have, and in pages of what size."""

from __future__ import annotations

import os

import torch

from hrm_text.model.config import ModelConfig

GPU_SHARE = 0.9
"""Of the GPU's memory that is free once the weights are there."""
GPU_RESERVE = 2 * 2**30
"""Bytes left for what passes over long prompts need besides."""
HOST_SHARE = 0.25
"""Of all memory of the host; what is not used is not taken from it."""


def page_size(device: torch.device) -> int:
    """Tokens in a page: few, as those behind the end of a text are lost; on a CPU 16 and 64 were as fast."""
    return 16 if device.type == "cuda" else 32


def cache_tokens(config: ModelConfig, dtype: torch.dtype, device: torch.device, max_batch: int) -> int:
    """Tokens that the memory left has room for, but not more than ``max_batch`` texts of the longest kind have.

    At least one such text, whatever it takes.
    """
    context = config.max_position_embeddings
    wanted = max_batch * context
    if device.type == "cuda":
        available = torch.cuda.mem_get_info(device)[0] * GPU_SHARE - GPU_RESERVE
    else:
        available = host_memory() * HOST_SHARE
    return max(min(wanted, int(available / bytes_per_token(config, dtype))), context)


def bytes_per_token(config: ModelConfig, dtype: torch.dtype) -> int:
    """Bytes of the keys and values of one token, with the scales of 8-bit ones."""
    scales = 2 * config.num_cache_slots * config.num_heads * 4 if dtype == torch.int8 else 0
    return config.cache_bytes_per_token(dtype.itemsize) + scales


def host_memory() -> int:
    """Bytes of memory the host has."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):  # Windows
        return 8 * 2**30
