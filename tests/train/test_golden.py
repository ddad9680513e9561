"""A fixed tiny run whose first losses never change: what a refactor must leave as it is.

When a change is meant to change them, write them anew, and say why in docs/log.md:

    python tests/train/test_golden.py
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np
import pytest

from hrm_text.files import write_json
from hrm_text.settings import from_mapping
from hrm_text.train.config import TrainConfig
from hrm_text.train.hooks import Hook, StepRecord
from hrm_text.train.loop import Trainer

GOLDEN = Path(__file__).with_name("golden_losses.json")
STEPS = 20
VOCAB = 200


def write_sampled(folder: Path) -> Path:
    """Samples whose response is the reversed prefix, drawn here: no generator, tokenizer or sampler has a part."""
    rng = np.random.Generator(np.random.Philox(0))
    samples = [rng.integers(20, 60, length) for length in rng.integers(2, 12, 500)]
    lengths = np.array([len(sample) for sample in samples])
    starts = np.cumsum(2 * lengths) - 2 * lengths
    spans = {"inst_start": starts, "inst_len": lengths, "resp_start": starts + lengths, "resp_len": lengths}
    (folder / "epoch_0").mkdir()
    for name, column in spans.items():
        np.save(folder / "epoch_0" / f"{name}.npy", column.astype(np.int64))
    np.save(folder / "tokens.npy", np.concatenate([x for s in samples for x in (s, s[::-1])]).astype(np.uint16))
    metadata = {"tokenizer_info": {"vocab_size": VOCAB}, "vocab_size": None, "max_seq_len": 33}
    (folder / "metadata.json").write_text(json.dumps(metadata))
    return folder


def first_losses(folder: Path) -> list[float]:
    """The losses of the first steps of the fixed run: the recipe of the spec, K warm-up and all."""
    losses: list[float] = []

    class Losses(Hook):
        def on_step(self, record: StepRecord) -> None:
            losses.append(record.loss)

    settings = {
        "run": str(folder / "run"),
        "seed": 1,
        "model": {"hidden_size": 64, "num_layers": 2, "num_heads": 2, "head_dim": 32, "inner_multiple": 32},
        "data": {"sampled": str(write_sampled(folder)), "tokens_per_batch": 128, "micro_batches": 2},
        "optimizer": {"lr": {"peak": 3e-3, "warmup_steps": 5}},
        "max_steps": STEPS,
        "device": "cpu",
        "attention": "plain",
    }
    Trainer(from_mapping(TrainConfig, settings, "golden"), [Losses()]).run()
    return losses


def test_the_first_losses_are_those_of_before(tmp_path: Path) -> None:
    assert first_losses(tmp_path) == pytest.approx(json.loads(GOLDEN.read_text()), rel=1e-4)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        write_json(GOLDEN, first_losses(Path(folder)))
