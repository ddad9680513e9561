"""A draft head for a weights folder: trained on packed batches of a sampled folder, written beside the weights."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hrm_text.contracts import PackedBatch, UserError
from hrm_text.data.loader import Loader, read_metadata
from hrm_text.data.storage import Location, location, under
from hrm_text.data.tokenizer import tokenizer_info
from hrm_text.infer.text_model import DRAFTS, MOST_DRAFTS
from hrm_text.model.config import ModelConfig
from hrm_text.model.draft import FILE, DraftHead, save_head
from hrm_text.model.weights import parse_dtype, read_model
from hrm_text.train.draft_heads import acceptance, train_head

BATCH_TOKENS = 4096
"""Of a step: the logits of all guesses are in memory at once."""

HELD_OUT_SHARE = 0.05
MOST_HELD_OUT = 16
"""Batches at the end of the epoch that the head is not trained on, but asked."""


@dataclass(frozen=True)
class DraftReport:
    """What training a head came to."""

    file: Path
    steps: int
    seconds: float
    held_out_batches: int
    acceptance: list[float]
    """Of held-out batches, for each guess in a row: the share that is right of those behind right ones."""

    @property
    def tokens_per_pass(self) -> float:
        """Tokens that a pass with all these guesses makes on average."""
        return float(1 + np.cumprod(self.acceptance).sum())


def train_draft_head(
    folder: Path,
    sampled: Location,
    *,
    minutes: float = 2.0,
    guesses: int = DRAFTS,
    seed: int = 0,
    device: str = "cpu",
    dtype: str | None = None,
    batch_tokens: int = BATCH_TOKENS,
    max_steps: int | None = None,
    on_progress: Callable[[float, float], object] = lambda done, total: None,
) -> DraftReport:
    """Train a head on a frozen model's own choices, and write it to ``draft.safetensors`` in the model's folder.

    Args:
        folder: the weights folder.
        sampled: a sampled folder of its tokenizer: best what the model was trained with, for it guesses in such texts.
        minutes: to train.
        guesses: in a row that the head learns to make.
        seed: of the first weights, and of the order of the batches.
        device: to compute on.
        dtype: of the model; None: as decoding has it, bfloat16 on a GPU and float32 elsewhere.
        batch_tokens: of a step.
        max_steps: end after so many, should the minutes not be over.
        on_progress: is called with the seconds that are over, and those in all.

    Raises:
        UserError: a setting out of range; a folder that is missing or damaged; data of another tokenizer, of samples
            that are too long for the model, or of too few samples.
    """
    if not 0 < minutes < float("inf"):
        raise UserError(f"minutes must be positive, found {minutes}")
    if not 1 <= guesses <= MOST_DRAFTS:
        raise UserError(f"guesses must be from 1 to {MOST_DRAFTS}, found {guesses}")
    place, seconds = torch.device(device), 60 * minutes
    element = parse_dtype(dtype or ("bfloat16" if place.type == "cuda" else "float32"))
    model = read_model(folder, device=device, dtype=element)
    batches = SampledBatches(location(sampled), folder, model.config, batch_tokens)
    head = DraftHead(model.config)
    head.initialise(seed)
    head.to(place)
    start = time.perf_counter()
    steps = train_head(
        model,
        head,
        batches.shuffled(seed),
        guesses=guesses,
        seconds=seconds,
        max_steps=max_steps,
        on_step=lambda step, loss: on_progress(min(time.perf_counter() - start, seconds), seconds),
    )
    trained = time.perf_counter() - start
    shares = acceptance(model, head, batches.held_out(), guesses)
    save_head(head.to(element), folder)
    return DraftReport(folder / FILE, steps, trained, batches.num_held_out, shares)


class SampledBatches:
    """The batches of a sampled folder's first epoch: most to train on, the last ones to measure with."""

    def __init__(self, sampled: Location, folder: Path, config: ModelConfig, batch_tokens: int) -> None:
        metadata = read_metadata(under(sampled, "metadata.json"))
        check_tokenizer(metadata["tokenizer_info"], folder, sampled)
        longest = metadata["max_seq_len"]
        if longest - 1 > config.max_position_embeddings:
            raise UserError(
                f"{sampled}: samples of up to {longest:,} tokens, and the context of {folder} is "
                f"{config.max_position_embeddings:,}: sample with --max-seq-len {config.max_position_embeddings + 1}"
            )
        self.loader = Loader(
            sampled,
            tokens_per_batch=max(batch_tokens, longest),
            epochs=1,
            mask="prefix" if config.prefix_lm else "causal",
        )
        total = self.loader.total_steps
        if total < 2:
            raise UserError(
                f"{sampled}: one batch of {batch_tokens:,} tokens holds all samples, and a second one is needed to "
                "measure with: give more samples, or ask for smaller batches (--batch-tokens)"
            )
        self.num_held_out = min(max(1, round(HELD_OUT_SHARE * total)), MOST_HELD_OUT)
        self.num_trained_on = total - self.num_held_out

    def shuffled(self, seed: int) -> Iterator[PackedBatch]:
        """Without end, each round in another order."""
        chance = np.random.Generator(np.random.Philox(seed))
        while True:
            for step in chance.permutation(self.num_trained_on).tolist():
                yield from self.loader.load(0, step).batches

    def held_out(self) -> Iterator[PackedBatch]:
        """Those that are not trained on."""
        for step in range(self.num_trained_on, self.num_trained_on + self.num_held_out):
            yield from self.loader.load(0, step).batches


def check_tokenizer(info: Mapping[str, Any], folder: Path, sampled: Location) -> None:
    """See that data are tokens of a weights folder's tokenizer; UserError if not."""
    own = tokenizer_info(folder)
    differences = [
        f"{key} is {info[key]!r} there and {own[key]!r} here"
        for key in ("vocab_size", "boq", "eoq", "eoa", "condition_mapping")
        if info[key] != own[key]
    ]
    if differences:
        raise UserError(
            f"{sampled}: made with another tokenizer than that of {folder}: {'; '.join(differences)}. Take data that "
            f"were tokenized with it: hrm-text data tokenize RECORDS --tokenizer {folder} --out STORE"
        )
