from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from hrm_text.train.metrics import Throughput, device_memory_bytes, peak_flops, peak_flops_of


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA GB200", 2500e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L40", None),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", None),
        ("Some Future GPU", None),
    ],
)
def test_peak_by_name(name: str, peak: float | None) -> None:
    assert peak_flops_of(name) == peak


def test_no_peak_is_claimed_for_a_cpu() -> None:
    assert peak_flops(torch.device("cpu")) is None


def test_throughput_counts_steps_and_not_the_pauses_between_them() -> None:
    clock = Clock()
    meter = Throughput(peak_flops=1000.0, window=2, clock=clock)
    rates = []
    for seconds, tokens in ((1.0, 999), (1.0, 100), (3.0, 300)):
        meter.start()
        clock.now += seconds
        rates.append(meter.lap(tokens=tokens, flops=4.0 * tokens))
        clock.now += 50  # validation
    assert [rate.seconds for rate in rates] == [1, 1, 3]
    assert rates[0].tokens_per_second == 999
    assert rates[2].tokens_per_second == 400 / 4  # the first step has left the window
    assert rates[2].mfu == pytest.approx(0.4)


def test_steps_whose_results_arrive_in_a_heap_are_no_faster() -> None:
    clock = Clock()
    meter = Throughput(clock=clock)
    meter.start()
    clock.now += 6.0  # three steps were launched at once, and all have arrived
    rates = [meter.lap(tokens=100, flops=1.0) for _ in range(3)]
    assert [rate.seconds for rate in rates] == [6, 0, 0]
    assert rates[-1].tokens_per_second == 300 / 6


def test_without_a_peak_there_is_no_utilisation() -> None:
    meter = Throughput()
    meter.start()
    assert meter.lap(tokens=1, flops=1.0).mfu is None


def test_memory_of_a_cpu_run_is_the_most_of_this_process_alone() -> None:
    # In a process of its own: 200 MB more, freed again, and not the size of the process that started it.
    code = (
        "import torch\nfrom hrm_text.train.metrics import device_memory_bytes as held\n"
        "before = held(torch.device('cpu'))\nx = torch.ones(50_000_000)\ndel x\n"
        "print(before, held(torch.device('cpu')))"
    )
    ballast = torch.ones(300_000_000 // 4)
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    before, after = map(int, output.split())
    assert 190e6 < after - before < 260e6
    assert device_memory_bytes(torch.device("cpu")) > ballast.nbytes
