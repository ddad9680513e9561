"""Adapters on several ranks: each holds all of the model, and they exchange gradients of A and B alone."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch import Tensor

from hrm_text.data.loader import LoaderStep
from hrm_text.model.config import ModelConfig
from hrm_text.model.lora import LoraConfig
from hrm_text.model.recurrence import build
from hrm_text.model.tensorfile import load_tensors, save_tensors
from hrm_text.settings import from_mapping
from hrm_text.train.config import ExecutionConfig, OptimizerConfig
from hrm_text.train.execution import chosen
from hrm_text.train.sharding import Sharding
from hrm_text.train.step import TrainingStep
from hrm_text.train.world import joined
from tests.train.conftest import random_step
from tests.train.forked_ranks import Ranks

STEPS = 4


def shares() -> list[tuple[LoaderStep, LoaderStep, LoaderStep]]:
    """Of each step, of two micro-batches: that of the first rank, that of the second, and the whole."""
    steps = []
    for number in range(STEPS):
        one, two = random_step(2 * number), random_step(2 * number + 1)
        of_step = one.supervised + two.supervised, one.samples + two.samples, one.tokens + two.tokens
        batches = ([*one.batches], [*two.batches], [*one.batches, *two.batches])
        first, second, both = (LoaderStep(of_share, *of_step) for of_share in batches)
        steps.append((first, second, both))
    return steps


def trained(steps: list[LoaderStep], ranks: int) -> dict[str, Tensor]:
    """The numbers of some steps, and the state after them, on this rank."""
    values = {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "head_dim": 16, "inner_multiple": 16}
    model = from_mapping(ModelConfig, values | {"vocab_size": 256, "max_position_embeddings": 64}, "test")
    step = TrainingStep(
        model,
        from_mapping(OptimizerConfig, {"lr": {"peak": 1e-2}, "ema_decay": 0.9}, "test"),
        chosen(from_mapping(ExecutionConfig, {"device": "cpu"}, "test"), model),
        sharding=Sharding("ddp", ranks, 1, "as set") if ranks > 1 else None,
        initial=build(model, seed=7).state_dict(),
        lora=from_mapping(LoraConfig, {"rank": 4}, "test"),
    )
    numbers = [step.run(batches, 5, 1e-2) for batches in steps]
    return {"numbers": torch.stack(numbers), **step.state()}


def train_rank(out: str) -> None:
    """One rank, in its own process."""
    warnings.simplefilter("error")
    with joined("cpu", 60) as world:
        state = trained([step[world.rank] for step in shares()], 2)
        save_tensors(Path(out, f"rank_{world.rank}.safetensors"), state)


def test_two_ranks_train_the_adapters_of_one(tmp_path: Path, forked: Ranks) -> None:
    forked.run(2, "tests.train.test_lora_ranks:train_rank", tmp_path, out=str(tmp_path))
    one = trained([whole for _, _, whole in shares()], 1)
    first, second = (load_tensors(tmp_path / f"rank_{rank}.safetensors") for rank in range(2))
    assert first.keys() == second.keys() == one.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(first[name], tensor.detach(), rtol=1e-3, atol=1e-5, msg=name)
        assert torch.equal(first[name], second[name]), name  # the ranks agree to the bit
