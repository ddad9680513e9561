"""`hrm-text train`: every setting of the YAML file is an option."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import tyro
from tyro.conf import FlagConversionOff, Positional

from hrm_text.cli.terminal import notes, tell


def train(config: Positional[Path]) -> None:
    """Train as a YAML file says; --section.key VALUE overrides it (`hrm-text train CONFIG.yaml --help` lists all).

    Started again, it continues from the newest good checkpoint. Ctrl-C saves and stops.

    Args:
        config: YAML file of the run, such as those in configs/
    """
    train_with_overrides([str(config)])


def train_with_overrides(arguments: Sequence[str]) -> None:
    """The train command: its options are the settings of the YAML file it names."""
    from hrm_text.settings import read_yaml, with_options
    from hrm_text.train.starting import train_config

    path, options = Path(arguments[0]), list(arguments[1:])
    asks_for_help = not {"-h", "--help"}.isdisjoint(options)
    options = [option for option in options if option not in ("-h", "--help")]
    where = " ".join([str(path), *options])
    # Merged before they are read: a setting may depend on another, as the recurrence does on the architecture.
    values = with_options(read_yaml(path), options, where)
    if asks_for_help:
        show_settings(values, where, f"hrm-text train {path}")
    settings = train_config(values, where)

    from hrm_text.recipes.train import train as run

    summary = run(settings, notes())
    if os.environ.get("RANK", "0") != "0":
        return  # one rank tells
    if summary.outcome == "finished":
        tell(f"wrote {summary.checkpoint}. Next:")
        tell(f"  hrm-text export {settings.run} WEIGHTS_DIR")
    else:
        tell(f"to continue: {how_it_was_started()} {shlex.join(arguments)}")


def how_it_was_started() -> str:
    """The command before its arguments: of one process, or of the ranks of a machine."""
    ranks = os.environ.get("LOCAL_WORLD_SIZE")
    if ranks is None:
        return "hrm-text train"
    return f"torchrun --nproc-per-node {ranks} -m -- hrm_text train"  # without the -- it takes --run for its own


def show_settings(values: Any, where: str, prog: str) -> NoReturn:
    """Print every setting with what it is and its value here, and exit."""
    from hrm_text.contracts import UserError
    from hrm_text.model.config import preset
    from hrm_text.settings import from_mapping, to_mapping
    from hrm_text.train.config import TrainConfig
    from hrm_text.train.starting import train_config

    try:
        settings = train_config(values, where)
    except UserError:
        # The weights that say what the model is need not be there to read about the settings.
        settings = from_mapping(TrainConfig, {"model": to_mapping(preset("XL"))} | values, where)
    tyro.cli(
        TrainConfig, default=settings, args=["--help"], prog=prog, use_underscores=True, config=(FlagConversionOff,)
    )
    raise AssertionError("--help exits")
