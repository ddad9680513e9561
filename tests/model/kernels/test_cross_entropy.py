from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hrm_text.contracts import IGNORE_INDEX
from hrm_text.model.head import LossSums, Targets, supervised_loss
from hrm_text.model.kernels import cross_entropy
from hrm_text.model.kernels.cross_entropy import chunked_loss

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
Rows = Callable[[Tensor, Tensor, bool], tuple[Tensor, Tensor]]


@pytest.fixture(params=["plain", "triton"])
def rows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Rows:
    """Each of the two row functions, in use by ``chunked_loss``."""
    chosen: Rows = cross_entropy.loss_rows
    if request.param == "triton":
        pytest.importorskip("triton")
        from hrm_text.model.kernels import triton_cross_entropy

        chosen = triton_cross_entropy.loss_rows
    monkeypatch.setattr(cross_entropy, "_rows_on", lambda _: chosen)
    return chosen


def batch(
    tokens: int = 43, width: int = 8, vocabulary: int = 768, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Tensor, Tensor, Targets]:
    """Hidden states, weight, and targets at about half of the positions of five samples; the last is not supervised."""
    generator = torch.Generator().manual_seed(seed)
    hidden = (2 * torch.randn(tokens, width, generator=generator)).to(dtype)
    weight = torch.randn(vocabulary, width, generator=generator).to(dtype)
    # Every other label is what the model would say, or no token would be right.
    labels = (hidden.float() @ weight.float().T).argmax(-1)
    wrong = torch.rand(tokens, generator=generator) < 0.3
    labels[wrong] = torch.randint(vocabulary, (tokens,), generator=generator)[wrong]
    labels[torch.rand(tokens, generator=generator) < 0.5] = IGNORE_INDEX
    starts = torch.tensor([0, 3, 4, tokens // 2, tokens - 6, tokens - 2])
    labels[starts[-2] :] = IGNORE_INDEX
    return hidden.to(DEVICE), weight.to(DEVICE), Targets.of(labels, starts).to(DEVICE)


def gradients_of(
    loss: Callable[[Tensor, Tensor, Targets], LossSums], hidden: Tensor, weight: Tensor, targets: Targets
) -> tuple[LossSums, Tensor, Tensor]:
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    sums = loss(hidden, weight, targets)
    (sums.loss / 7).backward()
    assert hidden.grad is not None and weight.grad is not None
    return sums, hidden.grad, weight.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocabulary", [256, 768, 8192 + 256])  # a block, not a power of two, more than a block
def test_rows_are_those_of_float64(rows: Rows, vocabulary: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = (5 * torch.randn(6, vocabulary, generator=generator)).to(dtype).to(DEVICE)
    labels = torch.randint(vocabulary, (6,), generator=generator).to(DEVICE)
    labels[:2] = logits[:2].argmax(-1)
    labels[2] = vocabulary - 1
    logits[3] += 1000  # a softmax that does not subtract the largest logit would overflow
    exact = logits.double().requires_grad_()
    exact_losses = torch.nn.functional.cross_entropy(exact, labels, reduction="none")
    exact_losses.sum().backward()
    expected_correct = (logits.argmax(-1) == labels).long()

    losses, correct = rows(logits.clone(), labels, False)
    gradient = logits.clone()
    again, _ = rows(gradient, labels, True)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses.double(), exact_losses.detach(), rtol=1e-6, atol=1e-5)
    assert torch.equal(losses, again)
    assert torch.equal(correct, expected_correct) and correct.sum() >= 2
    assert exact.grad is not None
    # bf16: half a unit in the last place is 2^-8; Triton's interpreter cuts off where a GPU rounds, a whole one
    rtol, atol = (1e-5, 1e-7) if dtype == torch.float32 else (2**-7, 1e-7)
    torch.testing.assert_close(gradient.double(), exact.grad, rtol=rtol, atol=atol)


def test_of_equal_logits_the_first_is_chosen(rows: Rows) -> None:
    """As ``argmax`` does, also when the equal ones lie in different blocks."""
    logits = torch.zeros(4, 8192 + 512, device=DEVICE)
    logits[2:, [300, 8500]] = 1.0
    _, correct = rows(logits, torch.tensor([0, 1, 300, 8500], device=DEVICE), False)
    assert correct.tolist() == [1, 0, 1, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk", [1, 5, 16, 2048])
def test_chunks_equal_the_definition(rows: Rows, chunk: int, dtype: torch.dtype) -> None:
    hidden, weight, targets = batch(dtype=dtype)
    assert len(targets.labels_S) > 16 and len(targets.labels_S) % 5 and len(targets.labels_S) % 16
    ours = gradients_of(lambda h, w, t: chunked_loss(h, w, t, chunk), hidden, weight, targets)
    definition = gradients_of(supervised_loss, hidden, weight, targets)
    for field in dataclasses.fields(LossSums):
        mine, theirs = (getattr(sums, field.name) for sums in (ours[0], definition[0]))
        assert mine.dtype == theirs.dtype and mine.shape == theirs.shape == ()
        torch.testing.assert_close(mine, theirs)
    assert 0 < int(ours[0].exact_samples) < int(ours[0].samples) < targets.num_samples
    for mine, theirs in zip(ours[1:], definition[1:], strict=True):
        assert mine.dtype == dtype
        # bf16: both round the gradient of the logits, a chunk's product and the result; about 3 roundings of 2^-9
        rtol, atol = (1e-5, 1e-6) if dtype == torch.float32 else (2**-7, 2**-7 * float(theirs.abs().max()))
        torch.testing.assert_close(mine, theirs, rtol=rtol, atol=atol)


def test_unsupervised_positions_have_no_part(rows: Rows) -> None:
    hidden, weight, targets = batch()
    _, d_hidden, _ = gradients_of(chunked_loss, hidden, weight, targets)
    asked = torch.zeros(len(hidden), dtype=torch.bool, device=DEVICE)
    asked[targets.positions_S] = True
    assert not d_hidden[~asked].any() and bool(d_hidden[asked].any(-1).all())
    disturbed = torch.where(asked[:, None], hidden, 1e6)
    assert torch.equal(chunked_loss(disturbed, weight, targets).loss, chunked_loss(hidden, weight, targets).loss)


def test_a_batch_without_supervised_tokens_costs_nothing(rows: Rows) -> None:
    hidden, weight, _ = batch()
    targets = Targets.of(torch.full((len(hidden),), IGNORE_INDEX), torch.tensor([0, len(hidden)])).to(DEVICE)
    sums, d_hidden, d_weight = gradients_of(chunked_loss, hidden, weight, targets)
    assert [float(getattr(sums, field.name).detach()) for field in dataclasses.fields(LossSums)] == [0, 0, 0, 0, 0]
    assert not d_hidden.any() and not d_weight.any()


def test_without_a_gradient_there_is_no_work_for_one(rows: Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []

    def recording(logits: Tensor, labels: Tensor, gradient: bool) -> tuple[Tensor, Tensor]:
        asked.append(gradient)
        return rows(logits, labels, gradient)

    monkeypatch.setattr(cross_entropy, "_rows_on", lambda _: recording)
    hidden, weight, targets = batch()
    expected = supervised_loss(hidden, weight, targets).loss
    torch.testing.assert_close(chunked_loss(hidden, weight, targets).loss, expected)
    with torch.no_grad():
        torch.testing.assert_close(chunked_loss(hidden.requires_grad_(), weight, targets).loss, expected)
    assert asked == [False, False]
    chunked_loss(hidden, weight, targets)
    assert asked == [False, False, True]


@pytest.mark.parametrize("which", [0, 1])
def test_one_gradient_can_be_asked_for_alone(which: int) -> None:
    hidden, weight, targets = batch()
    expected = gradients_of(supervised_loss, hidden, weight, targets)[1 + which]
    (hidden, weight)[which].requires_grad_()
    (chunked_loss(hidden, weight, targets, 5).loss / 7).backward()
    torch.testing.assert_close((hidden, weight)[which].grad, expected)
    assert (weight, hidden)[which].grad is None


def test_the_gradient_can_be_asked_for_twice_but_not_differentiated() -> None:
    hidden, weight, targets = batch()
    hidden.requires_grad_()
    weight.requires_grad_()
    loss = chunked_loss(hidden, weight, targets).loss
    once = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    twice = torch.autograd.grad(loss * 2, (hidden, weight), retain_graph=True)
    for first, second in zip(once, twice, strict=True):
        torch.testing.assert_close(2 * first, second)
    (d_hidden,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        d_hidden.sum().backward()


def test_the_weights_gradient_is_added_up_in_fp32() -> None:
    """Over 450 chunks of one position a running sum in bf16 goes astray."""
    hidden, weight, targets = batch(tokens=900, width=4, vocabulary=256, dtype=torch.bfloat16)
    *_, whole = gradients_of(chunked_loss, hidden, weight, targets)
    *_, ours = gradients_of(lambda h, w, t: chunked_loss(h, w, t, 1), hidden, weight, targets)
    in_bf16 = torch.zeros_like(weight)
    for s in range(len(targets.labels_S)):
        one = {name: getattr(targets, name)[s : s + 1] for name in ("positions_S", "labels_S", "owners_S")}
        in_bf16 += gradients_of(supervised_loss, hidden, weight, dataclasses.replace(targets, **one))[2]
    assert 2 * float((ours - whole).norm()) < float((in_bf16 - whole).norm())


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation gave."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return result


def test_no_more_than_a_chunk_of_logits_exists_at_once() -> None:
    hidden, weight, targets = batch(tokens=200, width=4, vocabulary=256)
    for loss, positions in (
        (lambda h, w, t: chunked_loss(h, w, t, 16), 16),
        (supervised_loss, len(targets.labels_S)),
    ):
        with Largest() as largest:
            gradients_of(loss, hidden, weight, targets)
        assert largest.elements == positions * 256
