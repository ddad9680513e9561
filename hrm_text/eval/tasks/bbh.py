"""BIG-Bench Hard (Suzgun et al. 2022): 27 subtasks, three examples each, direct. Beyond the published protocol.

Direct, as all few-shot benchmarks of the published protocol: the authors' worked examples are not part of the data. A
subtask's examples are its first three rows, which are not asked. Under other conditions the answer may follow working.
"""

from collections.abc import Iterator

from hrm_text.eval.few_shot import FewShot, Shot
from hrm_text.eval.scoring.stated import score_stated
from hrm_text.eval.subtasks import BBH
from hrm_text.eval.task import Dataset, Question, Rows, Task

DATASETS = tuple(Dataset("lukaemon/bbh", config=name, split="test", folder="bbh") for name in BBH)
SHOTS = 3


def questions(rows: Rows) -> Iterator[Question]:
    """All rows but the examples."""
    for dataset in DATASETS:
        table = [Shot(f"Q: {row['input'].strip()}\nA:", row["target"].strip()) for row in rows(dataset)]
        few_shot = FewShot(table[:SHOTS])
        for number, row in enumerate(table[SHOTS:], start=SHOTS):
            name = f"{dataset.config}/{number}"
            yield few_shot.ask(row.asked, id=name, answer=row.answer, subject=str(dataset.config))


TASK = Task(
    name="bbh",
    version=1,
    title="BIG-Bench Hard",
    datasets=DATASETS,
    questions=questions,
    score=score_stated,
    condition="direct",
    max_new_tokens=256,
    shots=SHOTS,
    macro=True,
    chance=0.257,  # the mean over subtasks of the published random baseline
)
