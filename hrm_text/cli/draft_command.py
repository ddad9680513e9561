"""`hrm-text draft`: a draft head for a weights folder."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from hrm_text.cli.terminal import print_json, progress_bar, tell
from hrm_text.cli.weights_commands import available_device


def draft(
    weights_dir: Positional[Path],
    sampled_dir: Positional[str],
    minutes: float = 2.0,
    guesses: int = 3,
    seed: int = 0,
    device: str = "cpu",
    dtype: Literal["float32", "bfloat16"] | None = None,
    batch_tokens: int = 4096,
    json: Annotated[bool, arg(name="json")] = False,
) -> None:
    """Train a head that guesses tokens ahead, so that one pass of the model makes several (draft.safetensors).

    The model stays as it is, and so does what it says: guesses save time, on a GPU, for one greedy text at a time.

    Args:
        weights_dir: weights folder; the head is written to it
        sampled_dir: sampled folder of the same tokenizer, best the one that the model was trained with; or its URL
        minutes: to train
        guesses: in a row that the head learns to make
        seed: of the first weights, and of the order of the batches
        device: cpu, cuda or mps
        dtype: of the model; bfloat16 on a GPU and float32 elsewhere if not given
        batch_tokens: tokens of a training step
        json: print the outcome as one JSON object
    """
    from hrm_text.recipes.draft_heads import train_draft_head

    with progress_bar("training", "seconds") as on_progress:
        report = train_draft_head(
            weights_dir,
            sampled_dir,
            minutes=minutes,
            guesses=guesses,
            seed=seed,
            device=available_device(device),
            dtype=dtype,
            batch_tokens=batch_tokens,
            on_progress=on_progress,
        )
    if json:
        print_json(dataclasses.asdict(report) | {"file": str(report.file), "tokens_per_pass": report.tokens_per_pass})
        return
    print(f"{report.steps:,} steps in {report.seconds:.0f} s; of {report.held_out_batches} held-out batches:")
    for number, share in enumerate(report.acceptance, 1):
        print(f"  guess {number}: {share:6.1%} right{' of those behind right ones' if number > 1 else ''}")
    print(f"  tokens a pass with {len(report.acceptance)} guesses: {report.tokens_per_pass:.2f}")
    tell(f"wrote {report.file}. Next:")
    tell(f"  hrm-text generate {weights_dir} --device cuda --dtype bfloat16 --drafts {guesses} --prompt TEXT")
