"""The output folder of a quickstart."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Paths:
    """Where everything lies in the output folder."""

    out: Path

    @property
    def records(self) -> Path:
        """train/ and held_out/: a JSONL file per stratum."""
        return self.out / "records"

    @property
    def tokenizer(self) -> Path:
        return self.out / "tokenizer"

    def store(self, split: str) -> Path:
        """Tokens of a split."""
        return self.out / "store" / split

    def sampled(self, split: str) -> Path:
        """Epochs of a split: what training reads."""
        return self.out / "sampled" / split

    @property
    def run(self) -> Path:
        """Checkpoints and metrics."""
        return self.out / "train"

    @property
    def weights(self) -> Path:
        return self.out / "weights"

    @property
    def report(self) -> Path:
        return self.out / "report.html"

    def evaluation(self, name: str) -> Path:
        """What the model was asked before and after, and what it answered: see ``eval.runs``."""
        return self.out / "evaluation" / name

    def result(self, name: str) -> Path:
        """What a stage found out, as JSON."""
        return self.out / "results" / f"{name}.json"
