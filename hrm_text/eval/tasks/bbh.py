"""BIG-Bench Hard (Suzgun et al. 2022): 27 subtasks, three examples each, direct. Beyond the published protocol.

Direct, as all few-shot benchmarks of the published protocol: the authors' worked examples are prose that trains a form
of reasoning this model does not have, and they are not part of the data. A subtask's examples are its first three rows,
which are not asked. Under another condition the answer is looked for behind the working.
"""

import re
from collections.abc import Iterator

from hrm_text.eval.few_shot import FewShot, Shot
from hrm_text.eval.scoring.boxed import last_boxed
from hrm_text.eval.task import Dataset, Question, Rows, Scored, Task

SUBTASKS = (
    "boolean_expressions causal_judgement date_understanding disambiguation_qa dyck_languages formal_fallacies "
    "geometric_shapes hyperbaton logical_deduction_five_objects logical_deduction_seven_objects "
    "logical_deduction_three_objects movie_recommendation multistep_arithmetic_two navigate object_counting "
    "penguins_in_a_table reasoning_about_colored_objects ruin_names salient_translation_error_detection snarks "
    "sports_understanding temporal_sequences tracking_shuffled_objects_five_objects "
    "tracking_shuffled_objects_seven_objects tracking_shuffled_objects_three_objects web_of_lies word_sorting"
).split()
DATASETS = tuple(Dataset("lukaemon/bbh", config=name, split="test", folder="bbh") for name in SUBTASKS)
SHOTS = 3


def questions(rows: Rows) -> Iterator[Question]:
    """All rows but the examples."""
    for dataset in DATASETS:
        table = [Shot(f"Q: {row['input'].strip()}\nA:", row["target"].strip()) for row in rows(dataset)]
        few_shot = FewShot(table[:SHOTS])
        for number, row in enumerate(table[SHOTS:], start=SHOTS):
            subject = str(dataset.config)
            yield few_shot.ask(row.asked, id=f"{subject}/{number}", answer=row.answer, subject=subject)


def answer_in(response: str, right: str) -> str:
    """The answer that a response gives: in a box, behind "the answer is", or its last line; of options the letter."""
    response = response.split("\nQ:")[0]  # what a model asks itself next is no answer
    stated = re.findall(r"answer(?: is:?|:)\s*(.+)", response, re.IGNORECASE)
    lines = [line for line in response.splitlines() if line.strip()] or [""]
    found = last_boxed(response) or (stated[-1] if stated else lines[-1])
    found = re.sub(r"^\\text\{(.*)\}$", r"\1", found.strip(" *$").rstrip(".*$ "))
    if re.fullmatch(r"\([A-Z]\)", right):
        letters = re.findall(r"\(([A-Z])\)|^([A-Z])(?=[.):]|$)", found)
        return f"({''.join(letters[0])})" if letters else ""
    return " ".join(found.lower().replace(",", " " if " " in right else "").split())


def score(response: str, question: Question) -> Scored:
    """1 if the answers are the same, capitals, white space and a full stop aside."""
    got, right = answer_in(response, question.answer), answer_in(question.answer, question.answer)
    return Scored(float(got == right), float(got == right), got, readable=bool(got))


TASK = Task(
    name="bbh",
    version=1,
    title="BIG-Bench Hard",
    datasets=DATASETS,
    questions=questions,
    score=score,
    condition="direct",
    max_new_tokens=256,
    shots=SHOTS,
    macro=True,
    chance=0.257,  # the mean over subtasks of the published random baseline
)
