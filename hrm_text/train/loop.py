"""The training loop: one process, on a CPU, a CUDA GPU or an Apple GPU."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Literal

import torch
import yaml

from hrm_text.contracts import UserError
from hrm_text.data.loader import Loader, LoaderState, read_metadata
from hrm_text.data.storage import Location, under
from hrm_text.files import whole_file
from hrm_text.model.config import ModelConfig
from hrm_text.model.plan import training_flops
from hrm_text.model.weights import check_shapes
from hrm_text.train import checkpoint
from hrm_text.train.config import TrainConfig, plain
from hrm_text.train.continuing import changed_settings, check_same_model
from hrm_text.train.execution import chosen, describe
from hrm_text.train.hooks import Hook, Hooks, RunInfo, RunSummary, StepRecord, ValidationRecord
from hrm_text.train.metrics import Throughput, device_memory_bytes, peak_flops
from hrm_text.train.readback import Readback
from hrm_text.train.step import Totals, TrainingStep, added

MOST_SKIPPED_IN_A_ROW = 5
"""Steps without a finite gradient in a row after which the run stops: the weights themselves are broken by then."""


@dataclass(frozen=True, slots=True)
class Launched:
    """What the host knows of a step while the device computes it."""

    step: int
    epoch: int
    lr: float
    k: int
    tokens: int
    supervised: int


class Trainer:
    """A run: its data, model and optimizer, and the step they are at."""

    def __init__(self, config: TrainConfig, hooks: Sequence[Hook] = ()) -> None:
        self.config = config = resolved(config)
        self.hooks = Hooks(hooks)
        folder, saved = self._newest_checkpoint()
        position = LoaderState.from_dict(saved.state["loader"]) if saved is not None else None
        self.loader = self._loader(config.data.sampled, config.data.epochs, position)
        self.validation = None
        if config.validation.sampled is not None:
            self.validation = self._loader(config.validation.sampled, 1)
            check_same_tokenizer(self.loader, self.validation)
        self.total_steps = min(self.loader.total_steps, config.max_steps or self.loader.total_steps)
        self.training = TrainingStep(config.model, config.optimizer, config, seed=config.seed)
        self.model, self.optimizer, self.device = self.training.model, self.training.optimizer, self.training.device
        self.readback: Readback[Launched] = Readback(late=1 if self.device.type == "cuda" else 0)
        self.meter = Throughput(peak_flops(self.device, self.training.dtype))
        self.step = 0
        """Steps launched; all of them are finished whenever a checkpoint is written."""
        self.tokens_seen = 0
        self.skipped = 0
        self.skipped_in_a_row = 0
        self.stop_requested = False
        self.last_checkpoint = folder
        if folder is not None and saved is not None:
            self._continue_from(folder, saved)

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
                device=describe(config),
                config=plain(config),
            )
        )
        batches = iter(self.loader)
        try:
            with self._signals():
                self.meter.start()
                while self.step < self.total_steps and not self.stop_requested:
                    epoch = self.loader.state.epoch
                    batch, self.loader.state = next(batches)
                    k, lr = self.k_at(self.step), config.optimizer.lr.at(self.step, self.total_steps)
                    sums = self.training.run(batch, k, lr)
                    self.step += 1
                    self.tokens_seen += batch.tokens
                    launched = Launched(self.step, epoch, lr, k, batch.tokens, batch.supervised)
                    self.readback.put(sums, launched)
                    self._report(self.readback.due())
                    validating = self.validation is not None and self._due(config.validation.every_steps)
                    saving = self._due(config.checkpoint.every_steps)
                    if validating or saving:
                        self._report(self.readback.all())
                        if validating:
                            self.hooks.on_validation(self.validate())
                        if saving:
                            self.save()
                        self.meter.start()
                if self.step < self.total_steps:
                    self._report(self.readback.all())
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

    def k_at(self, step: int) -> int:
        """Module calls that carry gradient in a step; only HRM has a warm-up."""
        model = self.config.model
        if model.architecture != "hrm":
            return model.bp_steps
        return self.config.credit.at(step, self.total_steps, model.bp_steps)

    def _due(self, every_steps: int | None) -> bool:
        """Whether what happens every so many steps, and after the last, happens now."""
        return self.step == self.total_steps or (every_steps is not None and self.step % every_steps == 0)

    def _report(self, arrived: Iterable[tuple[Launched, list[float]]]) -> None:
        """Tell the hooks of steps whose numbers have arrived, and count those that were skipped."""
        for launched, (*sums, finite) in arrived:
            totals = Totals.of(sums)
            self.skipped_in_a_row = 0 if finite else self.skipped_in_a_row + 1
            self.skipped += not finite
            flops = training_flops(self.config.model, launched.k, launched.tokens, launched.supervised)
            rate = self.meter.lap(tokens=launched.tokens, flops=flops)
            self.hooks.on_step(
                StepRecord(
                    step=launched.step,
                    total_steps=self.total_steps,
                    epoch=launched.epoch,
                    loss=totals.mean_loss,
                    token_accuracy=totals.token_accuracy,
                    exact_accuracy=totals.exact_accuracy,
                    lr=launched.lr,
                    k=launched.k,
                    tokens=launched.tokens,
                    supervised=launched.supervised,
                    tokens_per_second=rate.tokens_per_second,
                    mfu=rate.mfu,
                    memory_bytes=device_memory_bytes(self.device),
                    skipped=self.skipped,
                    seconds=rate.seconds,
                )
            )
            self._check_skipped(launched.step)

    def _check_skipped(self, step: int) -> None:
        if self.skipped_in_a_row == 1:
            self.hooks.on_message("warning", f"step {step}: loss or gradient is not finite; the step was skipped")
        if self.skipped_in_a_row >= MOST_SKIPPED_IN_A_ROW:
            raise UserError(
                f"{self.skipped_in_a_row} steps in a row had a loss or gradient that is not finite, the last was step "
                f"{step}. Lower optimizer.lr.peak or lengthen its warm-up, check the data of these steps, and run "
                f"the same command again: it continues from {self.last_checkpoint or 'the start'}."
            )

    # -------------------------------------------------------------------------------------------------- validation --

    @torch.no_grad()
    def validate(self) -> ValidationRecord:
        """Loss and accuracies of the averaged weights on the held-out records."""
        assert self.validation is not None
        started = time.monotonic()
        with self.training.averaged_weights():
            sums = [self.training.loss(batch, None) for step, _ in self.validation for batch in step.batches]
            totals = Totals.of(added(sums).tolist())
        return ValidationRecord(
            step=self.step,
            weights="ema",
            loss=totals.mean_loss,
            token_accuracy=totals.token_accuracy,
            exact_accuracy=totals.exact_accuracy,
            samples=totals.samples,
            supervised=totals.tokens,
            seconds=time.monotonic() - started,
        )

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

    def _newest_checkpoint(self) -> tuple[Path, checkpoint.Checkpoint] | tuple[None, None]:
        """The newest good checkpoint of this run, if there is one; one that this run cannot continue is an error."""
        root = self.config.run / "checkpoints"
        folder = checkpoint.latest_good(root, lambda text: self.hooks.on_message("warning", text))
        if folder is None:
            return None, None
        if self.config.resume == "never":
            raise UserError(f"{folder} is there and resume is 'never': choose another run folder, or delete this one")
        saved = checkpoint.load(folder, verify=False)
        check_same_model(self.config.model, saved.config.get("model", {}), folder)
        for change in changed_settings(self.config, saved.config, folder):
            self.hooks.on_message("warning", f"continuing with other settings: {change}")
        return folder, saved

    def _continue_from(self, folder: Path, saved: checkpoint.Checkpoint) -> None:
        """Take over all that training changes; the loader has its position already."""
        weights = saved.tensors["weights"]
        expected = {name: tuple(tensor.shape) for name, tensor in self.model.state_dict().items()}
        check_shapes(expected, {name: tuple(tensor.shape) for name, tensor in weights.items()}, folder)
        self.model.load_state_dict(weights)
        self.optimizer.load_state_dict(saved.tensors["optimizer"])
        checkpoint.restore_rng(saved.state["rng"])
        self.step, self.tokens_seen = saved.state["step"], saved.state["tokens_seen"]
        self.skipped, self.skipped_in_a_row = saved.state["skipped"], saved.state["skipped_in_a_row"]
        if saved.state["total_steps"] != self.total_steps:
            self.hooks.on_message(
                "warning",
                f"{folder} is of a run of {saved.state['total_steps']:,} steps and this one has {self.total_steps:,}: "
                "its schedules differ from here on",
            )

    def _loader(self, sampled: Location, epochs: int | None, state: LoaderState | None = None) -> Loader:
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
    """The run's settings with every choice made: how to compute, and what the data decides of the model."""
    model = fitted_to_data(config)
    return dataclasses.replace(chosen(config, model), model=model)


def fitted_to_data(config: TrainConfig) -> ModelConfig:
    """The model with the data's vocabulary, rounded up to a multiple of 256, and the data's context."""
    data = read_metadata(under(config.data.sampled, "metadata.json"))
    least_vocab, least_context = -(-data["vocab_size"] // 256) * 256, data["max_seq_len"] - 1
    model = config.model
    for key, least in (("vocab_size", least_vocab), ("max_position_embeddings", least_context)):
        if 0 < getattr(model, key) < least:
            raise UserError(f"model.{key} is {getattr(model, key):,}, but {config.data.sampled} needs {least:,}")
    return dataclasses.replace(
        model,
        vocab_size=model.vocab_size or least_vocab,
        max_position_embeddings=model.max_position_embeddings or least_context,
    )


def check_same_tokenizer(training: Loader, validation: Loader) -> None:
    """Validation with other token ids would measure nothing."""
    ours, theirs = training.tokenizer_info, validation.tokenizer_info
    if ours != theirs:
        keys = [key for key in ours if ours[key] != theirs.get(key)]
        raise UserError(
            f"validation.sampled {validation.sampled} and data.sampled {training.sampled} were made with different "
            f"tokenizers ({', '.join(f'{key}: {theirs.get(key)!r} and {ours[key]!r}' for key in keys)})"
        )
