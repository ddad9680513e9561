"""HumanEval (Chen et al. 2021): 164 Python functions to write. Beyond the published protocol."""

from collections.abc import Iterator

from hrm_text.eval.scoring.code import programs_of, require_isolation, run_tests
from hrm_text.eval.task import Dataset, Question, Rows, Scored, Task

DATASET = Dataset("openai/openai_humaneval", split="test", folder="humaneval")
JOB = ("prompt", "test", "entry_point")


def questions(rows: Rows) -> Iterator[Question]:
    """A question a row, where its answer could be run at all: nothing is generated that could not be scored."""
    require_isolation()
    for row in rows(DATASET):
        yield Question(row["task_id"], row["prompt"], {name: row[name] for name in JOB})


def score(response: str, question: Question) -> Scored:
    """1 if every test passes; unreadable is what is not Python, or does not define the function."""
    job = question.answer
    verdict = run_tests(programs_of(response, job["prompt"], job["entry_point"]), **job)
    right = float(verdict.passed)
    got = f"{verdict.kind}: {verdict.detail}".rstrip(": ")
    return Scored(right, right, got, readable=verdict.kind != "unreadable")


TASK = Task(
    name="humaneval",
    version=1,
    title="HumanEval, pass@1",
    datasets=(DATASET,),
    questions=questions,
    score=score,
    condition="synth,cot",
    max_new_tokens=1024,
    runs_code=True,
)
