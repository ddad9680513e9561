"""A fused model equals the plain one, forward and backward: on a GPU, or in Triton's interpreter."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from hrm_text.contracts import UserError
from hrm_text.model.attention import Attention, PlainAttention, Spans
from hrm_text.model.block import Block, Stack, rotary_table
from hrm_text.model.config import ModelConfig
from hrm_text.model.recurrence import RecurrentLM, build

pytest.importorskip("triton", reason="the kernels are written in Triton, which is not installed")

from hrm_text.model.kernels.fused import Recompute, fuse, why_not_fused
from hrm_text.model.kernels.triton_attention import TritonAttention

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# The interpreter cuts bf16 off where a GPU rounds.
DTYPES = [torch.float32, *([torch.bfloat16] if DEVICE.type == "cuda" else [])]
RECOMPUTE: list[Recompute] = ["none", "some", "full"]

SPANS = Spans.of_samples(torch.tensor([7, 5]), torch.tensor([3, 0]))
PADDING = 2
TOKENS = int(SPANS.starts[-1]) + PADDING

Outcome = tuple[Tensor, dict[str, Tensor | None]]
"""Logits, and every parameter's gradient; in fp32."""

each_recompute = pytest.mark.parametrize("recompute", RECOMPUTE)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def config(architecture: Any = "transformer", num_layers: int = 1, **others: Any) -> ModelConfig:
    return ModelConfig(
        architecture=architecture,
        vocab_size=32,
        max_position_embeddings=64,
        hidden_size=24,
        num_layers=num_layers,
        num_heads=2,
        head_dim=16,
        inner_multiple=8,
        **others,
    )


def models(config: ModelConfig, dtype: torch.dtype = torch.float32, **how: Any) -> tuple[RecurrentLM, RecurrentLM]:
    """(plain, fused) of the same weights."""
    plain = build(config, seed=1, device=DEVICE.type, dtype=dtype)
    fused = copy.deepcopy(plain)
    fuse(fused, **how)
    return plain, fused


def batch(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, positions, and the gradient of the logits, of padding too: it must change nothing but itself."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(32, (TOKENS,), generator=generator)
    positions = torch.cat([torch.arange(int(length)) for length in [*SPANS.lengths, PADDING]])
    return ids.to(DEVICE), positions.to(DEVICE), torch.randn(TOKENS, 32, generator=generator).to(DEVICE)


def outcome(model: RecurrentLM, attention: Attention, seeds: tuple[int, ...] = (0,)) -> Outcome:
    """The logits of the last batch, and the gradients added up over all."""
    model.zero_grad()
    for seed in seeds:
        ids, positions, wanted = batch(seed)
        logits = model.lm_head(model(ids, positions, attention))
        logits.backward(wanted.to(logits.dtype))
    gradients = {name: p.grad if p.grad is None else p.grad.float() for name, p in model.named_parameters()}
    return logits.detach().float(), gradients


def plain_attention() -> PlainAttention:
    return PlainAttention(SPANS, TOKENS, DEVICE)


def triton_attention() -> TritonAttention:
    return TritonAttention(SPANS, TOKENS, DEVICE)


def error(x: Tensor, exact: Tensor) -> float:
    return float((x.double() - exact.double()).norm() / exact.double().norm())


def check(config: ModelConfig, dtype: torch.dtype, seeds: tuple[int, ...] = (0,), **how: Any) -> None:
    """In fp32 the two are equal but for rounding; in bf16 the fused model is as near to fp32 as the plain one."""
    plain, fused = models(config, dtype, **how)
    exact_logits, exact = outcome(copy.deepcopy(plain).float(), plain_attention(), seeds)
    plain_logits, gradients = outcome(plain, plain_attention(), seeds)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Block, "forward", None)  # it is not by falling back that the two are equal
        patch.setattr(Stack, "forward", None)
        logits, found = outcome(fused, triton_attention(), seeds)
    allowed = 5e-6 if dtype == torch.float32 else 5e-3
    assert error(logits, exact_logits) <= 2 * error(plain_logits, exact_logits) + allowed
    for name, exact_gradient in exact.items():
        gradient, ours = gradients[name], found[name]
        assert gradient is not None and ours is not None and exact_gradient is not None and exact_gradient.any(), name
        assert error(ours, exact_gradient) <= 2 * error(gradient, exact_gradient) + allowed, name


@each_dtype
@each_recompute
def test_whatever_is_recomputed_the_model_is_the_plain_one(recompute: Recompute, dtype: torch.dtype) -> None:
    """Three layers: of these, "some" computes the gate-up product of the third again."""
    check(config(num_layers=3), dtype, recompute=recompute)


@each_dtype
@pytest.mark.parametrize(
    "model",
    [
        # Both stacks are called twice, the fast one once without gradient.
        config("hrm", num_layers=2, H_cycles=2, L_cycles=1, bp_steps=3),
        config("rins", num_layers=2, cycles=2, bp_steps=3),
        config("rins", num_layers=2, cycles=1, bp_steps=2, norm="pre"),
        config("transformer", num_layers=2, norm="pre"),
    ],
    ids=lambda model: f"{model.architecture}-{model.norm}",
)
def test_architectures_and_norms(model: ModelConfig, dtype: torch.dtype) -> None:
    check(model, dtype)


@each_dtype
def test_gradients_add_up_over_two_backward_passes(dtype: torch.dtype) -> None:
    check(config(), dtype, seeds=(0, 1))


def test_a_change_of_one_sample_leaves_the_others_alone() -> None:
    _, fused = models(config(num_layers=2))
    ids, positions, _ = batch()
    changed = ids.clone()
    changed[7] = (ids[7] + 1) % 32  # the first token of the second
    with torch.no_grad():
        before, after = (fused(i, positions, triton_attention()) for i in (ids, changed))
    assert torch.equal(before[:7], after[:7])
    assert (before[7:12] != after[7:12]).any(1).all()


@each_recompute
def test_without_gradients_the_forward_pass_is_the_same(recompute: Recompute) -> None:
    _, fused = models(config(num_layers=2), recompute=recompute)
    ids, positions, _ = batch()
    with torch.no_grad():
        alone = fused(ids, positions, triton_attention())
    assert torch.equal(alone, fused(ids, positions, triton_attention()))


def kept_bytes(model: RecurrentLM) -> int:
    """Bytes of what autograd holds between the passes, each storage once."""
    storages: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    ids, positions, _ = batch()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        hidden = model(ids, positions, triton_attention())
    assert hidden.requires_grad
    return sum(storages.values())


def test_the_more_is_recomputed_the_less_is_kept() -> None:
    model = config(num_layers=3)
    none, some, full = (kept_bytes(models(model, recompute=each)[1]) for each in RECOMPUTE)
    bytes_of_h = 4 * TOKENS * model.intermediate_size
    # The SwiGLU's output in every layer, and the two halves that it is made of in one of them.
    assert none - some == 3 * bytes_of_h + 2 * bytes_of_h
    assert some > 2 * full


def test_the_blocks_input_stays_as_it_is_and_gets_the_gradient_alone() -> None:
    """Where the weights want none they get none, and the other way round."""
    plain, fused = models(config())
    x = torch.randn(TOKENS, 24, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    rotary = rotary_table(batch()[1], 16, 10_000.0)
    expected, found = x.clone().requires_grad_(), x.clone().requires_grad_()
    for model, leaf, attention in ((plain, expected, plain_attention()), (fused, found, triton_attention())):
        model.requires_grad_(False)
        block = model.model.stack("S").layers[0]
        block(leaf, rotary, attention, 0).square().sum().backward()
        assert all(p.grad is None for p in model.parameters())
    assert torch.equal(found, x)
    assert found.grad is not None and expected.grad is not None
    assert error(found.grad, expected.grad) < 1e-5

    fused.requires_grad_(True)
    block(x, rotary, triton_attention(), 0).square().sum().backward()
    assert x.grad is None and all(p.grad is not None for p in block.parameters())


class Recorded:
    """Some other attention object, such as a key-value cache."""

    def __init__(self) -> None:
        self.slots: list[int] = []
        self.attend = plain_attention()

    def __call__(self, q_TNH: Tensor, k_TNH: Tensor, v_TNH: Tensor, slot: int) -> Tensor:
        self.slots.append(slot)
        return self.attend(q_TNH, k_TNH, v_TNH, slot)


def test_any_other_attention_gets_the_plain_blocks() -> None:
    plain, fused = models(config("hrm", num_layers=2, H_cycles=1, L_cycles=2, bp_steps=2))
    (logits, gradients), other = outcome(plain, plain_attention()), Recorded()
    found, found_gradients = outcome(fused, other)
    assert other.slots == [0, 1, 2]
    assert torch.equal(found, logits)
    assert gradients.keys() == found_gradients.keys()
    for name, gradient in gradients.items():
        ours = found_gradients[name]
        assert gradient is ours is None or (gradient is not None and ours is not None and torch.equal(gradient, ours))


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (config(norm="post"), "the model has norm: post"),
        (ModelConfig(vocab_size=32, hidden_size=24, num_layers=2, num_heads=2, head_dim=24), "power of 2 .*and is 24"),
        (ModelConfig(vocab_size=32, hidden_size=24, num_layers=2, num_heads=2, head_dim=8), "power of 2 .*and is 8"),
    ],
)
def test_what_cannot_be_fused_is_refused_and_left_as_it_was(model: ModelConfig, reason: str) -> None:
    lm = build(ModelConfig(**{**vars(model), "max_position_embeddings": 64}), device=DEVICE.type)
    with pytest.raises(UserError, match=f"blocks cannot be fused: .*{reason}.*; choose blocks compiled or plain"):
        fuse(lm)
    assert not any("forward" in vars(module) for module in lm.modules())
    assert why_not_fused(config(), DEVICE) is None
    assert "needs a GPU" in str(why_not_fused(config(), torch.device("mps")))


def test_fp8_is_refused_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = build(config(), device=DEVICE.type)
    if DEVICE.type == "cuda":
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    with pytest.raises(UserError, match="FP8 products need (an NVIDIA GPU|compute capability 8.9)"):
        fuse(lm, fp8=True)
    assert not any("forward" in vars(module) for module in lm.modules())
