"""Many ranks by PyTorch's own engine, FSDP2, applied from outside to a model that does not know.

Each rank holds a part of every fp32 weight, and so of its moments and its average. In a step:

* The weights are gathered once, in the dtype of the computation, block by block ahead of the first call of a stack,
  and stay whole until its last backward call: a recurrent model uses a weight eight times, so to gather it for each
  call, as a Transformer does, would send eight times as much.
* A gradient is summed over the ranks in fp32 as soon as it is complete: when the backward pass has left a block in the
  *earliest* graded call of its stack. The calls before that only add to it. So what is sent hides behind the backward
  passes that follow.
* With several micro-batches the ranks exchange nothing before the last one; sums in between are fp32.

ddp, fsdp and hsdp are three shapes of one mesh (replicas x shards): (N, 1), N, (machines, ranks of a machine).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from hrm_text.contracts import UserError
from hrm_text.model.block import Stack
from hrm_text.model.config import ModelConfig
from hrm_text.model.head import LossSums, Targets
from hrm_text.model.kernels.cross_entropy import chunked_loss
from hrm_text.model.recurrence import RecurrentLM
from hrm_text.train.config import DistributedConfig
from hrm_text.train.world import World

STATE_BYTES = 20
"""Bytes a parameter of what may be sharded: fp32 weight, gradient, two moments and average."""
_SMALL, _MODERATE = 0.1, 0.25
"""Shares of a device's memory up to which the state may lie whole on every rank, or whole on every machine."""


@dataclass(frozen=True, slots=True)
class Sharding:
    """What each rank holds, and why."""

    kind: Literal["ddp", "fsdp", "hsdp"]
    replicas: int
    """Copies of the state."""
    shards: int
    """Ranks that share one copy."""
    reason: str
    within_machine: bool = True
    """Whether the ranks that share a copy are on one machine."""

    def __str__(self) -> str:
        if self.shards == 1:
            return f"{self.kind}, a copy on each rank"
        copies = "one copy" if self.replicas == 1 else f"{self.replicas} copies each"
        return f"{self.kind}, {copies} over {self.shards} ranks"


def chosen_sharding(config: DistributedConfig, model: ModelConfig, world: World, memory_bytes: int | None) -> Sharding:
    """How to share the state of a model among ranks.

    Args:
        config: what is asked for.
        model: of which parameters are counted.
        world: the ranks.
        memory_bytes: of one device; None: not known, and nothing is saved by sharing (a CPU).

    Raises:
        UserError: ``shard_ranks`` does not divide the ranks, or is given for another kind than hsdp.
    """
    kind, reason = config.sharding, "as set"
    gib = STATE_BYTES * model.num_parameters / 2**30
    if kind == "auto":
        kind, reason = _by_size(gib, world, None if memory_bytes is None else memory_bytes / 2**30)
    if config.shard_ranks is not None and kind != "hsdp":
        raise UserError(f"distributed.shard_ranks is for sharding hsdp, and this is {kind}; leave it out, or set hsdp")
    shards = {"ddp": 1, "fsdp": world.size, "hsdp": config.shard_ranks or world.local_size}[kind]
    if world.size % shards:
        raise UserError(f"distributed.shard_ranks: {world.size} ranks cannot be shared out by {shards}; take a divisor")
    return Sharding(kind, world.size // shards, shards, reason, within_machine=shards <= world.local_size)


def _by_size(state_gib: float, world: World, memory_gib: float | None) -> tuple[Literal["ddp", "fsdp", "hsdp"], str]:
    if memory_gib is None:
        return (
            "ddp",
            f"weights, gradients, moments and averages are {state_gib:.2f} GiB, and ranks on CPUs share memory",
        )
    of_memory = f"weights, gradients, moments and averages are {state_gib:.1f} GiB and a GPU has {memory_gib:.0f}"
    if state_gib <= _SMALL * memory_gib:
        return "ddp", of_memory
    if world.machines > 1 and state_gib / world.local_size <= _MODERATE * memory_gib:
        return "hsdp", f"{of_memory}; machines exchange gradients alone"
    return "fsdp", of_memory


class ShardedModel:
    """A model whose parameters are shared among ranks, and what a step has to tell FSDP.

    The parameters become fp32 DTensors, which the optimizer owns. The model is called as before; the loss comes from
    ``loss``, as the head's weight is whole only while FSDP knows that it is used.
    """

    def __init__(self, model: RecurrentLM, sharding: Sharding, dtype: torch.dtype, requantise: bool = False) -> None:
        """``model``: fp32, on this rank's device, the same on every rank; its blocks are prepared already.

        dtype: of the computation. requantise: whether blocks keep FP8 copies of their weights.
        """
        self.model, self.mesh = model, _mesh(sharding, model.lm_head.weight.device.type)
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        shard = functools.partial(fully_shard, mesh=self.mesh, mp_policy=policy, reshard_after_forward=False)
        stacks = [model.model.stack(name) for name in model.config.stacks]
        blocks = [block for stack in stacks for block in stack.layers]
        model.lm_head.forward = functools.partial(_head_loss, model.lm_head)  # type: ignore[method-assign,assignment]
        self._reduction = None
        if dtype == torch.bfloat16 and sharding.shards > 1 and sharding.within_machine:
            self._reduction = HalfWidthReduction()
        self._units: list[FSDPModule] = [shard(unit) for unit in [*blocks, model.lm_head, model]]
        for unit in self._units:
            # The trainer divides by the supervised tokens of all ranks: gradients are added, not averaged.
            unit.set_gradient_divide_factor(1.0)
            unit.set_force_sum_reduction_for_comms(True)
            unit.set_unshard_in_backward(False)  # whole since the forward pass
            if self._reduction is not None:
                unit.set_custom_reduce_scatter(self._reduction)  # type: ignore[arg-type]  # its base class is private
        self._last: bool | None = None
        self._first_calls: set[Stack] = set()
        self._graded_calls: set[Stack] = set()
        for stack in stacks:
            assert isinstance(stack, Stack)
            stack.forward = functools.partial(self._stack_forward, stack, stack.forward)  # type: ignore[method-assign]
        if requantise:
            for block in blocks:
                block.register_forward_pre_hook(self._weights_are_new)  # after FSDP's, which gathers them

    def begin_pass(self, last: bool, only: bool) -> None:
        """A micro-batch follows; ``last``: of its step, with which gradients are exchanged; ``only``: and there is no
        other.
        """
        if self._reduction is not None:
            self._reduction.sent_dtype = torch.bfloat16 if only else torch.float32
        self._first_calls.clear()
        self._graded_calls.clear()
        if last == self._last:
            return
        self._last = last
        self.model.set_requires_gradient_sync(last)  # type: ignore[operator]
        self.model.set_reshard_after_backward(last)  # type: ignore[operator]
        self.model.set_is_last_backward(last)  # type: ignore[operator]

    def loss(self, hidden_TD: Tensor, targets: Targets) -> LossSums:
        """``chunked_loss`` of the head."""
        loss, sums = self.model.lm_head(hidden_TD, targets)
        return dataclasses.replace(sums, loss=loss)

    def forget_gathered(self) -> None:
        """Drop whole weights: the shards have changed, or whoever gathered them made no backward pass."""
        for unit in self._units:
            unit.reshard()

    def _stack_forward(self, stack: Stack, forward: Any, *arguments: Any) -> Tensor:
        """One call of a stack. FSDP hears of the first of a pass and of the first that is graded, and of no other."""
        first = stack not in self._first_calls
        first_graded = torch.is_grad_enabled() and stack not in self._graded_calls
        self._first_calls.add(stack)
        if first_graded:
            self._graded_calls.add(stack)
        stack.with_hooks, self._gathering = first or first_graded, first
        out_TD: Tensor = forward(*arguments)
        return out_TD

    def _weights_are_new(self, block: nn.Module, arguments: Any) -> None:
        """Gathering writes weights behind autograd's back, by whose count FP8 copies know that they are stale."""
        if self._gathering:
            with torch.no_grad():
                increment_version(list(block.parameters()))


# PyTorch 2.13 warns of the names of 2.11.
reduce_scatter: Callable[..., dist.Work | None] = (
    dist.reduce_scatter_single if hasattr(dist, "reduce_scatter_single") else dist.reduce_scatter_tensor
)


class HalfWidthReduction:
    """Sums gradients over ranks in fp32 and sends them in the dtype that they have, which is bf16: half the bytes.

    A bf16 gradient loses nothing on the wire, so the sums are those of a reduction in fp32: each rank gets its part of
    every other rank's gradient and adds them up. Gradients that were summed over micro-batches are fp32 and sent as
    such. Within a machine alone: between machines a reduce-scatter adds up on the way and sends less.

    FSDP asks for two tensors before each call: one for what is sent, then one for the result.
    """

    def __init__(self) -> None:
        self.sent_dtype = torch.bfloat16
        """Of the gradients of this step."""
        self._result_is_next = False

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """An empty tensor; one for what is sent has the dtype of the gradients."""
        room = torch.empty(*size, dtype=dtype if self._result_is_next else self.sent_dtype, device=device)
        self._result_is_next = not self._result_is_next
        return room

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> None:
        assert not async_op and not self._result_is_next
        if input_tensor.dtype == output_tensor.dtype:
            reduce_scatter(output_tensor, input_tensor, op, group=group)
            return
        parts = torch.empty_like(input_tensor)
        dist.all_to_all_single(parts, input_tensor, group=group)
        torch.sum(parts.view(group.size(), -1), 0, dtype=output_tensor.dtype, out=output_tensor)


def _mesh(sharding: Sharding, device_type: str) -> DeviceMesh:
    if sharding.kind == "fsdp":
        return init_device_mesh(device_type, (sharding.shards,), mesh_dim_names=("shard",))
    shape = (sharding.replicas, sharding.shards)
    return init_device_mesh(device_type, shape, mesh_dim_names=("replicate", "shard"))


def _head_loss(head: nn.Linear, hidden_TD: Tensor, targets: Targets) -> tuple[Tensor, LossSums]:
    """The loss by itself as well: hooks look for tensors, and into no dataclass."""
    sums = chunked_loss(hidden_TD, head.weight, targets)
    return sums.loss, sums
