r"""GSM8K (Cobbe et al. 2021): word problems of primary school, answered by an integer in the last ``\boxed``."""

from __future__ import annotations

from collections.abc import Iterator

from hrm_text.eval.scoring.boxed import score_integer
from hrm_text.eval.task import Dataset, Question, Rows, Task

TEST = Dataset("openai/gsm8k", config="main")


def questions(rows: Rows) -> Iterator[Question]:
    """The problem alone; the answer stands behind ``####``, with commas between thousands."""
    for index, row in enumerate(rows(TEST)):
        answer = int(row["answer"].rpartition("####")[2].replace(",", ""))
        yield Question(str(index), row["question"].strip(), answer)


TASK = Task(
    name="gsm8k",
    version=1,
    title="GSM8K",
    datasets=(TEST,),
    questions=questions,
    score=score_integer,
    condition="synth,cot",
    max_new_tokens=3072,
    context=3072,
    held_in=("gsm8k_train", "flan_cot_fs", "flan_cot_zs"),
)
