"""The command line: every command is a function, its options are the function's parameters.

Rooms are imported inside the commands, so that `--help` and a mistyped option answer at once.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import arg

from hrm_text.cli.bench_commands import COMMANDS as BENCH_COMMANDS
from hrm_text.cli.budget_command import budget, budget_with_overrides
from hrm_text.cli.data import COMMANDS as DATA_COMMANDS
from hrm_text.cli.eval_command import eval_
from hrm_text.cli.serve_command import serve
from hrm_text.cli.terminal import escape, notes, print_json
from hrm_text.cli.train_command import train, train_with_overrides
from hrm_text.cli.weights_commands import export, generate, import_reference
from hrm_text.contracts import UserError, did_you_mean


def quickstart(
    out: Path | None = None,
    preset: Literal["cpu", "gpu"] = "cpu",
    seed: int = 0,
    json: Annotated[bool, arg(name="json")] = False,
) -> None:
    """Generate data, train, evaluate, export and report: the whole system in minutes.

    Interrupted and started again, it continues. Without --preset, it is for two CPU cores.

    Args:
        out: folder for everything it makes; runs/quickstart-PRESET if not given
        preset: cpu takes a laptop a few minutes; gpu one large GPU about eight
        seed: of the data and the initial weights
        json: print the outcome as one JSON object
    """
    from hrm_text.recipes.quickstart import quickstart as run

    outcome = run(out or Path(f"runs/quickstart-{preset}"), preset, seed, notes())
    if json:
        print_json(
            {key: outcome.get(key) for key in ("title", "seconds", "parameters", "tokens_seen", "stages", "tasks")}
        )


def data() -> None:
    """From sources to sampled epochs: clean, tokenize, sample, report and more (`hrm-text data --help`)."""
    raise AssertionError("main() hands the commands below `data` on")


def bench() -> None:
    """Measure this machine: train, decode, attention, data (`hrm-text bench --help`)."""
    raise AssertionError("main() hands the commands below `bench` on")


COMMANDS: dict[str, Callable[..., None]] = {
    "quickstart": quickstart,
    "data": data,
    "train": train,
    "budget": budget,
    "export": export,
    "import": import_reference,
    "generate": generate,
    "serve": serve,
    "eval": eval_,
    "bench": bench,
}

GROUPS: dict[str, dict[str, Callable[..., None]]] = {
    "data": DATA_COMMANDS,
    "bench": BENCH_COMMANDS,
}
"""The commands below a command."""

DESCRIPTIONS = {
    "": "Pretrain, evaluate, export and run HRM-Text models.",
    "data": "From records to the epochs that training reads.",
    "bench": "Measure how fast this machine trains and answers, on random weights and random samples.",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit code is 0, 1 for an error of the user's, 2 for a mistyped command, 130 for Ctrl-C."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if arguments[:1] == ["train"] and len(arguments) > 2 and not arguments[1].startswith("-"):
            train_with_overrides(arguments[1:])
        elif arguments[:1] == ["budget"] and len(arguments) > 2 and not arguments[1].startswith("-"):
            budget_with_overrides(arguments[1:])
        else:
            group = arguments[0] if arguments and arguments[0] in GROUPS else ""
            commands, rest = GROUPS.get(group, COMMANDS), arguments[1 if group else 0 :]
            check_command(rest, commands)
            tyro.extras.subcommand_cli_from_dict(
                commands, args=rest, prog=f"hrm-text {group}".rstrip(), description=DESCRIPTIONS[group]
            )
    except UserError as error:
        notes().print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `hrm-text ... | head` is not an error
        return 0
    return 0


def check_command(arguments: Sequence[str], commands: Mapping[str, Any]) -> None:
    """An unknown command is an error that suggests the right one."""
    if arguments and arguments[0] not in commands and not arguments[0].startswith("-"):
        hint = did_you_mean(arguments[0], commands)
        raise UserError(f"unknown command {arguments[0]!r}: {hint}The commands are {', '.join(commands)}")
