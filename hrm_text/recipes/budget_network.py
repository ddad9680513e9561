"""What ranks send each other in a step, and how much of it does not hide behind computing (``train.sharding``)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from hrm_text.model.plan import plan
from hrm_text.recipes import budget_gpus as rates
from hrm_text.recipes.budget_memory import Setup


@dataclass(frozen=True)
class Network:
    """Bytes a second in one direction, by data sheets."""

    link: float
    """Between GPUs of one machine."""
    between: float
    """Of each GPU's own adapter, between machines."""


@dataclass(frozen=True)
class Group:
    """Ranks that take part in one collective."""

    ranks: int
    members: int
    """Of them on one machine."""

    def seconds(self, sent: float, network: Network, times: int = 1) -> float:
        """Of an all-gather or a reduce-scatter of ``sent`` bytes, or ``times`` of them: an all-reduce is two.

        A ring passes through every GPU of a machine and leaves it by every adapter of the group, so between machines
        the adapters together are the bound, or the links within.
        """
        if self.ranks == 1:
            return 0.0
        bandwidth = rates.LINKS * network.link
        if self.ranks > self.members:
            bandwidth = min(bandwidth, self.members * rates.NETWORK * network.between)
        return times * ((self.ranks - 1) / self.ranks * sent / bandwidth + self.latency)

    def all_to_all_seconds(self, sent: float, network: Network) -> float:
        """Of ``sent`` bytes, to each rank its part: what goes to other machines goes by the rank's own adapter."""
        if self.ranks == 1:
            return 0.0
        within = (self.ranks - 1) / self.ranks * sent / (rates.LINKS * network.link)
        between = (self.ranks - self.members) / self.ranks * sent / (rates.NETWORK * network.between)
        return max(within, between) + self.latency

    @property
    def latency(self) -> float:
        """Seconds of a collective of no bytes."""
        return rates.COLLECTIVE_SECONDS + rates.HOP_SECONDS * (self.ranks - 2)


@dataclass(frozen=True)
class Exchange:
    """Of one step."""

    gather: float
    """Seconds of all gathering of weights."""
    reduce: float
    """Seconds of all reductions of gradients."""
    exposed_gather: float
    """Of ``gather``, what the computing waits for."""
    exposed_reduce: float
    on_links: float
    """Of all of it, seconds if links within machines were the only bound."""
    sent_bytes: float
    """That each rank sends."""

    @property
    def total(self) -> float:
        return self.gather + self.reduce

    @property
    def exposed(self) -> float:
        return self.exposed_gather + self.exposed_reduce

    @property
    def lost(self) -> float:
        """Seconds by which computing is slower beside what it hides."""
        if not self.total:
            return 0.0
        share = self.on_links / self.total
        return (self.total - self.exposed) * (rates.CONTENTION * share + rates.WAITING * (1 - share))


def groups(setup: Setup) -> tuple[Group, Group]:
    """(the ranks that share one copy, the ranks that hold the same shard of different copies)."""
    replicas = setup.ranks // setup.shards
    members = min(setup.shards, setup.local_ranks)
    return Group(setup.shards, members), Group(replicas, min(replicas, max(1, setup.local_ranks // members)))


def unit_seconds(setup: Setup, parameters: int, network: Network) -> tuple[float, float]:
    """(gathering the weights of one unit in bf16, reducing their gradients).

    Shards travel in bf16 or in fp32; sums are fp32, and so is what copies of a shard exchange.
    """
    shard, replicate = groups(setup)
    gather = shard.seconds(2 * parameters, network)
    if setup.sends_bf16:
        reduce = shard.all_to_all_seconds(2 * parameters, network)
    else:
        reduce = shard.seconds(4 * parameters, network)
    return gather, reduce + replicate.seconds(4 * parameters / setup.shards, network, times=2)


def exchange(setup: Setup, k: int, network: Network, *, forward: float, backward: float, head: float) -> Exchange:
    """Follow computing and exchange side by side through one step.

    forward, backward: seconds of one block. head: of the head and its loss; its gradients are made in its forward pass.
    """
    if setup.ranks == 1:
        return Exchange(0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    model = setup.model
    steps, layers = plan(model, k), range(model.layers_per_stack)
    block, table = model.block_parameters, model.vocab_size * model.hidden_size
    block_gather, block_reduce = unit_seconds(setup, block, network)
    table_gather, table_reduce = unit_seconds(setup, table, network)

    # Forward: a unit is gathered while the one before it computes.
    arrived = now = table_gather
    computed, started = 0.0, 0.0
    whole: set[str] = set()
    for step in steps:
        for _ in layers:
            if step.stack not in whole:
                arrived = max(arrived, started) + block_gather
                now = max(now, arrived)
            started = now
            now += forward
            computed += forward
        whole.add(step.stack)
    arrived = max(arrived, started) + table_gather
    exposed_gather = max(now, arrived) - computed

    # Backward: a unit's gradient leaves behind its earliest graded call.
    now, free = 0.0, head / 2 + table_reduce
    graded = [step for step in steps if step.grad]
    calls_left = {step.stack: sum(other.stack == step.stack for other in graded) for step in graded}
    now = head / 2
    for step in reversed(graded):
        calls_left[step.stack] -= 1
        for _ in layers:
            now += backward
            if calls_left[step.stack] == 0:
                free = max(free, now) + block_reduce
    reaches_embedding = graded[0] == steps[0] or k > 2
    if reaches_embedding:
        free = max(free, now) + table_reduce
    units = sum(model.stacks.values())
    reductions = 2 if reaches_embedding else 1
    parameters = units * block + reductions * table
    shard, replicate = setup.shards, setup.ranks // setup.shards
    sent = (2 * model.num_parameters + (2 if setup.sends_bf16 else 4) * parameters) * (shard - 1) / shard
    sent += 2 * 4 * parameters / shard * (replicate - 1) / replicate
    links = Network(network.link, math.inf)
    block_links, table_links = (unit_seconds(setup, unit, links) for unit in (block, table))
    return Exchange(
        gather=2 * table_gather + units * block_gather,
        reduce=reductions * table_reduce + units * block_reduce,
        exposed_gather=exposed_gather,
        exposed_reduce=max(0.0, free - now),
        on_links=2 * table_links[0] + reductions * table_links[1] + units * sum(block_links),
        sent_bytes=sent,
    )
