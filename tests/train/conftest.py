from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hrm_text.contracts import IGNORE_INDEX, PackedBatch
from hrm_text.data.loader import PAD_ID, LoaderStep
from hrm_text.data.procedural import generate
from hrm_text.data.records import BadRecords, find_record_files, read_texts, write_jsonl
from hrm_text.data.sample import sample_epochs
from hrm_text.data.tokenize import tokenize_files
from hrm_text.data.tokenizer import train_tokenizer
from hrm_text.settings import from_mapping
from hrm_text.train.config import TrainConfig
from hrm_text.train.hooks import CheckpointRecord, Hook, Level, RunSummary, StepRecord, ValidationRecord
from hrm_text.train.loop import Trainer
from tests.train.forked_ranks import Ranks, started

TASKS = {"upper": 1.0, "repeat": 1.0}
VOCAB_SIZE = 320
MODEL = {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "head_dim": 16, "inner_multiple": 16}
TIMED = {"share", "seconds", "tokens_per_second", "mfu", "memory_bytes"}


class Recorder(Hook):
    """Remembers everything it is told."""

    def __init__(self) -> None:
        self.steps: list[StepRecord] = []
        self.validations: list[ValidationRecord] = []
        self.checkpoints: list[Path] = []
        self.messages: list[tuple[Level, str]] = []
        self.summary: RunSummary | None = None

    def on_step(self, record: StepRecord) -> None:
        self.steps.append(record)

    def on_validation(self, record: ValidationRecord) -> None:
        self.validations.append(record)

    def on_checkpoint(self, record: CheckpointRecord) -> None:
        self.checkpoints.append(record.folder)

    def on_message(self, level: Level, text: str) -> None:
        self.messages.append((level, text))

    def on_end(self, summary: RunSummary) -> None:
        self.summary = summary


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


def sample(folder: Path, tokenizer: Path, split: Any, examples: int, epochs: int) -> Path:
    """Draw records of a split and take them to a sampled folder."""
    write_jsonl(folder / "records" / "tasks.jsonl", generate(TASKS, examples, 0, split))
    tokenize_files([folder / "records"], tokenizer, folder / "store")
    sample_epochs(folder / "store", folder / "sampled", [], epochs, max_seq_len=65)
    return folder / "sampled"


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_jsonl(folder / "tasks.jsonl", generate(TASKS, 200, 1))
    texts = read_texts(find_record_files([folder / "tasks.jsonl"]), BadRecords(strict=True))
    return train_tokenizer(texts, VOCAB_SIZE, folder / "bpe")


@pytest.fixture(scope="session")
def sampled_dir(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> Path:
    """Two epochs of 64 samples, about 1,600 tokens each."""
    return sample(tmp_path_factory.mktemp("train"), tokenizer_dir, "train", 64, epochs=2)


@pytest.fixture(scope="session")
def five_epochs_dir(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> Path:
    """For runs of more steps, or of larger ones."""
    return sample(tmp_path_factory.mktemp("five"), tokenizer_dir, "train", 64, epochs=5)


@pytest.fixture(scope="session")
def held_out_dir(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> Path:
    return sample(tmp_path_factory.mktemp("held_out"), tokenizer_dir, "held_out", 16, epochs=1)


@pytest.fixture
def plain_settings(tmp_path: Path, sampled_dir: Path, held_out_dir: Path) -> dict[str, Any]:
    """A tiny run of 14 steps over two epochs, every part of the trainer in use, as a YAML file would give it."""
    return {
        "run": str(tmp_path / "run"),
        "model": dict(MODEL),
        "data": {"sampled": str(sampled_dir), "tokens_per_batch": 128, "micro_batches": 2},
        "optimizer": {"lr": {"peak": 3e-3, "warmup_steps": 3}, "ema_decay": 0.9},
        "validation": {"sampled": str(held_out_dir), "every_steps": 5},
        "checkpoint": {"every_steps": 4},
        "logging": {"tensorboard": False},
    }


MakeConfig = Callable[..., TrainConfig]


@pytest.fixture
def config(plain_settings: dict[str, Any]) -> MakeConfig:
    """The settings of the tiny run with some changed: ``config({"data.micro_batches": 1})``."""

    def make(changes: dict[str, Any] | None = None) -> TrainConfig:
        values: dict[str, Any] = json.loads(json.dumps(plain_settings))
        for key, value in (changes or {}).items():
            *sections, last = key.split(".")
            section = values
            for name in sections:
                section = section.setdefault(name, {})
            section[last] = str(value) if isinstance(value, Path) else value
        return from_mapping(TrainConfig, values, "test")

    return make


def learned(trainer: Trainer) -> dict[str, torch.Tensor]:
    """A copy of all that training changes: weights, moments, EMA, step count."""
    state: dict[str, torch.Tensor] = {}
    for name, value in {**trainer.model.state_dict(), **trainer.optimizer.state_dict()}.items():
        group = value if isinstance(value, dict) else {"": value}
        state |= {f"{name}/{key}": tensor.detach().clone() for key, tensor in group.items()}
    return state


@pytest.fixture(name="learned")
def learned_fixture() -> Callable[[Trainer], dict[str, torch.Tensor]]:
    return learned


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    different = [name for name in found if not torch.equal(found[name], expected[name])]
    assert different == []


@pytest.fixture(name="assert_same")
def assert_same_fixture() -> Callable[[dict[str, torch.Tensor], dict[str, torch.Tensor]], None]:
    """To the bit."""
    return assert_same


def random_step(seed: int, pad_to: int = 0) -> LoaderStep:
    """A few samples of random ids and lengths: no two seeds have the same numbers of tokens and samples."""
    rng = np.random.Generator(np.random.Philox(seed))
    lengths = rng.integers(2, 60, 3 + seed)
    prefixes = rng.integers(1, lengths)
    starts = np.concatenate([[0], lengths.cumsum()])
    filled = int(starts[-1])
    size = max(filled, pad_to)
    ids, positions = np.full(size, PAD_ID), np.zeros(size, np.int64)
    labels = np.full(size, IGNORE_INDEX)
    ids[:filled] = rng.integers(0, 256, filled)
    positions[:filled] = np.arange(filled) - np.repeat(starts[:-1], lengths)
    answered = positions[:filled] >= np.repeat(prefixes - 1, lengths)
    labels[:filled][answered] = rng.integers(0, 256, int(answered.sum()))
    batch = PackedBatch(ids, labels, positions, starts, prefixes)
    return LoaderStep([batch], batch.num_supervised, batch.num_samples, filled)


@pytest.fixture(name="random_step")
def random_step_fixture() -> Callable[..., LoaderStep]:
    return random_step


@pytest.fixture(scope="session")
def forked() -> Iterator[Ranks]:
    """A process that forks ranks."""
    with started() as ranks:
        yield ranks


def untimed_metrics(run: Path) -> list[dict[str, Any]]:
    """The records of metrics.jsonl without what no two runs share."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in record.items() if key not in TIMED} for record in records]


@pytest.fixture(name="untimed_metrics")
def untimed_metrics_fixture() -> Callable[[Path], list[dict[str, Any]]]:
    return untimed_metrics
