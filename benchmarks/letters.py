"""The same multiple-choice questions scored in five ways: by what the model says, and by what it finds likely.

    python benchmarks/letters.py WEIGHTS_DIR [--condition direct] [--count 200] [--questions FILE.jsonl]

Without --questions, held-out problems of the procedural tasks whose answer is one of a few. Lines of a file are
{"question": TEXT, "choices": [TEXT, ...], "answer": NUMBER, "subject": NAME}, the last one optional.

    said      the letter the model says, greedily, after the options under their letters: strict (unreadable is wrong),
              published (unreadable is worth 1 / options), and the share that cannot be read
    letters   the likeliest of the letters at that place; mass: the probability that all of them have together
    options   the likeliest option as a text, asked without the options; its end token included in "and end"
    text      the option said as a text, to the character
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from math import exp
from pathlib import Path

from hrm_text.contracts import UserError
from hrm_text.data.procedural import find_task, held_out_items
from hrm_text.eval.few_shot import Choice
from hrm_text.eval.metrics import exact_match
from hrm_text.eval.scoring.letters import letter, sole_letter
from hrm_text.infer.likelihood import likelihoods
from hrm_text.infer.requests import Turn
from hrm_text.infer.text_model import TextModel, load

TASKS = ("compare", "parity", "max", "vowels")


@dataclass(frozen=True)
class Asked:
    """A question with options, of some subject."""

    subject: str
    choice: Choice


@dataclass(frozen=True)
class Picked:
    """What each way makes of one question: the number of an option, or None of a letter that cannot be read."""

    said: int | None
    letters: int
    mass: float
    options: int
    options_and_end: int
    text_is_right: bool


def drawn(task: str, count: int) -> list[Asked]:
    """Held-out problems of a procedural task, with the options that its question offers."""
    asked = []
    for item in held_out_items(task, count, 0, "direct"):
        match task:
            case "compare":
                options = [word.strip("?:,.") for word in item.instruction.split()]
                options = [word for word in options if word.isdecimal()]
            case "parity":
                options = ["even", "odd"]
            case "max":
                options = sorted({word.strip("?:,.") for word in item.instruction.split()} & set("0123456789"))
            case _:
                options = [str(number) for number in range(6)]
        if item.answer in options and len(options) > 1:
            asked.append(Asked(task, Choice(item.instruction, options, options.index(item.answer))))
    return asked


def read(file: Path) -> list[Asked]:
    """Questions of a file."""
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    return [
        Asked(row.get("subject", file.stem), Choice(row["question"], row["choices"], row["answer"])) for row in rows
    ]


def pick(model: TextModel, asked: Sequence[Asked], condition: str) -> list[Picked]:
    """Every question in every way."""
    with_letters = [each.choice.asked for each in asked]
    plain = [each.choice.text for each in asked]
    said = model.generate(with_letters, condition=condition, max_new_tokens=8)
    texts = model.generate(plain, condition=condition, max_new_tokens=32)
    letters = [[letter(index) for index in range(len(each.choice.options))] for each in asked]
    options = [list(each.choice.options) for each in asked]
    of_letters = scores(model, with_letters, letters, condition)
    of_options = scores(model, plain, options, condition)
    of_options_and_end = scores(model, plain, options, condition, end=True)
    picked = []
    for number, each in enumerate(asked):
        got = sole_letter(said[number], len(each.choice.options))
        picked.append(
            Picked(
                ord(got) - ord("A") if got else None,
                best(of_letters[number]),
                sum(exp(logprob) for logprob in of_letters[number]),
                best(of_options[number]),
                best(of_options_and_end[number]),
                exact_match(texts[number], each.choice.options[each.choice.right]),
            )
        )
    return picked


def scores(
    model: TextModel, prompts: Sequence[str], responses: Sequence[Sequence[str]], condition: str, end: bool = False
) -> list[list[float]]:
    """The log-probability of each response to each prompt."""
    form = model.prompt_format
    prefixes = form.prefix_ids_batch([condition] * len(prompts), prompts)
    turns = [
        Turn(tuple(prefix), tuple(form.response_ids(response)[: None if end else -1]))
        for prefix, given in zip(prefixes, responses, strict=True)
        for response in given
    ]
    found = dict(likelihoods(model, turns))
    logprobs = iter(found[number].logprob for number in range(len(turns)))
    return [[next(logprobs) for _ in given] for given in responses]


def best(logprobs: Sequence[float]) -> int:
    """The number of the largest, of equals the first."""
    return max(range(len(logprobs)), key=logprobs.__getitem__)


HEADS = (
    "questions", "chance", "strict", "published", "unreadable", "letters", "mass", "options", "and end", "text",
    "readable alike",
)  # fmt: skip


def row(asked: Sequence[Asked], picked: Sequence[Picked]) -> list[float | None]:
    """Shares over some questions, as in ``HEADS``; None where there is nothing to take a share of."""
    n = len(asked)
    pairs = list(zip((each.choice for each in asked), picked, strict=True))
    readable = [each for each in picked if each.said is not None]
    chance = sum(1 / len(choice.options) for choice, _ in pairs) / n
    strict = sum(each.said == choice.right for choice, each in pairs) / n
    credit = sum(1 / len(choice.options) for choice, each in pairs if each.said is None) / n
    return [
        n,
        chance,
        strict,
        strict + credit,
        1 - len(readable) / n,
        sum(each.letters == choice.right for choice, each in pairs) / n,
        sum(each.mass for each in picked) / n,
        sum(each.options == choice.right for choice, each in pairs) / n,
        sum(each.options_and_end == choice.right for choice, each in pairs) / n,
        sum(each.text_is_right for each in picked) / n,
        sum(each.said == each.letters for each in readable) / len(readable) if readable else None,
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a table, a row for each subject and one for all."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("weights", type=Path)
    parser.add_argument("--condition", default="direct")
    parser.add_argument("--count", type=int, default=200, help="questions of a procedural task")
    parser.add_argument("--questions", type=Path, help="a file of questions in place of the procedural tasks")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(arguments)
    try:
        model = load(options.weights, device=options.device)
        asked = (
            read(options.questions)
            if options.questions
            else [each for task in TASKS for each in drawn(find_task(task).name, options.count)]
        )
        if not asked:
            raise UserError(f"{options.questions}: no question; a line is {{question, choices, answer}}")
        picked = pick(model, asked, options.condition)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{'':12}" + "".join(f"{head:>16}" for head in HEADS))
    for subject in [*dict.fromkeys(each.subject for each in asked), "all"]:
        numbers = [number for number, each in enumerate(asked) if subject in (each.subject, "all")]
        count, *shares = row([asked[number] for number in numbers], [picked[number] for number in numbers])
        cells = [f"{share:>16.1%}" if share is not None else f"{'-':>16}" for share in shares]
        print(f"{subject:12}{count:>16}" + "".join(cells))
    return 0


if __name__ == "__main__":
    sys.exit(main())
