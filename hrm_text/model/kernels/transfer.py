"""What the host has worked out about a batch, on the device in one copy that nobody waits for."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

ALIGNMENT = 16
"""Bytes at a multiple of which each tensor starts: compiled kernels copy what starts elsewhere before they read it."""


def to_device(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """CPU tensors of one dtype as tensors on the device, of the same shapes.

    ``x.to(device)`` waits for all work queued on a GPU, once a tensor. Here they travel together, from pinned memory.
    """
    if device.type == "cpu" or not tensors:
        return list(tensors)
    dtype = tensors[0].dtype
    assert all(tensor.dtype == dtype for tensor in tensors)
    step = ALIGNMENT // dtype.itemsize
    sizes = [-(-tensor.numel() // step) * step for tensor in tensors]
    joint = torch.empty(sum(sizes), dtype=dtype, pin_memory=device.type == "cuda")
    for tensor, place in zip(tensors, joint.split(sizes), strict=True):
        place[: tensor.numel()] = tensor.flatten()
    places = joint.to(device, non_blocking=True).split(sizes)
    return [place[: tensor.numel()].view(tensor.shape) for tensor, place in zip(tensors, places, strict=True)]
