"""Memory of a training step on one GPU, counted tensor by tensor along the step, at the moment when it is most."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from hrm_text.model.config import ModelConfig
from hrm_text.model.plan import plan
from hrm_text.recipes.budget_work import Work

Blocks = Literal["compiled", "fused"]
Recompute = Literal["none", "some", "full"]

CHUNK = 2048
"""Supervised positions whose logits exist at once (``kernels.cross_entropy``)."""

# D width, A = N * H heads times head width, I inner width of the SwiGLU, V entries of the vocabulary


@dataclass(frozen=True)
class Setup:
    """How a step is computed, and by how many."""

    model: ModelConfig
    blocks: Blocks = "fused"
    recompute: Recompute = "some"
    fp8: bool = False
    passes: int = 1
    """Forward and backward passes of a rank in one step."""
    ranks: int = 1
    local_ranks: int = 1
    """On one machine."""
    shards: int = 1
    """Ranks that share one copy of weights, moments and averages."""
    bf16_gradients: bool = True
    """Whether shards of gradients that were not summed over passes travel in bf16 (``sharding.HalfWidthReduction``)."""

    @property
    def sends_bf16(self) -> bool:
        """Whether gradients leave in bf16, by an all-to-all within a machine, and are added up where they arrive."""
        return self.bf16_gradients and 1 < self.shards <= self.local_ranks and self.passes == 1

    @property
    def block_keeps(self) -> list[float]:
        """Bytes a token that each layer of a stack keeps for its backward pass."""
        return [kept_bytes(self, layer) for layer in range(self.model.layers_per_stack)]


def float8_parameters(model: ModelConfig) -> int:
    """Parameters of a block that are multiplied in FP8: all but the output projection of attention."""
    return model.block_parameters - model.hidden_size * model.attention_size


def computes_gate_up_again(setup: Setup, layer: int) -> bool:
    """Whether a fused layer drops the gate-up product and makes it again (``fused.fuse``)."""
    if setup.recompute == "some":
        return layer % (5 if setup.fp8 else 4) == 2
    return setup.recompute == "full"


def kept_bytes(setup: Setup, layer: int) -> float:
    """Bytes a token that one layer keeps for its backward pass."""
    model = setup.model
    D, A, I = model.hidden_size, model.attention_size, model.intermediate_size  # noqa: E741
    if setup.recompute == "full":
        return 2 * D
    if setup.blocks == "compiled":
        # Inputs of both norms and what comes of them; gate, q, k, v; q, k, v as attention takes them; its output before
        # and behind the gate; gate-up and their product; the log-sum-exp. Counted against one measurement.
        return 2 * (4 * D + 4 * A + 3 * A + 2 * A + 3 * I) + 4 * model.num_heads
    normed, inner = (1, 1) if setup.fp8 else (2, 2)
    small = 2 * 4 + 4 * model.num_heads  # 1 / rms twice, log-sum-exp
    kept = 2 * normed * D + 2 * 4 * A + 2 * A + small
    if not computes_gate_up_again(setup, layer):
        kept += 2 * 2 * I
    if setup.recompute == "none":
        kept += inner * I
    return kept


def working_bytes(setup: Setup, layer: int) -> float:
    """Most bytes a token that a layer's backward pass needs beside what it kept."""
    D, I = setup.model.hidden_size, setup.model.intermediate_size  # noqa: E741
    gradients = 2 * 2 * D
    if setup.blocks == "compiled":
        again = kept_bytes(_keeping(setup), layer) if setup.recompute == "full" else 0
        return gradients + again + 2 * 4 * I
    again = 2 * D + kept_bytes(_keeping(setup), 2) if setup.recompute == "full" else 0
    made = 2 * 2 * I if computes_gate_up_again(setup, layer) else 0
    if setup.fp8:
        # The product's gradient, that of gate-up and the product in FP8, and the transposed copy of one of them.
        return gradients + again + made + D + 2 * I + 2 * I + I + max(2 * I + D, I)
    return gradients + again + made + 2 * (I + 2 * I) + (0 if setup.recompute == "none" else 2 * I)


def _keeping(setup: Setup) -> Setup:
    """What a layer that runs a second time keeps meanwhile."""
    recompute: Recompute = "some" if setup.blocks == "fused" else "none"
    return Setup(setup.model, setup.blocks, recompute, setup.fp8)


PARTS = (
    "weights",
    "moments and averages",
    "gradients",
    "activations",
    "work of a layer",
    "head",
    "exchange",
)
"""What memory is for. weights: all forms. activations: what forward passes keep. exchange: buffers of collectives."""

Moment = dict[str, float]


def peak_memory(setup: Setup, k: int, work: Work) -> dict[str, float]:
    """Bytes of tensors by part, at the moment of the most; K = ``k``."""
    return max(moments(setup, k, work), key=lambda moment: sum(moment.values()))


def moments(setup: Setup, k: int, work: Work) -> Iterator[Moment]:
    """The memory of a step along its way; of several passes the last, which has the sums of the others beside it.

    Where the forward pass ends, in the head, in every layer of the backward pass, and in the optimizer.
    """
    model, T = setup.model, work.tokens
    D, V, P = model.hidden_size, model.vocab_size, model.num_parameters
    many = setup.ranks > 1
    blocks = sum(model.stacks.values())
    weights = 4 * P / setup.shards + 2 * P if many else 2 * P
    if setup.fp8:
        weights += 2 * blocks * float8_parameters(model)
    # One process keeps the fp32 weight as the bf16 one and 16 more bits.
    moments_ = 12 * P / setup.shards if many else 14 * P
    accumulates = setup.passes > 1
    sums = 4.0 * P if accumulates else 0.0
    base = {"weights": weights, "moments and averages": moments_}

    steps = plan(model, k)
    graded = [step for step in steps if step.grad]
    # A call that carries gradient keeps what its exit norm gave; states and tables of the plan's own.
    states = T * (2 * D * (len(graded) if model.norm == "magic" else 1) + 3 * 2 * D + 4 * model.head_dim)
    per_call = T * sum(setup.block_keeps)
    activations = states + per_call * len(graded)

    def moment(gradients: float, activations: float, working: float, head: float, exchange: float) -> Moment:
        parts = (gradients, activations, working, head, exchange)
        return base | dict(zip(PARTS[2:], parts, strict=True))

    head_sum = 4.0 * V * D
    yield moment(sums, activations, 0, head_sum + 2 * min(CHUNK, work.supervised) * V, 0)
    gradients = sums + 2 * V * D
    small = 2 * 2 * work.supervised * D + 2 * T * D
    yield moment(gradients, activations, 0, head_sum + small, 4 * V * D if many else 0)

    fp32_shard = 4 / setup.shards
    gradients = sums + (fp32_shard if many else 2) * V * D
    if many and accumulates:
        gradients -= 4 * V * D  # the sum became the shard
    seen: set[str] = set()
    calls_left = {step.stack: 0 for step in steps}
    for step in graded:
        calls_left[step.stack] += 1
    # Of two units, what is sent in fp32, or what is sent and what arrives in bf16.
    exchange = 2 * 4.0 * model.block_parameters if many else 0.0
    for step in reversed(graded):
        calls_left[step.stack] -= 1
        for layer in reversed(range(model.layers_per_stack)):
            if step.stack not in seen:
                gradients += 2 * model.block_parameters
            yield moment(gradients, activations, T * working_bytes(setup, layer), 0, exchange)
            activations -= T * setup.block_keeps[layer]
            if many and calls_left[step.stack] == 0:
                gradients += (fp32_shard - 2 - (4 if accumulates else 0)) * model.block_parameters
        seen.add(step.stack)
    yield moment(gradients + 2 * V * D, activations, 0, 0, 4 * V * D if many else 0)
    final = 4 * P / setup.shards if many else sums or 2 * P
    yield {**base, "weights": weights - (2 * P if many else 0), "gradients": final}
