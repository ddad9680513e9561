"""Whether a run may be continued from a checkpoint: what must be equal, and what is told when it is not."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hrm_text.contracts import UserError
from hrm_text.model.config import ModelConfig
from hrm_text.settings import to_mapping
from hrm_text.train.config import TrainConfig, plain


def check_same_model(ours: ModelConfig, saved: Mapping[str, Any], folder: Path) -> None:
    """A checkpoint of another model is an error that names every difference."""
    differences = [
        f"{key} is {saved[key]!r} there and {value!r} here"
        for key, value in to_mapping(ours).items()
        if key in saved and saved[key] != value and key != "bp_steps"
    ]
    if differences:
        raise UserError(
            f"{folder} holds another model: {'; '.join(differences)}. "
            "Give this run another folder (run: ...), or the model of that checkpoint."
        )


def changed_settings(config: TrainConfig, saved: Mapping[str, Any], folder: Path) -> list[str]:
    """What a resumed run changes of how it learns; batches of another size are an error, as a position would move."""
    changes = []
    for section in ("data", "optimizer", "credit"):
        ours, theirs = plain(config)[section], saved.get(section, {})
        changes += [
            (f"{section}.{key}", f"{section}.{key} was {theirs[key]!r} and is {value!r}")
            for key, value in ours.items()
            if key in theirs and theirs[key] != value and key not in ("workers", "sampled", "at_once")
        ]
    if resized := [text for key, text in changes if key in ("data.tokens_per_batch", "data.micro_batches")]:
        raise UserError(
            f"{folder} cannot be continued with other batches: {'; '.join(resized)}. "
            "Put the sizes back, or give this run another folder (run: ...)."
        )
    return [text for _, text in changes]
