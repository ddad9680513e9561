"""General instructions beside FLAN: Tasksource (Sileo 2024) and No Robots."""

from __future__ import annotations

from collections.abc import Iterator

from hrm_text.contracts import Example
from hrm_text.data.sources.pairs import exchanges, pair, text
from hrm_text.data.sources.upstream import Drop, Hub, Row, dataset

_ONLY_FOR_EVALUATION = "task made for evaluation only"
_PREFERENCE = "task of rating answers"
_UNDECIDABLE = "task the text does not decide"
_ELSEWHERE = "task of another dataset"

LEFT_OUT = {
    # Made to measure models; their authors ask that nobody trains on them, or they have no training part.
    "bigbench": _ONLY_FOR_EVALUATION,
    "blimp": _ONLY_FOR_EVALUATION,
    "crows_pairs": _ONLY_FOR_EVALUATION,
    "mmlu": _ONLY_FOR_EVALUATION,
    "model-written-evals": _ONLY_FOR_EVALUATION,
    "truthful_qa": _ONLY_FOR_EVALUATION,
    "winobias": _ONLY_FOR_EVALUATION,
    "NeQA": _ONLY_FOR_EVALUATION,
    # Which of two answers somebody liked better: a judgement of style, learnt as if it were a fact.
    "hh-rlhf": _PREFERENCE,
    "SHP": _PREFERENCE,
    "oasst1_pairwise_rlhf_reward": _PREFERENCE,
    "synthetic-instruct-gptj-pairwise": _PREFERENCE,
    "webgpt_comparisons": _PREFERENCE,
    "wouldyourather": _PREFERENCE,
    # Guesses about the author, or about which program wrote a text.
    "blog_authorship_corpus": _UNDECIDABLE,
    "TuringBench": _UNDECIDABLE,
    "hyperpartisan_news": _UNDECIDABLE,
    "path-naturalness-prediction": _UNDECIDABLE,
    # Sampled more fully there.
    "ScienceQA_text_only": _ELSEWHERE,
    "icl-symbol-tuning-instruct": _ELSEWHERE,
}
"""Task, or the part of its name before the first slash, and why its rows are dropped."""


@dataset(
    "tasksource",
    group="general instruction",
    licence="Apache-2.0 (each task has its own)",
    home="https://huggingface.co/datasets/tasksource/tasksource-instruct-v0",
    condition="direct",
    columns={"inputs": "string", "targets": "string", "task": "string"},
    files=("**/train-*.parquet",),
    hub=Hub("tasksource/tasksource-instruct-v0"),
    rows=5_314_383,
    megabytes=1_887,
    stratum=lambda row: text(row, "task") or "unnamed",
)
def clean_tasksource(row: Row) -> Iterator[Example | Drop]:
    """Tasksource: classification, tagging and multiple choice with short answers, 485 tasks."""
    task = text(row, "task")
    reason = LEFT_OUT.get(task) or LEFT_OUT.get(task.partition("/")[0])
    if reason:
        yield Drop(reason)
        return
    # Upstream ends every answer with a full stop, which is not part of the label.
    yield pair("direct", text(row, "inputs"), text(row, "targets").removesuffix(".").rstrip())


@dataset(
    "no_robots",
    group="general instruction",
    licence="CC-BY-NC-4.0",
    home="https://huggingface.co/datasets/HuggingFaceH4/no_robots",
    condition="cot",
    columns={"messages": "list"},
    files=("**/train*.parquet",),
    hub=Hub("HuggingFaceH4/no_robots"),
    rows=9_500,
    megabytes=11,
)
def clean_no_robots(row: Row) -> Iterator[Example | Drop]:
    """No Robots: instructions answered by people; the first turn, after the system's prompt where there is one."""
    turns = list(exchanges(row, "messages", speaker="role", says="content"))
    system = turns.pop(0)[1] if turns and turns[0][0] == "system" else ""
    if [who for who, _ in turns[:2]] != ["user", "assistant"]:
        yield Drop("no user turn with its answer")
        return
    question, answer = turns[0][1], turns[1][1]
    yield pair("cot", "\n\n".join(filter(None, (system, question))) if question else "", answer)
