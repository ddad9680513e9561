"""The files of the public datasets as upstream lays them out, and how a made-up record becomes a row of each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from benchmarks.generated_text import Style

Columns = dict[str, list[Any]]
Logarithm = tuple[float, float]
"""Mean and deviation of the logarithm of a number of tokens."""

PREFIX: Logarithm = (4.6, 1.0)
RESPONSE: Logarithm = (4.8, 1.2)
LABEL: Logarithm = (1.5, 0.8)
LONG: Logarithm = (7.2, 0.6)
NONE: Logarithm = (0.0, 0.0)
"""Of a dataset that makes its own rows."""


class Drawn(NamedTuple):
    """A chunk of records before they take a dataset's form."""

    rng: np.random.Generator
    first: int
    """Number of the first one within its file."""
    questions: list[str | None]
    answers: list[str | None]

    def choice(self, values: Sequence[Any]) -> list[Any]:
        """A value for each record, the early ones more often."""
        skewed = self.rng.random(len(self.questions)) ** 1.5 * len(values)
        return [values[i] for i in skewed.astype(np.int64).tolist()]

    def constant(self, value: Any) -> list[Any]:
        return [value] * len(self.questions)

    @property
    def numbers(self) -> range:
        return range(self.first, self.first + len(self.questions))


@dataclass(frozen=True)
class Layout:
    """A dataset."""

    name: str
    share: float
    """Of the corpus's bytes, relative to those of the others."""
    path: str
    """Of a file below the dataset's folder: {part} of {parts}; or of one row's file, {row} in its {part}."""
    rows: Callable[[Drawn], Columns]
    style: Style = "prose"
    question: Logarithm = PREFIX
    answer: Logarithm = RESPONSE
    also: tuple[str, ...] = ()
    """Other datasets that read the same files."""

    @property
    def makes_its_own_rows(self) -> bool:
        return self.question == NONE


def flan(source: str, template: str, tasks: int, drawn: Drawn) -> Columns:
    names = [f"{source.lower()}_task{number:03d}" for number in range(tasks)]
    return {
        "inputs": drawn.questions,
        "targets": drawn.answers,
        "_template_idx": drawn.rng.integers(0, 10, len(drawn.questions)).tolist(),
        "_task_source": drawn.constant(source),
        "_task_name": drawn.choice(names),
        "_template_type": drawn.constant(template),
    }


def tasksource(drawn: Drawn) -> Columns:
    names = [*(f"family{number % 40}/task{number:03d}" for number in range(300)), "hh-rlhf", "blimp/agreement"]
    full_stop = [answer and f"{answer}." for answer in drawn.answers]
    return {"inputs": drawn.questions, "targets": full_stop, "task": drawn.choice(names)}


def chat(drawn: Drawn) -> Columns:
    turns = [
        [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
        for asked, said in zip(drawn.questions, drawn.answers, strict=True)
    ]
    return {"messages": turns, "category": drawn.choice(["Chat", "Open QA"])}


def synth(drawn: Drawn) -> Columns:
    seeds = [*(f"https://en.wikipedia.org/wiki/{number}" for number in range(50)), None, "Pleias self-knowledge"]
    return {
        "synth_id": [f"s{number}" for number in drawn.numbers],
        "language": drawn.choice(["en", "en", "en", "fr"]),
        "exercise": drawn.choice(["memorization", "mcq", "rag", "math exercise", "cooking"]),
        "query": drawn.questions,
        "query_seed_url": drawn.choice(seeds),
        "constraints": drawn.choice([None, "<source_1>It is so.</source_1>"]),
        "synthetic_reasoning": drawn.constant("Asked, considered, answered."),
        "synthetic_answer": drawn.answers,
    }


def platypus(drawn: Drawn) -> Columns:
    parts = ["ARB", "reclor", "scibench", "scienceqa", "theoremqa", "MATH/PRM-800K"]
    return {
        "input": drawn.constant(""),
        "output": drawn.answers,
        "instruction": drawn.questions,
        "data_source": drawn.choice(parts),
    }


def openbookqa(drawn: Drawn) -> Columns:
    labels = list("ABCD")
    return {
        "id": [f"7-{number}" for number in drawn.numbers],
        "question_stem": drawn.questions,
        "choices": [{"text": f"{answer} a b c d".split()[:4], "label": labels} for answer in drawn.answers],
        "answerKey": drawn.choice(labels),
    }


def named(question: str, answer: str, drawn: Drawn, /, **others: Sequence[Any]) -> Columns:
    """Two columns under these names, and others that hold one of some values."""
    chosen = {name: drawn.choice(values) for name, values in others.items()}
    return {question: drawn.questions, answer: drawn.answers, **chosen}


def openmathinstruct2(drawn: Drawn) -> Columns:
    answers = [str(number) for number in drawn.rng.integers(0, 9999, len(drawn.questions)).tolist()]
    sources = ["augmented_math", "augmented_gsm8k", "math", "gsm8k"]
    return {**named("problem", "generated_solution", drawn, problem_source=sources), "expected_answer": answers}


def numinamath(drawn: Drawn) -> Columns:
    return named(
        "problem", "solution", drawn,
        answer=["1", "$\\pi$", "proof"], question_type=["math-word-problem", "MCQ", "proof"],
        problem_is_valid=["Yes", "Yes", "Incomplete"], solution_is_valid=["Yes", "Yes", "Problem"],
        synthetic=[False, False, False, True],
    )  # fmt: skip


def gsm8k(drawn: Drawn) -> Columns:
    sums = drawn.rng.integers(2, 900, (len(drawn.questions), 2)).tolist()
    marked = [
        f"It is {a}+{b}=<<{a}+{b}={a + b}>>{a + b}.\n{answer}\n#### {a + b:,}"
        for (a, b), answer in zip(sums, drawn.answers, strict=True)
    ]
    return {"question": drawn.questions, "answer": marked}


def competition(drawn: Drawn) -> Columns:
    boxed = [rf"{answer} So $\boxed{{{number}}}$." for number, answer in zip(drawn.numbers, drawn.answers, strict=True)]
    return {"problem": drawn.questions, "level": drawn.constant("Level 3"), "solution": boxed}


def khan(drawn: Drawn) -> Columns:
    return {"problem": drawn.questions, "hints": [(answer or "").split(". ") for answer in drawn.answers]}


def thought(answer: str | None) -> str | None:
    """The first nine tenths as thinking, the rest as what is said then."""
    if answer is None:
        return None
    end = len(answer) * 9 // 10
    return f"<think>\n{answer[:end]}\n</think>\n\n{answer[end:]}"


def acereason(drawn: Drawn) -> Columns:
    return {
        "category": drawn.choice(["math", "math", "code"]),
        "source": drawn.constant("made"),
        "input": drawn.questions,
        "output": list(map(thought, drawn.answers)),
    }


def openthoughts2(drawn: Drawn) -> Columns:
    turns = [
        [{"from": "user", "value": asked}, {"from": "assistant", "value": thought(said)}]
        for asked, said in zip(drawn.questions, drawn.answers, strict=True)
    ]
    return {"conversations": turns, "source": drawn.choice(["automath", "science", "magicoder"])}


def natural_reasoning(drawn: Drawn) -> Columns:
    responses = [[{"response_model": "m", "response": answer}] for answer in drawn.answers]
    return {"question": drawn.questions, "reference_answer": drawn.choice(["", "3 km", "yes"]), "responses": responses}


def sudoku(drawn: Drawn) -> Columns:
    """Sudokus that differ from one solved grid by their digits and the order of their bands; 30 cells are given."""
    count, rng = len(drawn.questions), drawn.rng
    rows = (np.arange(9)[:, None] * 3 + np.arange(9)[:, None] // 3 + np.arange(9)) % 9
    bands = rng.permuted(np.tile(np.arange(3), (count, 1)), axis=1)
    grids = rows[(bands[:, :, None] * 3 + np.arange(3)).reshape(count, 9)].reshape(count, 81)
    digits = rng.permuted(np.tile(np.frombuffer(b"123456789", np.uint8), (count, 1)), axis=1)
    solved = np.take_along_axis(digits, grids, axis=1)
    puzzles = np.where(rng.random((count, 81)) < 30 / 81, solved, np.uint8(ord(".")))
    question, answer = ([line.tobytes().decode() for line in side] for side in (puzzles, solved))
    return {"source": drawn.constant("made"), "question": question, "answer": answer, "rating": drawn.constant("7")}


def school(drawn: Drawn) -> Columns:
    """Lines as those of DeepMind Mathematics."""
    numbers = drawn.rng.integers(-9999, 9999, (len(drawn.questions), 3)).tolist()
    return {
        "question": [f"Solve {a}*x + {b} = {a * c + b} for x." for a, b, c in numbers],
        "answer": [str(c) for _, _, c in numbers],
    }


def _flan(mixture: str, source: str, tasks: int, share: float, answer: Logarithm, folder: str = "opt") -> list[Layout]:
    """A mixture with examples in its prompts and without."""
    upstream = mixture.removesuffix("2021")
    return [
        Layout(
            f"flan_{mixture}_{shots}",
            share,
            f"{upstream}_{shots}{folder}_data/part.{{part}}.parquet",
            partial(flan, source, f"{shots}_{folder}", tasks),
            question=question,
            answer=answer,
        )
        for shots, question in (("fs", (6.0, 0.7)), ("zs", PREFIX))
    ]


HUB = "data/train-{part:05d}-of-{parts:05d}.parquet"
PRINCIPIA = "data/{}-{{part:05d}}-of-{{parts:05d}}.parquet"
PLATYPUS = tuple(f"platypus_{part}" for part in ("prm800k", "reclor", "scibench", "scienceqa", "theoremqa"))
posed = partial(named, "problem_statement", "answer")
asked = partial(named, "question", "answer")

LAYOUTS = (
    *_flan("cot", "CoT", 18, 0.004, (3.6, 0.6)),
    *_flan("dialog", "Dialog", 4, 0.008, (3.0, 0.8)),
    *_flan("flan2021", "Flan2021", 70, 0.05, (2.5, 1.0)),
    *_flan("niv2", "NIv2", 300, 0.03, (2.5, 1.0)),
    *_flan("t0", "P3", 190, 0.05, (2.0, 1.0), "noopt"),
    Layout("tasksource", 0.05, HUB, tasksource, answer=LABEL),
    Layout("no_robots", 0.005, HUB, chat),
    Layout("synth", 0.17, "synth_{part:03d}.parquet", synth, answer=(5.5, 0.8)),
    Layout("platypus_arb", 0.01, HUB, platypus, "mathematics", also=PLATYPUS),
    Layout("platypus_openbookqa", 0.002, "main/train-{part:05d}-of-{parts:05d}.parquet", openbookqa, answer=LABEL),
    Layout("principia", 0.01, PRINCIPIA.format("mathematical_object"), posed, "mathematics", answer=LABEL),
    Layout("principia_numerical", 0.01, PRINCIPIA.format("numerical"), posed, "mathematics", answer=LABEL),
    Layout("openmathinstruct2", 0.11, HUB, openmathinstruct2, "mathematics", also=("openmathinstruct2_answers",)),
    Layout("numinamath", 0.03, HUB, numinamath, "mathematics"),
    Layout("omnimath", 0.004, "test.jsonl", partial(named, "problem", "solution", answer=["1", "$x$"]), "mathematics"),
    Layout("gsm8k_train", 0.004, "train.jsonl", gsm8k, "mathematics", (4.0, 0.5), (4.0, 0.5)),
    Layout("math_train", 0.0004, "train/{part}/{row}.json", competition, "mathematics", also=("math_train_answers",)),
    Layout("dm_mathematics", 0.03, "train-easy/algebra__linear_{part}d.txt", school, question=NONE, answer=NONE),
    Layout("amps_mathematica", 0.0001, "mathematica/algebra/task{part}/{row}.txt", asked, "mathematics", answer=LABEL),
    Layout("amps_khan", 0.0004, "khan/{part}/{row}.json", khan, "mathematics"),
    Layout("sudoku_extreme", 0.03, "train.csv", sudoku, question=NONE, answer=NONE),
    Layout("acereason", 0.9, HUB, acereason, "mathematics", answer=LONG),
    Layout("openthoughts2", 0.5, HUB, openthoughts2, "code", answer=LONG),
    Layout("textbook_reasoning", 0.03, HUB, partial(asked, reference_answer=["Bonds", "4", ""])),
    Layout("natural_reasoning", 0.03, "full-{part}.jsonl.gz", natural_reasoning),
    Layout("webinstruct_verified", 0.01, HUB, asked, answer=LABEL),
)
"""Every dataset that hrm_text.data.sources cleans; their shares are about those of the released mixture's bytes after
sampling, so that no kind of file is too rare to be seen. The two of LONG answers are most of the bytes, as they are
upstream before their reasoning is removed."""
