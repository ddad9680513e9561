"""Training adapters of low rank: the optimizer owns A and B, the model's matrices hold W + s B A.

Blocks do not know of it. They compute with W_eff and leave its gradient in ``grad``, as always, be it autograd's or
that of a kernel of our own; the gradients of the adapter follow from it::

    dA = s B^T dW               dB = s dW A^T

B is 0 at first, so that a run begins as its base model, to the bit.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from hrm_text.model.config import ModelConfig
from hrm_text.model.lora import A, B, LoraConfig, adapted, merged_weight, scale
from hrm_text.model.recurrence import truncated_normal


class Adapters:
    """The adapters of a model's matrices, and the matrices that they change.

    W_eff is always made anew from W, which never changes, so that no rounding adds up. W is kept in bf16 where that is
    exact, as it is for released weights, and in fp32 otherwise.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        base: Mapping[str, Tensor],
        lora: LoraConfig,
        config: ModelConfig,
        seed: int = 0,
    ) -> None:
        """Draw A from ``seed`` and freeze whatever has no adapter.

        ``parameters``: all of the model's, by name, fp32 or bf16; those with an adapter are set to ``base``. ``base``:
        fp32 weights by name, as they were read: a parameter in bf16 would be a rounded one.
        """
        names = adapted(lora, {name: tuple(p.shape) for name, p in parameters.items()})
        self.scales = {name: scale(lora, config, name) for name in names}
        """s by weight."""
        self._weights = {name: parameters[name] for name in names}
        for name, parameter in parameters.items():
            parameter.requires_grad_(name in self._weights)
        self._base = {name: _kept(base[name], self._weights[name].device) for name in names}
        self.parameters: dict[str, nn.Parameter] = {}
        """A and B, fp32, by ``<weight>.lora_A`` and ``<weight>.lora_B``: what the optimizer owns."""
        generator = torch.Generator().manual_seed(seed)
        for name, weight in self._weights.items():
            outputs, inputs = weight.shape
            a_RI = truncated_normal(torch.Size([lora.rank, inputs]), 1 / math.sqrt(inputs), generator)
            self.parameters[name + A] = nn.Parameter(a_RI.to(weight.device))
            self.parameters[name + B] = nn.Parameter(torch.zeros(outputs, lora.rank, device=weight.device))
        self.apply()

    @torch.no_grad()
    def gradients(self, of_weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """fp32 gradients of A and B from those of the weights by name; a weight without one gives its adapter none."""
        gradients: dict[str, Tensor] = {}
        for name, s in self.scales.items():
            if (of_weight := of_weights.get(name)) is not None:
                dw_OI = whole(of_weight).float()
                gradients[name + A] = (self.parameters[name + B].T @ dw_OI).mul_(s)
                gradients[name + B] = (dw_OI @ self.parameters[name + A].T).mul_(s)
        return gradients

    @torch.no_grad()
    def apply(self, adapters: Mapping[str, Tensor] | None = None) -> None:
        """Set the model's matrices to W + s B A, with these adapters by name or with the live ones."""
        for name, matrix in self.matrices(self.parameters if adapters is None else adapters):
            whole(self._weights[name]).copy_(matrix)
        increment_version(self._weights.values())  # copies of them in FP8 are stale now

    @torch.no_grad()
    def matrices(self, adapters: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Each W + s B A with these adapters by name, fp32, made as it is asked for."""
        for name, s in self.scales.items():
            yield name, merged_weight(self._base[name], adapters[name + A], adapters[name + B], s)

    @contextlib.contextmanager
    def applied(self, adapters: Mapping[str, Tensor]) -> Iterator[None]:
        """The model with other adapters, such as averaged ones, for a while."""
        try:
            self.apply(adapters)
            yield
        finally:
            self.apply()


def whole(tensor: Tensor) -> Tensor:
    """The tensor that lies here behind a DTensor, all of it: with adapters every rank holds everything."""
    if not hasattr(tensor, "to_local"):
        return tensor.detach()
    here: Tensor = tensor.to_local()
    assert here.shape == tensor.shape, "adapters need whole weights on every rank"
    return here.detach()


def _kept(weight: Tensor, device: torch.device) -> Tensor:
    """A base weight in the smaller of the types that hold it exactly."""
    rounded = weight.to(torch.bfloat16)
    return (rounded if torch.equal(rounded.float(), weight.float()) else weight.float()).to(device, copy=True)
