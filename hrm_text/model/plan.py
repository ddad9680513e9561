"""An architecture is a plan: which stack runs when, on the sum of which states, and which calls carry gradient.

There are two states. ``z_H`` starts as the scaled embedding, ``z_L`` as a frozen random vector. A plan is a tuple of
steps over them; its last step writes ``z_H`` or ``z_L``, and what it writes goes to the head. The training loop, the
key-value cache (slot = step index * layers + layer), cost counts, the exported gradient fields and the diagnostics are
all read off the plan. To add a recurrence, add one function here and its numbers to ``config.RECURRENCE``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from hrm_text.contracts import UserError
from hrm_text.model.config import ModelConfig


@dataclass(frozen=True, slots=True)
class Step:
    """One module call: ``states[writes] = stack(sum of states[reads])``, with or without gradient."""

    stack: str
    reads: tuple[str, ...]
    writes: str
    grad: bool = False


Plan = tuple[Step, ...]


def hrm(config: ModelConfig, k: int) -> Plan:
    """H_cycles times: L_cycles calls of the fast stack on z_L + z_H, then one of the slow stack (paper, section 3)."""
    fast, slow = Step("L", ("z_L", "z_H"), "z_L"), Step("H", ("z_H", "z_L"), "z_H")
    calls = [*[fast] * config.L_cycles, slow] * config.H_cycles
    # K calls carry gradient: the last min(H_cycles, K - 1) slow ones and the last of the fast ones.
    graded_slow = min(config.H_cycles, k - 1)
    return with_gradient(with_gradient(calls, "z_H", graded_slow), "z_L", k - graded_slow)


def trm(config: ModelConfig, k: int) -> Plan:
    """HRM with a single stack in both roles."""
    return tuple(replace(step, stack="S") for step in hrm(config, k))


def rins(config: ModelConfig, k: int) -> Plan:
    """The first stack repeated on its own output and the input, the second once on the result."""
    calls = [*[Step("L", ("z_L", "z_H"), "z_L")] * config.cycles, Step("H", ("z_L",), "z_H")]
    return with_gradient(with_gradient(calls, "z_H", 1), "z_L", k - 1)


def looped(config: ModelConfig, k: int) -> Plan:
    """One stack repeated on its own output and the input (universal transformer)."""
    return with_gradient([Step("S", ("z_L", "z_H"), "z_L")] * config.cycles, "z_L", k)


def transformer(config: ModelConfig, k: int) -> Plan:
    """One stack, called once."""
    return with_gradient([Step("S", ("z_H",), "z_H")], "z_H", k)


def with_gradient(calls: Plan | list[Step], state: str, count: int) -> Plan:
    """The plan in which the last ``count`` of the calls that write ``state`` carry gradient."""
    writers = [index for index, step in enumerate(calls) if step.writes == state]
    graded = set(writers[len(writers) - count :])
    return tuple(replace(step, grad=True) if index in graded else step for index, step in enumerate(calls))


ARCHITECTURES: dict[str, Callable[[ModelConfig, int], Plan]] = {
    "hrm": hrm,
    "trm": trm,
    "trm_match_recurrence": trm,
    "rins": rins,
    "looped": looped,
    "transformer": transformer,
}


def plan(config: ModelConfig, k: int | None = None) -> Plan:
    """The module calls of one forward pass, ``k`` of them carrying gradient (None: ``config.bp_steps``)."""
    k = config.bp_steps if k is None else k
    steps = ARCHITECTURES[config.architecture](config, k)
    # The last call must be among them, or no gradient would leave the head: an HRM with K = 1 has L's last call alone.
    if sum(step.grad for step in steps) != k or not steps[-1].grad:
        raise UserError(f"K = {k} is out of range for {config.architecture}, which makes {len(steps)} module calls")
    return steps


def call_names(steps: Plan) -> list[str]:
    """A short name for each call of a plan, counted per stack: L1, L2, L3, H1, ..."""
    counts: dict[str, int] = {}
    names = []
    for step in steps:
        counts[step.stack] = counts.get(step.stack, 0) + 1
        names.append(f"{step.stack}{counts[step.stack]}")
    return names


def training_flops(config: ModelConfig, k: int | None, tokens: int, supervised: int) -> int:
    """Floating-point operations to train on some tokens, attention left out; the head sees the supervised ones alone.

    2 N per forward call of N parameters and token, 4 N more per call that is backpropagated (spec, section 7).
    """
    per_call = config.layers_per_stack * config.block_parameters
    calls = sum((6 if step.grad else 2) * per_call for step in plan(config, k))
    return calls * tokens + 6 * config.vocab_size * config.hidden_size * supervised


def flops_per_token(config: ModelConfig, k: int | None = None) -> int:
    """Floating-point operations to train on one supervised token, attention left out."""
    return training_flops(config, k, tokens=1, supervised=1)
