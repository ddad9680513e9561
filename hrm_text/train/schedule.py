"""What changes over a run as a function of the step alone: the learning rate and K."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field

from hrm_text.settings import settings


@settings
class LearningRate:
    """Linear warm-up, then constant (averaging of the weights takes the place of a decay) or cosine to a floor."""

    peak: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    """Learning rate after the warm-up; 2.2e-4 for XL, 2.5e-4 for L, 3e-5 for fine-tuning."""
    warmup_steps: Annotated[int, Field(ge=0)] = 2000
    """Steps from 0 to the peak; a run that is shorter never gets there."""
    decay: Literal["constant", "cosine"] = "constant"
    """What follows the warm-up."""
    floor: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Learning rate of the last step of a cosine, as a fraction of the peak."""

    def at(self, step: int, total_steps: int) -> float:
        """Learning rate of step 0 to total_steps - 1. The warm-up's last step and the one after it are at the peak."""
        _check_step(step, total_steps)
        if step < self.warmup_steps:
            return self.peak * (step + 1) / self.warmup_steps
        if self.decay == "constant":
            return self.peak
        progress = min(1.0, (step - self.warmup_steps) / max(1, total_steps - 1 - self.warmup_steps))
        return self.peak * (self.floor + (1 - self.floor) * (1 + math.cos(math.pi * progress)) / 2)


@settings
class CreditAssignment:
    """How many module calls carry gradient: K grows from k_min to the model's k_max early in the run."""

    k_min: Annotated[int, Field(ge=1)] = 2
    """K of the first step; a model whose k_max is smaller uses its k_max."""
    warmup_ratio: Annotated[float, Field(ge=0, le=1)] = 0.2
    """Fraction of all steps after which K is k_max; 0, as in fine-tuning, is k_max from the first step."""

    def at(self, step: int, total_steps: int, k_max: int) -> int:
        """K of step 0 to total_steps - 1 (arXiv 2605.20613, warm-up of the truncated backpropagation)::

            K = k_min + floor(min(1, step / (warmup_ratio * total_steps)) * (k_max - k_min))

        Raises ValueError when a number is out of range.
        """
        _check_step(step, total_steps)
        if k_max < 1:
            raise ValueError(f"expected k_max >= 1, found {k_max}")
        if self.warmup_ratio == 0 or k_max <= self.k_min:
            return k_max
        progress = min(1.0, step / (self.warmup_ratio * total_steps))
        return self.k_min + math.floor(progress * (k_max - self.k_min))


def _check_step(step: int, total_steps: int) -> None:
    if step < 0 or total_steps < 1:
        raise ValueError(f"expected step >= 0 and total_steps >= 1, found step {step} of {total_steps}")
