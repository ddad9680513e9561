"""Every task from its files to its score: a small model learns some answers, and the run must find just those right.

The model has the right response to some questions by heart, a wrong one to others, and an unreadable one to the rest.
So each score is known before the run, and whatever loses a question, cuts or mixes up responses, or misreads one on the
way from the files to ``results.json`` moves one of them.
"""

from __future__ import annotations

import importlib.util
import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from hrm_text.contracts import UserError
from hrm_text.data.prompt import PromptFormat
from hrm_text.data.tokenizer import load_tokenizer, tokenizer_info, train_tokenizer
from hrm_text.eval.runs import Item, plan_run
from hrm_text.eval.scoring import maths
from hrm_text.eval.scoring.code import require_isolation
from hrm_text.eval.sources import LocalRows
from hrm_text.eval.statistics import mean
from hrm_text.eval.task import Question
from hrm_text.eval.tasks import benchmarks, find_tasks
from hrm_text.model.attention import Spans
from hrm_text.model.config import preset
from hrm_text.model.kernels import packed_attention
from hrm_text.model.recurrence import RecurrentLM, build
from hrm_text.model.weights import write_weights
from hrm_text.recipes.evaluation import Outcome, Settings, evaluate_weights

FIXTURES = Path(__file__).parents[1] / "eval" / "fixtures"
LIMIT = 8
"""Questions of a task; all but BBH have fewer."""
FOLLOWED = {
    "1000": "A pale moon.",
    "1001": "<<Lamps>>\n* a desk lamp\n* a torch",
    "1002": "A stone lies there. So it flows.",
}
"""Responses that do what IFEval's requests ask for."""


def can_isolate() -> bool:
    try:
        require_isolation()
    except UserError:
        return False
    return True


def names() -> list[str]:
    """Every benchmark that can be had here; of reasoning-gym, which draws its rows, one task."""
    left_out = {"reasoning_gym"}
    if importlib.util.find_spec("math_verify") is None:
        left_out.add("math")
    if not can_isolate():
        left_out.add("humaneval")
    drawn = ["reasoning_gym/gcd/0"] if importlib.util.find_spec("reasoning_gym") else []
    return [name for name in benchmarks() if name not in left_out] + drawn


@dataclass(frozen=True)
class Lesson:
    """A question with the response that is learnt, and what that is worth."""

    item: Item
    response: str
    worth: float
    readable: bool


class Unlimited:
    """Stands for a model while questions are read."""

    context = 10**9

    def num_tokens(self, condition: str, prompt: str) -> int:
        return 0


def lessons() -> list[Lesson]:
    """Of each task's questions in turn the right response, a wrong and readable one, one that cannot be read."""
    tasks = find_tasks(names(), limit=LIMIT)
    found, of_task = [], Counter[str]()
    for item in plan_run(tasks, LocalRows(FIXTURES), Unlimited(), identity={}, limit=LIMIT).items:  # type: ignore[arg-type]
        right, wrong = responses(item.task.name, item.question)
        unreadable = "Who knows?" if item.task.name == "humaneval" else ""
        # Of an answer in several parts one is learnt.
        worth = 1 / len(item.question.answer[0]) if item.task.name == "drop" else 1.0
        learnt = ((right, worth, True), (wrong, 0.0, True), (unreadable, 0.0, False))
        found.append(Lesson(item, *learnt[of_task[item.task.name] % 3]))
        of_task[item.task.name] += 1
    return found


def responses(name: str, question: Question) -> tuple[str, str]:
    """The right one and a wrong one."""
    answer = question.answer
    match name.partition("/")[0]:
        case "gsm8k" | "math" | "aime":
            return rf"So it is \boxed{{{answer}}}.", r"So it is \boxed{11}."
        case "drop":
            return answer[0][0], "a heron"
        case "nq_open":
            return answer[-1], "a heron"
        case "mmlu_pro":
            return f"It is ({answer}).", f"It is ({other_letter(answer)})."
        case "ifeval":
            return FOLLOWED[question.id], "Well, no."
        case "bbh":
            return f"The answer is {answer}", "The answer is (Z)"
        case "humaneval":
            rows = map(json.loads, (FIXTURES / "humaneval" / "test.jsonl").read_text().splitlines())
            solutions = {row["task_id"]: row["canonical_solution"] for row in rows}
            return solutions[question.id], "    return None\n"
        case "reasoning_gym":
            return str(answer), "none"
    assert question.choices, name
    return answer, other_letter(answer)


def other_letter(answer: str) -> str:
    return "B" if answer == "A" else "A"


def learn(lessons: Sequence[Lesson], form: PromptFormat) -> RecurrentLM:
    """A model that has the responses by heart, and is sure of them: what is sampled is what is likeliest."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "num_layers": 2, "num_heads": 2, "head_dim": 24, "inner_multiple": 16}
    config = preset("tiny", vocab_size=form.vocab_size, max_position_embeddings=512, H_cycles=1, L_cycles=1, **sizes)
    module = build(config, seed=0)
    prefixes = [form.prefix_ids(each.item.condition, each.item.prompt) for each in lessons]
    learnt = [form.response_ids(each.response) for each in lessons]
    prefix_lengths = torch.tensor([len(prefix) for prefix in prefixes])
    lengths = prefix_lengths + torch.tensor([len(ids) - 1 for ids in learnt])  # behind the last token nothing is asked
    ids_T = torch.tensor(
        [token for prefix, ids in zip(prefixes, learnt, strict=True) for token in (*prefix, *ids[:-1])]
    )
    positions_T = torch.cat([torch.arange(length) for length in lengths.tolist()])
    asked_T = positions_T >= (prefix_lengths - 1).repeat_interleave(lengths)
    labels_S = torch.tensor([token for ids in learnt for token in ids])
    attention = packed_attention(Spans.of_samples(lengths, prefix_lengths), len(ids_T), torch.device("cpu"))
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-2, betas=(0.9, 0.95))
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=10)
    for _ in range(300):
        hidden_SD = module(ids_T, positions_T, attention)[asked_T]
        losses_S = F.cross_entropy(module.lm_head(hidden_SD), labels_S, reduction="none")
        if losses_S.max() < 0.3:
            break
        optimizer.zero_grad()
        losses_S.mean().backward()
        optimizer.step()
        warmup.step()
    else:
        raise AssertionError("the answers were not learnt")
    with torch.no_grad():
        module.lm_head.weight.mul_(20)
    return module


@dataclass(frozen=True)
class Ran:
    """The lessons, and the run that asked for them."""

    lessons: Mapping[str, list[Lesson]]
    outcome: Outcome

    @property
    def answers(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.outcome.out / "answers.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ran]:
    folder = tmp_path_factory.mktemp("every task")
    to_learn = lessons()
    texts = (text for each in to_learn for text in (each.item.prompt, each.response))
    weights = train_tokenizer(texts, 2048, folder / "weights")
    form = PromptFormat(load_tokenizer(weights), tokenizer_info(weights))
    module = learn(to_learn, form)
    write_weights(weights, module.config, module.state_dict(), torch.float32, {})
    settings = Settings(tuple(names()), limit=LIMIT, data=FIXTURES, allow_code=True)
    outcome = evaluate_weights(weights, settings, folder / "run", say=lambda text: None)
    by_task = defaultdict(list)
    for each in to_learn:
        by_task[each.item.task.name].append(each)
    yield Ran(by_task, outcome)
    maths.comparer().close()


def test_every_benchmark_is_asked(ran: Ran) -> None:
    scores = {score["task"]: score for score in ran.outcome.results["scores"]}
    of_all = {task.name for name in names() for task in benchmarks().get(name, ())}
    assert scores.keys() == ran.lessons.keys() == of_all | {name for name in names() if "/" in name}
    assert all(scores[name]["n"] == len(learnt) >= 3 for name, learnt in ran.lessons.items())
    assert all(score["no_room"] == score["shortened"] == score["truncated"] == 0 for score in scores.values())


def test_the_answers_are_what_was_learnt(ran: Ran) -> None:
    learnt = {(each.item.task.name, each.item.question.id): each for each in chain(*ran.lessons.values())}
    for answer in ran.answers:
        expected = learnt[answer["task"], answer["id"]]
        assert (answer["text"], answer["strict"]) == (expected.response, pytest.approx(expected.worth)), answer
        assert answer["readable"] == expected.readable, answer


def test_every_score_is_that_of_the_answers_that_were_learnt(ran: Ran) -> None:
    for score in ran.outcome.results["scores"]:
        learnt, by_subject = ran.lessons[score["task"]], defaultdict(list)
        for each in learnt:
            by_subject[each.item.question.subject if score["macro"] else ""].append(each)
        strict = mean([mean([each.worth for each in inside]) for inside in by_subject.values()])
        guesses = [mean([as_published(each) for each in inside]) for inside in by_subject.values()]
        assert score["strict"] == pytest.approx(strict), score
        if score["task"] != "math":  # as published, LaTeX in a box is read as plain text: see docs/evaluation.md
            assert score["published"] == pytest.approx(mean(guesses)), score
        assert score["unreadable"] == pytest.approx(mean([float(not each.readable) for each in learnt])), score
        assert 0 < score["strict"] < 1 and 0 < score["unreadable"] < 1


def as_published(lesson: Lesson) -> float:
    """An unreadable letter is worth a guess among the options."""
    choices = lesson.item.question.choices
    return 1 / choices if choices and not lesson.readable else lesson.worth


def test_samples_are_voted_on(ran: Ran) -> None:
    """All samples of a question are alike, so that the vote and pass@k are what one answer is worth."""
    [score] = [score for score in ran.outcome.results["scores"] if score["task"] == "aime"]
    also = score["also"]
    assert sum(answer["task"] == "aime" for answer in ran.answers) == 256 * score["n"]
    assert also["majority"] == also["pass@1"] == also["pass@256"] == score["strict"] == 0.5
