from __future__ import annotations

import pytest

from hrm_text.contracts import UserError
from hrm_text.model.config import preset
from hrm_text.model.plan import call_names, flops_per_token, plan, training_flops


def graded(architecture: str, k: int | None = None) -> str:
    steps = plan(preset("tiny", architecture=architecture), k)
    return " ".join(name for name, step in zip(call_names(steps), steps, strict=True) if step.grad)


@pytest.mark.parametrize(
    ("k", "calls"),
    [
        (2, "L6 H2"),
        (3, "H1 L6 H2"),
        (4, "H1 L5 L6 H2"),
        (5, "H1 L4 L5 L6 H2"),
        (6, "L3 H1 L4 L5 L6 H2"),
        (7, "L2 L3 H1 L4 L5 L6 H2"),
        (8, "L1 L2 L3 H1 L4 L5 L6 H2"),
    ],
)
def test_k_module_calls_of_an_hrm_carry_gradient(k: int, calls: str) -> None:
    assert graded("hrm", k) == calls


@pytest.mark.parametrize(
    ("architecture", "calls"),
    [
        ("hrm", "H1 L4 L5 L6 H2"),
        ("transformer", "S1"),
        ("looped", "S3 S4"),
        ("rins", "L4 L5 L6 L7 H1"),
        ("trm", "S3 S4"),  # the last L call and the last H call of S S S S = L H L H
        ("trm_match_recurrence", "S4 S5 S6 S7 S8"),  # both H calls (S4, S8), the last three L calls
    ],
)
def test_each_architecture_has_its_own_gradient_rule(architecture: str, calls: str) -> None:
    assert graded(architecture) == calls


def test_an_hrm_calls_fast_fast_fast_slow_twice() -> None:
    steps = plan(preset("tiny"))
    assert [step.stack for step in steps] == list("LLLHLLLH")
    assert [step.writes for step in steps] == ["z_L", "z_L", "z_L", "z_H"] * 2
    assert all(set(step.reads) == {"z_L", "z_H"} for step in steps)


def test_one_stack_in_both_roles_makes_the_calls_of_an_hrm() -> None:
    hrm, trm = (plan(preset("tiny", architecture=name)) for name in ("hrm", "trm_match_recurrence"))
    assert [(s.reads, s.writes, s.grad) for s in hrm] == [(s.reads, s.writes, s.grad) for s in trm]
    assert {step.stack for step in trm} == {"S"}


@pytest.mark.parametrize(
    ("architecture", "k"), [("hrm", 9), ("hrm", 1), ("looped", 5), ("rins", 9), ("transformer", 2)]
)
def test_a_k_that_no_plan_has_is_an_error(architecture: str, k: int) -> None:
    with pytest.raises(UserError, match=f"K = {k} is out of range for {architecture}"):
        plan(preset("tiny", architecture=architecture), k)


def test_flops_count_two_per_parameter_forwards_and_four_more_backwards() -> None:
    config = preset("tiny", vocab_size=1000)
    stack = config.layers_per_stack * (4 * 64 * 64 + 64 * 64 + 3 * 64 * config.intermediate_size)
    head = 1000 * 64
    # K = 3: eight calls forwards, three of them backwards, on all 10 tokens; the head on the 4 supervised ones.
    assert training_flops(config, 3, tokens=10, supervised=4) == 10 * (8 * 2 + 3 * 4) * stack + 4 * 6 * head
    assert flops_per_token(config, 3) == (8 * 2 + 3 * 4) * stack + 6 * head
