"""How long a training step takes on one GPU: every part a count times a rate of ``budget_gpus``."""

from __future__ import annotations

from dataclasses import dataclass

from hrm_text.model.plan import plan
from hrm_text.recipes import budget_gpus as rates
from hrm_text.recipes.budget_gpus import Gpu
from hrm_text.recipes.budget_memory import CHUNK, Setup, computes_gate_up_again, float8_parameters
from hrm_text.recipes.budget_network import Exchange, Network, exchange
from hrm_text.recipes.budget_work import Work

# T packed tokens, D width, A = N * H heads times head width, I inner width of the SwiGLU, V entries of the vocabulary

KERNELS = {"fused": (9, 14), "float8": (10, 29), "compiled": (9, 18)}
"""Launched by a block forward and backward."""


@dataclass(frozen=True)
class Step:
    """Seconds of one optimizer step."""

    parts: dict[str, float]
    """On the device, by part; they add up to ``device``."""
    host: float
    """That the host needs to launch it."""
    exchange: Exchange

    @property
    def device(self) -> float:
        return sum(self.parts.values())

    @property
    def seconds(self) -> float:
        """The device's time, or the host's where it cannot launch so fast."""
        return max(self.device, self.host)

    @property
    def waits_for_host(self) -> bool:
        return self.host > self.device


def step_time(
    setup: Setup, k: int, work: Work, gpu: Gpu, network: Network, host_load: float = rates.TRAINING_HOST
) -> Step:
    """A step of ``setup.passes`` passes over ``work`` each, K = ``k``.

    host_load: how much slower the host launches than with nothing else to do; 1 is a measurement of bare steps.
    """
    forward, backward = forward_parts(setup, work, gpu), backward_parts(setup, work, gpu)
    head = head_time(setup, work, gpu)
    model = setup.model
    steps = plan(model, k)
    layers = model.layers_per_stack
    calls, graded = len(steps) * layers, sum(step.grad for step in steps) * layers
    passes = setup.passes
    parts = {name: passes * (calls * forward[name] + graded * backward[name]) for name in forward}
    parts["head and loss"] = passes * head
    bandwidth = rates.PASSES * gpu.bytes_per_second
    parts["states, embedding"] = passes * state_bytes(setup, len(steps), graded // layers, work.tokens) / bandwidth
    parts["optimizer, averages"] = optimizer_bytes(setup) / (rates.OPTIMIZER * gpu.bytes_per_second)
    if passes > 1:
        # fp32 sums: the first is written, the others read and written.
        parts["sums of gradients"] = (6 + 10 * (passes - 1)) * model.num_parameters / bandwidth
    kernels, host = launches(setup, calls, graded, work)
    parts["gaps"] = kernels * rates.GAP_SECONDS + rates.BUSY_HOST * host
    sent = exchange(setup, k, network, forward=sum(forward.values()), backward=sum(backward.values()), head=head)
    if setup.ranks > 1:
        parts["casts and copies"] = cast_bytes(setup) / bandwidth
        if setup.sends_bf16:
            # Every part is read, and the sum of a shard written.
            summed = (2 + 4 / setup.shards) * model.num_parameters
            parts["sums over ranks"] = summed / (rates.SUMS * gpu.bytes_per_second)
        parts["exchange, exposed"] = sent.exposed
        parts["exchange, contention"] = sent.lost
        host += 4 * (blocks_of(setup) + 2) * rates.HOOK_SECONDS * passes
    return Step(parts, host_load * host, sent)


def blocks_of(setup: Setup) -> int:
    """Blocks of all stacks."""
    return sum(setup.model.stacks.values())


def product(tokens: float, depth: float, width: float, flops: float, gpu: Gpu, element_bytes: float = 2) -> float:
    """Seconds of a matrix product [tokens, depth] x [depth, width]: bound by its operations or by its operands."""
    operations = 2 * tokens * depth * width / flops * (1 + rates.DEPTH / depth)
    moved = element_bytes * (tokens * depth + depth * width) + 2 * tokens * width
    return max(operations, moved / (rates.PASSES * gpu.bytes_per_second))


def forward_parts(setup: Setup, work: Work, gpu: Gpu) -> dict[str, float]:
    """Seconds of one block forward."""
    model, T = setup.model, work.tokens
    D, A, I = model.hidden_size, model.attention_size, model.intermediate_size  # noqa: E741
    fast, size = (gpu.float8_flops, 1.0) if setup.fp8 else (gpu.product_flops, 2.0)
    products = (
        product(T, D, 4 * A, fast, gpu, size)
        + product(T, A, D, gpu.product_flops, gpu)
        + product(T, D, 2 * I, fast, gpu, size)
        + product(T, I, D, fast, gpu, size)
    )
    return {
        "matrix products": products,
        "attention": attention_time(setup, work, gpu, backward=False),
        "passes between": T * forward_bytes(setup) / pass_rate(setup, gpu),
    }


def backward_parts(setup: Setup, work: Work, gpu: Gpu) -> dict[str, float]:
    """Seconds of one block backward, with what it computes again; the mean over the layers of a stack."""
    model, T = setup.model, work.tokens
    D, A, I = model.hidden_size, model.attention_size, model.intermediate_size  # noqa: E741
    fast, size = (gpu.float8_flops, 1.0) if setup.fp8 else (gpu.product_flops, 2.0)
    slow = gpu.product_flops
    products = (
        product(T, D, I, fast, gpu, size) + product(D, T, I, fast, gpu, size)  # down: its input, its weight
        + product(T, 2 * I, D, fast, gpu, size) + product(2 * I, T, D, fast, gpu, size)
        + product(T, D, A, slow, gpu) + product(D, T, A, slow, gpu)
        + product(T, 4 * A, D, fast, gpu, size) + product(4 * A, T, D, fast, gpu, size)
    )  # fmt: skip
    parts = {
        "matrix products": products,
        "attention": attention_time(setup, work, gpu, backward=True),
        "passes between": (T * backward_bytes(setup) + gradient_bytes(setup)) / pass_rate(setup, gpu),
    }
    if setup.blocks == "fused":
        layers = range(model.layers_per_stack)
        again = sum(computes_gate_up_again(setup, layer) for layer in layers) / len(layers)
        parts["matrix products"] += again * product(T, D, 2 * I, fast, gpu, size)
    if setup.recompute == "full":
        forward = forward_parts(setup, work, gpu)
        parts = {name: seconds + forward[name] for name, seconds in parts.items()}
    return parts


def forward_bytes(setup: Setup) -> float:
    """Bytes a token that the passes of a block move on its way forward, products and attention left out."""
    model = setup.model
    D, A, I = model.hidden_size, model.attention_size, model.intermediate_size  # noqa: E741
    if setup.fp8:
        # The norms write FP8, the first a copy of the stream as well; the output of the MLP is added in a pass.
        return (2 + 1 + 2) * D + 8 * A + (2 + 1) * D + (4 + 1) * I + (2 + 2 + 2) * D
    return 2 * (3 * D + 4 * A + 2 * D + 3 * I)


def backward_bytes(setup: Setup) -> float:
    """Bytes a token that the passes of a block move on its way back."""
    model = setup.model
    D, A, I = model.hidden_size, model.attention_size, model.intermediate_size  # noqa: E741
    made_again = 0 if setup.recompute == "none" else 1
    if setup.fp8:
        quantised = 3 * D + 3 * 4 * A  # gradients of the block and of gate, q, k, v: 2 bytes read, 1 written
        transposed = 2 * (D + I + 2 * I + D + 4 * A + D)
        swiglu = 4 * I + 2 * I + 2 * I + made_again * I
        return quantised + transposed + swiglu + 2 * (2 + 1 + 2 + 2) * D + 10 * A
    return 2 * ((5 + made_again) * I + 4 * D + 5 * A + 4 * D)


def gradient_bytes(setup: Setup) -> float:
    """Bytes that the passes over weight gradients of a block move: products in bf16 add as they write."""
    return 6 * float8_parameters(setup.model) if setup.fp8 else 0


def pass_rate(setup: Setup, gpu: Gpu) -> float:
    """Bytes a second of the passes between products."""
    rate = (rates.PASSES_FP8 if setup.fp8 else rates.PASSES) * gpu.bytes_per_second
    return rate / rates.COMPILED_PASSES if setup.blocks == "compiled" else rate


def attention_time(setup: Setup, work: Work, gpu: Gpu, *, backward: bool) -> float:
    """Seconds of one block's attention: its operands, then whole tiles."""
    model = setup.model
    A = model.attention_size
    if setup.blocks == "compiled":
        tiles, flops = (5 if backward else 2) * work.block_tiles, rates.FLEX_ATTENTION * gpu.peak
    else:
        tiles = 4 * work.key_tiles + 3 * work.query_tiles if backward else 2 * work.forward_tiles
        flops = rates.ATTENTION * gpu.peak
    operands = 2 * work.tokens * A * (11 if backward else 5)
    return operands / (rates.PASSES * gpu.bytes_per_second) + 2 * A * tiles / flops


def head_time(setup: Setup, work: Work, gpu: Gpu) -> float:
    """Seconds of the head and its loss, forward and backward."""
    D, V, S = setup.model.hidden_size, setup.model.vocab_size, work.supervised
    products = product(S, D, V, gpu.product_flops, gpu) + product(S, V, D, gpu.product_flops, gpu)
    products += product(V, min(S, CHUNK), D, gpu.product_flops, gpu) * S / max(min(S, CHUNK), 1)
    # Logits: read twice and written by the loss. Weight gradient: an fp32 sum, read and written for each chunk, rounded
    # in the end.
    moved = 3 * 2 * S * V + 8 * V * D * -(-S // CHUNK) + 6 * V * D + 2 * 4 * work.tokens * D
    return products + moved / (rates.PASSES * gpu.bytes_per_second)


def state_bytes(setup: Setup, calls: int, graded: int, tokens: float) -> float:
    """Bytes that a pass moves outside of blocks: embedding, sums of states, norms at exits, and their gradients."""
    D, V = setup.model.hidden_size, setup.model.vocab_size
    return 2 * tokens * D * (4 + calls * (3 + 2) + graded * (4 + 3) + 4) + 2 * 2 * V * D


def optimizer_bytes(setup: Setup) -> float:
    """Bytes that the optimizer moves on one rank: all state is read and written, gradients are read twice."""
    P = setup.model.num_parameters
    if setup.ranks > 1:
        return (8 + 24 + 4 + 4) * P / setup.shards
    gradient = 4 if setup.passes > 1 else 2
    return (4 + 4 + 24 + 2 * gradient) * P + (6 * blocks_of(setup) * float8_parameters(setup.model) if setup.fp8 else 0)


def cast_bytes(setup: Setup) -> float:
    """Bytes that sharing weights moves on one rank beside the collectives.

    Shards become bf16, whole weights leave the buffer they arrive in, gradients enter one in the dtype that they are
    sent in; sums of those in bf16 are counted apart.
    """
    P = setup.model.num_parameters
    weights = 6 / setup.shards + 4
    gradients = 2 + 2 if setup.sends_bf16 else 2 + 4 + 8 / setup.shards
    return (weights + gradients) * P + (6 * blocks_of(setup) * float8_parameters(setup.model) if setup.fp8 else 0)


def launches(setup: Setup, calls: int, graded: int, work: Work) -> tuple[float, float]:
    """Kernels of a step, and the seconds that the host needs to launch them."""
    forward, backward = KERNELS["float8" if setup.fp8 else setup.blocks]
    again = forward if setup.recompute == "full" else 0
    tensors = 4 * blocks_of(setup) + 2
    kernels = setup.passes * (calls * forward + graded * (backward + again) + 40 + 6 * work.supervised / CHUNK)
    kernels += tensors * (1 + (setup.passes if setup.passes > 1 else 0)) + (6 * blocks_of(setup) if setup.fp8 else 0)
    each = rates.LAUNCH_SECONDS_FP8 if setup.fp8 else rates.LAUNCH_SECONDS
    return kernels, kernels * each
