"""Resume is invisible: however a run was cut into pieces, it ends as if it had not been."""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import yaml
from torch import Tensor

from hrm_text.contracts import UserError
from hrm_text.files import explained_disk_errors
from hrm_text.train.checkpoint import Saver
from hrm_text.train.checkpoint_storage import Writer
from hrm_text.train.config import TrainConfig, plain
from hrm_text.train.hooks import Hook, JsonlMetrics, Level, StepRecord
from hrm_text.train.loop import Trainer

MakeConfig = Callable[..., TrainConfig]
State = dict[str, Tensor]
TOTAL_STEPS = 14


class StopAfter(Hook):
    """Asks the run to stop once it has finished some steps, as Ctrl-C does."""

    def __init__(self, *steps: int, number: int = signal.SIGINT) -> None:
        self.steps, self.number = steps, number

    def on_step(self, record: StepRecord) -> None:
        if record.step in self.steps:
            signal.raise_signal(self.number)


def train(config: TrainConfig, *hooks: Hook) -> Trainer:
    trainer = Trainer(config, [JsonlMetrics(config.run / "metrics.jsonl"), *hooks])
    trainer.run()
    return trainer


@pytest.fixture(scope="session")
def whole_runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[State, list[dict[str, Any]]]]:
    return {}


@pytest.fixture
def whole_run(
    config: MakeConfig,
    tmp_path: Path,
    learned: Callable[[Trainer], State],
    untimed_metrics: Callable[[Path], list[dict[str, Any]]],
    whole_runs: dict[str, tuple[State, list[dict[str, Any]]]],
) -> tuple[State, list[dict[str, Any]]]:
    """What the tiny run ends with when nothing disturbs it: made once."""
    if "tiny" not in whole_runs:
        trainer = train(config({"run": tmp_path / "whole"}))
        assert trainer.total_steps == TOTAL_STEPS
        assert len(trainer.loader.steps_per_epoch) == 2
        whole_runs["tiny"] = learned(trainer), untimed_metrics(tmp_path / "whole")
    return whole_runs["tiny"]


@pytest.fixture
def assert_ends_the_same(
    whole_run: tuple[State, list[dict[str, Any]]],
    learned: Callable[[Trainer], State],
    assert_same: Callable[[State, State], None],
    untimed_metrics: Callable[[Path], list[dict[str, Any]]],
) -> Callable[[Trainer], None]:
    def check(trainer: Trainer) -> None:
        state, records = whole_run
        assert trainer.step == trainer.total_steps
        assert_same(learned(trainer), state)
        assert untimed_metrics(trainer.config.run) == records

    return check


def test_a_run_cut_after_every_step_ends_the_same(
    config: MakeConfig, assert_ends_the_same: Callable[[Trainer], None]
) -> None:
    settings, trainer = config(), None
    for step in range(1, TOTAL_STEPS):
        trainer = train(settings, StopAfter(step, number=random.choice([signal.SIGINT, signal.SIGTERM])))
        assert trainer.step == step
    trainer = train(settings)
    assert_ends_the_same(trainer)
    # Started once more, a finished run does nothing and says that it is finished.
    again = Trainer(settings)
    assert again.run().outcome == "finished"
    assert_ends_the_same(again)


def test_what_was_cut_says_where_it_continues(config: MakeConfig, recorder: Any) -> None:
    trainer = Trainer(config(), [recorder, StopAfter(3)])
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    summary = trainer.run()
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    assert (summary.outcome, summary.step, summary.total_steps) == ("interrupted", 3, TOTAL_STEPS)
    assert summary.checkpoint == trainer.config.run / "checkpoints" / "step_00000003"
    assert recorder.checkpoints == [summary.checkpoint]
    assert recorder.summary == summary


def test_a_second_ctrl_c_stops_at_once(config: MakeConfig, recorder: Any) -> None:
    class Impatient(Hook):
        def on_step(self, record: StepRecord) -> None:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        Trainer(config(), [recorder, Impatient()]).run()
    assert recorder.checkpoints == []
    assert recorder.summary.outcome == "interrupted"


# ------------------------------------------------------------------------------------------------ in other processes --


def started(settings: TrainConfig, folder: Path, at_step: int) -> subprocess.Popen[str]:
    """``hrm-text train`` in a process of its own, once it has finished a few steps."""
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(plain(settings)))
    process = subprocess.Popen(
        [sys.executable, "-W", "error", "-m", "hrm_text", "train", str(file)],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())},
    )
    metrics = settings.run / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (metrics.exists() and metrics.read_bytes().count(b"\n") >= at_step):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, "no step within a minute"
        time.sleep(0.005)
    return process


@pytest.fixture
def long_enough(config: MakeConfig) -> TrainConfig:
    """The tiny run with a step that is as long as a signal needs to arrive: saving fourteen times takes a while."""
    return config({"checkpoint.every_steps": 1})


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_the_command_saves_on_a_signal_and_exits_with_0(
    long_enough: TrainConfig, tmp_path: Path, name: str, assert_ends_the_same: Callable[[Trainer], None]
) -> None:
    process = started(long_enough, tmp_path, at_step=1)
    process.send_signal(signal.Signals[name])
    told = process.communicate(timeout=60)[1]
    assert process.returncode == 0, told
    assert "interrupted after " in told
    assert f"to continue: hrm-text train {tmp_path / 'run.yaml'}" in told
    assert_ends_the_same(train(long_enough))


def test_a_killed_process_loses_nothing_that_was_saved(
    long_enough: TrainConfig, tmp_path: Path, assert_ends_the_same: Callable[[Trainer], None]
) -> None:
    process = started(long_enough, tmp_path, at_step=1)
    time.sleep(random.uniform(0, 0.2))
    process.kill()
    process.communicate()
    assert_ends_the_same(train(long_enough))


# ------------------------------------------------------------------------------------------------------- what is bad --


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    config: MakeConfig, recorder: Any, assert_ends_the_same: Callable[[Trainer], None]
) -> None:
    settings = config()
    train(settings, StopAfter(10))
    checkpoints = settings.run / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step_00000004", "step_00000008", "step_00000010"]
    damaged = checkpoints / "step_00000010" / "rank_00000_00.safetensors"
    flip_a_bit(damaged)
    trainer = Trainer(settings, [recorder, JsonlMetrics(settings.run / "metrics.jsonl")])
    assert trainer.step == 8
    [(level, text)] = recorder.messages
    assert level == "warning"
    assert f"{damaged}: damaged" in text
    assert str(checkpoints / "step_00000008") in text
    trainer.run()
    assert_ends_the_same(trainer)


def test_when_all_are_damaged_nothing_is_overwritten(config: MakeConfig) -> None:
    settings = config({"max_steps": 8})
    train(settings)
    for folder in (settings.run / "checkpoints").iterdir():
        flip_a_bit(folder / "rank_00000_00.safetensors")
    with pytest.raises(UserError, match=r"none of its 2 checkpoints can be used[\s\S]*another folder"):
        Trainer(settings)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.hidden_size": 48}, r"hidden_size is 32 there and 48 here"),
        ({"model.architecture": "transformer"}, r"architecture is 'hrm' there and 'transformer' here"),
        ({"model.norm": "pre", "model.num_layers": 4}, r"num_layers is 2 there and 4 here; norm is 'magic' there"),
    ],
)
def test_a_checkpoint_of_another_model_is_one_clear_error(
    config: MakeConfig, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    train(config({"max_steps": 1}))
    with pytest.raises(UserError, match=message) as error:
        Trainer(config({"max_steps": 1, **change}))
    assert str(tmp_path / "run" / "checkpoints" / "step_00000001") in str(error.value)
    assert "Give this run another folder" in str(error.value)


def test_resume_never_refuses_a_folder_with_a_checkpoint(config: MakeConfig) -> None:
    settings = config({"resume": "never", "max_steps": 1})
    train(settings)
    with pytest.raises(UserError, match=r"step_00000001 is there and resume is 'never': choose another run folder"):
        Trainer(settings)
    shutil.rmtree(settings.run)
    Trainer(settings)


def test_a_run_that_is_made_longer_says_that_its_schedules_differ(config: MakeConfig, recorder: Any) -> None:
    train(config({"max_steps": 2}))
    trainer = Trainer(config({"max_steps": 3}), [recorder])
    [(level, text)] = recorder.messages
    assert level == "warning"
    assert "of a run of 2 steps and this one has 3" in text
    assert trainer.run().step == 3


def test_a_disk_that_is_full_for_a_while_costs_a_checkpoint_and_not_the_run(
    config: MakeConfig,
    recorder: Any,
    monkeypatch: pytest.MonkeyPatch,
    assert_ends_the_same: Callable[[Trainer], None],
) -> None:
    write = Writer.write_data

    def full_at_first(self: Writer, *arguments: Any) -> Any:
        if self.step < 8:
            with explained_disk_errors(self.folder):
                raise OSError(errno.ENOSPC, "No space left on device")
        return write(self, *arguments)

    monkeypatch.setattr(Writer, "write_data", full_at_first)
    settings = config()
    trainer = train(settings, recorder)
    [(level, text)] = recorder.messages
    assert level == "warning"
    assert f"not saved: {settings.run / 'checkpoints' / 'step_00000004'}: the disk is full" in text
    assert [path.name for path in recorder.checkpoints] == ["step_00000008", "step_00000012", "step_00000014"]
    assert_ends_the_same(trainer)


@pytest.mark.parametrize("seconds", [0.0, 0.3])
def test_a_disk_that_is_full_at_the_end_is_an_error(
    seconds: float, config: MakeConfig, recorder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Writer, *arguments: Any) -> Any:
        time.sleep(seconds)
        with explained_disk_errors(self.folder):
            raise OSError(errno.ENOSPC, "No space left on device")

    # Whether it fails before the run asks for it, or after.
    begin = Saver.begin

    def begin_and_wait(*arguments: Any) -> None:
        begin(*arguments)
        time.sleep(0.3 - seconds)

    monkeypatch.setattr(Saver, "begin", begin_and_wait)
    monkeypatch.setattr(Writer, "write_data", full)
    for hooks in ([], [StopAfter(1)]):
        with pytest.raises(UserError, match="the disk is full"):
            Trainer(config({"max_steps": 2}), [*hooks, recorder]).run()
        assert recorder.summary.outcome == "failed"


def test_batches_of_another_size_are_refused_and_other_changes_are_told(config: MakeConfig, tmp_path: Path) -> None:
    train(config({"run": tmp_path / "run"}), StopAfter(3))
    size = config({"run": tmp_path / "run"}).data.tokens_per_batch
    with pytest.raises(UserError, match=f"data.tokens_per_batch was {size} and is {2 * size}.*Put the sizes back"):
        Trainer(config({"run": tmp_path / "run", "data.tokens_per_batch": 2 * size}))

    class Messages(Hook):
        told: ClassVar[list[str]] = []

        def on_message(self, level: Level, text: str) -> None:
            self.told.append(text)

    Trainer(config({"run": tmp_path / "run", "optimizer.weight_decay": 0.05}), [Messages()])
    assert Messages.told == ["continuing with other settings: optimizer.weight_decay was 0.1 and is 0.05"]
