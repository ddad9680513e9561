"""What GPUs do in a training step: one table of rates, measured on an H200 and scaled by data sheets for the others."""

from __future__ import annotations

from dataclasses import dataclass

from hrm_text.contracts import UserError, did_you_mean
from hrm_text.train.metrics import peak_flops_of

# Efficiencies: what an H200 (700 W) reached within training steps, as a share of its data sheet (docs/performance.md).
# Hot GPUs: the power limit is part of them.
PRODUCTS_BF16 = 0.745
"""Of the bf16 peak, large matrix products: 737 TFLOP/s of 989."""
PRODUCTS_FP8 = 0.71
"""Of the FP8 peak, twice the bf16 one: 1,404 TFLOP/s."""
PASSES = 0.833
"""Of the memory's bandwidth, passes that read and write whole tensors: 4.0 TB/s of 4.8."""
PASSES_FP8 = 0.75
"""The same of passes that make FP8 tensors, the transposing ones among them."""
OPTIMIZER = 0.75
"""The same of the optimizer's pass, which works on ten tensors at once: 3.6 TB/s."""
ATTENTION = 0.335
"""Of the bf16 peak, products of attention; all of a tile counts, masked pairs too."""
COMPILED_PASSES = 1.85
"""Bytes of the passes that the compiler writes, as a multiple of those of fused blocks."""
FLEX_ATTENTION = 0.21
"""As ATTENTION, of FlexAttention with its tiles of 128 x 128."""
DEPTH = 80
"""A matrix product along K numbers reaches K / (K + DEPTH) of the rate of a deep one: tiles are begun and ended."""
GAP_SECONDS = 1.3e-6
"""Between two kernels that the host has launched in time."""
LAUNCH_SECONDS = 36e-6
"""Of the host for each kernel: 88 ms for the 2,461 kernels counted of an XL step."""
LAUNCH_SECONDS_FP8 = 42e-6
"""The same with FP8 products, each of which the host dresses with scales: 168 ms for 3,981."""
TRAINING_HOST = 1.75
"""In a run the host is slower by this than in a measurement of bare steps: the threads that load, record and save
share its interpreter. Fitted to one run with FP8 at a width of 512, whose steps are nothing but launches."""
BUSY_HOST = 0.10
"""Share of the host's own time for a step that the device waits: launches come in bursts, and small kernels drain
the queue."""

# Between two H200 of one host: measured by exchanges alone, outside of steps (budget_measurements.EXCHANGES).
LINKS = 0.565
"""Of a data sheet's link speed: 255 GB/s of 450 each way. By the difference of two reduce-scatters in fp32."""
COLLECTIVE_SECONDS = 30e-6
"""A collective of no bytes: 36 us by the same two, 26 by two all-gathers."""
CONTENTION = 1.6
"""Seconds of computing lost for each second that an exchange on links takes alone, where computing hides it: it holds
multiprocessors that products wait for. A product of 8192^3 ends 0.475 ms later beside a reduce-scatter of 0.295."""
WAITING = 0.5
"""The same for each second in which an exchange waits for others: in an XL step of two ranks 17.4 ms were lost beside
33.7 of exchange, most of them waiting or slowed themselves."""
SUMS = 0.2
"""Of the memory's bandwidth, the sum in fp32 of bf16 gradients as they arrive: 0.135 ms for two parts of 16.5 M."""

# Between ranks, beyond two of one host: assumed.
NETWORK = 0.8
"""Of an adapter's speed, what collectives of many MB reach."""
HOP_SECONDS = 3e-6
"""Of a collective for each GPU beyond two."""
HOOK_SECONDS = 60e-6
"""Of the host for each unit of weights in each call of a stack that FSDP hears of."""


@dataclass(frozen=True)
class Gpu:
    """A GPU as its data sheet has it."""

    name: str
    """As PyTorch calls it, or a part of that."""
    memory_gib: float
    """That PyTorch finds."""
    bytes_per_second: float
    """Of its memory."""
    link_bytes_per_second: float
    """To another GPU of the machine, in one direction: NVLink, or PCIe through the host."""
    float8: bool
    """Whether it multiplies in FP8."""
    measured: bool = False

    @property
    def peak(self) -> float:
        """bf16 FLOP/s, dense."""
        peak = peak_flops_of(self.name)
        assert peak is not None, self.name
        return peak

    @property
    def product_flops(self) -> float:
        """FLOP/s of deep bf16 products in a step."""
        return PRODUCTS_BF16 * self.peak

    @property
    def float8_flops(self) -> float:
        """FLOP/s of deep FP8 products in a step."""
        return PRODUCTS_FP8 * 2 * self.peak


GPUS = {
    "b200": Gpu("B200", 178.4, 8.0e12, 900e9, float8=True),
    "h200": Gpu("H200", 139.8, 4.8e12, 450e9, float8=True, measured=True),
    "h100": Gpu("H100", 79.1, 3.35e12, 450e9, float8=True),
    "h100-pcie": Gpu("H100 PCIe", 79.1, 2.0e12, 50e9, float8=True),
    "a100": Gpu("A100", 79.2, 2.04e12, 300e9, float8=False),
    "a100-40gb": Gpu("A100", 39.4, 1.56e12, 300e9, float8=False),
    "l40s": Gpu("L40S", 44.4, 0.864e12, 25e9, float8=True),
    "rtx-5090": Gpu("RTX 5090", 31.3, 1.79e12, 50e9, float8=True),
    "rtx-4090": Gpu("RTX 4090", 23.6, 1.01e12, 25e9, float8=True),
    "rtx-3090": Gpu("RTX 3090", 23.6, 0.936e12, 25e9, float8=False),
}


def find_gpu(name: str) -> Gpu:
    """The GPU of that name; an unknown one is an error that lists them."""
    key = name.lower().replace(" ", "-").replace("_", "-")
    if key not in GPUS:
        raise UserError(f"--gpu: unknown GPU {name!r}; {did_you_mean(key, GPUS)}choose from {', '.join(GPUS)}")
    return GPUS[key]
