"""What a run asks while it trains: the same scores as `hrm-text eval` gives its weights, in bounded memory."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import rich.console
import torch
import yaml

from hrm_text.contracts import UserError
from hrm_text.convert.huggingface import export
from hrm_text.data.procedural import generate
from hrm_text.data.records import write_jsonl
from hrm_text.data.tokenizer import train_tokenizer
from hrm_text.files import read_json
from hrm_text.infer.engine import DecodingEngine
from hrm_text.model.config import ModelConfig
from hrm_text.model.recurrence import build
from hrm_text.model.weights import write_weights
from hrm_text.recipes.evaluation import EngineAnswerer, Settings, evaluate_weights
from hrm_text.recipes.run_evaluation import PAGES_OF, RunEvaluator
from hrm_text.recipes.train import train
from hrm_text.recipes.tuning_data import prepared
from hrm_text.settings import from_mapping
from hrm_text.train.loop import Trainer
from hrm_text.train.starting import train_config
from tests.train.forked_ranks import Ranks, started

FIXTURES = Path(__file__).parents[1] / "eval" / "fixtures"
SIZES = {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "head_dim": 16, "inner_multiple": 16}
ASKED = {"tasks": "upper,repeat,upper:noisy", "every_steps": 2, "limit": 5, "seed": 3, "most_share": 1.0, "batch": 3}
LORA = {"rank": 4, "alpha": 64.0}

Values = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """weights/ to start from, and my.jsonl."""
    folder = tmp_path_factory.mktemp("shared")
    texts = (text for each in generate({"upper": 1.0, "repeat": 1.0}, 100, 1) for text in (each.instruction,))
    train_tokenizer(texts, 300, folder / "weights")
    config = from_mapping(ModelConfig, SIZES | {"vocab_size": 512, "max_position_embeddings": 256}, "test")
    special = {"bos_token_id": 6, "eos_token_id": 11, "pad_token_id": 5}
    write_weights(folder / "weights", config, build(config, seed=3).state_dict(), torch.float32, special)
    write_jsonl(folder / "my.jsonl", generate({"upper": 1.0, "repeat": 1.0}, 30, 0))
    one = next(iter(generate({"upper": 1.0}, 1, 0)))
    write_jsonl(folder / "long.jsonl", [dataclasses.replace(one, instruction="why? " * 300)])
    return folder


@pytest.fixture
def values(shared: Path, tmp_path: Path) -> Values:
    def make(run: str = "run", evaluate: Mapping[str, Any] = ASKED, **changes: Any) -> dict[str, Any]:
        return {
            "run": str(tmp_path / run),
            "init": str(shared / "weights"),
            "device": "cpu",
            "data": {"records": str(shared / "my.jsonl"), "tokens_per_batch": 128, "micro_batches": 2, "epochs": 2},
            "optimizer": {"lr": {"peak": 1e-2, "warmup_steps": 0}, "ema_decay": 0.5},
            "evaluate": dict(evaluate),
            "checkpoint": {"every_steps": 1, "keep_last": 9},
            "logging": {"tensorboard": False},
            "max_steps": 4,
        } | changes

    return make


def trained(values: dict[str, Any]) -> tuple[Path, str]:
    """The run's folder, and what it told."""
    told = io.StringIO()
    settings = train_config(values, "test")
    train(settings, rich.console.Console(file=told, width=200))
    return settings.run, told.getvalue()


def curve(run: Path) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [each for each in records if each["kind"] == "evaluation"]


def answers(evaluation: Path) -> bytes:
    return (evaluation / "answers.jsonl").read_bytes()


@pytest.mark.parametrize("lora", [None, LORA])
def test_scores_are_those_of_the_evaluation_command(
    values: Values, tmp_path: Path, lora: dict[str, Any] | None
) -> None:
    run, told = trained(values(**({} if lora is None else {"lora": lora})))
    of_run = {step: run / "evaluations" / f"step_{step:08d}" for step in (2, 4)}
    assert answers(of_run[2]) != answers(of_run[4])
    settings = Settings(("upper", "repeat", "upper:noisy"), limit=5, seed=3)
    for step in (2, 4):
        checkpoint = run / "checkpoints" / f"step_{step:08d}"
        export(checkpoint, tmp_path / f"exported{step}")
        scores = read_json(of_run[step] / "results.json")["scores"]
        # What it was trained upon a run knows, and weights alone do not.
        for name, weights, held in (
            ("checkpoint", checkpoint, "out"),
            ("exported", tmp_path / f"exported{step}", "unknown"),
        ):
            asked = evaluate_weights(weights, settings, tmp_path / f"{name}{step}.eval", say=lambda text: None)
            assert answers(asked.out) == answers(of_run[step])
            assert asked.results["scores"] == [score | {"held": held} for score in scores]
        assert {score["held"] for score in scores} == {"out"}
    records = curve(run)
    assert [(each["step"], each["weights"], each["questions"]) for each in records] == [(2, "ema", 15), (4, "ema", 15)]
    for record in records:
        scores = read_json(of_run[record["step"]] / "results.json")["scores"]
        assert [each["strict"] for each in record["scores"].values()] == [each["strict"] for each in scores]
        assert [each["mean_tokens"] for each in record["scores"].values()] == [each["mean_tokens"] for each in scores]
        assert list(record["scores"]) == ["upper", "repeat", "upper:noisy"]
        assert 0 < record["share"] < 1
    assert "evaluating 15 questions of upper, repeat, upper:noisy after every 2 steps, 3 at a time with at most" in told
    assert "step 4: evaluation mean" in told


def test_after_a_kill_what_was_asked_of_the_same_weights_is_not_asked_again(
    values: Values, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, _ = trained(values())
    first = curve(run)
    for step in (2, 3, 4):  # as if it had been killed after the evaluation of step 4, with this much saved
        shutil.rmtree(run / "checkpoints" / f"step_{step:08d}")
    asked: list[int] = []
    ask = EngineAnswerer.ask

    def counted(self: EngineAnswerer, questions: Any, told: Any) -> None:
        asked.append(len(questions))
        ask(self, questions, told)

    monkeypatch.setattr(EngineAnswerer, "ask", counted)
    lines = (run / "evaluations" / "step_00000004" / "answers.jsonl").read_bytes().splitlines(keepends=True)
    (run / "evaluations" / "step_00000004" / "answers.jsonl").write_bytes(b"".join(lines[:4]) + lines[4][:9])
    trained(values())
    assert asked == [15 - 4], "what was cut off, and nothing of step 2"
    again = curve(run)
    assert [each["scores"] for each in again] == [each["scores"] for each in first]
    # A run that goes another way has other weights at the same steps.
    for step in (2, 3, 4):
        shutil.rmtree(run / "checkpoints" / f"step_{step:08d}")
    trained(values(optimizer={"lr": {"peak": 3e-3, "warmup_steps": 0}, "ema_decay": 0.5}))
    assert asked[1:] == [15, 15]


def test_a_folder_in_the_way_is_a_warning(values: Values, tmp_path: Path) -> None:
    stranger = tmp_path / "run" / "evaluations" / "step_00000002" / "mine.txt"
    stranger.parent.mkdir(parents=True)
    stranger.write_text("mine")
    run, told = trained(values())
    assert [each["step"] for each in curve(run)] == [4]
    assert "warning: no evaluation after step 2" in told
    assert "is there and is no evaluation" in told
    assert "finished after 4 of 4 steps" in told
    assert stranger.read_text() == "mine"


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"tasks": "gsm9k"}, "unknown task 'gsm9k': did you mean 'gsm8k'"),
        ({"tasks": "gsm8k", "data": "nowhere"}, "nowhere: no such folder"),
        ({"tasks": "gsm8k", "data": str(FIXTURES.parent)}, "no file of openai/gsm8k's split 'test'"),
        ({"tasks": "humaneval", "data": str(FIXTURES)}, "scored by running what the model wrote"),
        (
            {"tasks": "LONG/long.jsonl"},
            "no question of '.*long.jsonl' leaves room for a response: the context of the run",
        ),
        ({"tasks": "upper,upper"}, None),
    ],
)
def test_what_cannot_be_asked_is_refused_before_training(
    values: Values, shared: Path, asked: dict[str, Any], message: str | None, tmp_path: Path
) -> None:
    asked = asked | {"tasks": asked["tasks"].replace("LONG", str(shared))}
    if message is None:  # said twice is said once, as on the command line
        assert len(RunEvaluator(prepared(train_config(values(evaluate=asked), "test"))).plan.tasks) == 1
        return
    with pytest.raises(UserError, match=message):
        trained(values(evaluate=asked))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_data_without_their_tokenizer_cannot_be_asked_about(values: Values, tmp_path: Path) -> None:
    settings = prepared(train_config(values(), "test"))
    path = settings.data.sampled / "metadata.json"  # type: ignore[operator]
    metadata = read_json(path)
    metadata["tokenizer_info"]["tokenizer_path"] = str(tmp_path / "gone")
    path.write_text(json.dumps(metadata))
    with pytest.raises(UserError, match="was made with the tokenizer .*gone, which is not there"):
        RunEvaluator(settings)


def test_memory_is_that_of_a_batch_and_is_given_back(values: Values, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = prepared(train_config(values(), "test"))
    evaluator = RunEvaluator(settings)
    trainer = Trainer(settings, evaluator=evaluator)
    engines: list[weakref.ref[DecodingEngine]] = []
    found: dict[str, Any] = {}
    init = DecodingEngine.__init__

    def observed(self: DecodingEngine, model: Any, **options: Any) -> None:
        init(self, model, **options)
        engines.append(weakref.ref(self))
        found.update(rows=self.max_batch, tokens=self.pages.num_tokens)
        found["weights"] = {name: weight.data_ptr() for name, weight in model.module.named_parameters()}

    monkeypatch.setattr(DecodingEngine, "__init__", observed)
    trainer.evaluations.run(2, False, lambda: False)
    assert len(engines) == 1
    assert engines[0]() is None
    averages = trainer.optimizer.ema_weights()
    assert found["weights"] == {name: average.data_ptr() for name, average in averages.items()}, "not copied"
    assert found["rows"] == 3
    assert found["tokens"] <= evaluator.cache_tokens + PAGES_OF < 3 * evaluator.config.max_position_embeddings / 2
    assert all(parameter.requires_grad for parameter in trainer.model.parameters())
    longest = max(item.max_new_tokens for item in evaluator.plan.items)
    assert evaluator.cache_tokens >= longest + 1


# -------------------------------------------------------------------------------------------------------------- ranks


@pytest.fixture(scope="module")
def forked() -> Iterator[Ranks]:
    with started() as ranks:
        yield ranks


@pytest.mark.parametrize("sharding", ["fsdp", "ddp"])
def test_rank_0_asks_whole_weights(values: Values, tmp_path: Path, forked: Ranks, sharding: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(values(distributed={"sharding": sharding, "timeout_seconds": 20})))
    told = forked.run(2, "tests.train.forked_ranks:train", tmp_path, config=str(path)).err
    assert told.count("step 4: evaluation mean") == 1
    checkpoint = tmp_path / "run" / "checkpoints" / "step_00000004"
    settings = Settings(("upper", "repeat", "upper:noisy"), limit=5, seed=3)
    asked = evaluate_weights(checkpoint, settings, tmp_path / "eval", say=lambda text: None)
    assert answers(asked.out) == answers(tmp_path / "run" / "evaluations" / "step_00000004")


def test_an_error_of_the_settings_is_told_once(values: Values, tmp_path: Path, forked: Ranks) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(values(evaluate={"tasks": ["nothing"]})))
    told = forked.run(2, "tests.train.forked_ranks:train", tmp_path, code=1, config=str(path)).err
    assert told.count("unknown task 'nothing'") == 1
