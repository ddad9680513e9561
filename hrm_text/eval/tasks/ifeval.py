"""IFEval (Zhou et al. 2023): 541 requests that a program can verify. Beyond the published protocol."""

from collections.abc import Iterator

from hrm_text.eval.scoring.instructions import judge
from hrm_text.eval.task import Dataset, Question, Rows, Scored, Task

DATASET = Dataset("google/IFEval", split="train", folder="ifeval")


def questions(rows: Rows) -> Iterator[Question]:
    """A question a row, as it stands."""
    for row in rows(DATASET):
        yield Question(str(row["key"]), row["prompt"], {"kinds": row["instruction_id_list"], "kwargs": row["kwargs"]})


def score(response: str, question: Question) -> Scored:
    """1 if every instruction is followed to the letter; also: by a loose form, and of how many instructions."""
    judged = judge(response, question.answer["kinds"], question.answer["kwargs"])
    ways = {"strict": judged.strict, "loose": judged.loose}
    counts = {f"instruction, {way}": (sum(found), len(found)) for way, found in ways.items()}
    followed = [kind for kind, follows in zip(question.answer["kinds"], judged.strict, strict=True) if follows]
    right = float(all(judged.strict))
    also = {"prompt, loose": float(all(judged.loose))}
    return Scored(right, right, " ".join(followed), readable=bool(response.strip()), also=also, counts=counts)


TASK = Task(
    name="ifeval",
    version=2,
    title="IFEval, prompts followed strictly",
    datasets=(DATASET,),
    questions=questions,
    score=score,
    condition="synth,cot",
    max_new_tokens=1280,
)
