from __future__ import annotations

import dataclasses
import math
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
import yaml
from torch import Tensor

from hrm_text.contracts import PackedBatch, UserError
from hrm_text.data.loader import LoaderStep
from hrm_text.data.tokenizer import train_tokenizer
from hrm_text.files import read_json, write_json
from hrm_text.model.checkpoint_files import load_state, step_folders
from hrm_text.model.config import RECURRENCE
from hrm_text.model.head import LossSums
from hrm_text.settings import from_mapping, read_yaml
from hrm_text.train.checkpoint_storage import Writer
from hrm_text.train.config import TrainConfig
from hrm_text.train.hooks import JsonlMetrics
from hrm_text.train.loop import Trainer, resolved
from hrm_text.train.readback import Readback
from hrm_text.train.step import Totals, added

MakeConfig = Callable[..., TrainConfig]
State = dict[str, Tensor]


def first_step(trainer: Trainer) -> LoaderStep:
    step, _ = next(iter(trainer.loader))
    return step


# ----------------------------------------------------------------------------------------------------- skipped steps --


@pytest.mark.parametrize("number", ["nan", "inf"])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(
    config: MakeConfig,
    recorder: Any,
    monkeypatch: pytest.MonkeyPatch,
    learned: Callable[[Trainer], State],
    assert_same: Callable[[State, State], None],
    number: str,
    micro_batches: int,
) -> None:
    trainer = Trainer(config({"max_steps": 4, "data.micro_batches": micro_batches}), [recorder])
    loss, run = trainer.training.loss, trainer.training.run
    before_and_after: list[tuple[State, State]] = []

    def poisoned(batch: PackedBatch, k: int | None) -> LossSums:
        sums = loss(batch, k)
        return dataclasses.replace(sums, loss=sums.loss * float(number)) if trainer.step in (1, 2) else sums

    def observed(batch: LoaderStep, k: int, lr: float, wishes: Sequence[bool]) -> Tensor:
        before = learned(trainer)
        sums = run(batch, k, lr, wishes)
        before_and_after.append((before, learned(trainer)))
        return sums

    monkeypatch.setattr(trainer.training, "loss", poisoned)
    monkeypatch.setattr(trainer.training, "run", observed)
    trainer.run()
    assert [record.skipped for record in recorder.steps] == [0, 1, 2, 2]
    assert [math.isfinite(record.loss) for record in recorder.steps] == [True, False, False, True]
    assert recorder.messages == [("warning", "step 2: loss or gradient is not finite; the step was skipped")]
    for step, (before, after) in enumerate(before_and_after):
        if step in (1, 2):
            assert_same(after, before)
        else:
            assert not torch.equal(after["lm_head.weight/"], before["lm_head.weight/"])


def test_what_is_read_a_step_late_is_the_same(
    config: MakeConfig,
    recorder: Any,
    monkeypatch: pytest.MonkeyPatch,
    untimed_metrics: Callable[[Path], list[dict[str, Any]]],
    tmp_path: Path,
) -> None:
    """On a GPU a step is launched before the one before it is read: the records and the checkpoints do not show it."""
    told: dict[int, list[Any]] = {}
    events: list[tuple[str, int]] = []
    for late in (0, 1, 3):
        settings = config({"run": tmp_path / str(late), "checkpoint.every_steps": 3, "max_steps": 11})
        trainer = Trainer(settings, [recorder, JsonlMetrics(settings.run / "metrics.jsonl")])
        trainer.readback = Readback(late)
        run, loss = trainer.training.run, trainer.training.loss

        def observed(*arguments: Any, wishes: Any, run: Any = run, trainer: Trainer = trainer) -> Tensor:
            events.append(("launched", trainer.step + 1))
            return run(*arguments, wishes)

        def poisoned(batch: PackedBatch, k: int | None, loss: Any = loss, trainer: Trainer = trainer) -> LossSums:
            sums = loss(batch, k)  # steps 3, 7 and 8; validation after step 5 is not poisoned
            return dataclasses.replace(sums, loss=sums.loss * (math.inf if trainer.step in (2, 6, 7) and k else 1))

        monkeypatch.setattr(trainer.training, "run", observed)
        monkeypatch.setattr(trainer.training, "loss", poisoned)
        monkeypatch.setattr(recorder, "on_step", lambda record: events.append(("read", record.step)))
        trainer.run()
        states = [load_state(folder).state for folder in step_folders(settings.run / "checkpoints")]
        assert [(state["step"], state["skipped"], state["skipped_in_a_row"]) for state in states] == [
            (6, 1, 0), (9, 3, 0), (11, 3, 0)
        ]  # fmt: skip
        told[late] = untimed_metrics(settings.run)
        if late == 1:  # step 2 is launched before 1 is read; all is read before saving (3, 6, 9) and validating (5, 10)
            order = "L1 L2 R1 L3 R2 R3 L4 L5 R4 R5 L6 R6 L7 L8 R7 L9 R8 R9 L10 R10 L11 R11"
            assert " ".join(what[0].upper() + str(step) for what, step in events) == order
        events.clear()
    assert told[0] == told[1] == told[3]
    assert [record["skipped"] for record in told[0] if record["kind"] == "step"] == [0, 0, 1, 1, 1, 1, 2, 3, 3, 3, 3]


def test_a_gradient_that_is_not_finite_is_skipped_though_the_loss_is(config: MakeConfig, recorder: Any) -> None:
    trainer = Trainer(config({"max_steps": 1}), [recorder])
    weight = trainer.model.lm_head.weight
    before = weight.detach().clone()
    weight.register_hook(lambda gradient: gradient.masked_fill(gradient == gradient.max(), float("inf")))
    trainer.run()
    assert trainer.skipped == 1
    assert math.isfinite(recorder.steps[0].loss)
    assert torch.equal(weight, before)


def test_five_in_a_row_stop_the_run_with_advice(
    config: MakeConfig, recorder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow_checkpoints(monkeypatch)
    settings = config({"checkpoint.every_steps": 3, "data.tokens_per_batch": 64})
    trainer = Trainer(settings, [recorder])
    with torch.no_grad():
        trainer.model.lm_head.weight[7, 0] = float("nan")
    with pytest.raises(UserError) as error:
        trainer.run()
    assert len(recorder.steps) == 5
    assert recorder.summary.outcome == "failed"
    message = str(error.value)
    assert "5 steps in a row had a loss or gradient that is not finite, the last was step 5" in message
    assert "Lower optimizer.lr.peak" in message
    assert f"continues from {settings.run / 'checkpoints' / 'step_00000003'}" in message
    # The two skipped after the checkpoint come again, and with the three before it that makes five.
    again = Trainer(settings, [recorder])
    assert (again.skipped, again.skipped_in_a_row) == (3, 3)
    with pytest.raises(UserError, match="the last was step 5"):
        again.run()


def slow_checkpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpoints take longer to become whole than the steps after them."""
    finish = Writer.finish

    def slowly(writer: Writer, **written: Any) -> None:
        time.sleep(1)
        finish(writer, **written)

    monkeypatch.setattr(Writer, "finish", slowly)


def test_an_error_in_training_loses_no_checkpoint_that_is_being_written(
    config: MakeConfig, recorder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow_checkpoints(monkeypatch)

    settings = config({"checkpoint.every_steps": 3, "validation.sampled": None})
    trainer = Trainer(settings, [recorder])
    run, calls = trainer.training.run, []

    def failing(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 5:
            raise RuntimeError("a kernel failed")
        return run(*arguments, **options)

    monkeypatch.setattr(trainer.training, "run", failing)
    with pytest.raises(RuntimeError, match="a kernel failed"):
        trainer.run()
    assert Trainer(settings, [recorder]).step == 3


# ------------------------------------------------------------------------------------------------------ a whole run --


def test_k_grows_as_the_schedule_says_for_hrm(config: MakeConfig, recorder: Any) -> None:
    Trainer(config({"credit.warmup_ratio": 0.5, "validation.sampled": None}), [recorder]).run()
    # 14 steps, so K is 2 + floor(3 step / 7), step counted from 0.
    assert [record.k for record in recorder.steps] == [2, 2, 2, 3, 3, 4, 4, 5, 5, 5, 5, 5, 5, 5]
    assert [record.lr for record in recorder.steps[:5]] == pytest.approx([1e-3, 2e-3, 3e-3, 3e-3, 3e-3])
    assert [record.step for record in recorder.steps] == list(range(1, 15))
    assert [record.epoch for record in recorder.steps] == [0] * 7 + [1] * 7


@pytest.mark.parametrize("architecture", RECURRENCE)
def test_every_architecture_learns(config: MakeConfig, recorder: Any, architecture: str) -> None:
    changes = {"model.architecture": architecture, "optimizer.lr.peak": 1e-2, "validation.sampled": None}
    Trainer(config({**changes, "data.micro_batches": 1}), [recorder]).run()
    losses = [record.loss for record in recorder.steps]
    assert len(losses) > 20
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    constant = {record.k for record in recorder.steps} == {RECURRENCE[architecture]["bp_steps"]}
    assert constant == (architecture != "hrm")


def test_masks_and_supervision_make_different_objectives(config: MakeConfig, tmp_path: Path) -> None:
    def first(changes: dict[str, Any]) -> tuple[float, int]:
        trainer = Trainer(
            config({"run": tmp_path / str(changes), "max_steps": 2, "validation.sampled": None, **changes})
        )
        trainer.run()
        step = first_step(trainer)
        sums = added([trainer.training.loss(batch, None) for batch in step.batches])
        return Totals.of(sums.tolist()).loss, step.supervised

    prefix, supervised = first({})
    causal, supervised_causal = first({"model.prefix_lm": False})
    everything, supervised_everything = first({"data.supervise": "all"})
    assert supervised == supervised_causal < supervised_everything
    assert len({round(loss, 3) for loss in (prefix, causal, everything)}) == 3


def test_bfloat16_computes_beside_fp32_master_weights(config: MakeConfig) -> None:
    trainer = Trainer(config({"dtype": "bfloat16", "max_steps": 2}))
    trainer.run()
    assert trainer.model.lm_head.weight.dtype == torch.bfloat16
    master = trainer.optimizer.state_dict()["weights"]["lm_head.weight"]
    assert master.dtype == torch.float32
    assert torch.equal(master.bfloat16(), trainer.model.lm_head.weight)
    resumed = Trainer(config({"dtype": "bfloat16", "max_steps": 2}))
    assert torch.equal(resumed.optimizer.state_dict()["weights"]["lm_head.weight"], master)


def test_max_steps_ends_the_run_and_its_schedules(config: MakeConfig, recorder: Any) -> None:
    changes = {"max_steps": 3, "optimizer.lr": {"peak": 1.0, "warmup_steps": 0, "decay": "cosine", "floor": 0.25}}
    summary = Trainer(config(changes), [recorder]).run()
    assert (summary.outcome, summary.step, summary.total_steps) == ("finished", 3, 3)
    assert summary.checkpoint == recorder.checkpoints[-1]
    assert [record.lr for record in recorder.steps] == pytest.approx([1.0, 0.625, 0.25])
    # More steps than the data has: the data ends it.
    assert Trainer(config({"max_steps": 1000, "run": "never written"})).total_steps == 14


def test_the_run_folder_says_how_it_was_made(config: MakeConfig) -> None:
    trainer = Trainer(config({"max_steps": 1}))
    trainer.run()
    written = from_mapping(TrainConfig, read_yaml(trainer.config.run / "config.yaml"), "config.yaml")
    assert written == trainer.config == resolved(written)
    chosen = (written.device, written.dtype, written.blocks, written.attention, written.recompute, written.fp8)
    assert chosen == ("cpu", "float32", "plain", "grouped", "none", False)
    saved = trainer.config.run / "checkpoints" / "step_00000001" / "config.yaml"
    assert yaml.safe_load(saved.read_text()) == read_yaml(trainer.config.run / "config.yaml")


# ------------------------------------------------------------------------------------------------------- validation --


def test_validation_is_of_the_averaged_weights_and_leaves_the_live_ones(
    config: MakeConfig,
    recorder: Any,
    learned: Callable[[Trainer], State],
    assert_same: Callable[[State, State], None],
) -> None:
    trainer = Trainer(config({"optimizer.lr.peak": 1e-2}), [recorder])
    trainer.run()
    assert [record.step for record in recorder.validations] == [5, 10, 14]
    before = learned(trainer)
    pointers = {name: parameter.data_ptr() for name, parameter in trainer.model.named_parameters()}
    record = trainer.validate()
    assert_same(learned(trainer), before)
    assert pointers == {name: parameter.data_ptr() for name, parameter in trainer.model.named_parameters()}
    assert record.loss == recorder.validations[-1].loss
    assert record.samples == 16

    def held_out_loss() -> float:
        assert trainer.validation is not None
        batches = [batch for step, _ in trainer.validation for batch in step.batches]
        return Totals.of(added([trainer.training.loss(batch, None) for batch in batches]).tolist()).mean_loss

    raw = held_out_loss()
    trainer.model.load_state_dict(trainer.optimizer.ema_weights(), strict=False)
    assert record.loss == held_out_loss() != raw


def test_live_weights_come_back_after_an_error(
    config: MakeConfig, learned: Callable[[Trainer], State], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(config({"max_steps": 2}))
    trainer.run()
    before = learned(trainer)["lm_head.weight/"]

    def interrupted(*_: Any) -> LossSums:
        assert not torch.equal(trainer.model.lm_head.weight, before)
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer.training, "loss", interrupted)
    with pytest.raises(KeyboardInterrupt):
        trainer.validate()
    assert torch.equal(trainer.model.lm_head.weight, before)


def test_validation_with_another_tokenizer_is_an_error(config: MakeConfig, tmp_path: Path, held_out_dir: Path) -> None:
    other = train_tokenizer(iter(["other words altogether"] * 9), 300, tmp_path / "other")
    shutil.copytree(held_out_dir, tmp_path / "held_out")
    metadata = read_json(tmp_path / "held_out" / "metadata.json")
    metadata["tokenizer_info"] |= {"tokenizer_path": str(other), "vocab_size": 300}
    write_json(tmp_path / "held_out" / "metadata.json", metadata)
    with pytest.raises(UserError, match=r"made with different tokenizers \(.*vocab_size: 300 and 320"):
        Trainer(config({"validation.sampled": tmp_path / "held_out"}))


# --------------------------------------------------------------------------------------------------------- settings --


def test_data_behind_a_url_trains_the_same_model(config: MakeConfig, sampled_dir: Path, tmp_path: Path) -> None:
    """Copied to a store that only fsspec can read, settings written to the run's folder and read back included."""
    memory = fsspec.filesystem("memory")
    memory.put(f"{sampled_dir}/", "/bucket/sampled/", recursive=True)
    local, remote = (
        Trainer(config({"max_steps": 3, "validation.sampled": None} | change))
        for change in ({}, {"data.sampled": "memory://bucket/sampled", "run": str(tmp_path / "remote")})
    )
    local.run()
    remote.run()
    for (name, parameter), other in zip(local.model.named_parameters(), remote.model.parameters(), strict=True):
        assert torch.equal(parameter, other), name
    written = from_mapping(TrainConfig, read_yaml(remote.config.run / "config.yaml"), "config.yaml")
    assert written.data.sampled == "memory://bucket/sampled"


def test_vocabulary_and_context_come_from_the_data(config: MakeConfig) -> None:
    model = resolved(config()).model
    assert model.vocab_size == 512  # 320 entries, rounded up to a multiple of 256
    assert model.max_position_embeddings == 64
    larger = resolved(config({"model.vocab_size": 1024, "model.max_position_embeddings": 128})).model
    assert (larger.vocab_size, larger.max_position_embeddings) == (1024, 128)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.vocab_size": 256}, r"model\.vocab_size is 256, but .* needs 512"),
        ({"model.max_position_embeddings": 32}, r"model\.max_position_embeddings is 32, but .* needs 64"),
        ({"data.epochs": 3}, r"epochs: .* holds 2, found 3"),
        ({"data.sampled": "nowhere"}, r"nowhere/metadata\.json: no such file"),
        ({"data.tokens_per_batch": 16}, r"16"),
    ],
)
def test_settings_that_do_not_fit_the_data_are_errors(config: MakeConfig, change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Trainer(config(change))


def test_a_device_that_is_not_there_lists_those_that_are(config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    for device in ("cuda", "mps"):
        with pytest.raises(UserError, match=rf"device: '{device}' is not available here; choose from \['cpu'\]"):
            Trainer(config({"device": device}))
    assert resolved(config()).device == "cpu"
    with pytest.raises(UserError, match="'auto', 'cpu', 'cuda' or 'mps'"):
        config({"device": "tpu"})
