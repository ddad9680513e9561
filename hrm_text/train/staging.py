"""Copies of tensors in host memory, so that training may go on while they are written."""

from __future__ import annotations

import mmap
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import create_default_local_save_plan
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.tensor import DTensor


class Staging:
    """Host memory for one copy of the local part of each tensor, made at the first copy and used again by the next.

    For tensors on CUDA it is pinned, so that copies run at the speed of the bus. PyTorch's own pinned memory comes in
    powers of two, which for the parameters of these models is 1.6 times what they need; here it is exact, by the page.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}
        self._pinned: list[Tensor] = []

    @torch.no_grad()
    def copy(self, tensors: Mapping[str, Tensor]) -> tuple[SavePlan, dict[str, Tensor]]:
        """Copy the part of each tensor that lies here; returns what is to be written of each, and the copies by name.

        They are complete on return. Tensors are taken one by one, so a mapping may make them as it is asked.
        """
        plan, copies = SavePlan([]), {}
        on_cuda = False
        for name, tensor in tensors.items():
            plan.items.extend(create_default_local_save_plan({name: tensor}, is_coordinator=True).items)
            local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            copies[name] = self._buffer(name, local)
            copies[name].copy_(local, non_blocking=local.is_cuda)
            on_cuda |= local.is_cuda
        if on_cuda:
            torch.cuda.current_stream().synchronize()
        return plan, copies

    def close(self) -> None:
        """Give the memory back."""
        for buffer in self._pinned:
            torch.cuda.check_error(int(torch.cuda.cudart().cudaHostUnregister(buffer.data_ptr())))
        self._pinned.clear()
        self._buffers.clear()

    def _buffer(self, name: str, like: Tensor) -> Tensor:
        buffer = self._buffers.get(name)
        if buffer is None or (buffer.shape, buffer.dtype) != (like.shape, like.dtype):
            if like.is_cuda and like.numel():
                buffer = self._pinned_memory(like.numel() * like.element_size()).view(like.dtype).view(like.shape)
            else:
                buffer = torch.empty(like.shape, dtype=like.dtype)
            self._buffers[name] = buffer
        return buffer

    def _pinned_memory(self, size: int) -> Tensor:
        """uint8 [size], pinned: pages of their own, as pinned ranges must not share any."""
        memory = torch.frombuffer(mmap.mmap(-1, size), dtype=torch.uint8, count=size)
        portable = 1  # for all CUDA contexts of the process
        torch.cuda.check_error(int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), size, portable)))
        self._pinned.append(memory)
        return memory
