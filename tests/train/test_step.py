"""A step is that of the whole global batch, and makes nobody wait, compile or pad."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hrm_text.contracts import PackedBatch
from hrm_text.data.loader import LoaderStep
from hrm_text.model.config import preset
from hrm_text.model.kernels import why_not
from hrm_text.train.config import ExecutionConfig, OptimizerConfig, TrainConfig
from hrm_text.train.execution import chosen
from hrm_text.train.loop import Trainer
from hrm_text.train.schedule import LearningRate
from hrm_text.train.step import Totals, TrainingStep

MakeConfig = Callable[..., TrainConfig]
State = dict[str, Tensor]


def first_step(trainer: Trainer) -> LoaderStep:
    step, _ = next(iter(trainer.loader))
    return step


def laid_end_to_end(batches: list[PackedBatch]) -> PackedBatch:
    """Several packed batches as one, samples in the same order."""
    tokens = np.cumsum([0, *(batch.num_tokens for batch in batches)])
    starts = [batch.sample_starts[:-1] + offset for batch, offset in zip(batches, tokens, strict=False)]
    return PackedBatch(
        input_ids=np.concatenate([batch.input_ids for batch in batches]),
        labels=np.concatenate([batch.labels for batch in batches]),
        position_ids=np.concatenate([batch.position_ids for batch in batches]),
        sample_starts=np.concatenate([*starts, tokens[-1:]]),
        prefix_lengths=np.concatenate([batch.prefix_lengths for batch in batches]),
    )


def gradients_of(trainer: Trainer, batch: LoaderStep, monkeypatch: pytest.MonkeyPatch) -> tuple[State, Totals]:
    """What a step hands to its optimizer, which takes no step."""
    taken: list[State] = []
    with monkeypatch.context() as patch:
        patch.setattr(trainer.optimizer, "step", lambda gradients, finite: taken.append({**gradients}))
        *sums, finite = trainer.training.run(batch, k=5, lr=1e-3).tolist()
    assert finite == 1
    return {name: gradient.clone() for name, gradient in taken[0].items()}, Totals.of(sums)


EXACT = {"dtype": "float32", "blocks": "plain", "attention": "grouped"}
"""The same on every device: fused blocks add to ``grad`` themselves, and bf16 rounds."""


def test_accumulated_micro_batches_are_the_large_batch(config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(config({"data.micro_batches": 4, "data.tokens_per_batch": 64, **EXACT}))
    step = first_step(trainer)
    assert len(step.batches) == 4
    added, added_totals = gradients_of(trainer, step, monkeypatch)
    whole = dataclasses.replace(step, batches=[laid_end_to_end(step.batches)])
    large, large_totals = gradients_of(trainer, whole, monkeypatch)
    assert dataclasses.replace(added_totals, loss=0) == dataclasses.replace(large_totals, loss=0)
    assert added_totals.loss == pytest.approx(large_totals.loss, rel=1e-6)
    assert added.keys() == large.keys() == dict(trainer.model.named_parameters()).keys()
    for name, gradient in large.items():
        assert torch.allclose(added[name], gradient, rtol=1e-5, atol=1e-6 * float(gradient.abs().max())), name


def test_the_gradient_is_that_of_the_mean_over_all_supervised_tokens(
    config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(config(EXACT))
    step = first_step(trainer)
    found, totals = gradients_of(trainer, step, monkeypatch)
    assert totals.tokens == step.supervised == sum(batch.num_supervised for batch in step.batches)
    assert totals.samples == step.samples
    mean = torch.stack([trainer.training.loss(batch, 5).loss for batch in step.batches]).sum() / step.supervised
    expected = torch.autograd.grad(mean, list(trainer.optimizer.parameters.values()))
    for name, gradient in zip(trainer.optimizer.parameters, expected, strict=True):
        assert torch.allclose(found[name], gradient, rtol=1e-5, atol=1e-6 * float(gradient.abs().max())), name


def test_overrides_of_the_settings_reach_their_parameters(config: MakeConfig) -> None:
    frozen = {"match": "lm_head.*", "lr_scale": 0.0}
    trainer = Trainer(config({"max_steps": 2, "optimizer.overrides": [frozen], **EXACT}))
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    trainer.run()
    changed = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == before.keys() - {"lm_head.weight"}


# ------------------------------------------------------------------------------------------- what a step never does --

MODEL = preset("mini", vocab_size=256)


def training_step(**execution: Any) -> TrainingStep:
    config = chosen(ExecutionConfig(**execution), MODEL)
    return TrainingStep(MODEL, OptimizerConfig(lr=LearningRate(peak=1e-3)), config)


@contextlib.contextmanager
def rows_seen(training: TrainingStep) -> Iterator[list[int]]:
    """The rows of every batch that the model is given."""
    seen: list[int] = []
    handle = training.model.model.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    yield seen
    handle.remove()


@pytest.mark.parametrize("attention", ["plain", "grouped"])
def test_nothing_is_padded(config: MakeConfig, attention: str) -> None:
    trainer = Trainer(config({"max_steps": 3, "blocks": "plain", "attention": attention, "validation.sampled": None}))
    assert not trainer.loader.pad
    with rows_seen(trainer.training) as seen:
        trainer.run()
    expected = [batch.num_tokens for step in range(3) for batch in trainer.loader.load(0, step).batches]
    assert seen == expected
    assert len(set(seen)) > 1


def test_a_step_returns_one_small_tensor(random_step: Callable[..., LoaderStep]) -> None:
    training = training_step(device="cpu")
    step = random_step(1)
    sums = training.run(step, k=5, lr=1e-3)
    assert (sums.shape, sums.dtype, sums.requires_grad) == ((6,), torch.float64, False)
    loss, tokens, correct, samples, exact, finite = sums.tolist()
    assert (tokens, samples, finite) == (step.supervised, step.samples, 1)
    assert loss > 0 and 0 <= correct <= tokens and 0 <= exact <= samples


@contextlib.contextmanager
def compilations() -> Iterator[list[str]]:
    """The names of what torch.compile and Triton compile meanwhile."""
    import triton
    from torch._dynamo.utils import counters

    compiled: list[str] = []
    frames = counters["frames"]["total"]
    before = triton.knobs.runtime.jit_post_compile_hook
    triton.knobs.runtime.jit_post_compile_hook = lambda **told: compiled.append(told["fn"].name)
    try:
        yield compiled
    finally:
        triton.knobs.runtime.jit_post_compile_hook = before
        compiled += ["a frame of Python"] * (counters["frames"]["total"] - frames)


@contextlib.contextmanager
def no_waiting() -> Iterator[None]:
    """Whatever makes the host wait for the GPU is an error."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="waiting and compiling are looked for on a GPU")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch.compile looks, and hides it from users
@pytest.mark.parametrize(
    "execution",
    [
        {"blocks": "fused", "recompute": "none"},
        {"blocks": "fused", "recompute": "some"},
        {"blocks": "fused", "recompute": "full"},
        {"blocks": "fused", "fp8": True},
        {"blocks": "compiled", "attention": "triton"},
        {"blocks": "compiled", "attention": "varlen"},
        {"blocks": "compiled", "attention": "flex"},
        {"blocks": "compiled", "attention": "grouped", "recompute": "full"},
    ],
    ids=lambda execution: "-".join(map(str, execution.values())),
)
def test_a_real_run_neither_waits_nor_compiles_again_nor_pads(
    execution: dict[str, Any], random_step: Callable[..., LoaderStep]
) -> None:
    device = torch.device("cuda")
    if lack := why_not(execution.get("attention", "triton"), device, torch.bfloat16):
        pytest.skip(lack)
    if execution.get("fp8") and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("FP8 needs compute capability 8.9")
    training = training_step(device="cuda", **execution)
    flex = training.execution.attention == "flex"
    pad_to = 60 * 30 if flex else 0
    for k in range(2, 6):  # the first pass over every K
        training.run(random_step(k, pad_to), k, lr=1e-3)
    steps = [random_step(seed, pad_to) for seed in range(6, 26)]
    torch.cuda.synchronize()
    sums: list[Tensor] = []
    with compilations() as compiled, rows_seen(training) as seen, no_waiting():
        for index, step in enumerate(steps):
            sums.append(training.run(step, 2 + index % 4, lr=1e-3))
    assert compiled == []
    assert seen == [pad_to if flex else step.tokens for step in steps]
    assert all(finite == 1 for *_, finite in torch.stack(sums).tolist())
