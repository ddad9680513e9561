"""A budget as tables for people; they fit 80 columns."""

from __future__ import annotations

import math

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from hrm_text.recipes.budget import Budget
from hrm_text.recipes.budget_estimate import Estimate
from hrm_text.recipes.budget_options import Option


def show(budget: Budget, console: Console) -> None:
    """One number of GPUs: everything of it. Several: how the run scales."""
    console.print(Text(budget.title, style="bold"))
    console.print(parameters_table(budget))
    if len(budget.estimates) == 1 and not budget.errors:
        [estimate] = budget.estimates
        console.print(costs_table(estimate))
        console.print(parts_table(estimate))
        console.print(run_table(budget, estimate))
        console.print(verdict(budget, estimate))
        if budget.options:
            console.print(options_table(budget.options))
    else:
        console.print(scaling_table(budget))
        for gpus, error in budget.errors.items():
            console.print(Text(f"{gpus} GPUs: {error}", style="yellow"))
    notes = Table.grid(padding=(0, 1))
    for note in budget.assumptions:
        notes.add_row("*", note, style="dim")
    console.print(notes)


def table(*columns: str, left: int = 1) -> Table:
    """A table whose first ``left`` columns hold words, the others numbers."""
    made = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for index, column in enumerate(columns):
        made.add_column(column, justify="left" if index < left else "right", no_wrap=True)
    return made


def parameters_table(budget: Budget) -> Table:
    """Parameters by part."""
    total = sum(budget.parameters.values())
    made = table("part", "parameters", "share")
    for part, count in budget.parameters.items():
        made.add_row(part, f"{count:,}", f"{count / total:.0%}")
    made.add_row("all", f"{total:,}", "", style="bold")
    return made


def costs_table(estimate: Estimate) -> Table:
    """What a token and a step cost by K."""
    made = table("K", "share of steps", "GFLOP/token", "attention", "ms a step", left=0)
    for cost in estimate.costs:
        made.add_row(
            str(cost.k),
            f"{cost.share_of_steps:.0%}",
            gflop(cost.gflop_per_token),
            f"+ {cost.attention_gflop_per_token:,.3f}",
            f"{cost.ms:,.1f}",
        )
    mean = sum(cost.share_of_steps * cost.gflop_per_token for cost in estimate.costs)
    attention = sum(cost.share_of_steps * cost.attention_gflop_per_token for cost in estimate.costs)
    made.add_row("mean", "", gflop(mean), f"+ {attention:,.3f}", f"{estimate.step_ms:,.1f}", style="bold")
    return made


def parts_table(estimate: Estimate) -> Table:
    """Memory and time by part, side by side."""
    most = max(cost.k for cost in estimate.costs)
    made = Table(box=SIMPLE_HEAD, pad_edge=False)
    made.add_column("memory of a GPU")
    made.add_column("GiB", justify="right")
    made.add_column(f"a step, K = {most}")
    made.add_column("ms", justify="right")
    memory = [(part, f"{gib:,.1f}") for part, gib in estimate.gib_by_part.items() if gib >= 0.05]
    parts = [(part, f"{ms:,.1f}") for part, ms in estimate.ms_by_part.items() if ms >= 0.05]
    step = max(cost.ms for cost in estimate.costs)
    lost = step - sum(estimate.ms_by_part.values())
    if lost >= 0.05:
        parts.append(("waiting for the host", f"{lost:,.1f}"))
    for row in range(max(len(memory), len(parts))):
        made.add_row(*(memory[row] if row < len(memory) else ("", "")), *(parts[row] if row < len(parts) else ("", "")))
    made.add_row(f"of {estimate.gpu_gib:,.1f}", f"{estimate.gib:,.1f}", "all", f"{step:,.1f}", style="bold")
    return made


def run_table(budget: Budget, estimate: Estimate) -> Table:
    """The run: time and money."""
    made = Table(box=SIMPLE_HEAD, show_header=False, pad_edge=False)
    made.add_column(no_wrap=True)
    made.add_column()
    batch = f"{estimate.micro_batches} x {estimate.tokens_per_batch:,} tokens"
    if estimate.passes > 1 or estimate.at_once > 1:
        batch += f"; {estimate.passes} passes of {estimate.at_once} on each GPU"
    saved = estimate.checkpoints
    made.add_row("run", f"{estimate.tokens / 1e9:,.3g} B tokens in {estimate.steps:,} steps")
    made.add_row("step", batch)
    made.add_row("sharding", estimate.sharding)
    made.add_row(
        "speed",
        f"{estimate.tokens_per_second:,.0f} tokens/s, {estimate.tokens_per_second / estimate.gpus:,.0f} a GPU, "
        f"MFU {estimate.mfu:.0%}",
    )
    if estimate.gpus > 1:
        made.add_row(
            "exchange",
            f"{estimate.sent_gib:,.1f} GiB a step in {estimate.exchange_ms:,.1f} ms, of which "
            f"{estimate.exposed_ms:,.1f} are exposed",
        )
    made.add_row("time", duration(estimate.days))
    hours = 24 * estimate.days * estimate.gpus
    made.add_row("cost", f"${estimate.dollars:,.0f} ({hours:,.0f} GPU-hours at ${budget.price:,.2f})")
    made.add_row(
        "checkpoint",
        f"{saved.gib:,.2f} GiB: the run waits {seconds(saved.copy_seconds)} "
        f"({seconds(saved.first_copy_seconds)} for the first), written in "
        f"{seconds(saved.write_seconds)}; {saved.count:,} in all, {saved.kept_gib:,.1f} GiB stay",
    )
    return made


def verdict(budget: Budget, estimate: Estimate) -> Text:
    """Whether it fits, and what follows below."""
    room = f"{estimate.gib:,.1f} of {estimate.gpu_gib:,.1f} GiB"
    if estimate.fits:
        text = Text(f"It fits: {room}.", style="green")
        if estimate.waits_for_host:
            text.append(" The GPU waits for the host: larger batches would be free.", style="yellow")
        if budget.options:
            text.append(" Faster, and fits as well:")
        return text
    if budget.options:
        return Text(f"It does not fit: {room}. What does:", style="red")
    return Text(
        f"It does not fit: {room}, nor does any of recompute full, smaller micro-batches, fsdp or more GPUs; "
        "take larger GPUs or a smaller model.",
        style="red",
    )


def options_table(options: tuple[Option, ...]) -> Table:
    """Other ways to run it."""
    made = table("change", "GiB", "tokens/s", "days", "dollars")
    for option in options:
        other = option.estimate
        name = "\n".join(option.changes) + (f"\n({option.note})" if option.note else "")
        made.add_row(
            name, f"{other.gib:,.1f}", f"{other.tokens_per_second:,.0f}", days(other.days), f"{other.dollars:,.0f}"
        )
    return made


def scaling_table(budget: Budget) -> Table:
    """One row for each number of GPUs; efficiency is by tokens/s of a GPU against the first row's."""
    made = table("GPUs", "sharding", "batch", "GiB", "tokens/s", "eff.", "exposed", "days", "$", left=0)
    first = budget.estimates[0]
    for estimate in budget.estimates:
        rate = estimate.tokens_per_second / estimate.gpus
        step = max(cost.ms for cost in estimate.costs)
        made.add_row(
            str(estimate.gpus),
            estimate.sharding.partition(",")[0].replace("one process", "-"),
            f"{estimate.micro_batches * estimate.tokens_per_batch:,}",
            Text(f"{estimate.gib:,.1f}", style="" if estimate.fits else "red"),
            f"{estimate.tokens_per_second:,.0f}",
            f"{rate / (first.tokens_per_second / first.gpus):.0%}",
            f"{estimate.exposed_ms / step:.1%}",
            days(estimate.days),
            f"{estimate.dollars:,.0f}",
        )
    return made


def gflop(number: float) -> str:
    """GFLOP of a token: from laptops' models to large ones."""
    return f"{number:,.1f}" if number >= 1 else f"{number:.4f}"


def days(number: float) -> str:
    """A number of days in three digits."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def duration(number: float) -> str:
    """Days, or what is readable of less."""
    if number >= 2:
        return f"{number:,.1f} days"
    hours = 24 * number
    return f"{hours:,.1f} hours" if hours >= 2 else f"{max(1, math.ceil(60 * hours)):,} minutes"


def seconds(number: float) -> str:
    """Seconds in two digits."""
    return f"{number:.2g} s" if number < 100 else f"{number:,.0f} s"
