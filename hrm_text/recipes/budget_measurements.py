"""What was measured of training steps, to check the budget's model against (docs/performance.md, docs/budget.md)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from hrm_text.model.config import Architecture, ModelConfig, preset
from hrm_text.recipes.budget_gpus import TRAINING_HOST, find_gpu
from hrm_text.recipes.budget_memory import Setup, peak_memory
from hrm_text.recipes.budget_network import Group, Network
from hrm_text.recipes.budget_speed import step_time
from hrm_text.recipes.budget_work import synthetic_work


@dataclass(frozen=True)
class Measurement:
    """One run of ``bench train`` (K = 5, "anchor" batches), or a published figure of a comparable system."""

    name: str
    gpu: str
    size: str
    tokens: int
    """Budget of one forward pass."""
    ms: float | None = None
    """Of one step."""
    tokens_per_second: float | None = None
    """Of one GPU, the budget counted, padding included."""
    gib: float | None = None
    """Peak of tensors on one GPU."""
    launch_ms: float | None = None
    """That the host needs to launch a step."""
    architecture: Architecture = "hrm"
    model: ModelConfig | None = None
    """Of another size than the named one."""
    distribution: str = "anchor"
    run: bool = False
    """Of a training run; otherwise of bare steps (``bench train``)."""
    blocks: Literal["fused", "compiled"] = "fused"
    recompute: Literal["none", "some", "full"] = "some"
    fp8: bool = False
    passes: int = 1
    """Forward and backward passes of a rank in a step."""
    gpus: int = 1
    gpus_per_node: int = 8
    sharding: Literal["none", "ddp", "fsdp", "hsdp"] = "none"
    shard_ranks: int | None = None
    """hsdp: ranks that share one copy; None is those of a machine."""
    fitted: bool = False
    """Rates were set by this row; the others were not looked at for it."""
    ours: bool = True
    """False: the published trainer, here or over its real runs; by our model of compiled blocks."""

    @property
    def measured_ms(self) -> float:
        """Of one step, whichever way it was noted."""
        if self.ms is not None:
            return self.ms
        assert self.tokens_per_second is not None
        return 1e3 * self.passes * self.tokens / self.tokens_per_second


BETWEEN_BYTES_PER_SECOND = 50e9
"""Of each GPU's adapter, 400 Gb/s."""
EARLIER = "earlier machine"
"""Another H200, on which the same code took 3 % longer."""

# The quickstart's GPU mixture, whose samples are as short as those of "short".
B_8192: dict[str, Any] = {"model": preset("B", vocab_size=8192), "distribution": "short", "run": True}
WIDTH_512: dict[str, Any] = {
    "model": ModelConfig(
        hidden_size=512, num_layers=16, num_heads=8, head_dim=64, vocab_size=8192, max_position_embeddings=512
    ),
    "distribution": "short",
    "run": True,
}
PAIR: dict[str, Any] = {"gpus": 2, "gpus_per_node": 2}

MEASUREMENTS = (
    Measurement("XL", "h200", "XL", 12_288, ms=440, gib=49.3, launch_ms=88, fitted=True),
    Measurement("XL, none", "h200", "XL", 12_288, ms=431, gib=60.6, recompute="none"),
    Measurement(f"XL, full, {EARLIER}", "h200", "XL", 12_288, ms=606, gib=22.4, recompute="full"),
    Measurement("XL, FP8", "h200", "XL", 12_288, ms=338, gib=49.1, launch_ms=168, fp8=True, fitted=True),
    Measurement(f"XL, FP8, none, {EARLIER}", "h200", "XL", 12_288, ms=343, gib=55.6, recompute="none", fp8=True),
    Measurement(f"L, {EARLIER}", "h200", "L", 21_504, tokens_per_second=46_221, gib=46.1),
    Measurement(f"L, FP8, {EARLIER}", "h200", "L", 21_504, tokens_per_second=60_587, gib=45.1, fp8=True),
    Measurement(f"B, {EARLIER}", "h200", "B", 21_504, tokens_per_second=130_354, gib=19.7),
    Measurement(f"B, FP8, {EARLIER}", "h200", "B", 21_504, tokens_per_second=157_470, gib=18.6, fp8=True),
    Measurement(
        f"XL, plain PyTorch compiled, {EARLIER}", "h200", "XL", 12_288, ms=494, gib=77.8, blocks="compiled",
        recompute="none", fitted=True,
    ),
    Measurement("XL, two at once, each alone", "h200", "XL", 12_288, ms=446.8, gib=49.1),
    Measurement("XL, fsdp", "h200", "XL", 12_288, ms=462.9, gib=42.7, **PAIR, sharding="fsdp"),
    Measurement("XL, fsdp, another run", "h200", "XL", 12_288, ms=467.4, **PAIR, sharding="fsdp"),
    Measurement("XL, ddp", "h200", "XL", 12_288, ms=483.1, gib=51.6, **PAIR, sharding="ddp"),
    Measurement("XL, fsdp, 4 passes", "h200", "XL", 12_288, ms=1783.2, gib=47.3, passes=4, **PAIR, sharding="fsdp"),
    Measurement("XL, ddp, 4 passes", "h200", "XL", 12_288, ms=1795.8, gib=56.1, passes=4, **PAIR, sharding="ddp"),
    Measurement("XL, scaling table", "h200", "XL", 12_288, ms=458.3, gib=49.3),
    Measurement("XL, FP8, scaling table", "h200", "XL", 12_288, ms=350.0, gib=49.1, fp8=True),
    Measurement("L, scaling table", "h200", "L", 21_504, ms=465.0, gib=46.0),
    Measurement("L, FP8, scaling table", "h200", "L", 21_504, ms=355.7, gib=45.3, fp8=True),
    Measurement("XL, fsdp, scaling table", "h200", "XL", 12_288, ms=470.9, gib=42.7, **PAIR, sharding="fsdp"),
    Measurement("XL, ddp, scaling table", "h200", "XL", 12_288, ms=483.0, gib=51.6, **PAIR, sharding="ddp"),
    Measurement(
        "XL, FP8, fsdp, scaling table", "h200", "XL", 12_288, ms=362.2, gib=42.6, fp8=True, **PAIR, sharding="fsdp",
    ),
    Measurement(
        "XL, FP8, ddp, scaling table", "h200", "XL", 12_288, ms=374.0, gib=51.5, fp8=True, **PAIR, sharding="ddp",
    ),
    Measurement("L, fsdp, scaling table", "h200", "L", 21_504, ms=473.1, gib=41.8, **PAIR, sharding="fsdp"),
    Measurement("L, ddp, scaling table", "h200", "L", 21_504, ms=483.1, gib=47.2, **PAIR, sharding="ddp"),
    Measurement(
        "L, FP8, fsdp, scaling table", "h200", "L", 21_504, ms=360.9, gib=41.1, fp8=True, **PAIR, sharding="fsdp",
    ),
    Measurement(
        "L, FP8, ddp, scaling table", "h200", "L", 21_504, ms=368.7, gib=46.4, fp8=True, **PAIR, sharding="ddp",
    ),
    Measurement(
        "XL, fsdp, 8 passes, scaling table", "h200", "XL", 12_288, ms=3647.5, gib=47.2, passes=8, **PAIR,
        sharding="fsdp",
    ),
    Measurement(
        "L, fsdp, 4 passes, scaling table", "h200", "L", 21_504, ms=1853.5, gib=44.5, passes=4, **PAIR, sharding="fsdp",
    ),
    Measurement("B, 8,192 entries, run", "h200", "B", 21_504, tokens_per_second=151_900, gib=17.8, **B_8192),
    Measurement(
        "B, 8,192 entries, FP8, run", "h200", "B", 21_504, tokens_per_second=190_800, gib=16.9, fp8=True, **B_8192
    ),
    Measurement("width 512, run", "h200", "quickstart", 32_768, tokens_per_second=333_000, **WIDTH_512),
    Measurement(
        "width 512, FP8, run", "h200", "quickstart", 32_768, tokens_per_second=213_000, fp8=True, fitted=True,
        **WIDTH_512,
    ),
    Measurement(
        "XL, published trainer", "h200", "XL", 12_288, tokens_per_second=24_845, gib=81.4, blocks="compiled",
        recompute="none", ours=False,
    ),
    Measurement(
        "L, published trainer", "h200", "L", 21_504, tokens_per_second=43_367, gib=81.4, blocks="compiled",
        recompute="none", ours=False,
    ),
    Measurement(
        "B, published trainer", "h200", "B", 21_504, tokens_per_second=111_532, gib=37.3, blocks="compiled",
        recompute="none", ours=False,
    ),
    Measurement(
        "XL, published run", "h100", "XL", 12_288, tokens_per_second=21_200, blocks="compiled", recompute="none",
        gpus=16, sharding="fsdp", ours=False,
    ),
    Measurement(
        "L, published run", "h100", "L", 21_504, tokens_per_second=39_000, blocks="compiled", recompute="none",
        gpus=8, sharding="fsdp", ours=False,
    ),
)  # fmt: skip
"""In the order in which docs/budget.md shows them."""


@dataclass(frozen=True)
class ExchangeMeasurement:
    """One collective of H200 of one host with nothing beside it."""

    name: Literal["reduce-scatter", "all-gather", "all-to-all"]
    unit: str
    elements: float
    element_bytes: int
    ms: float
    gpus: int = 2
    fitted: bool = False
    """``LINKS`` and ``COLLECTIVE_SECONDS`` were set by it."""

    @property
    def predicted_ms(self) -> float:
        """By the model's links."""
        group = Group(self.gpus, self.gpus)
        network = Network(find_gpu("h200").link_bytes_per_second, BETWEEN_BYTES_PER_SECOND)
        seconds = group.all_to_all_seconds if self.name == "all-to-all" else group.seconds
        return 1e3 * seconds(self.element_bytes * self.elements, network)


EXCHANGES = (
    ExchangeMeasurement("reduce-scatter", "block", 33.0e6, 4, 0.295, fitted=True),
    ExchangeMeasurement("reduce-scatter", "head", 100.7e6, 4, 0.826, fitted=True),
    ExchangeMeasurement("all-gather", "block", 33.0e6, 2, 0.158, fitted=True),
    ExchangeMeasurement("all-gather", "head", 100.7e6, 2, 0.429, fitted=True),
    ExchangeMeasurement("all-to-all", "block", 33.0e6, 2, 0.145),
    ExchangeMeasurement("all-to-all", "head", 100.7e6, 2, 0.371),
)
"""Those that ``train.sharding`` makes."""


@dataclass(frozen=True)
class Prediction:
    """What the budget's model says of a measurement."""

    ms: float
    gib: float
    """Tensors alone, as they were measured."""
    launch_ms: float


def predict(row: Measurement) -> Prediction:
    """The same figures by the model."""
    model, gpu = row.model or preset(row.size, architecture=row.architecture), find_gpu(row.gpu)
    local = min(row.gpus, row.gpus_per_node)
    shards = {"none": 1, "ddp": 1, "fsdp": row.gpus, "hsdp": row.shard_ranks or local}[row.sharding]
    setup = Setup(
        model, row.blocks, row.recompute, row.fp8, row.passes, row.gpus, local, shards, bf16_gradients=row.ours
    )
    work, k = synthetic_work(row.distribution, row.tokens), model.bp_steps
    network = Network(gpu.link_bytes_per_second, BETWEEN_BYTES_PER_SECOND)
    step = step_time(setup, k, work, gpu, network, TRAINING_HOST if row.run else 1.0)
    return Prediction(1e3 * step.seconds, sum(peak_memory(setup, k, work).values()) / 2**30, 1e3 * step.host)
