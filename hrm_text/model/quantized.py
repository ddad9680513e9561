"""Weights of 8 bits: a model's blocks with integer matrices and one scale for each of their outputs.

Weight-only: activations stay as they are. Decoding reads every weight for every token, so half the bytes of bf16 are
nearly half the time; a product's relative error is about 1 %.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from hrm_text.contracts import UserError
from hrm_text.model.paged import quantize
from hrm_text.model.recurrence import RecurrentLM

# O outputs, K inputs of a product


class Int8Linear(nn.Module):
    """y = scale * (x W^T) with W in int8."""

    weight: Tensor
    """int8 [O, K]"""
    scale: Tensor
    """fp32 [O]: what the integers of a row are multiplied with."""

    def __init__(self, weight_OK: Tensor, scale_O: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight_OK)
        self.register_buffer("scale", scale_O)

    @classmethod
    def of(cls, linear: nn.Linear) -> Int8Linear:
        """A layer's weights, rounded: the largest of each row becomes 127, halves go to the even."""
        return cls(*quantize(linear.weight.detach()))

    def forward(self, x: Tensor) -> Tensor:
        # Integers up to 127 are exact in bf16; the scale is applied in fp32, to the output.
        return (F.linear(x, self.weight.to(x.dtype)) * self.scale).to(x.dtype)


def quantize_weights(model: RecurrentLM) -> None:
    """Replace every matrix of the blocks by an int8 one, in place and one after the other, wherever they lie.

    The head and the embedding stay: they are read once in a step, and their errors are the logits' own. The gradients
    are lost, so this is for inference. Raises UserError for a model that has int8 weights already.
    """
    stacks = [model.model.stack(name) for name in model.config.stacks]
    if any(isinstance(module, Int8Linear) for stack in stacks for module in stack.modules()):
        raise UserError("the model's weights are in int8 already; quantise a model as it was loaded, once")
    for stack in stacks:
        for parent in list(stack.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(parent, name, Int8Linear.of(child))
