from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from hrm_text.contracts import UserError
from hrm_text.data.prompt import PromptFormat
from hrm_text.data.tokenizer import load_tokenizer, tokenizer_info, train_tokenizer
from hrm_text.eval import tasks as registry
from hrm_text.eval.answers import Answer, Asked
from hrm_text.eval.task import Dataset, Question, Rows, Scored, Task
from hrm_text.files import only_process, read_json
from hrm_text.infer.text_model import TextModel, load
from hrm_text.model.config import preset
from hrm_text.model.recurrence import build
from hrm_text.model.weights import write_weights
from hrm_text.recipes import evaluation
from hrm_text.recipes.evaluation import EngineAnswerer, Settings, compare_weights, evaluate_weights, weights_hash

TEXTS = ["What is 12 + 7?", "The sum is 19.", "reverse the word apple", "1 2 3 4 5 6 7 8 9 0"] * 3


def small(tokenizer: Path, seed: int) -> TextModel:
    prompt_format = PromptFormat(load_tokenizer(tokenizer), tokenizer_info(tokenizer))
    sizes = {"hidden_size": 32, "num_heads": 2, "head_dim": 16, "inner_multiple": 16}
    config = preset("tiny", vocab_size=prompt_format.vocab_size, max_position_embeddings=96, **sizes)
    return TextModel(build(config, seed=seed), prompt_format)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_tokenizer(iter(TEXTS), 300, tmp_path_factory.mktemp("tokenizer") / "tokenizer")


@pytest.fixture(scope="module")
def weights(tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two folders, a and b, of different weights."""
    folder = tmp_path_factory.mktemp("weights")
    for seed, name in enumerate("ab"):
        (folder / name).mkdir()
        module = small(tokenizer, seed).module
        write_weights(folder / name, module.config, module.state_dict(), torch.float32, {})
        for file in tokenizer.iterdir():
            (folder / name / file.name).write_bytes(file.read_bytes())
    return folder


SETTINGS = Settings(("upper", "add", "add:direct"), limit=6)


def lines(out: Path) -> bytes:
    return (out / "answers.jsonl").read_bytes()


def without_clock(out: Path) -> dict[str, Any]:
    results: dict[str, Any] = read_json(out / "results.json")
    assert results.pop("speed")
    return results


def quiet(text: str) -> None:
    pass


def with_batch(batch: int, **changes: Any) -> Settings:
    return Settings(**{**vars(SETTINGS), "batch": batch, **changes})


def test_texts_and_scores_are_the_same_with_any_batch(weights: Path, tmp_path: Path) -> None:
    for batch in (64, 1, 5):
        evaluate_weights(weights / "a", with_batch(batch), tmp_path / str(batch), say=quiet)
    assert lines(tmp_path / "1") == lines(tmp_path / "5") == lines(tmp_path / "64")
    assert without_clock(tmp_path / "1") == without_clock(tmp_path / "5") == without_clock(tmp_path / "64")
    assert len({json.loads(line)["text"] for line in lines(tmp_path / "1").splitlines()}) > 6


def test_what_is_sampled_is_the_same_with_any_batch_too(weights: Path) -> None:
    model = load(weights / "a")
    asked = [Asked("direct", f"What is {n // 4}?", 8 + n % 3, 1.0, 1.0, seed=n) for n in range(24)]
    texts = []
    for batch in (32, 1, 6):
        answers: dict[int, Answer] = {}
        EngineAnswerer(model, batch).ask(asked, answers.__setitem__)
        texts.append([answers[n].text for n in range(24)])
    assert texts[0] == texts[1] == texts[2]
    assert len(set(texts[0][:4])) > 1


def test_slots_are_busy_until_the_tail(tokenizer: Path) -> None:
    """With prompts and responses of all lengths; and with one of each, in a batch for many, all is tail."""
    model = small(tokenizer, 0)
    answerer = EngineAnswerer(model, 8)
    answerer.ask([Asked("direct", "7 " * (n % 9 + 1), 1 + n * 7 % 23) for n in range(100)], lambda index, answer: None)
    speed = answerer.speed()
    assert speed["busy_slots"] > 0.9
    assert 0 < speed["steps_of_tail"] < speed["steps"] / 4
    alone = EngineAnswerer(model, 8)
    alone.ask([Asked("direct", "7", 4)], lambda index, answer: None)
    assert alone.speed()["steps_of_tail"] == alone.speed()["steps"]


def test_equal_prompts_are_computed_once(tokenizer: Path) -> None:
    asked = [Asked("direct", f"What is {n % 3}?", 4, 1.0, 1.0, seed=n) for n in range(30)]
    answerer = EngineAnswerer(small(tokenizer, 0), 8)
    answerer.ask(asked, lambda index, answer: None)
    different = sum(answerer.num_tokens("direct", f"What is {n}?") for n in range(3))
    assert answerer.prompt_tokens == different + 27  # of a prompt that is there the last token says what follows


def test_the_same_command_finds_its_run_and_another_does_not(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "RUNS", tmp_path)
    first = evaluate_weights(weights / "a", SETTINGS, say=quiet)
    before = lines(first.out)

    def never(answerer: EngineAnswerer, asked: Sequence[Asked], told: Any) -> None:
        raise AssertionError(f"{len(asked)} questions are asked again")

    with monkeypatch.context() as patched:
        patched.setattr(EngineAnswerer, "ask", never)
        again = evaluate_weights(weights / "a", with_batch(3), say=quiet)
    assert again.out == first.out
    assert lines(first.out) == before
    others = [evaluate_weights(weights / "b", SETTINGS, say=quiet).out]
    others += [evaluate_weights(weights / "a", with_batch(8, seed=1), say=quiet).out]
    assert len({first.out, *others}) == 3
    with pytest.raises(UserError, match="weights_sha256 was"):
        evaluate_weights(weights / "b", SETTINGS, first.out, say=quiet)


def test_two_models_are_compared_on_the_same_questions(weights: Path, tmp_path: Path) -> None:
    _, second, rows = compare_weights(weights / "a", weights / "b", SETTINGS, tmp_path / "run", say=quiet)
    assert second.out == tmp_path / "run" / "against"
    assert [(row["task"], row["paired"]["n"]) for row in rows] == [("upper", 6), ("add", 6), ("add:direct", 6)]
    found = read_json(tmp_path / "run" / "comparison.json")
    assert found["rows"] == rows
    assert found["first"]["weights_sha256"] == weights_hash(weights / "a") != weights_hash(weights / "b")


def test_the_hash_is_of_what_answers_and_not_of_what_describes(weights: Path, tmp_path: Path) -> None:
    copy = tmp_path / "elsewhere"
    copy.mkdir()
    for file in (weights / "a").iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    (copy / "README.md").write_text("a card")
    assert weights_hash(copy) == weights_hash(weights / "a")
    config = copy / "config.json"
    config.write_text(config.read_text() + " ")
    assert weights_hash(copy) != weights_hash(weights / "a")


def coded() -> Task:
    def questions(rows: Rows) -> Iterator[Question]:
        yield from (Question(str(n), row["q"], "1") for n, row in enumerate(rows(Dataset("x/y"))))

    def score(response: str, question: Question) -> Scored:
        return Scored(0.0, 0.0, response, readable=bool(response))

    return Task("coded", 1, "Coded", (Dataset("x/y"),), questions, score, "direct", 4, runs_code=True)


def test_code_is_run_on_request_alone(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "benchmarks", lambda: {"coded": (coded(),)})
    (tmp_path / "coded").mkdir()
    (tmp_path / "coded" / "test.jsonl").write_text('{"q": "1 + 1"}\n')
    settings = Settings(("coded",), conditions=("direct", "synth,cot"), data=tmp_path)
    with pytest.raises(UserError, match="coded.*: scored by running what the model wrote.*--allow-code"):
        evaluate_weights(weights / "a", settings, tmp_path / "run", say=quiet)
    allowed = Settings(**{**vars(settings), "allow_code": True})
    scores = evaluate_weights(weights / "a", allowed, tmp_path / "run", say=quiet).results["scores"]
    assert [(score["task"], score["condition"]) for score in scores] == [("coded", "direct"), ("coded", "synth,cot")]


def test_a_run_says_which_packages_scored(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "SCORING_PACKAGES", ("pytest", "no-such-package"))
    results = evaluate_weights(weights / "a", SETTINGS, tmp_path / "run", say=quiet).results
    assert results["versions"]["pytest"] == pytest.__version__
    assert "torch" in results["versions"]
    assert "no-such-package" not in results["versions"]


def test_a_run_ends_with_a_report(weights: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    evaluate_weights(weights / "a", SETTINGS, out, say=quiet)
    alone = (out / "report.html").read_text()
    assert f"Evaluation of {weights.name}/a" in alone
    assert f"Evaluation of {weights.name}/a" in (out / "report.md").read_text()
    compare_weights(weights / "a", weights / "b", SETTINGS, out, say=quiet)
    assert f"Compared with {weights.name}/b" not in alone
    assert f"Compared with {weights.name}/b" in (out / "report.html").read_text()
    assert f"Evaluation of {weights.name}/b" in (out / "against" / "report.html").read_text()


def test_a_run_that_another_process_is_at_is_refused(weights: Path, tmp_path: Path) -> None:
    with only_process(tmp_path / "run"), pytest.raises(UserError, match="is writing to this folder"):
        evaluate_weights(weights / "a", SETTINGS, tmp_path / "run", say=quiet)
    evaluate_weights(weights / "a", SETTINGS, tmp_path / "run", say=quiet)
