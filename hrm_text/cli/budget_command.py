"""`hrm-text budget`: what a run will take, before it is begun."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from tyro.conf import Positional, arg

from hrm_text.cli.terminal import print_json
from hrm_text.contracts import UserError


def budget(
    config: Positional[Path],
    gpus: Annotated[str, arg(metavar="N or N,N,...")] = "1",
    gpu: str = "h100",
    price: float = 2.0,
    gpus_per_node: int = 8,
    network_gbps: float = 400.0,
    disk_gb_per_second: float = 2.0,
    tokens: float | None = None,
    lengths: str | None = None,
    json: Annotated[bool, arg(name="json")] = False,
) -> None:
    """Memory, speed, days and dollars of a run, before it is begun; --section.key VALUE overrides its settings.

    Neither a GPU nor the data is needed: parts are counted, and rates are those measured (docs/budget.md).

    Args:
        config: YAML file of the run, such as those in configs/
        gpus: how many; several numbers, such as 1,2,8,16,64, give a table of how the run scales
        gpu: b200, h200, h100, h100-pcie, a100, a100-40gb, l40s, rtx-5090, rtx-4090 or rtx-3090
        price: dollars for an hour of one GPU
        gpus_per_node: GPUs of one machine
        network_gbps: gigabits a second of each GPU's own adapter, between machines
        disk_gb_per_second: that one machine writes when it saves
        tokens: of the whole run, such as 56e9; if not given the data's, or where it is not there the released run's
        lengths: of the samples: anchor, short, mixed, long or causal; if not given the data's, or without it anchor
        json: print one JSON object
    """
    answer((), **locals())


OWN = {name.replace("_", "-") for name in inspect.signature(budget).parameters} - {"config"}
"""Options of the command; all others are settings of the YAML file."""


def budget_with_overrides(arguments: Sequence[str]) -> None:
    """The budget command: options that are not its own are settings of the YAML file it names."""
    config, options = arguments[0], arguments[1:]
    own: list[str] = [config]
    overrides: list[str] = []
    taken_by = own
    for option in options:
        if option.startswith("--") or option == "-h":
            name = option.removeprefix("--").partition("=")[0].replace("_", "-")
            taken_by = own if name in OWN or option in ("-h", "--help") else overrides
        taken_by.append(option)

    @functools.wraps(budget)
    def with_settings(**given: Any) -> None:
        answer(overrides, **given)

    tyro.cli(with_settings, args=own, prog="hrm-text budget")


def answer(overrides: Sequence[str], *, config: Path, gpus: str, json: bool, **asked: Any) -> None:
    """Tell the budget of a file with settings in the place of its own; ``asked``: fields of ``Question``."""
    from hrm_text.recipes.budget import budget
    from hrm_text.recipes.budget_run import Question, read_config
    from hrm_text.recipes.budget_tables import show
    from hrm_text.settings import read_yaml, with_options

    question = Question(gpus=numbers(gpus), **asked)
    where = " ".join([str(config), *overrides])
    settings, notes = read_config(with_options(read_yaml(config), overrides, where), where)
    title = f"{where}, {gpus} x {question.gpu}, ${question.price:,.2f} an hour each"
    found = budget(settings, question, title, notes)
    if json:
        print_json(found.as_dict())
    else:
        show(found, Console())


def numbers(text: str) -> tuple[int, ...]:
    """Numbers of GPUs, from "16" or "1,2,8"."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"--gpus: expected a number such as 16, or several such as 1,2,8; found {text!r}") from None
