"""MMLU-Pro (Wang et al. 2024): multiple choice with up to ten options in 14 subjects, answered after reasoning."""

from __future__ import annotations

from collections.abc import Iterator

from hrm_text.eval.scoring.letters import letter, score_last_letter
from hrm_text.eval.task import Dataset, Question, Rows, Task

TEST = Dataset("TIGER-Lab/MMLU-Pro", config="default")


def questions(rows: Rows) -> Iterator[Question]:
    """The question, then every option behind its letter in brackets."""
    for row in rows(TEST):
        options = [f"({letter(index)}) {option}" for index, option in enumerate(row["options"])]
        prompt = "\n".join([row["question"].strip(), "Options:", *options])
        name = str(row["question_id"])
        yield Question(name, prompt, row["answer"], subject=row["category"], choices=len(options))


TASK = Task(
    name="mmlu_pro",
    version=1,
    title="MMLU-Pro",
    datasets=(TEST,),
    questions=questions,
    score=score_last_letter,
    condition="synth,cot",
    max_new_tokens=3072,
    context=3072,
    macro=True,
    chance=0.1,
)
