"""The training loop: one process, on a CPU, a CUDA GPU or an Apple GPU."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import torch
import yaml
from torch import Tensor

from hrm_text.contracts import PackedBatch, UserError
from hrm_text.data.loader import Loader, LoaderState, LoaderStep
from hrm_text.files import whole_file
from hrm_text.model.attention import Spans
from hrm_text.model.block import Block
from hrm_text.model.config import ModelConfig
from hrm_text.model.head import LossSums, supervised_loss
from hrm_text.model.kernels import packed_attention, pick_backend
from hrm_text.model.plan import training_flops
from hrm_text.model.recurrence import build
from hrm_text.model.weights import check_shapes, parse_dtype
from hrm_text.settings import to_mapping
from hrm_text.train import checkpoint
from hrm_text.train.config import TrainConfig
from hrm_text.train.hooks import Hook, Hooks, RunInfo, RunSummary, StepRecord, ValidationRecord
from hrm_text.train.metrics import Throughput, device_memory_bytes, peak_flops
from hrm_text.train.optimizer import AdamAtan2

MOST_SKIPPED_IN_A_ROW = 5
"""Steps without a finite gradient in a row after which the run stops: the weights themselves are broken by then."""


@dataclass(frozen=True)
class Totals:
    """Sums over the supervised tokens and the samples of some batches, as plain numbers."""

    loss: float
    tokens: int
    correct_tokens: int
    samples: int
    exact_samples: int

    @classmethod
    def of(cls, sums: Sequence[LossSums]) -> Totals:
        """Add up; reading the numbers waits for the device, once."""
        rows = [
            torch.stack([getattr(s, field.name).detach().double() for field in dataclasses.fields(LossSums)])
            for s in sums
        ]
        loss, *counts = torch.stack(rows).sum(0).tolist()
        return cls(loss, *(int(count) for count in counts))


class Trainer:
    """A run: its data, model and optimizer, and the step they are at."""

    def __init__(self, config: TrainConfig, hooks: Sequence[Hook] = ()) -> None:
        self.config = config = resolved(config)
        self.hooks = Hooks(hooks)
        self.device = torch.device(config.device)
        self.compute_dtype = parse_dtype(config.dtype)
        self.loader = self._loader(config.data.sampled, config.data.epochs)
        self.validation = None
        if config.validation.sampled is not None:
            self.validation = self._loader(config.validation.sampled, 1)
            check_same_tokenizer(self.loader, self.validation)
        self.total_steps = min(self.loader.total_steps, config.max_steps or self.loader.total_steps)
        self.model = build(config.model, seed=config.seed, device=config.device, dtype=self.compute_dtype)
        if config.compile == "always":
            for module in self.model.modules():
                if isinstance(module, Block):
                    module.compile(dynamic=False)
        self.optimizer = AdamAtan2(
            self.model.named_parameters(),
            lr=config.optimizer.lr.peak,
            betas=config.optimizer.betas,
            weight_decay=config.optimizer.weight_decay,
            ema_decay=config.optimizer.ema_decay,
        )
        self.step = 0
        self.tokens_seen = 0
        self.skipped = 0
        self.skipped_in_a_row = 0
        self.stop_requested = False
        self.last_checkpoint: Path | None = None
        self._resume()

    # ---------------------------------------------------------------------------------------------------- training --

    def run(self) -> RunSummary:
        """Train to the end, or until SIGINT or SIGTERM asks to save and stop."""
        config, started = self.config, time.monotonic()
        outcome: Literal["finished", "interrupted", "failed"] = "failed"
        with whole_file(config.run / "config.yaml") as beside:
            beside.write_text(yaml.safe_dump(plain(config), sort_keys=False), encoding="utf-8")
        self.hooks.on_start(
            RunInfo(
                folder=config.run,
                start_step=self.step,
                total_steps=self.total_steps,
                parameters=config.model.num_parameters,
                device=f"{device_name(self.device)} ({config.dtype}, {config.attention} attention)",
                config=plain(config),
            )
        )
        peak = peak_flops(self.device, self.compute_dtype)
        meter = Throughput(peak)
        batches = iter(self.loader)
        try:
            with self._signals():
                while self.step < self.total_steps and not self.stop_requested:
                    meter.start()
                    epoch = self.loader.state.epoch
                    batch, self.loader.state = next(batches)
                    k, lr = self.k_at(self.step), config.optimizer.lr.at(self.step, self.total_steps)
                    totals = self.train_step(batch, k, lr)
                    self.step += 1
                    self.tokens_seen += batch.tokens
                    flops = training_flops(config.model, k, batch.tokens, batch.supervised)
                    rate = meter.stop(tokens=batch.tokens, flops=flops)
                    self.hooks.on_step(
                        StepRecord(
                            step=self.step,
                            total_steps=self.total_steps,
                            epoch=epoch,
                            loss=totals.loss / max(totals.tokens, 1),
                            token_accuracy=totals.correct_tokens / max(totals.tokens, 1),
                            exact_accuracy=totals.exact_samples / max(totals.samples, 1),
                            lr=lr,
                            k=k,
                            tokens=batch.tokens,
                            supervised=batch.supervised,
                            tokens_per_second=rate.tokens_per_second,
                            mfu=rate.mfu,
                            memory_bytes=device_memory_bytes(self.device),
                            skipped=self.skipped,
                            seconds=rate.seconds,
                        )
                    )
                    self._check_skipped()
                    last = self.step == self.total_steps
                    if self.validation is not None and (last or self.step % config.validation.every_steps == 0):
                        self.hooks.on_validation(self.validate())
                    if last or self.step % config.checkpoint.every_steps == 0:
                        self.save()
                if self.step < self.total_steps:
                    self.save()
            outcome = "finished" if self.step == self.total_steps else "interrupted"
        except KeyboardInterrupt:
            outcome = "interrupted"
            raise
        finally:
            batches.close()  # type: ignore[attr-defined]  # iter() of a generator function: ends its threads
            seconds = time.monotonic() - started
            summary = RunSummary(self.step, self.total_steps, outcome, seconds, self.last_checkpoint)
            self.hooks.on_end(summary)
        return summary

    def train_step(self, batch: LoaderStep, k: int, lr: float) -> Totals:
        """One optimizer step over a global batch: loss per supervised token of all its micro-batches together."""
        self.optimizer.zero_grad()
        sums: list[LossSums] = []
        added: dict[str, Tensor] = {}
        for micro_batch in batch.batches:
            sums.append(self.loss(micro_batch, k))
            (sums[-1].loss / max(batch.supervised, 1)).backward()
            if len(batch.batches) > 1:
                self._take_gradients(added)
        gradients = added or {name: p.grad for name, p in self.optimizer.parameters.items() if p.grad is not None}
        finite = torch.stack(torch._foreach_norm(list(gradients.values()))).isfinite().all() if gradients else None
        totals = Totals.of(sums)
        if (finite is None or bool(finite)) and abs(totals.loss) < float("inf"):
            self.optimizer.lr = lr
            self.optimizer.step(gradients)
            self.skipped_in_a_row = 0
        else:
            self.skipped += 1
            self.skipped_in_a_row += 1
        return totals

    def loss(self, batch: PackedBatch, k: int | None) -> LossSums:
        """Forward pass over one micro-batch."""
        device = self.device
        spans = Spans(torch.from_numpy(batch.sample_starts), torch.from_numpy(batch.prefix_lengths))
        sample_ids_T = torch.zeros(len(batch.input_ids), dtype=torch.long)
        sample_ids_T[: batch.num_tokens] = torch.arange(batch.num_samples).repeat_interleave(spans.lengths)
        ids_T, positions_T, labels_T, sample_ids_T = (
            x.to(device, non_blocking=True)
            for x in (*map(torch.from_numpy, (batch.input_ids, batch.position_ids, batch.labels)), sample_ids_T)
        )
        attention = packed_attention(spans, len(ids_T), device, self.config.attention)
        hidden_TD = self.model(ids_T, positions_T, attention, k)
        return supervised_loss(hidden_TD, self.model.lm_head.weight, labels_T, sample_ids_T, batch.num_samples)

    def k_at(self, step: int) -> int:
        """Module calls that carry gradient in a step; only HRM has a warm-up."""
        model = self.config.model
        if model.architecture != "hrm":
            return model.bp_steps
        return self.config.credit.at(step, self.total_steps, model.bp_steps)

    def _take_gradients(self, added: dict[str, Tensor]) -> None:
        """Add the gradients to fp32 sums and drop them: bf16 sums over micro-batches would lose their last bits."""
        for name, parameter in self.optimizer.parameters.items():
            if parameter.grad is not None:
                gradient = parameter.grad.float()
                added[name] = added[name].add_(gradient) if name in added else gradient
                parameter.grad = None

    def _check_skipped(self) -> None:
        if self.skipped_in_a_row == 1:
            self.hooks.on_message("warning", f"step {self.step}: loss or gradient is not finite; the step was skipped")
        if self.skipped_in_a_row >= MOST_SKIPPED_IN_A_ROW:
            raise UserError(
                f"{self.skipped_in_a_row} steps in a row had a loss or gradient that is not finite, the last was step "
                f"{self.step}. Lower optimizer.lr.peak or lengthen its warm-up, check the data of these steps, and run "
                f"the same command again: it continues from {self.last_checkpoint or 'the start'}."
            )

    # -------------------------------------------------------------------------------------------------- validation --

    @torch.no_grad()
    def validate(self) -> ValidationRecord:
        """Loss and accuracies of the averaged weights on the held-out records."""
        assert self.validation is not None
        started = time.monotonic()
        with self.averaged_weights():
            sums = [self.loss(batch, None) for step, _ in self.validation for batch in step.batches]
        totals = Totals.of(sums)
        return ValidationRecord(
            step=self.step,
            weights="ema",
            loss=totals.loss / max(totals.tokens, 1),
            token_accuracy=totals.correct_tokens / max(totals.tokens, 1),
            exact_accuracy=totals.exact_samples / max(totals.samples, 1),
            samples=totals.samples,
            supervised=totals.tokens,
            seconds=time.monotonic() - started,
        )

    @contextlib.contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Put the averaged weights into the model for a while."""
        live = {name: parameter.data for name, parameter in self.optimizer.parameters.items()}
        try:
            for name, average in self.optimizer.ema_weights().items():
                self.optimizer.parameters[name].data = average.to(self.compute_dtype)
            yield
        finally:
            for name, data in live.items():
                self.optimizer.parameters[name].data = data

    # --------------------------------------------------------------------------------------------------- continuing --

    def save(self) -> None:
        """Write a checkpoint of this moment. A disk that is full is a warning: training goes on."""
        state = {
            "step": self.step,
            "total_steps": self.total_steps,
            "tokens_seen": self.tokens_seen,
            "skipped": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
            "loader": self.loader.state.to_dict(),
            "rng": checkpoint.rng_state(),
            "tokenizer_info": self.loader.tokenizer_info,
        }
        tensors = {"weights": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        root = self.config.run / "checkpoints"
        try:
            keep = self.config.checkpoint.keep_last
            folder = checkpoint.save(root, self.step, tensors, state, plain(self.config), keep_last=keep)
        except UserError as error:
            if self.step == self.total_steps or self.stop_requested:
                raise
            self.hooks.on_message("warning", f"not saved: {error}")
            return
        self.last_checkpoint = folder
        self.hooks.on_checkpoint(folder)

    def _resume(self) -> None:
        """Continue from the newest good checkpoint of this run, if there is one."""
        root = self.config.run / "checkpoints"
        folder = checkpoint.latest_good(root, lambda text: self.hooks.on_message("warning", text))
        if folder is None:
            return
        if self.config.resume == "never":
            raise UserError(f"{folder} is there and resume is 'never': choose another run folder, or delete this one")
        saved = checkpoint.load(folder, verify=False)
        check_same_model(self.config.model, saved.config.get("model", {}), folder)
        for change in changed_settings(self.config, saved.config, folder):
            self.hooks.on_message("warning", f"continuing with other settings: {change}")
        weights = saved.tensors["weights"]
        expected = {name: tuple(tensor.shape) for name, tensor in self.model.state_dict().items()}
        check_shapes(expected, {name: tuple(tensor.shape) for name, tensor in weights.items()}, folder)
        self.model.load_state_dict(weights)
        self.optimizer.load_state_dict(saved.tensors["optimizer"])
        self.loader = self._loader(
            self.config.data.sampled, self.config.data.epochs, LoaderState.from_dict(saved.state["loader"])
        )
        checkpoint.restore_rng(saved.state["rng"])
        self.step, self.tokens_seen = saved.state["step"], saved.state["tokens_seen"]
        self.skipped, self.skipped_in_a_row = saved.state["skipped"], saved.state["skipped_in_a_row"]
        self.last_checkpoint = folder
        if saved.state["total_steps"] != self.total_steps:
            self.hooks.on_message(
                "warning",
                f"{folder} is of a run of {saved.state['total_steps']:,} steps and this one has {self.total_steps:,}: "
                "its schedules differ from here on",
            )

    def _loader(self, sampled: Path, epochs: int | None, state: LoaderState | None = None) -> Loader:
        data = self.config.data
        return Loader(
            sampled,
            tokens_per_batch=data.tokens_per_batch,
            bins=data.micro_batches,
            epochs=epochs,
            mask="prefix" if self.config.model.prefix_lm else "causal",
            supervise=data.supervise,
            # Compiled kernels want one shape; elsewhere the padded tail would be work for nothing.
            pad=self.config.attention == "flex",
            workers=data.workers,
            state=state,
        )

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """The first SIGINT or SIGTERM lets the step in progress finish and saves; a second one stops at once."""

        def request_stop(number: int, frame: FrameType | None) -> None:
            if self.stop_requested:
                raise KeyboardInterrupt
            self.stop_requested = True

        try:
            before = {number: signal.signal(number, request_stop) for number in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # not the main thread: whoever owns it decides
            before = {}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def resolved(config: TrainConfig) -> TrainConfig:
    """The run's settings with every choice made: device, dtype, attention, and what the data decides of the model."""
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not available[device]:
        raise UserError(
            f"device: {device!r} is not available here; choose from {[d for d in available if available[d]]}"
        )
    on_cuda = device == "cuda"
    return dataclasses.replace(
        config,
        device=device,
        dtype=("bfloat16" if on_cuda else "float32") if config.dtype == "auto" else config.dtype,
        attention=pick_backend(torch.device(device)) if config.attention == "auto" else config.attention,
        compile=("always" if on_cuda else "never") if config.compile == "auto" else config.compile,
        model=fitted_to_data(config),
    )


def fitted_to_data(config: TrainConfig) -> ModelConfig:
    """The model with the data's vocabulary, rounded up to a multiple of 256, and the data's context."""
    probe = Loader(config.data.sampled, tokens_per_batch=config.data.tokens_per_batch, bins=config.data.micro_batches)
    least_vocab, least_context = -(-probe.vocab_size // 256) * 256, probe.max_seq_len - 1
    model = config.model
    for key, least in (("vocab_size", least_vocab), ("max_position_embeddings", least_context)):
        if 0 < getattr(model, key) < least:
            raise UserError(f"model.{key} is {getattr(model, key):,}, but {config.data.sampled} needs {least:,}")
    return dataclasses.replace(
        model,
        vocab_size=model.vocab_size or least_vocab,
        max_position_embeddings=model.max_position_embeddings or least_context,
    )


def check_same_model(ours: ModelConfig, saved: Mapping[str, Any], folder: Path) -> None:
    """A checkpoint of another model is an error that names every difference."""
    differences = [
        f"{key} is {saved[key]!r} there and {value!r} here"
        for key, value in to_mapping(ours).items()
        if key in saved and saved[key] != value and key != "bp_steps"
    ]
    if differences:
        raise UserError(
            f"{folder} holds another model: {'; '.join(differences)}. "
            "Give this run another folder (run: ...), or the model of that checkpoint."
        )


def changed_settings(config: TrainConfig, saved: Mapping[str, Any], folder: Path) -> list[str]:
    """What a resumed run changes of how it learns; batches of another size are an error, as a position would move."""
    changes = []
    for section in ("data", "optimizer", "credit"):
        ours, theirs = plain(config)[section], saved.get(section, {})
        changes += [
            (f"{section}.{key}", f"{section}.{key} was {theirs[key]!r} and is {value!r}")
            for key, value in ours.items()
            if key in theirs and theirs[key] != value and key not in ("workers", "sampled")
        ]
    if resized := [text for key, text in changes if key in ("data.tokens_per_batch", "data.micro_batches")]:
        raise UserError(
            f"{folder} cannot be continued with other batches: {'; '.join(resized)}. "
            "Put the sizes back, or give this run another folder (run: ...)."
        )
    return [text for _, text in changes]


def check_same_tokenizer(training: Loader, validation: Loader) -> None:
    """Validation with other token ids would measure nothing."""
    ours, theirs = training.tokenizer_info, validation.tokenizer_info
    if ours != theirs:
        keys = [key for key in ours if ours[key] != theirs.get(key)]
        raise UserError(
            f"validation.sampled {validation.sampled} and data.sampled {training.sampled} were made with different "
            f"tokenizers ({', '.join(f'{key}: {theirs.get(key)!r} and {ours[key]!r}' for key in keys)})"
        )


def plain(config: TrainConfig) -> dict[str, Any]:
    """The settings as values that YAML and JSON know."""

    def simple(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: simple(inner) for key, inner in value.items()}
        if isinstance(value, (list, tuple)):
            return [simple(inner) for inner in value]
        return str(value) if isinstance(value, Path) else value

    mapping: dict[str, Any] = simple(to_mapping(config))
    return mapping


def device_name(device: torch.device) -> str:
    """What a person calls the device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads" if device.type == "cpu" else device.type
