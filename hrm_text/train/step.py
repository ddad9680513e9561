"""One optimizer step: forward and backward over micro-batches, one division, one update; the host waits for nothing."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.profiler import record_function

from hrm_text.contracts import PackedBatch
from hrm_text.data.loader import LoaderStep
from hrm_text.model.attention import Spans
from hrm_text.model.config import ModelConfig
from hrm_text.model.head import LossSums, Targets
from hrm_text.model.kernels.cross_entropy import chunked_loss
from hrm_text.model.kernels.transfer import to_device
from hrm_text.model.recurrence import build
from hrm_text.model.weights import parse_dtype
from hrm_text.train.config import ExecutionConfig, OptimizerConfig
from hrm_text.train.execution import batch_attention, prepare_blocks
from hrm_text.train.optimizer import AdamAtan2

HEAD_AND_LOSS, OPTIMIZER = "head and loss", "optimizer"
"""Names of these parts of a step in a profile: what kernels belong to is not always in their names."""


@dataclass(frozen=True)
class Totals:
    """Sums over the supervised tokens and the samples of some batches, as plain numbers."""

    loss: float
    """Cross-entropy in nats."""
    tokens: int
    correct_tokens: int
    samples: int
    exact_samples: int

    @classmethod
    def of(cls, sums_5: Sequence[float]) -> Totals:
        """From the numbers of ``added(...)``, read from the device."""
        loss, *counts = sums_5
        return cls(loss, *(int(count) for count in counts))

    @property
    def mean_loss(self) -> float:
        """Cross-entropy per supervised token."""
        return self.loss / max(self.tokens, 1)

    @property
    def token_accuracy(self) -> float:
        """Share of the supervised tokens whose most likely id is the label."""
        return self.correct_tokens / max(self.tokens, 1)

    @property
    def exact_accuracy(self) -> float:
        """Share of the samples whose supervised tokens are all right."""
        return self.exact_samples / max(self.samples, 1)


def added(sums: Sequence[LossSums]) -> Tensor:
    """The sums of some batches together: a tensor [5] on their device, in the order of the fields."""
    rows = [torch.stack([_wide(getattr(s, field.name)) for field in dataclasses.fields(LossSums)]) for s in sums]
    return torch.stack(rows).sum(0)


def _wide(number: Tensor) -> Tensor:
    """A number in fp64, which holds every count; in fp32 on MPS, which has no fp64."""
    return number.detach().to(torch.float32 if number.device.type == "mps" else torch.float64)


class TrainingStep:
    """A model, its optimizer, and the step that they take together.

    Nothing in ``run`` makes the host wait for the device: what the host knows (where samples lie, what is supervised)
    it works out itself and sends in copies from pinned memory; what the device alone knows (the loss, whether the
    gradients are finite) stays there, and decides there whether the step counts.
    """

    def __init__(
        self, model: ModelConfig, optimizer: OptimizerConfig, execution: ExecutionConfig, seed: int = 0
    ) -> None:
        """``execution``: settings in which every choice is made (``execution.chosen``). ``seed``: of the weights."""
        self.execution = execution
        self.device, self.dtype = torch.device(execution.device), parse_dtype(execution.dtype)
        self.model = build(model, seed=seed, device=execution.device, dtype=self.dtype)
        prepare_blocks(self.model, execution)
        self.optimizer = AdamAtan2(
            self.model.named_parameters(),
            lr=optimizer.lr.peak,
            betas=optimizer.betas,
            weight_decay=optimizer.weight_decay,
            ema_decay=optimizer.ema_decay,
            overrides=optimizer.overrides,
        )

    def run(self, step: LoaderStep, k: int, lr: float) -> Tensor:
        """Take one step on the loss per supervised token of a global batch; K = ``k``.

        Returns a tensor [6] on the device: the five sums of ``added``, and 1 if loss and gradients were finite. If they
        were not, neither the weights nor the optimizer have changed.
        """
        self.optimizer.zero_grad()
        sums: list[LossSums] = []
        gradients: dict[str, Tensor] = {}
        for batch in step.batches:
            of_batch = self.loss(batch, k)
            (of_batch.loss / max(step.supervised, 1)).backward()
            sums.append(dataclasses.replace(of_batch, loss=of_batch.loss.detach()))
            del of_batch  # and with it the graph
            if len(step.batches) > 1:
                self._take_gradients(gradients)
        with record_function(OPTIMIZER):
            if len(step.batches) == 1:
                gradients = {name: p.grad for name, p in self.optimizer.parameters.items() if p.grad is not None}
            totals_5 = added(sums)
            finite = totals_5[0].isfinite()
            if gradients:
                finite &= torch.stack(torch._foreach_norm(list(gradients.values()))).isfinite().all()
            self.optimizer.lr = lr
            self.optimizer.step(gradients, finite=finite)
        return torch.cat([totals_5, finite[None]])

    def loss(self, batch: PackedBatch, k: int | None) -> LossSums:
        """Forward pass over one micro-batch."""
        starts, num_tokens = torch.from_numpy(batch.sample_starts), len(batch.input_ids)
        attention = batch_attention(Spans(starts, torch.from_numpy(batch.prefix_lengths)), num_tokens, self.execution)
        targets = Targets.of(torch.from_numpy(batch.labels), starts).to(self.device, non_blocking=True)
        inputs = [torch.from_numpy(batch.input_ids), torch.from_numpy(batch.position_ids)]
        ids_T, positions_T = to_device(inputs, self.device)
        hidden_TD = self.model(ids_T, positions_T, attention, k)
        with record_function(HEAD_AND_LOSS):
            return chunked_loss(hidden_TD, self.model.lm_head.weight, targets)

    @contextlib.contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Put the averaged weights into the model for a while."""
        parameters = self.optimizer.parameters
        live = {name: parameter.data for name, parameter in parameters.items()}
        try:
            for name, average in self.optimizer.ema_weights().items():
                parameters[name].data = average.to(self.dtype)
            increment_version(parameters.values())  # setting data is no change to autograd, but FP8 copies are stale
            yield
        finally:
            for name, data in live.items():
                parameters[name].data = data
            increment_version(parameters.values())

    def _take_gradients(self, sums: dict[str, Tensor]) -> None:
        """Add the gradients to fp32 sums and drop them: bf16 sums over micro-batches would lose their last bits."""
        for name, parameter in self.optimizer.parameters.items():
            if parameter.grad is not None:
                sums[name] = sums[name].add_(parameter.grad) if name in sums else parameter.grad.float()
                parameter.grad = None
