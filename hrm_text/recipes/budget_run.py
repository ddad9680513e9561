"""What a budget is asked, and what of a run does not depend on the GPUs: the model, its tokens, its steps, K."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hrm_text.contracts import UserError
from hrm_text.data.storage import names_in
from hrm_text.model.config import ModelConfig, preset
from hrm_text.recipes.budget_gpus import Gpu
from hrm_text.recipes.budget_memory import Blocks
from hrm_text.recipes.budget_work import FILLED, Work, data_work, synthetic_work
from hrm_text.recipes.synthetic import CONTEXT
from hrm_text.settings import from_mapping, to_mapping
from hrm_text.train.config import TrainConfig
from hrm_text.train.loop import fitted_to_data
from hrm_text.train.starting import train_config

EPOCH_TOKENS, EPOCHS = 14e9, 4
"""Of the released runs, where nothing else is known."""
RECORD_TOKENS = 10e6
"""Of records for fine-tuning that are not there."""
BYTES_PER_TOKEN = 4.0
"""Of records that have not been tokenised. Assumed."""
VOCABULARY = 65_536
"""Entries of the released tokenizer, where nothing else is known."""
FLOAT8_MULTIPLE = 64
"""That of ``model.kernels.float8``, which cannot be asked where Triton is not installed."""
MOST_K_STEPS = 10_000
"""Steps on which the warm-up of K is followed: a run of more is as one of so many."""


@dataclass(frozen=True)
class Question:
    """What is asked beside the configuration."""

    gpus: tuple[int, ...] = (1,)
    """How many; several give a table of scaling."""
    gpu: str = "h100"
    """A name of ``budget_gpus.GPUS``."""
    price: float = 2.0
    """Dollars for an hour of one GPU."""
    gpus_per_node: int = 8
    network_gbps: float = 400.0
    """Gigabits a second of each GPU's own adapter, between machines."""
    tokens: float | None = None
    """Of the whole run; None: as the data, or the released runs'."""
    lengths: str | None = None
    """A name of ``synthetic.DISTRIBUTIONS``; None: as the data, or "anchor"."""
    disk_gb_per_second: float = 2.0
    """That one machine writes."""

    def __post_init__(self) -> None:
        if not self.gpus or min(self.gpus) < 1:
            found = ",".join(map(str, self.gpus)) or "none"
            raise UserError(f"--gpus: expected numbers of at least 1, such as 16 or 1,2,8; found {found}")
        for name in ("gpus_per_node", "network_gbps", "price", "disk_gb_per_second"):
            if getattr(self, name) <= 0:
                raise UserError(f"--{name.replace('_', '-')}: expected more than 0, found {getattr(self, name)}")
        if self.tokens is not None and self.tokens < 1:
            raise UserError(f"--tokens: expected at least 1, found {self.tokens}")


@dataclass(frozen=True)
class Run:
    """What is to be trained on, whatever it is computed with."""

    model: ModelConfig
    bin: Work
    """One micro-batch."""
    tokens: float
    """Of the whole run, padding not counted."""
    steps: int
    share_by_k: dict[int, float]
    """Share of the steps that have this K."""
    assumptions: tuple[str, ...]


def read_config(values: Any, where: str) -> tuple[TrainConfig, tuple[str, ...]]:
    """The settings of a run from a parsed mapping, and what had to be assumed to read them.

    Weights to start from (``init``) say what the model is; where they are not there yet, it is as large as the released
    one, unless the mapping says otherwise.
    """
    init = values.get("init") if isinstance(values, dict) else None
    if not isinstance(init, (str, Path)) or Path(init).exists():
        return train_config(values, where), ()
    if values.get("model") is not None:
        return from_mapping(TrainConfig, values, where), ()
    note = f"{init} is not there (--init): a model of the size XL."
    return from_mapping(TrainConfig, values | {"model": to_mapping(preset("XL"))}, where), (note,)


def check(config: TrainConfig, gpu: Gpu) -> None:
    """Refuse what has never been measured, rather than guess."""
    if config.device in ("cpu", "mps"):
        raise UserError(f"device: a budget is of GPUs with CUDA, found {config.device!r}; add --device cuda")
    if config.dtype == "float32":
        raise UserError("dtype: a budget is of training in bfloat16, found 'float32'; add --dtype bfloat16")
    if config.blocks == "plain":
        raise UserError("blocks: a budget knows fused and compiled blocks, found 'plain'; add --blocks auto")
    if config.lora.rank:
        raise UserError("lora: a budget is of training the weights themselves, found adapters; add --lora.rank 0")
    if config.fp8 and not gpu.float8:
        raise UserError(f"fp8: {gpu.name} does not multiply in FP8; add --fp8 false, or name a GPU that does (--gpu)")


def run_of(config: TrainConfig, question: Question) -> Run:
    """Tokens and steps of a run: of its data where it is there, otherwise as assumed."""
    sampled, notes = config.data.sampled, []
    there = isinstance(sampled, Path) and (sampled / "metadata.json").exists()
    if there:
        model = fitted_to_data(config)
    else:
        model = dataclasses.replace(
            config.model,
            vocab_size=config.model.vocab_size or VOCABULARY,
            max_position_embeddings=config.model.max_position_embeddings or CONTEXT,
        )
        if not config.model.vocab_size:
            notes.append(f"The data is not looked at: a vocabulary of {VOCABULARY:,} (--model.vocab_size).")
    check_float8_widths(config, model)
    budgeted, total = config.data.tokens_per_batch, question.tokens
    if there and (question.lengths is None or total is None):
        assert sampled is not None
        numbers = sorted(int(found[1]) for name in names_in(sampled) if (found := re.fullmatch(r"epoch_(\d+)", name)))
        if not numbers:
            raise UserError(f"{sampled}: no folder epoch_<n>; a sampled folder is made by `hrm-text data sample`")
        data = data_work(sampled, numbers[: config.data.epochs], not model.prefix_lm, config.data.supervise == "all")
        total = data.tokens if total is None else total
    if question.lengths is None and there:
        bin_ = data.per_token.times(FILLED * budgeted)
        notes.append(f"Lengths are the data's; batches are {FILLED:.0%} full.")
    else:
        name = question.lengths or "anchor"
        bin_ = synthetic_work(name, budgeted)
        if config.data.supervise == "all":
            bin_ = dataclasses.replace(bin_, supervised=bin_.tokens)
        notes.append(
            f"Lengths are those of {name!r} (--lengths): {bin_.supervised / bin_.tokens:.0%} of the tokens supervised."
        )
    if total is None and config.data.records is not None:
        epochs = config.data.epochs or 1
        size = sum(file.stat().st_size for place in config.data.records for file in files_of(place))
        total = epochs * (size / BYTES_PER_TOKEN or RECORD_TOKENS)
        source = (
            f"{size / 1e6:,.1f} MB of records, {BYTES_PER_TOKEN:.0f} bytes a token" if size else "records not there"
        )
        notes.append(f"{total / 1e6:,.1f} M tokens: {source}, {epochs} epochs (--tokens).")
    if total is None:
        epochs = config.data.epochs or EPOCHS
        total = epochs * EPOCH_TOKENS
        notes.append(f"{total / 1e9:,.0f} B tokens: {epochs} epochs of the released run's 14 B (--tokens).")
    steps = max(1, math.ceil(total / (config.data.micro_batches * bin_.tokens) - 1e-6))
    if config.max_steps is not None and config.max_steps < steps:
        steps = config.max_steps
        notes.append(f"The run ends after max_steps, {steps:,} steps.")
    total = min(total, steps * config.data.micro_batches * bin_.tokens)
    return Run(model, bin_, total, steps, shares_of_k(config, model, steps), tuple(notes))


def files_of(place: Path) -> list[Path]:
    """A file, or the files of a folder; nothing where there is nothing."""
    if place.is_dir():
        return sorted(file for file in place.rglob("*") if file.is_file())
    return [place] if place.exists() else []


def check_float8_widths(config: TrainConfig, model: ModelConfig) -> None:
    """FP8 needs what ``model.kernels.fused`` needs."""
    if not config.fp8:
        return
    widths = (model.hidden_size, model.attention_size, model.intermediate_size)
    odd = [size for size in widths if size % FLOAT8_MULTIPLE]
    if odd:
        raise UserError(
            f"fp8: FP8 products need widths that are multiples of {FLOAT8_MULTIPLE}, and the model has {odd[0]}"
        )
    if blocks_of(config, model) != "fused":
        raise UserError("fp8: products in FP8 need fused blocks; leave blocks and attention at auto")


def shares_of_k(config: TrainConfig, model: ModelConfig, steps: int) -> dict[int, float]:
    """Share of the steps of each K, as the trainer has it: only HRM has a warm-up."""
    if model.architecture != "hrm":
        return {model.bp_steps: 1.0}
    followed = min(steps, MOST_K_STEPS)
    counts = Counter(config.credit.at(step, followed, model.bp_steps) for step in range(followed))
    return {k: counts[k] / followed for k in sorted(counts)}


def blocks_of(config: TrainConfig, model: ModelConfig) -> Blocks:
    """How blocks are computed on an NVIDIA GPU with Triton (``train.execution.chosen``)."""
    if config.blocks == "compiled":
        return "compiled"
    fusible = model.norm != "post" and model.head_dim in (16, 32, 64, 128, 256)
    if config.blocks == "fused" and not fusible:
        raise UserError(f"blocks: {model.norm}-norm blocks with heads of {model.head_dim} cannot be fused; take auto")
    return "fused" if fusible and config.attention in ("auto", "triton") else "compiled"
