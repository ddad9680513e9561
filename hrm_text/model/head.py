"""The head's loss: fp32 cross-entropy summed over the supervised positions, and nothing divided.

Only the trainer divides, once, by the global number of supervised tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hrm_text.contracts import IGNORE_INDEX


@dataclass(frozen=True)
class Targets:
    """What is asked of one packed batch: S supervised positions of its T.

    Made on the host, which knows the labels: a device that had to find the positions would have to be waited for.
    """

    positions_S: Tensor
    """LongTensor [S]: where in the batch, ascending."""
    labels_S: Tensor
    """LongTensor [S]: the id to be predicted there."""
    owners_S: Tensor
    """LongTensor [S]: the number of the sample that the position belongs to."""
    num_samples: int
    """Samples of the batch, those without a supervised position included."""

    @staticmethod
    def of(labels_T: Tensor, sample_starts: Tensor) -> Targets:
        """From LongTensors on the CPU: labels [T], IGNORE_INDEX where nothing is asked, and starts [samples + 1]."""
        assert labels_T.device.type == sample_starts.device.type == "cpu"
        positions_S = (labels_T != IGNORE_INDEX).nonzero().squeeze(1)
        owners_S = torch.searchsorted(sample_starts, positions_S, right=True) - 1
        num_samples = len(sample_starts) - 1
        assert bool((owners_S < num_samples).all()), "padding is supervised"
        return Targets(positions_S, labels_T[positions_S], owners_S, num_samples)

    def to(self, device: torch.device, non_blocking: bool = False) -> Targets:
        """The same on another device, in one transfer; without waiting for it if ``non_blocking``."""
        rows_3S = torch.stack([self.positions_S, self.labels_S, self.owners_S])
        if non_blocking and device.type == "cuda":
            rows_3S = rows_3S.pin_memory()  # a copy from pageable memory would wait for the device after all
        positions_S, labels_S, owners_S = rows_3S.to(device, non_blocking=non_blocking)
        return Targets(positions_S, labels_S, owners_S, self.num_samples)


@dataclass(frozen=True)
class LossSums:
    """Sums over one packed batch; tensors without dimensions, so that nothing waits for the device."""

    loss: Tensor
    """Cross-entropy in nats, summed over supervised tokens; carries the gradient."""
    tokens: Tensor
    """Supervised tokens."""
    correct_tokens: Tensor
    """Supervised tokens whose most likely id is the label."""
    samples: Tensor
    """Samples with at least one supervised token."""
    exact_samples: Tensor
    """Samples whose supervised tokens are all correct: the whole response is exact under teacher forcing."""

    @staticmethod
    def of(loss: Tensor, correct_S: Tensor, targets: Targets) -> LossSums:
        """From the loss and, for each supervised position, a LongTensor [S]: 1 if its most likely id is the label."""
        asked = correct_S.new_zeros(targets.num_samples).index_add_(0, targets.owners_S, torch.ones_like(correct_S))
        right = torch.zeros_like(asked).index_add_(0, targets.owners_S, correct_S)
        return LossSums(
            loss=loss,
            tokens=torch.full((), len(correct_S), device=correct_S.device),
            correct_tokens=correct_S.sum(),
            samples=(asked > 0).sum(),
            exact_samples=((asked > 0) & (asked == right)).sum(),
        )


def supervised_loss(hidden_TD: Tensor, weight_VD: Tensor, targets: Targets) -> LossSums:
    """Loss and accuracies of T positions against their targets; logits are made at supervised positions only.

    The definition, which makes all S x V logits at once; ``kernels.cross_entropy.chunked_loss`` equals it and does not.
    """
    logits_SV = F.linear(hidden_TD[targets.positions_S], weight_VD).float()
    loss = F.cross_entropy(logits_SV, targets.labels_S, reduction="sum")
    return LossSums.of(loss, (logits_SV.detach().argmax(-1) == targets.labels_S).long(), targets)
