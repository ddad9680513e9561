"""Solutions of reasoning models, their thinking removed: AceReason-1.1-SFT and OpenThoughts2-1M."""

from __future__ import annotations

import re
from collections.abc import Iterator

from hrm_text.contracts import Example
from hrm_text.data.prompt import strip_thinking
from hrm_text.data.sources.pairs import exchanges, pair, text
from hrm_text.data.sources.upstream import Drop, Hub, Row, dataset

_THOUGHT = re.compile(r"<\|begin_of_thought\|>.*?(?:<\|end_of_thought\|>|\Z)", re.DOTALL)
_SOLUTION = re.compile(r"<\|begin_of_solution\|>(.*?)(?:<\|end_of_solution\|>|\Z)", re.DOTALL)

CODE_SOURCES = frozenset({"codefeedback", "dolphin", "evolcodegolf", "glaive", "magicoder", "sharegpt"})
"""Of OpenThoughts2: programming tasks, which the released mixture leaves out."""
OTHER_SOURCES = frozenset({"nvidia_math"})
"""Of OpenThoughts2: problems that AceReason and OpenMathInstruct-2 bring."""


def solution(response: str) -> str:
    """What remains of a response once its thinking is removed; empty where it never came to an end.

    Thinking is ``<think>...</think>`` (the opening tag may be missing: some files start behind it), or
    ``<|begin_of_thought|>...<|end_of_thought|>``, and then the answer may stand between the marks of a solution.
    """
    without = strip_thinking(_THOUGHT.sub("", response)).rpartition("</think>")[2]
    found = _SOLUTION.search(without)
    return (found[1] if found else without).strip()


@dataset(
    "acereason",
    group="reasoning",
    licence="CC-BY-4.0",
    home="https://huggingface.co/datasets/nvidia/AceReason-1.1-SFT",
    condition="synth,cot",
    columns={"input": "string", "output": "string", "category": "string"},
    files=("**/*.parquet", "**/*.jsonl"),
    hub=Hub("nvidia/AceReason-1.1-SFT"),
    rows=3_970_332,
    megabytes=45_000,
)
def clean_acereason(row: Row) -> Iterator[Example | Drop]:
    """AceReason-1.1-SFT: mathematics solved by DeepSeek-R1; its programming tasks are left out."""
    if text(row, "category") != "math":
        yield Drop("programming")
        return
    yield pair("synth,cot", text(row, "input"), solution(text(row, "output")))


@dataset(
    "openthoughts2",
    group="reasoning",
    licence="Apache-2.0",
    home="https://huggingface.co/datasets/open-thoughts/OpenThoughts2-1M",
    condition="synth,cot",
    columns={"conversations": "list", "source": "string or null"},
    files=("**/train-*.parquet",),
    hub=Hub("open-thoughts/OpenThoughts2-1M"),
    rows=1_143_205,
    megabytes=8_500,
)
def clean_openthoughts2(row: Row) -> Iterator[Example | Drop]:
    """OpenThoughts2-1M: mathematics, science and puzzles solved by DeepSeek-R1; programming is left out."""
    source = text(row, "source")
    turns = list(exchanges(row, "conversations", speaker="from", says="value"))
    if source in CODE_SOURCES:
        yield Drop("programming")
    elif source in OTHER_SOURCES:
        yield Drop("problem of another dataset")
    elif [who for who, _ in turns] not in (["user", "assistant"], ["human", "gpt"]):
        yield Drop("not one question and one answer")
    else:
        answer = solution(turns[1][1])
        yield Drop("programming") if "```" in answer else pair("synth,cot", turns[0][1], answer)
