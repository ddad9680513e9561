"""One optimizer step: forward and backward over micro-batches, one division, one update; the host waits for nothing."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.profiler import record_function

from hrm_text.contracts import IGNORE_INDEX, PackedBatch
from hrm_text.data.loader import LoaderStep
from hrm_text.model.attention import Spans
from hrm_text.model.config import ModelConfig
from hrm_text.model.head import LossSums, Targets
from hrm_text.model.kernels.cross_entropy import chunked_loss
from hrm_text.model.kernels.transfer import to_device
from hrm_text.model.lora import LoraConfig
from hrm_text.model.recurrence import build
from hrm_text.model.weights import parse_dtype
from hrm_text.train.config import ExecutionConfig, OptimizerConfig
from hrm_text.train.execution import batch_attention, prepare_blocks
from hrm_text.train.lora import Adapters
from hrm_text.train.optimizer import AdamAtan2, local
from hrm_text.train.sharding import ShardedModel, Sharding

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


NOTHING = PackedBatch(
    input_ids=np.zeros(1, np.int64),
    labels=np.full(1, IGNORE_INDEX, np.int64),
    position_ids=np.zeros(1, np.int64),
    sample_starts=np.array([0, 1], np.int64),
    prefix_lengths=np.zeros(1, np.int64),
)
"""One token of which nothing is asked: its gradients are zero."""


class TrainingStep:
    """A model, its optimizer, and the step that they take together with those of the other ranks.

    Nothing in ``run`` makes the host wait for the device: what the host knows (where samples lie, what is supervised)
    it works out itself and sends in copies from pinned memory; what the device alone knows (the loss, whether the
    gradients are finite) stays there, and decides there whether the step counts.
    """

    def __init__(
        self,
        model: ModelConfig,
        optimizer: OptimizerConfig,
        execution: ExecutionConfig,
        seed: int = 0,
        sharding: Sharding | None = None,
        initial: Mapping[str, Tensor] | None = None,
        lora: LoraConfig | None = None,
    ) -> None:
        """Every rank draws the same weights, or is given them.

        Args:
            model: architecture and sizes.
            optimizer: how to learn.
            execution: settings in which every choice is made (``execution.chosen``).
            seed: of the weights, and of adapters.
            sharding: how ranks share the state; None: there is one process.
            initial: fp32 weights and buffers by name, to start from in the place of random ones.
            lora: train adapters upon ``initial``, which every rank holds whole; None: train the weights.
        """
        assert lora is None or initial is not None
        self.execution = execution
        self.device, self.dtype = torch.device(execution.device), parse_dtype(execution.dtype)
        self.alone = sharding is None
        is_sharded = sharding is not None and lora is None
        dtype = torch.float32 if is_sharded else self.dtype  # FSDP computes in copies of the dtype
        drawn = seed if initial is None else None  # drawing 1.2 B weights takes seconds
        self.model = build(model, seed=drawn, device=execution.device, dtype=dtype)
        if initial is not None:
            self.model.load_state_dict(dict(initial))
        self.adapters: Adapters | None = None
        if lora is not None and initial is not None:
            self.adapters = Adapters(dict(self.model.named_parameters()), initial, lora, model, seed)
        prepare_blocks(self.model, execution)
        self.sharded: ShardedModel | None = None
        if sharding is not None and lora is None:
            self.sharded = ShardedModel(self.model, sharding, self.dtype, requantise=execution.fp8)
        self.optimizer = AdamAtan2(
            self.model.named_parameters() if self.adapters is None else self.adapters.parameters.items(),
            lr=optimizer.lr.peak,
            betas=optimizer.betas,
            weight_decay=optimizer.weight_decay,
            ema_decay=optimizer.ema_decay,
            overrides=optimizer.overrides,
        )
        if initial is not None and self.adapters is None:
            self.optimizer.start_from(initial)

    def run(self, step: LoaderStep, k: int, lr: float, wishes: Sequence[bool] = ()) -> Tensor:
        """Take one step on the loss per supervised token of a global batch; K = ``k``.

        wishes: what this rank would have all ranks agree on. They travel with the numbers of the step and arrive with
        them, on every rank for the same step, so that no rank acts alone and nothing waits for it.

        Returns a tensor [6 + wishes] on the device: the five sums of ``added`` over all ranks, 1 if loss and gradients
        were finite on every rank, and for each wish how many ranks have it. If they were not finite, neither the
        weights nor the optimizer have changed.
        """
        self.model.zero_grad()
        sums: list[LossSums] = []
        gradients: dict[str, Tensor] = {}
        for number, batch in enumerate(step.batches, start=1):
            if self.sharded is not None:
                self.sharded.begin_pass(last=number == len(step.batches), only=len(step.batches) == 1)
            of_batch = self.loss(batch, k)
            (of_batch.loss / max(step.supervised, 1)).backward()
            sums.append(dataclasses.replace(of_batch, loss=of_batch.loss.detach()))
            del of_batch  # and with it the graph
            if self.adapters is not None or (self.sharded is None and len(step.batches) > 1):
                self._take_gradients(gradients)
        with record_function(OPTIMIZER):
            if self.adapters is None and (self.sharded is not None or len(step.batches) == 1):
                gradients = {name: p.grad for name, p in self.optimizer.parameters.items() if p.grad is not None}
            if self.adapters is not None and not self.alone:
                add_up_over_ranks(gradients.values())
            totals_5 = added(sums)
            finite = totals_5[0].isfinite()
            if gradients:
                norms = torch._foreach_norm([local(gradient) for gradient in gradients.values()])
                finite &= torch.stack(norms).isfinite().all()
            if self.alone:
                wished = [totals_5.new_full((1,), float(wish)) for wish in wishes]
                numbers = torch.cat([totals_5, finite[None], *wished])
            else:
                numbers = self._agreed(totals_5, finite, wishes)
                finite = numbers[5].bool()
            self.optimizer.lr = lr
            self.optimizer.step(gradients, finite=finite)
            if self.adapters is not None:
                self.adapters.apply()
        return numbers

    def loss(self, batch: PackedBatch, k: int | None) -> LossSums:
        """Forward pass over one micro-batch."""
        if not len(batch.input_ids):
            batch = NOTHING  # this rank has no sample left: it takes part in what the others exchange
        starts, num_tokens = torch.from_numpy(batch.sample_starts), len(batch.input_ids)
        attention = batch_attention(Spans(starts, torch.from_numpy(batch.prefix_lengths)), num_tokens, self.execution)
        targets = Targets.of(torch.from_numpy(batch.labels), starts).to(self.device, non_blocking=True)
        inputs = [torch.from_numpy(batch.input_ids), torch.from_numpy(batch.position_ids)]
        ids_T, positions_T = to_device(inputs, self.device)
        hidden_TD = self.model(ids_T, positions_T, attention, k)
        with record_function(HEAD_AND_LOSS):
            if self.sharded is not None:
                return self.sharded.loss(hidden_TD, targets)
            return chunked_loss(hidden_TD, self.model.lm_head.weight, targets)

    @torch.no_grad()
    def evaluate(self, batches: Iterable[PackedBatch]) -> Totals:
        """Sums over batches of this rank and of all others, which have as many. Waits for the device."""
        sums = []
        for batch in batches:
            if self.sharded is not None:
                self.sharded.begin_pass(last=False, only=False)
            sums.append(self.loss(batch, None))
        totals_5 = added(sums)
        if not self.alone:
            dist.all_reduce(totals_5)
        return Totals.of(totals_5.tolist())

    @contextlib.contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Put the averaged weights into the model for a while."""
        if self.sharded is not None:
            self.optimizer.exchange_averages()
            try:
                yield
            finally:
                self.optimizer.exchange_averages()
                self.sharded.forget_gathered()
            return
        if self.adapters is not None:
            with self.adapters.applied(self.optimizer.ema_weights()):
                yield
            return
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

    @torch.no_grad()
    def averaged_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The model as it would be exported: averaged weights and buffers by name, whole, in the computation's dtype.

        Every rank goes through all of it, whatever it keeps: a tensor that ranks share is gathered as it is asked for.
        One that is whole here and has that dtype is live, and not copied.
        """
        for name, buffer in self.model.named_buffers():
            yield name, buffer.detach().to(self.dtype)
        averages: Iterable[tuple[str, Tensor]] = self.optimizer.ema_weights().items()
        if self.adapters is not None:
            for name, parameter in self.model.named_parameters():
                if name not in self.adapters.scales:
                    yield name, _whole(parameter.detach().to(self.dtype))
            averages = self.adapters.matrices(self.optimizer.ema_weights())
        for name, average in averages:
            yield name, _whole(average.to(self.dtype))

    def state(self) -> dict[str, Tensor]:
        """All that training changes, and the model's buffers, by flat names: "weights/lm_head.weight", "step", ...

        Weights are fp32. Tensors are live, unless they are fp32 weights behind bf16 parameters. With adapters they
        alone are there: what they were trained upon is as it was.
        """
        tensors: dict[str, Tensor] = {}
        if self.adapters is None:
            tensors = {f"weights/{name}": buffer for name, buffer in self.model.named_buffers()}
        for group, values in self.optimizer.state_dict().items():
            if isinstance(values, Tensor):
                tensors[group] = values
            else:
                tensors |= {f"{group}/{name}": tensor for name, tensor in values.items()}
        return tensors

    def restore(self, fill: Callable[[Mapping[str, Tensor]], None]) -> None:
        """Let ``fill`` write into the tensors of ``state``, and take over what it wrote."""
        tensors = self.state()
        fill(tensors)
        groups: dict[str, Any] = {"step": tensors["step"]}
        for name, tensor in tensors.items():
            group, slash, parameter = name.partition("/")
            if slash and parameter in self.optimizer.parameters:
                groups.setdefault(group, {})[parameter] = tensor
        self.optimizer.load_state_dict(groups)
        if self.adapters is not None:
            self.adapters.apply()

    def _agreed(self, totals_5: Tensor, finite: Tensor, wishes: Sequence[bool]) -> Tensor:
        """The numbers of ``run`` over all ranks, in one exchange."""
        wished = [totals_5.new_full((1,), float(wish)) for wish in wishes]
        numbers = torch.cat([totals_5, (~finite)[None].to(totals_5.dtype), *wished])
        dist.all_reduce(numbers)
        numbers[5] = (numbers[5] == 0) & numbers[0].isfinite()
        return numbers

    def _take_gradients(self, sums: dict[str, Tensor]) -> None:
        """Add the gradients to fp32 sums and drop them: bf16 sums over micro-batches would lose their last bits."""
        of_pass = {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}
        self.model.zero_grad()
        if self.adapters is not None:
            of_pass = self.adapters.gradients(of_pass)
        for name in list(of_pass):
            gradient = of_pass.pop(name)  # gone with the next one: their memory is not held twice
            sums[name] = sums[name].add_(gradient) if name in sums else gradient.float()


def _whole(tensor: Tensor) -> Tensor:
    """All of a tensor of which ranks hold parts; every rank calls it."""
    gathered: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return gathered


def add_up_over_ranks(tensors: Iterable[Tensor]) -> None:
    """Add fp32 tensors up over all ranks, in place and in one exchange."""
    every = list(tensors)
    if not every:
        return
    flat = torch.cat([tensor.flatten() for tensor in every])
    dist.all_reduce(flat)
    for tensor, total in zip(every, flat.split([tensor.numel() for tensor in every]), strict=True):
        tensor.copy_(total.view_as(tensor))
