from __future__ import annotations

import pytest
import torch

from hrm_text.train.readback import Readback


@pytest.mark.parametrize("late", [0, 1, 3])
def test_numbers_come_back_in_order_and_as_late_as_asked(late: int) -> None:
    readback: Readback[str] = Readback(late)
    came: list[tuple[str, list[float]]] = []
    for step in range(6):
        readback.put(torch.tensor([step, -step], dtype=torch.float64), f"step {step}")
        came += readback.due()
        assert [what for what, _ in came] == [f"step {i}" for i in range(step + 1 - late)]
    came += readback.all()
    assert came == [(f"step {step}", [step, -step]) for step in range(6)]
    assert list(readback.all()) == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="pinned copies and events are of CUDA")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_on_cuda_sending_for_numbers_waits_for_nothing() -> None:
    readback: Readback[int] = Readback(late=1)
    numbers = torch.arange(5, device="cuda", dtype=torch.float64)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(3):
            readback.put(numbers * step, step)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert list(readback.all()) == [(step, [step * i for i in range(5)]) for step in range(3)]
