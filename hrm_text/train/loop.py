"""The training loop: one process on a CPU, a CUDA GPU or an Apple GPU, or many ranks in step."""

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
from hrm_text.train import checkpoint
from hrm_text.train.config import TrainConfig, plain
from hrm_text.train.continuing import changed_settings, check_same_model
from hrm_text.train.evaluation import Evaluations, Evaluator
from hrm_text.train.execution import chosen, describe
from hrm_text.train.hooks import CheckpointRecord, Hook, Hooks, RunInfo, RunSummary, StepRecord, ValidationRecord
from hrm_text.train.metrics import Throughput, device_memory_bytes, device_memory_total, peak_flops
from hrm_text.train.readback import Readback
from hrm_text.train.sharding import Sharding, chosen_sharding
from hrm_text.train.starting import starting_point
from hrm_text.train.step import Totals, TrainingStep
from hrm_text.train.watchdog import Watchdog
from hrm_text.train.world import World

MOST_SKIPPED_IN_A_ROW = 5
"""Steps without a finite gradient in a row after which the run stops: the weights themselves are broken by then."""

SAME_SIGNAL_SECONDS = 3.0
"""Within which a second signal to a rank is taken to be the first one again."""


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
    """A run: its data, model and optimizer, and the step that they are at. Every rank has one, and all do the same."""

    def __init__(
        self,
        config: TrainConfig,
        hooks: Sequence[Hook] = (),
        world: World | None = None,
        evaluator: Evaluator | None = None,
    ) -> None:
        """Open the data, build the model, and take over the newest checkpoint.

        hooks: only rank 0's are called. world: the ranks; None: this process is alone. evaluator: of rank 0, where the
        config names tasks to evaluate.
        """
        self.world = world = world or World()
        self.hooks = Hooks(hooks if world.is_main else ())
        self.step = 0
        """Steps launched; all of them are finished whenever a checkpoint is written."""
        self.watchdog: Watchdog | None = None
        if world.store is not None:
            self.watchdog = Watchdog(world.store, world.rank, world.size, config.distributed.timeout_seconds)
        # Planning a large epoch takes minutes, and no rank is to be blamed for them.
        with self.watchdog.paused() if self.watchdog is not None else contextlib.nullcontext():
            self._prepare(config, evaluator)

    def _prepare(self, config: TrainConfig, evaluator: Evaluator | None) -> None:
        """See ``__init__``."""
        world = self.world
        self.config = config = resolved(config)
        folder, saved = self._newest_checkpoint()
        position = LoaderState.from_dict(saved.state["loader"]) if saved is not None else None
        assert config.data.sampled is not None, "records are made into a sampled folder before training"
        with world.main_first():  # it leaves the plans of large epochs for the others to find
            self.loader = self._loader(config.data.sampled, config.data.epochs, position)
            self.validation = None
            if config.validation.sampled is not None:
                self.validation = self._loader(config.validation.sampled, 1)
                check_same_tokenizer(self.loader, self.validation)
        self.total_steps = min(self.loader.total_steps, config.max_steps or self.loader.total_steps)
        start = starting_point(config, self.loader.tokenizer_info, folder, saved, self._warn)
        self.base = start.base
        self.sharding = self._sharding()
        self.training = TrainingStep(
            config.model,
            config.optimizer,
            config,
            seed=config.seed,
            sharding=self.sharding,
            initial=start.weights,
            lora=start.lora,
        )
        del start  # the weights lie in the model by now
        self.model, self.optimizer, self.device = self.training.model, self.training.optimizer, self.training.device
        self.readback: Readback[Launched] = Readback(late=1 if self.device.type == "cuda" else 0)
        peak = peak_flops(self.device, self.training.dtype)
        self.meter = Throughput(None if peak is None else peak * world.size)
        self.saver = checkpoint.Saver(
            config.run / "checkpoints",
            keep_last=config.checkpoint.keep_last,
            keep_every=config.checkpoint.keep_every,
            group=world.saving_group,
        )
        self.evaluations = Evaluations(config.evaluate, evaluator, self.training, world, self.hooks, self.watchdog)
        self.tokens_seen = 0
        self.skipped = 0
        self.skipped_in_a_row = 0
        self.stop_requested = False
        """By a signal to this process."""
        self.stop_agreed = False
        """By all ranks."""
        self.save_agreed = False
        self._saved_at = time.monotonic()
        self.stalled_seconds = 0.0
        """How long checkpoints have kept training from going on."""
        self.last_checkpoint = folder
        self.not_saved: UserError | None = None
        """Why the newest checkpoint could not be written, until one can."""
        if folder is not None and saved is not None:
            self._continue_from(folder, saved)

    # ---------------------------------------------------------------------------------------------------- training --

    def run(self) -> RunSummary:
        """Train to the end, or until SIGINT or SIGTERM to any rank asks to save and stop."""
        config, started = self.config, time.monotonic()
        outcome: Literal["finished", "interrupted", "failed"] = "failed"
        if self.world.is_main:
            with whole_file(config.run / "config.yaml") as beside:
                beside.write_text(yaml.safe_dump(plain(config), sort_keys=False), encoding="utf-8")
        self.hooks.on_start(
            RunInfo(
                folder=config.run,
                start_step=self.step,
                total_steps=self.total_steps,
                parameters=config.model.num_parameters,
                device=self._describe(),
                config=plain(config),
            )
        )
        if self.sharding is not None:
            self.hooks.on_message("info", f"sharding: {self.sharding} ({self.sharding.reason})")
        self.evaluations.begin()
        batches = iter(self.loader)
        try:
            with self._signals():
                if self.evaluations.owed and self.step < self.total_steps:
                    self._evaluate()
                self.meter.start()
                while self.step < self.total_steps and not self._stopping():
                    epoch = self.loader.state.epoch
                    self._at(f"loading step {self.step + 1:,}")
                    batch, self.loader.state = next(batches)
                    self._at(f"computing step {self.step + 1:,}")
                    k, lr = self.k_at(self.step), config.optimizer.lr.at(self.step, self.total_steps)
                    sums = self.training.run(batch, k, lr, wishes=(self.stop_requested, self._wants_to_save()))
                    self.step += 1
                    self.tokens_seen += batch.tokens
                    launched = Launched(self.step, epoch, lr, k, batch.tokens, batch.supervised)
                    self.readback.put(sums, launched)
                    self._report(self.readback.due())
                    validating = self.validation is not None and self._due(config.validation.every_steps)
                    evaluating = self.evaluations.due(self.step, self.total_steps)
                    if validating or evaluating or self.save_agreed or self._due(config.checkpoint.every_steps):
                        self._report(self.readback.all())
                        if validating:
                            self._at(f"validating after step {self.step:,}")
                            self.hooks.on_validation(self.validate())
                        if evaluating:
                            self._evaluate()
                        if self.save_agreed or self._due(config.checkpoint.every_steps):
                            self.save()
                        self.meter.start()
                    self._tell_of_saves()
                if self.step < self.total_steps:
                    self._report(self.readback.all())
                    self.save()
                self._at(f"waiting for the checkpoint of step {self.step:,}")
                self._tell_of_saves(wait=True)
                if self.not_saved is not None:
                    raise self.not_saved
            outcome = "finished" if self.step == self.total_steps else "interrupted"
        except KeyboardInterrupt:
            outcome = "interrupted"
            raise
        finally:
            batches.close()  # type: ignore[attr-defined]  # iter() of a generator function: ends its threads
            seconds = time.monotonic() - started
            summary = RunSummary(
                self.step, self.total_steps, outcome, seconds, self.last_checkpoint, self.stalled_seconds
            )
            self.hooks.on_end(summary)
            if self.world.size == 1:
                self.saver.close()  # whoever catches an error may continue this run, from what is being written now
        self.saver.close()
        if self.watchdog is not None:
            self.watchdog.close()
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

    def _stopping(self) -> bool:
        """One process stops when it is asked to, ranks when all have heard of it."""
        return self.stop_agreed or (self.world.size == 1 and self.stop_requested)

    def _wants_to_save(self) -> bool:
        """By the clock, which is rank 0's."""
        minutes = self.config.checkpoint.every_minutes
        return self.world.is_main and minutes is not None and time.monotonic() - self._saved_at >= 60 * minutes

    def _at(self, doing: str) -> None:
        """Tell the watchdog what begins."""
        if self.watchdog is not None:
            self.watchdog.at(self.step, doing)

    def _report(self, arrived: Iterable[tuple[Launched, list[float]]]) -> None:
        """Tell the hooks of steps whose numbers have arrived, and act on what the ranks agreed on with them."""
        for launched, (*sums, finite, ranks_to_stop, ranks_to_save) in arrived:
            totals = Totals.of(sums)
            self.stop_agreed |= ranks_to_stop > 0
            self.save_agreed |= ranks_to_save > 0
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
            self._warn(f"step {step}: loss or gradient is not finite; the step was skipped")
        if self.skipped_in_a_row >= MOST_SKIPPED_IN_A_ROW:
            self._tell_of_saves(wait=True)  # one may be half written still, and it is where the run continues
            raise UserError(
                f"{self.skipped_in_a_row} steps in a row had a loss or gradient that is not finite, the last was step "
                f"{step}. Lower optimizer.lr.peak or lengthen its warm-up, check the data of these steps, and run "
                f"the same command again: it continues from {self.last_checkpoint or 'the start'}."
            )

    def _warn(self, text: str) -> None:
        self.hooks.on_message("warning", text)

    def _describe(self) -> str:
        """The ranks and their devices, for people."""
        if self.world.size == 1:
            return describe(self.config)
        machines = f" on {self.world.machines} machines" if self.world.machines > 1 else ""
        return f"{self.world.size} ranks{machines}, each {describe(self.config)}"

    # -------------------------------------------------------------------------------------------------- validation --

    @torch.no_grad()
    def validate(self) -> ValidationRecord:
        """Loss and accuracies of the averaged weights on the held-out records."""
        assert self.validation is not None
        started = time.monotonic()
        with self.training.averaged_weights():
            totals = self.training.evaluate(batch for step, _ in self.validation for batch in step.batches)
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

    def _evaluate(self) -> None:
        """Ask questions of the averaged weights; see ``Evaluations``."""
        self._at(f"evaluating after step {self.step:,}")
        self.evaluations.run(self.step, self.step == self.total_steps, lambda: self.stop_requested)

    # --------------------------------------------------------------------------------------------------- continuing --

    def save(self) -> None:
        """Begin to write a checkpoint of this moment; training goes on while it is written."""
        self._at(f"saving step {self.step:,}")
        state = {
            "step": self.step,
            "total_steps": self.total_steps,
            "tokens_seen": self.tokens_seen,
            "skipped": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
            "loader": self.loader.state.to_dict(),
            "rng": checkpoint.rng_state(),
            "tokenizer_info": self.loader.tokenizer_info,
            "base": self.base,
        }
        if self.config.evaluate.tasks:  # seconds, which no two runs share
            state["evaluation"] = self.evaluations.state()
        self.saver.begin(self.step, self.training.state(), state, plain(self.config))
        self._saved_at, self.save_agreed = time.monotonic(), False
        self._tell_of_saves()  # of the one before, which has ended by now

    def _tell_of_saves(self, wait: bool = False) -> None:
        """Tell of the checkpoints that are whole by now, with ``wait`` of all.

        One that failed, on a disk that is full, is a warning while training goes on. At the end it is an error, if it
        was the last.
        """
        while True:
            try:
                saved = self.saver.finished(wait)
            except UserError as error:
                self.not_saved = error
                self._warn(f"not saved: {error}")
                continue
            if saved is None:
                return
            self.not_saved, self.last_checkpoint = None, saved.folder
            self.stalled_seconds += saved.stalled_seconds
            self.hooks.on_checkpoint(CheckpointRecord(saved.step, saved.folder, saved.stalled_seconds, saved.seconds))

    def _newest_checkpoint(self) -> tuple[Path, checkpoint.SavedState] | tuple[None, None]:
        """The newest good checkpoint of this run, if there is one; one that this run cannot continue is an error."""
        root = self.config.run / "checkpoints"
        folder = checkpoint.latest_good(root, self._warn, self.world.host_group)
        if folder is None:
            return None, None
        if self.config.resume == "never":
            raise UserError(f"{folder} is there and resume is 'never': choose another run folder, or delete this one")
        saved = checkpoint.load_state(folder)
        check_same_model(self.config.model, saved.config.get("model", {}), folder)
        for change in changed_settings(self.config, saved.config, folder):
            self._warn(f"continuing with other settings: {change}")
        return folder, saved

    def _continue_from(self, folder: Path, saved: checkpoint.SavedState) -> None:
        """Take over all that training changes, however many ranks wrote it; the loader has its position already."""
        self.training.restore(lambda tensors: checkpoint.load_into(folder, tensors, self.world.host_group))
        checkpoint.restore_rng(saved.state["rng"])
        self.step, self.tokens_seen = saved.state["step"], saved.state["tokens_seen"]
        self.skipped, self.skipped_in_a_row = saved.state["skipped"], saved.state["skipped_in_a_row"]
        if "evaluation" in saved.state:
            self.evaluations.restore(saved.state["evaluation"])
        if saved.state["total_steps"] != self.total_steps:
            self._warn(
                f"{folder} is of a run of {saved.state['total_steps']:,} steps and this one has {self.total_steps:,}: "
                "its schedules differ from here on"
            )

    def _sharding(self) -> Sharding | None:
        """How the ranks share weights, moments and averages; None for one process."""
        if self.world.size == 1:
            return None
        asked = self.config.distributed
        if self.config.lora.rank:
            asked = dataclasses.replace(asked, sharding="ddp")
        memory = device_memory_total(torch.device(self.config.device))
        return chosen_sharding(asked, self.config.model, self.world, memory)

    def _loader(self, sampled: Location, epochs: int | None, state: LoaderState | None = None) -> Loader:
        data = self.config.data
        return Loader(
            sampled,
            tokens_per_batch=data.tokens_per_batch,
            bins=data.micro_batches,
            at_once=data.at_once,
            rank=self.world.rank,
            num_ranks=self.world.size,
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
        asked_at = 0.0

        def request_stop(number: int, frame: FrameType | None) -> None:
            nonlocal asked_at
            # Ranks may hear of one wish twice: from a batch system, and handed on by their launcher.
            if self.stop_requested and (self.world.size == 1 or time.monotonic() - asked_at > SAME_SIGNAL_SECONDS):
                raise KeyboardInterrupt
            self.stop_requested, asked_at = True, time.monotonic()

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
    assert config.data.sampled is not None
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
