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


def supervised_loss(
    hidden_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, sample_ids_T: Tensor, num_samples: int
) -> LossSums:
    """Loss and accuracies of T positions against their labels; logits are made at supervised positions only.

    labels_T: LongTensor, IGNORE_INDEX where nothing is supervised. sample_ids_T: LongTensor, the sample of each
    position; padding may carry any id below ``num_samples``.
    """
    supervised = (labels_T != IGNORE_INDEX).nonzero().squeeze(1)
    labels_S = labels_T[supervised]
    logits_SV = F.linear(hidden_TD[supervised], weight_VD).float()
    loss = F.cross_entropy(logits_SV, labels_S, reduction="sum")
    with torch.no_grad():
        correct_S = (logits_SV.argmax(-1) == labels_S).long()
        owners_S = sample_ids_T[supervised]
        asked = torch.zeros(num_samples, dtype=torch.long, device=labels_T.device).index_add_(
            0, owners_S, torch.ones_like(correct_S)
        )
        right = torch.zeros_like(asked).index_add_(0, owners_S, correct_S)
        return LossSums(
            loss=loss,
            tokens=torch.tensor(len(labels_S), device=labels_T.device),
            correct_tokens=correct_S.sum(),
            samples=(asked > 0).sum(),
            exact_samples=((asked > 0) & (asked == right)).sum(),
        )
