from __future__ import annotations

import functools
import subprocess
import sys
from typing import Any, get_args

import pytest
import torch
from torch._dynamo.utils import counters

from hrm_text.contracts import UserError
from hrm_text.model import kernels
from hrm_text.model.config import ModelConfig, preset
from hrm_text.train import execution
from hrm_text.train.config import AttentionBackend, ExecutionConfig, OptimizerConfig
from hrm_text.train.execution import chosen, describe
from hrm_text.train.schedule import LearningRate
from hrm_text.train.step import TrainingStep

MODEL = preset("tiny", vocab_size=256)


@pytest.fixture
def a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with a CUDA GPU that can do everything; nothing is run on it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA H200")
    monkeypatch.setattr(execution, "why_not", lambda backend, device, dtype: None)
    monkeypatch.setattr(execution, "pick_backend", lambda device: "triton")
    monkeypatch.setattr(execution, "why_not_fused", lambda model, device: None)


def choices(config: ExecutionConfig) -> tuple[Any, ...]:
    return config.device, config.dtype, config.blocks, config.attention, config.recompute, config.fp8


def test_every_backend_can_be_named() -> None:
    assert get_args(AttentionBackend) == ("auto", *kernels.BACKENDS)


@pytest.mark.parametrize(
    ("asked", "made"),
    [
        ({}, ("cuda", "bfloat16", "fused", "triton", "some", False)),
        ({"fp8": True}, ("cuda", "bfloat16", "fused", "triton", "some", True)),
        ({"attention": "flex"}, ("cuda", "bfloat16", "compiled", "flex", "none", False)),
        ({"blocks": "compiled"}, ("cuda", "bfloat16", "compiled", "triton", "none", False)),
        ({"blocks": "plain", "recompute": "full"}, ("cuda", "bfloat16", "plain", "triton", "full", False)),
        ({"device": "cpu"}, ("cpu", "float32", "plain", "triton", "none", False)),
        ({"dtype": "float32", "recompute": "none"}, ("cuda", "float32", "fused", "triton", "none", False)),
    ],
)
def test_auto_is_the_fastest_on_a_gpu(a_gpu: None, asked: dict[str, Any], made: tuple[Any, ...]) -> None:
    config = chosen(ExecutionConfig(**asked), MODEL)
    assert choices(config) == made
    assert chosen(config, MODEL) == config


def test_what_cannot_be_fused_is_compiled(a_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execution, "why_not_fused", lambda model, device: "the model has norm: post")
    assert choices(chosen(ExecutionConfig(), MODEL))[2:5] == ("compiled", "triton", "none")
    with pytest.raises(UserError, match="blocks: the blocks cannot be fused here: the model has norm: post"):
        chosen(ExecutionConfig(blocks="fused"), MODEL)
    with pytest.raises(UserError, match="fp8: products in FP8 need fused blocks, and these are compiled"):
        chosen(ExecutionConfig(fp8=True), MODEL)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"blocks": "fused", "attention": "flex"}, "attention: fused blocks need triton, found 'flex'"),
        ({"blocks": "plain", "recompute": "some"}, "recompute: plain blocks know none and full"),
        ({"attention": "flex", "recompute": "some"}, "recompute: compiled blocks know none and full"),
        ({"blocks": "compiled", "fp8": True}, "fp8: products in FP8 need fused blocks"),
    ],
)
def test_what_does_not_go_together_is_an_error(a_gpu: None, asked: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        chosen(ExecutionConfig(**asked), MODEL)


def test_fp8_needs_a_gpu_that_has_it(a_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    with pytest.raises(UserError, match=r"fp8: .*compute capability 8\.9.*leave fp8 at false"):
        chosen(ExecutionConfig(fp8=True), MODEL)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 9))
    assert chosen(ExecutionConfig(fp8=True), MODEL).fp8


@pytest.mark.skipif(torch.cuda.is_available(), reason="of a machine without a GPU")
def test_without_a_gpu_blocks_are_plain_and_kernels_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert choices(chosen(ExecutionConfig(device="cpu"), MODEL)) == (
        "cpu",
        "float32",
        "plain",
        "grouped",
        "none",
        False,
    )
    with pytest.raises(UserError, match="attention: 'flex' is not to be had here.*choose from plain, grouped"):
        chosen(ExecutionConfig(device="cpu", attention="flex"), MODEL)


def test_without_triton_blocks_cannot_be_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "triton", None)
    for name in [name for name in sys.modules if name.startswith("hrm_text.model.kernels.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr("hrm_text.model.kernels.fused", raising=False)
    assert execution.why_not_fused(MODEL, "cuda") == "Triton is not installed"


def test_a_run_says_how_it_computes(a_gpu: None) -> None:
    assert describe(chosen(ExecutionConfig(fp8=True), MODEL)) == (
        "NVIDIA H200 (bfloat16, fused blocks, triton attention, recompute some, products in FP8)"
    )


# ------------------------------------------------------------------------------------------------------ from outside --


def training_step(model: ModelConfig = MODEL, **asked: Any) -> TrainingStep:
    config = chosen(ExecutionConfig(device="cpu", **asked), model)
    return TrainingStep(model, OptimizerConfig(lr=LearningRate(peak=1e-2)), config)


def train(training: TrainingStep, random_step: Any) -> list[list[float]]:
    return [training.run(random_step(seed), k, lr=1e-2).tolist() for seed, k in enumerate((2, 2, 3, 4, 5, 5))]


@pytest.mark.parametrize("architecture", ["hrm", "transformer"])
def test_checkpointed_blocks_keep_less_and_learn_the_same(architecture: str, random_step: Any) -> None:
    model = preset("tiny", architecture=architecture, vocab_size=256)
    k = model.bp_steps
    kept: dict[str, int] = {}
    losses: dict[str, list[float]] = {}
    for recompute in ("none", "full"):
        training = training_step(model, recompute=recompute)
        sizes: list[int] = []

        def keep(x: torch.Tensor, sizes: list[int] = sizes) -> torch.Tensor:
            sizes.append(x.numel())
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            losses[recompute] = [training.run(random_step(seed), k, lr=1e-2)[0].item() for seed in range(3)]
        kept[recompute] = sum(sizes)
    assert losses["full"] == losses["none"]
    assert kept["full"] < 0.6 * kept["none"]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch.compile looks, and hides it from users
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_one_compilation_serves_every_k_and_every_length(
    recompute: str, random_step: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Without generating code, which takes a minute: what compiles anew is decided before.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    training = training_step(blocks="compiled", recompute=recompute)
    found = [training.run(random_step(0), 2, lr=1e-2).tolist()]
    compiled = counters["frames"]["total"]
    assert compiled > 0
    for seed, k in enumerate((2, 3, 4, 5, 5), start=1):
        found.append(training.run(random_step(seed), k, lr=1e-2).tolist())
    with torch.no_grad():
        training.loss(random_step(9).batches[0], None)
    assert counters["frames"]["total"] == compiled
    plain = train(training_step(blocks="plain"), random_step)
    assert [row[1:] for row in found] == [row[1:] for row in plain]
    assert [row[0] for row in found] == pytest.approx([row[0] for row in plain], rel=1e-5)
    torch._dynamo.reset()


def test_importing_what_trains_and_answers_does_not_import_a_compiler() -> None:
    """They take seconds and 130 MiB, and a run on a CPU needs none of them."""
    program = (
        "import sys, hrm_text.train.loop, hrm_text.infer.text_model; "
        "print([name for name in ('torch._dynamo', 'torch._inductor', 'triton') if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    assert run.stdout.strip() == "[]"
