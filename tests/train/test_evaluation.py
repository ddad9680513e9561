"""Evaluation while a run trains: nothing of the run changes, time is bounded, and no failure ends it."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from hrm_text.contracts import UserError
from hrm_text.settings import from_mapping, read_yaml
from hrm_text.train.checkpoint import rng_state
from hrm_text.train.config import EvaluateConfig, TrainConfig, plain
from hrm_text.train.evaluation import Evaluations, Scores
from hrm_text.train.hooks import EvaluationRecord, Hook, JsonlMetrics, Level
from hrm_text.train.loop import Trainer
from hrm_text.train.step import TrainingStep
from hrm_text.train.world import World, joined
from tests.train.forked_ranks import Ranks

MakeConfig = Callable[..., TrainConfig]
State = dict[str, Tensor]
SETTINGS = {"evaluate.tasks": ["sums"], "evaluate.every_steps": 3, "evaluate.most_share": 1.0}


class Clock:
    """Time that passes when it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr("hrm_text.train.evaluation.time.monotonic", lambda: self.now)


class Asks:
    """Scores weights by their sum, and uses up random numbers meanwhile."""

    description, questions = "asking sums", 2

    def __init__(self, *, fails: Exception | None = None, between: Callable[[int], None] = lambda step: None) -> None:
        self.steps: list[int] = []
        self.weights: dict[int, State] = {}
        self.fails, self.between = fails, between

    def __call__(self, step: int, weights: Mapping[str, Tensor], progress: Callable[[float], None]) -> Scores:
        self.steps.append(step)
        self.weights[step] = {name: tensor.clone() for name, tensor in weights.items()}
        random.random()
        torch.rand(3)
        self.between(step)
        progress(0.5)
        if self.fails is not None:
            raise self.fails
        total = sum(float(tensor.sum()) for tensor in weights.values())
        return {"sums": {"strict": total, "low": 0.0, "high": 1.0}}


def train(config: TrainConfig, asks: Asks | None, *hooks: Hook) -> Trainer:
    trainer = Trainer(config, [JsonlMetrics(config.run / "metrics.jsonl"), *hooks], evaluator=asks)
    trainer.run()
    return trainer


def test_training_is_the_same_to_the_bit_with_and_without_it(
    config: MakeConfig,
    tmp_path: Path,
    learned: Callable[[Trainer], State],
    assert_same: Callable[[State, State], None],
    untimed_metrics: Callable[[Path], list[dict[str, Any]]],
) -> None:
    torch.manual_seed(5)
    random.seed(5)
    without = train(config({"run": tmp_path / "without"}), None)
    states = [rng_state()]
    torch.manual_seed(5)
    random.seed(5)
    asks = Asks()
    with_it = train(config(SETTINGS | {"run": tmp_path / "with"}), asks)
    states.append(rng_state())
    assert asks.steps == [3, 6, 9, 12, 14]
    assert_same(learned(with_it), learned(without))
    assert states[0] == states[1]
    records = [untimed_metrics(tmp_path / name) for name in ("without", "with")]
    assert [each for each in records[1] if each["kind"] != "evaluation"] == records[0]
    evaluated = [each for each in records[1] if each["kind"] == "evaluation"]
    assert [each["step"] for each in evaluated] == asks.steps
    assert len({each["scores"]["sums"]["strict"] for each in evaluated}) == 5


def test_the_averaged_weights_are_asked(config: MakeConfig) -> None:
    asks = Asks()
    trainer = train(config(SETTINGS), asks)
    asked, model = asks.weights[14], trainer.model.state_dict()
    assert asked.keys() == model.keys()
    for name, average in trainer.optimizer.ema_weights().items():
        assert torch.equal(asked[name], average)
        assert not torch.equal(asked[name], model[name])


class Stops(Hook):
    def __init__(self, step: int) -> None:
        self.step = step
        self.trainer: Trainer | None = None

    def on_evaluation(self, record: EvaluationRecord) -> None:
        if record.step == self.step and self.trainer is not None:
            self.trainer.stop_requested = True


def test_a_resumed_run_has_the_same_curve_and_asks_nothing_twice(
    config: MakeConfig, tmp_path: Path, untimed_metrics: Callable[[Path], list[dict[str, Any]]]
) -> None:
    whole = config(SETTINGS | {"run": tmp_path / "whole"})
    train(whole, Asks())
    cut = config(SETTINGS | {"run": tmp_path / "cut"})
    stops, asked = Stops(6), Asks()
    stops.trainer = Trainer(cut, [JsonlMetrics(cut.run / "metrics.jsonl"), stops], evaluator=asked)
    assert stops.trainer.run().step == 6
    spent = stops.trainer.evaluations.state()
    again = Trainer(cut, [JsonlMetrics(cut.run / "metrics.jsonl")], evaluator=asked)
    assert again.evaluations.spent == pytest.approx(spent["spent"])
    assert again.evaluations.state()["seconds"] >= spent["spent"]
    again.run()
    assert asked.steps == [3, 6, 9, 12, 14]
    assert untimed_metrics(cut.run) == untimed_metrics(whole.run)


def test_one_that_a_stop_cuts_short_is_made_up_for(
    config: MakeConfig, tmp_path: Path, untimed_metrics: Callable[[Path], list[dict[str, Any]]]
) -> None:
    whole = config(SETTINGS | {"run": tmp_path / "whole"})
    train(whole, Asks())
    cut = config(SETTINGS | {"run": tmp_path / "cut"})
    trainers: list[Trainer] = []

    def stop(step: int) -> None:
        trainers[0].stop_requested |= step == 6 and len(trainers) == 1

    asks = Asks(between=stop)
    for expected in (6, 14):
        trainers.append(Trainer(cut, [JsonlMetrics(cut.run / "metrics.jsonl")], evaluator=asks))
        assert trainers[-1].run().step == expected
    assert asks.steps == [3, 6, 6, 9, 12, 14]
    assert untimed_metrics(cut.run) == untimed_metrics(whole.run)


@pytest.mark.parametrize("error", [UserError("no disk"), RuntimeError("CUDA out of memory"), KeyError("x")])
def test_a_failure_is_a_warning_and_the_run_goes_on(config: MakeConfig, recorder: Any, error: Exception) -> None:
    trainer = train(config(SETTINGS | {"max_steps": 4}), Asks(fails=error), recorder)
    assert trainer.step == 4
    told = [text for level, text in recorder.messages if level == "warning"]
    assert told == [f"no evaluation after step {step}: {error}; training goes on" for step in (3, 4)]
    assert trainer.evaluations.spent > 0


def test_tasks_without_an_evaluator_are_an_error(config: MakeConfig) -> None:
    with pytest.raises(ValueError, match="need an evaluator"):
        Trainer(config(SETTINGS))


# ----------------------------------------------------------------------------------------------------- what it may cost


class Told(Hook):
    def __init__(self) -> None:
        self.records: list[EvaluationRecord] = []
        self.messages: list[tuple[Level, str]] = []

    def on_evaluation(self, record: EvaluationRecord) -> None:
        self.records.append(record)

    def on_message(self, level: Level, text: str) -> None:
        self.messages.append((level, text))


class Bounded:
    """A run by a clock: a step takes a second, evaluations what they are told to."""

    def __init__(self, trainer: Trainer, monkeypatch: pytest.MonkeyPatch, share: float, takes: float) -> None:
        self.clock, self.told, self.takes = Clock(monkeypatch), Told(), takes
        settings = from_mapping(EvaluateConfig, {"tasks": ["sums"], "every_steps": 10, "most_share": share}, "test")
        self.asks = Asks(between=self.pass_time)
        self.evaluations = self.made(settings, trainer.training)
        self.evaluations.begin()

    def made(self, settings: EvaluateConfig, training: TrainingStep) -> Evaluations:
        return Evaluations(settings, self.asks, training, World(), self.told)

    def pass_time(self, step: int) -> None:
        self.clock.now += self.takes

    def run(self, first: int, last: int) -> None:
        for step in range(first, last + 1):
            self.clock.now += 1
            if self.evaluations.due(step, 1000):
                self.evaluations.run(step, step == 1000, lambda: False)


@pytest.fixture
def trainer(config: MakeConfig) -> Trainer:
    return Trainer(config())


def test_evaluations_stay_below_their_share_and_say_once_that_they_are_late(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Bounded(trainer, monkeypatch, share=0.05, takes=3.0)
    run.run(1, 1000)
    shares = [record.share for record in run.told.records]
    assert max(shares) <= 0.05
    assert len(shares) >= 10, "and most of the share is used"
    assert run.told.records[-1].seconds == 3.0
    # 3 s do not fit after 10 to 60 steps: the first is given up, from which its cost is known.
    assert run.asks.steps[0] == 10 < run.told.records[0].step
    texts = [text for _, text in run.told.messages]
    assert [text for text in texts if "given up" in text] == [
        "evaluation after step 10 was given up: it would take more than 5.0% of the run's time"
    ]
    [postponed] = [text for text in texts if text.startswith("evaluation is postponed")]
    assert "fits into 5.0% of the run's time" in postponed


def test_one_that_takes_ever_longer_is_given_up_in_time(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Bounded(trainer, monkeypatch, share=0.1, takes=0.1)
    run.run(1, 100)
    assert len(run.told.records) == 10
    run.takes = 60.0  # from one to the next: it is at most one step of the engine too long
    run.run(101, 110)
    assert len(run.told.records) == 10
    run.run(111, 500)
    assert len(run.asks.steps) == 11, "its cost is known by now"


def test_after_the_last_step_it_is_said_that_there_was_no_time(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Bounded(trainer, monkeypatch, share=0.01, takes=30.0)
    run.run(1, 1000)
    assert run.told.records == []
    assert "there is no evaluation after the last step: it does not fit into 1.0%" in run.told.messages[-1][1]


def test_time_before_a_restart_counts(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Bounded(trainer, monkeypatch, share=0.05, takes=3.0)
    run.run(1, 200)
    state = json.loads(json.dumps(run.evaluations.state()))
    assert state["seconds"] == pytest.approx(200 + run.evaluations.spent)
    run.evaluations = run.made(run.evaluations.config, trainer.training)
    run.evaluations.restore(state)
    run.run(201, 1000)
    assert max(record.share for record in run.told.records) <= 0.05
    assert run.told.records[-1].share > 0.04


# ----------------------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"every_steps": 0}, "every_steps"),
        ({"limit": 0}, "limit"),
        ({"most_share": 0}, "most_share"),
        ({"most_share": 1.5}, "most_share"),
        ({"batch": 0}, "batch"),
        ({"every": 5}, "every"),
    ],
)
def test_settings_that_make_no_sense_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        from_mapping(EvaluateConfig, {"tasks": ["gsm8k"]} | values, "evaluate")


def test_tasks_are_a_list_or_one_text() -> None:
    for tasks in ("gsm8k,add:direct", ["gsm8k", "add:direct"]):
        assert from_mapping(EvaluateConfig, {"tasks": tasks}, "evaluate").tasks == ("gsm8k", "add:direct")


# -------------------------------------------------------------------------------------------------------------- ranks


def slow(config: str, kind: str) -> int:
    """A rank of a run whose evaluations take longer than ranks may hang."""
    settings = from_mapping(TrainConfig, read_yaml(Path(config)), config)
    seconds = 5.0 if kind == "slow" else 0.0
    asks = Asks(between=lambda step: time.sleep(seconds), fails=RuntimeError("no luck") if kind == "fails" else None)
    with joined("cpu", settings.distributed.timeout_seconds) as world:
        hooks = [JsonlMetrics(settings.run / "metrics.jsonl")] if world.is_main else []
        summary = Trainer(settings, hooks, world, asks if world.is_main else None).run()
        # In one piece, or two ranks' lines may be one.
        print(json.dumps({"outcome": summary.outcome, "asked": asks.steps}) + "\n", end="", flush=True)
    return 0


@pytest.mark.parametrize("kind", ["slow", "fails"])
def test_ranks_wait_for_the_one_that_asks_even_if_it_fails(
    config: MakeConfig, tmp_path: Path, forked: Ranks, kind: str
) -> None:
    settings = config(SETTINGS | {"max_steps": 3, "distributed.timeout_seconds": 4.0, "distributed.sharding": "fsdp"})
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(plain(settings)))
    ended = forked.run(2, "tests.train.test_evaluation:slow", tmp_path, config=str(path), kind=kind)
    told = sorted(json.loads(line)["asked"] for line in ended.out.splitlines() if line.startswith("{"))
    assert told == [[], [3]]
    kinds = [json.loads(line)["kind"] for line in (settings.run / "metrics.jsonl").read_text().splitlines()]
    assert kinds.count("step") == 3
    assert kinds.count("evaluation") == (0 if kind == "fails" else 1)
