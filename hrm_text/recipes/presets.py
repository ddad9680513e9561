"""The two sizes of the quickstart: a laptop's CPU, and one GPU."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from hrm_text.contracts import UserError
from hrm_text.settings import settings


@settings
class QuickstartPreset:
    """Everything that the quickstart decides; the rest follows from it."""

    name: str
    """What a user types."""
    data: Literal["procedural", "mixture"]
    """procedural: the generators of data/procedural with CPU_WEIGHTS. mixture: all sources of data/sources."""
    examples: int = 0
    """Training examples to draw (procedural)."""
    scale: float = 1.0
    """Factor on the examples of every source (mixture)."""
    held_out_examples: int
    """Held-out records for the validation loss."""
    items_per_task: int
    """Held-out problems asked per task."""
    items_before: int
    """Of these, how many the untrained model is asked: it never stops by itself, so its answers take the longest."""
    items_at_once: int
    """Problems asked in one batch: each needs room for its keys and values."""
    vocab_size: int
    """Entries of the tokenizer."""
    max_seq_len: int
    """Most tokens of a prompt and its response together."""
    epochs: int = 1
    """Passes over the training examples."""
    model: dict[str, Any]
    """Settings of the model; vocabulary and context come from the data."""
    tokens_per_batch: int
    """Tokens of a training step."""
    learning_rate: dict[str, Any]
    """Peak, warm-up and decay."""
    ema_decay: float
    """Decay of the averaged weights."""
    validate_every: int
    """Steps between validations."""
    save_every: int
    """Steps between checkpoints: what a kill -9 may cost."""


PRESETS: Mapping[str, QuickstartPreset] = {
    # 0.5 M parameters. Found by trying: see docs/log.md, "the CPU quickstart".
    "cpu": QuickstartPreset(
        name="cpu",
        data="procedural",
        examples=50_000,
        held_out_examples=600,
        items_per_task=200,
        items_before=40,
        items_at_once=128,
        vocab_size=512,
        max_seq_len=129,
        model={
            "hidden_size": 128,
            "num_layers": 2,
            "num_heads": 4,
            "head_dim": 32,
            "inner_multiple": 32,
            "L_cycles": 2,
        },
        tokens_per_batch=512,
        learning_rate={"peak": 2e-3, "warmup_steps": 100, "decay": "cosine", "floor": 0.1},
        ema_decay=0.99,
        validate_every=500,
        save_every=500,
    ),
    # 67 M parameters, sized for about eight minutes on one H100 or H200.
    "gpu": QuickstartPreset(
        name="gpu",
        data="mixture",
        held_out_examples=2000,
        items_per_task=100,
        items_before=20,
        items_at_once=256,
        vocab_size=8192,
        max_seq_len=513,
        model={"hidden_size": 512, "num_layers": 16, "num_heads": 8, "head_dim": 64},
        tokens_per_batch=32_768,
        learning_rate={"peak": 1e-3, "warmup_steps": 100, "decay": "cosine", "floor": 0.1},
        ema_decay=0.99,
        validate_every=250,
        save_every=500,
    ),
}


def find_preset(name: str) -> QuickstartPreset:
    """The preset of that name; an unknown one is an error that lists them."""
    if name not in PRESETS:
        raise UserError(f"unknown preset {name!r}; the presets are {', '.join(PRESETS)}")
    return PRESETS[name]
