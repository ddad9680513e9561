"""Mathematics and science: the Platypus parts, Principia, OpenMathInstruct-2, NuminaMath, Omni-MATH, GSM8K, MATH."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from hrm_text.contracts import Example
from hrm_text.data.sources.pairs import asks_for_proof, boxed, pair, text
from hrm_text.data.sources.upstream import CleanRow, Drop, Hub, Row, dataset

GROUP = "mathematics"


class Part(NamedTuple):
    """A part of Open-Platypus."""

    source: str
    """As its column ``data_source`` says."""
    title: str
    licence: str
    rows: int


PLATYPUS = (
    Part("ARB", "ARB: graduate problems of mathematics, physics, science, law and reading", "CC-BY-4.0", 713),
    Part("reclor", "ReClor: logical reading of admission tests", "non-commercial", 4_530),
    Part("scibench", "SciBench: textbook problems of mathematics, physics and chemistry", "MIT", 616),
    Part("scienceqa", "ScienceQA: multiple choice of school science", "CC-BY-NC-SA-4.0", 1_317),
    Part("theoremqa", "TheoremQA: university problems, each about a theorem", "MIT", 564),
    Part(
        "MATH/PRM-800K",
        "Step-by-step solutions of MATH problems, some thousands of them of its TEST split",
        "MIT",
        12_298,
    ),
)
"""OpenBookQA, which the Platypus paper lists too, is not in the file, so it is read from its own home.

The 12,298 problems of ``MATH/PRM-800K`` are more than the 7,500 of MATH's train split, so that some thousands are of
the test split: no mixture here takes them (``configs/mixtures``).
"""

LONGEST_BARE_ANSWER = 40
"""Characters of an answer that shows no reasoning: a letter, a number, a formula, true or false."""


def is_bare(answer: str) -> bool:
    """Whether an answer is nothing but its result: one short line."""
    return len(answer) <= LONGEST_BARE_ANSWER and "\n" not in answer


def _platypus(part: Part) -> CleanRow:
    def clean(row: Row) -> Iterator[Example | Drop]:
        if text(row, "data_source") != part.source:
            yield Drop("another part of Open-Platypus")
            return
        # Multiple choice keeps "Choose A, B, C or D" in a column of its own.
        question = "\n\n".join(filter(None, (text(row, "instruction"), text(row, "input"))))
        answer = text(row, "output")
        yield pair("direct" if is_bare(answer) else "cot", question if text(row, "instruction") else "", answer)

    clean.__doc__ = f"{part.title}."
    return clean


for _part in PLATYPUS:
    dataset(
        f"platypus_{_part.source.rpartition('/')[2].replace('-', '').lower()}",
        group=GROUP,
        licence=_part.licence,
        home="https://huggingface.co/datasets/garage-bAInd/Open-Platypus",
        condition=f"direct where the answer is one line of at most {LONGEST_BARE_ANSWER} characters, else cot",
        columns={"instruction": "string", "input": "string or null", "output": "string", "data_source": "string"},
        files=("**/train-*.parquet",),
        hub=Hub("garage-bAInd/Open-Platypus"),
        rows=_part.rows,
        megabytes=16,
    )(_platypus(_part))


@dataset(
    "platypus_openbookqa",
    group=GROUP,
    licence="Apache-2.0",
    home="https://huggingface.co/datasets/allenai/openbookqa",
    condition="direct",
    columns={"question_stem": "string", "choices": "object", "answerKey": "string"},
    files=("**/main/train-*.parquet",),
    hub=Hub("allenai/openbookqa", config="main"),
    rows=4_957,
    megabytes=1,
)
def clean_openbookqa(row: Row) -> Iterator[Example | Drop]:
    """OpenBookQA: elementary science, four choices; the answer is the letter of the right one."""
    question, answer = text(row, "question_stem"), text(row, "answerKey")
    choices = row.get("choices")
    labels, texts = (choices.get("label"), choices.get("text")) if isinstance(choices, dict) else (None, None)
    if not isinstance(labels, list) or not isinstance(texts, list) or len(labels) != len(texts):
        yield Drop("no choices")
    elif answer not in labels:
        yield Drop("answer not among the choices")
    else:
        lines = [f"{label}. {choice}" for label, choice in zip(labels, texts, strict=True)]
        yield pair("direct", "\n".join([question, *lines]) if question else "", answer)


def _principia(row: Row) -> Iterator[Example | Drop]:
    yield pair("synth,direct", text(row, "problem_statement"), text(row, "answer"))


PRINCIPIA = {
    "principia": ("mathematical_object", "the answer is an expression, a set, an equation or a matrix", 248_743, 192),
    "principia_numerical": ("numerical", "the answer is a number", 305_656, 160),
}
"""Name, split, what its answers are, rows, megabytes."""

for _name, (_split, _answers, _rows, _megabytes) in PRINCIPIA.items():

    def _clean_principia(row: Row) -> Iterator[Example | Drop]:
        yield from _principia(row)

    _clean_principia.__doc__ = f"Principia Collection: graduate problems written by a model; {_answers}."
    dataset(
        _name,
        group=GROUP,
        licence="CC-BY-NC-SA-4.0",
        home="https://huggingface.co/datasets/facebook/principia-collection",
        condition="synth,direct",
        columns={"problem_statement": "string", "answer": "string"},
        files=(f"**/{_split}-*.parquet",),
        hub=Hub("facebook/principia-collection", split=_split),
        rows=_rows,
        megabytes=_megabytes,
    )(_clean_principia)


OPENMATHINSTRUCT2 = "https://huggingface.co/datasets/nvidia/OpenMathInstruct-2"


@dataset(
    "openmathinstruct2",
    group=GROUP,
    licence="CC-BY-4.0",
    home=OPENMATHINSTRUCT2,
    condition="synth,cot",
    columns={"problem": "string", "generated_solution": "string"},
    files=("**/train-*.parquet",),
    hub=Hub("nvidia/OpenMathInstruct-2"),
    rows=13_972_791,
    megabytes=7_000,
)
def clean_openmathinstruct2(row: Row) -> Iterator[Example | Drop]:
    """OpenMathInstruct-2: solutions by Llama-3.1-405B to problems of, and made after, MATH and GSM8K train."""
    yield pair("synth,cot", text(row, "problem"), text(row, "generated_solution"))


@dataset(
    "openmathinstruct2_answers",
    group=GROUP,
    licence="CC-BY-4.0",
    home=OPENMATHINSTRUCT2,
    condition="synth,direct",
    columns={"problem": "string", "expected_answer": "string", "problem_source": "string"},
    files=("**/train-*.parquet",),
    hub=Hub("nvidia/OpenMathInstruct-2"),
    rows=13_972_791,
    megabytes=7_000,
)
def clean_openmathinstruct2_answers(row: Row) -> Iterator[Example | Drop]:
    """OpenMathInstruct-2: the answer alone, to the problems a model has made."""
    if not text(row, "problem_source").startswith("augmented"):
        yield Drop("problem of MATH or GSM8K")
        return
    yield pair("synth,direct", text(row, "problem"), text(row, "expected_answer"))


NO_RESULT = frozenset({"", "proof", "notfound"})
"""What NuminaMath writes where a problem has no final answer."""


@dataset(
    "numinamath",
    group=GROUP,
    licence="Apache-2.0",
    home="https://huggingface.co/datasets/AI-MO/NuminaMath-1.5",
    condition="cot with the solution; direct with the final answer, unless the problem is a proof",
    columns={
        "problem": "string or null",
        "solution": "string or null",
        "answer": "string or null",
        "question_type": "string or null",
        "problem_is_valid": "string or null",
        "solution_is_valid": "string or null",
        "synthetic": "boolean or null",
    },
    files=("**/train-*.parquet",),
    hub=Hub("AI-MO/NuminaMath-1.5"),
    rows=896_215,
    megabytes=531,
)
def clean_numinamath(row: Row) -> Iterator[Example | Drop]:
    """NuminaMath-1.5: problems of competitions and schools with the solutions people wrote."""
    problem, answer = text(row, "problem"), text(row, "answer")
    solution = text(row, "solution")
    if row.get("synthetic") is True:
        yield Drop("made by a program")
    elif not text(row, "problem_is_valid") == text(row, "solution_is_valid") == "Yes":
        yield Drop("not checked as valid")
    elif "http" in problem or "http" in solution:
        yield Drop("refers to a picture or a page")
    else:
        yield pair("cot", problem, solution)
        if text(row, "question_type") == "proof" or answer.lower() in NO_RESULT:
            yield Drop("no final answer")
        else:
            yield pair("direct", problem, answer)


@dataset(
    "omnimath",
    group=GROUP,
    licence="Apache-2.0",
    home="https://huggingface.co/datasets/KbsdJames/Omni-MATH",
    condition="cot with the solution; direct with the final answer, unless the problem is a proof",
    columns={"problem": "string", "solution": "string", "answer": "string"},
    files=("**/test.jsonl", "**/test-*.parquet"),
    hub=Hub("KbsdJames/Omni-MATH", split="test"),
    rows=4_428,
    megabytes=9,
)
def clean_omnimath(row: Row) -> Iterator[Example | Drop]:
    """Omni-MATH: problems of olympiads; its only split is called test, and is none of our benchmarks."""
    problem, answer = text(row, "problem"), text(row, "answer")
    yield pair("cot", problem, text(row, "solution"))
    yield Drop("no final answer") if asks_for_proof(problem) else pair("direct", problem, answer)


_CALCULATOR = re.compile(r"<<[^<>]*>>")


@dataset(
    "gsm8k_train",
    group=GROUP,
    licence="MIT",
    home="https://huggingface.co/datasets/openai/gsm8k",
    condition="cot",
    columns={"question": "string", "answer": "string"},
    files=("**/train.jsonl", "**/main/train-*.parquet"),
    hub=Hub("openai/gsm8k", config="main"),
    rows=7_473,
    megabytes=4,
)
def clean_gsm8k(row: Row) -> Iterator[Example | Drop]:
    r"""GSM8K, train split: school word problems; calculator marks removed, the result in \boxed{} at the end."""
    steps, mark, result = text(row, "answer").rpartition("####")
    result = result.strip().replace(",", "")
    if not mark or not result:
        yield Drop("no final answer")
        return
    lines = [line.rstrip() for line in _CALCULATOR.sub("", steps).strip().split("\n")]
    # Evaluation reads the last \boxed{}.
    yield pair("cot", text(row, "question"), "\n".join([*filter(None, lines), rf"\boxed{{{result}}}"]))


MATH_ABOUT = {
    "group": GROUP,
    "licence": "MIT",
    "home": "https://github.com/hendrycks/math",
    "columns": {"problem": "string", "solution": "string"},
    "files": ("**/train-*.parquet", "**/train/*/*.json"),
    "hub": Hub("DigitalLearningGmbH/MATH-lighteval"),
    "rows": 7_500,
    "megabytes": 6,
    "stratum": lambda row: "train",
}
"""What the two ways of reading MATH share: Parquet of the hub, or a file for each problem as it was published."""


@dataset("math_train", condition="cot", **MATH_ABOUT)
def clean_math(row: Row) -> Iterator[Example | Drop]:
    r"""MATH, train split, with reasoning: problems of competitions, the result in \boxed{}."""
    solution = text(row, "solution")
    yield pair("cot", text(row, "problem"), solution) if boxed(solution) or not solution else Drop("no boxed answer")


@dataset("math_train_answers", condition="direct", **MATH_ABOUT)
def clean_math_answers(row: Row) -> Iterator[Example | Drop]:
    r"""MATH, train split, without reasoning: the boxed result alone."""
    solution = text(row, "solution")
    result = boxed(solution)
    if solution and not result:
        yield Drop("no boxed answer")
        return
    yield pair("direct", text(row, "problem"), rf"\boxed{{{result}}}" if result else "")
