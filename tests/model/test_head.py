from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from hrm_text.contracts import IGNORE_INDEX
from hrm_text.model.head import Targets, supervised_loss


def one_sample(labels_T: torch.Tensor) -> Targets:
    return Targets.of(labels_T, torch.tensor([0, len(labels_T)]))


def test_targets_name_the_position_the_label_and_the_sample() -> None:
    labels = torch.tensor([IGNORE_INDEX, 7, 8, IGNORE_INDEX, IGNORE_INDEX, 5, IGNORE_INDEX])
    targets = Targets.of(labels, torch.tensor([0, 2, 3, 5, 6]))  # the last token is padding
    assert targets.positions_S.tolist() == [1, 2, 5]
    assert targets.labels_S.tolist() == [7, 8, 5]
    assert targets.owners_S.tolist() == [0, 1, 3]  # sample 2 has nothing supervised
    assert targets.num_samples == 4
    moved = targets.to(torch.device("meta"))
    assert {x.device.type for x in (moved.positions_S, moved.labels_S, moved.owners_S)} == {"meta"}
    same = targets.to(torch.device("cpu"), non_blocking=True)
    for name in ("positions_S", "labels_S", "owners_S"):
        assert torch.equal(getattr(same, name), getattr(targets, name))
    assert same.num_samples == 4


def test_supervised_padding_is_refused() -> None:
    with pytest.raises(AssertionError, match="padding"):
        Targets.of(torch.tensor([1, 2, 3]), torch.tensor([0, 2]))


def test_the_loss_is_the_sum_of_cross_entropies_and_so_is_its_gradient() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(9, 4, generator=generator), torch.randn(7, 4, generator=generator)
    labels = torch.tensor([IGNORE_INDEX, 3, 0, 6, IGNORE_INDEX, 2, 2, 1, IGNORE_INDEX])
    gradients = []
    for ours in (True, False):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        if ours:
            loss = supervised_loss(h, w, one_sample(labels)).loss
        else:
            loss = F.cross_entropy(h @ w.T, labels, ignore_index=IGNORE_INDEX, reduction="sum")
        loss.backward()
        gradients.append((loss.detach(), h.grad, w.grad))
    torch.testing.assert_close(gradients[0], gradients[1])


def test_accuracies_count_tokens_and_whole_responses() -> None:
    """Identity head: the most likely id of a position is where its hidden state is largest."""
    said = torch.tensor([0, 1, 2, 3, 1, 1, 2, 0, 3])
    labels = torch.tensor([IGNORE_INDEX, 1, 2, 3, IGNORE_INDEX, 0, 2, IGNORE_INDEX, IGNORE_INDEX])
    # 0: both right; 1: right; 2: one of two; 3: nothing supervised; then padding
    targets = Targets.of(labels, torch.tensor([0, 3, 4, 7, 8]))
    sums = supervised_loss(F.one_hot(said, 4).float(), torch.eye(4), targets)
    assert int(sums.tokens) == 5
    assert int(sums.correct_tokens) == 4
    assert int(sums.samples) == 3
    assert int(sums.exact_samples) == 2


def test_a_batch_without_supervised_tokens_costs_nothing() -> None:
    hidden = torch.randn(3, 4, requires_grad=True)
    sums = supervised_loss(hidden, torch.randn(5, 4), one_sample(torch.full((3,), IGNORE_INDEX)))
    sums.loss.backward()
    assert float(sums.loss.detach()) == 0
    assert hidden.grad is not None and not hidden.grad.any()
    assert [int(x) for x in (sums.tokens, sums.correct_tokens, sums.samples, sums.exact_samples)] == [0, 0, 0, 0]


def test_low_precision_states_give_a_loss_in_fp32() -> None:
    hidden, weight = torch.randn(3, 4).bfloat16(), torch.randn(5, 4).bfloat16()
    assert supervised_loss(hidden, weight, one_sample(torch.tensor([0, 1, 2]))).loss.dtype == torch.float32
