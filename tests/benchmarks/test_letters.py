"""Five ways to score one multiple-choice question."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.letters import HEADS, Asked, Picked, drawn, main, pick, row
from hrm_text.data.prompt import PromptFormat
from hrm_text.data.tokenizer import load_tokenizer, tokenizer_info, train_tokenizer
from hrm_text.eval.few_shot import Choice
from hrm_text.infer.text_model import TextModel
from hrm_text.model.config import preset
from hrm_text.model.recurrence import build
from hrm_text.model.weights import write_weights


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TextModel:
    tokenizer = train_tokenizer(iter(["A. even\nB. odd\nAnswer:"] * 3), 300, tmp_path_factory.mktemp("letters") / "t")
    form = PromptFormat(load_tokenizer(tokenizer), tokenizer_info(tokenizer))
    return TextModel(build(preset("tiny", vocab_size=320, max_position_embeddings=96), seed=2), form)


@pytest.mark.parametrize(("task", "most"), [("compare", 2), ("parity", 2), ("max", 4), ("vowels", 6)])
def test_a_drawn_question_offers_the_right_answer_once(task: str, most: int) -> None:
    asked = drawn(task, 30)
    assert len(asked) > 15
    for each in asked:
        options = each.choice.options
        assert 2 <= len(options) <= most and len(set(options)) == len(options)
    assert len({each.choice.right for each in asked}) > 1


def test_a_letter_that_can_be_read_is_the_likeliest_one(model: TextModel, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = drawn("parity", 12)
    letters = [model.prompt_format.response_ids(letter)[0] for letter in "AB"]
    head = model.module.lm_head.weight
    with torch.no_grad():  # an untrained model says no letter; this one nothing else, and never ends
        rows = torch.stack([head[letters[0]], -head[letters[0]]])  # one of the two is above all others
        head[:] = torch.zeros_like(head).index_copy(0, torch.tensor(letters), rows)
    assert all(each.said is None for each in pick(model, asked, "direct"))  # several letters are none
    generate = model.generate
    monkeypatch.setattr(model, "generate", lambda prompts, **rest: generate(prompts, **rest | {"max_new_tokens": 1}))
    picked = pick(model, asked, "direct")
    readable = [each for each in picked if each.said is not None]
    assert readable and all(each.said == each.letters for each in readable)
    assert all(0 < each.mass < 1 for each in picked)


def test_the_published_score_gives_the_unreadable_a_share() -> None:
    two = Asked("s", Choice("?", ["x", "y"], 1))
    four = Asked("s", Choice("?", ["a", "b", "c", "d"], 0))
    picked = [
        Picked(None, 1, 0.5, 0, 1, True),
        Picked(0, 0, 0.9, 0, 0, False),
        Picked(None, 3, 0.1, 0, 0, False),
        Picked(1, 1, 0.7, 2, 2, False),
    ]
    values = dict(zip(HEADS, row([two, four, four, two], picked), strict=True))
    assert values["questions"] == 4 and values["chance"] == 3 / 8
    assert (values["strict"], values["published"], values["unreadable"]) == (0.5, 0.5 + 0.75 / 4, 0.5)
    assert (values["letters"], values["options"], values["and end"], values["text"]) == (0.75, 0.5, 0.75, 0.25)
    assert values["mass"] == pytest.approx(0.55) and values["readable alike"] == 1
    assert row([two], picked[:1])[-1] is None  # nothing was readable


def test_questions_come_from_a_file_too(model: TextModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "weights"
    folder.mkdir()
    write_weights(folder, model.config, model.module.state_dict(), torch.float32, {"eos_token_id": 11})
    model.prompt_format._tokenizer.save(str(folder / "tokenizer.json"))
    rows = [{"question": "Even?", "choices": ["even", "odd"], "answer": 0, "subject": name} for name in ("one", "two")]
    file = tmp_path / "questions.jsonl"
    file.write_text("".join(json.dumps(each) + "\n" for each in rows))
    assert main([str(folder), "--questions", str(file)]) == 0
    _, *lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [["one", "1"], ["two", "1"], ["all", "2"]]
    file.write_text("")
    assert main([str(folder), "--questions", str(file)]) == 1
    assert "no question" in capsys.readouterr().err
