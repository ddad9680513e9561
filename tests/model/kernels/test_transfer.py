from __future__ import annotations

import pytest
import torch

from hrm_text.model.kernels.transfer import ALIGNMENT, to_device

TENSORS = [torch.arange(3), torch.arange(8).view(2, 1, 4), torch.arange(0), torch.arange(5).flip(0)]


def test_shapes_stay_and_every_tensor_starts_where_kernels_want_it() -> None:
    copies = to_device(TENSORS, torch.device("meta"))
    assert [copy.shape for copy in copies] == [tensor.shape for tensor in TENSORS]
    assert all(copy.storage_offset() * copy.itemsize % ALIGNMENT == 0 for copy in copies)


def test_nothing_is_copied_on_a_cpu() -> None:
    assert all(copy is tensor for copy, tensor in zip(to_device(TENSORS, torch.device("cpu")), TENSORS, strict=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_values_arrive_and_the_host_does_not_wait() -> None:
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda.set_sync_debug_mode("error")
        try:
            copies = to_device(TENSORS, torch.device("cuda"))
        finally:
            torch.cuda.set_sync_debug_mode("default")
        for copy, tensor in zip(copies, TENSORS, strict=True):
            assert torch.equal(copy.cpu(), tensor)
