"""Rewritten knowledge: SYNTH, exercises made by models from 58,698 Wikipedia articles."""

from __future__ import annotations

from collections.abc import Iterator

from hrm_text.contracts import Example
from hrm_text.data.sources.pairs import pair, text
from hrm_text.data.sources.upstream import Drop, Hub, Row, dataset


@dataset(
    "synth",
    group="rewritten knowledge",
    licence="CC-BY-4.0",
    home="https://huggingface.co/datasets/PleIAs/SYNTH",
    condition="synth,direct where the exercise is a multiple choice (its name ends in mcq), else synth,cot",
    columns={
        "language": "string or null",
        "exercise": "string or null",
        "query": "string or null",
        "query_seed_url": "string or null",
        "constraints": "string or null",
        "synthetic_answer": "string or null",
    },
    files=("**/synth_*.parquet",),
    hub=Hub("PleIAs/SYNTH"),
    rows=77_908_583,
    megabytes=236_335,
)
def clean_synth(row: Row) -> Iterator[Example | Drop]:
    """SYNTH: questions, multiple choice, retrieval and writing about Wikipedia articles; English alone."""
    exercise, seed = text(row, "exercise").lower(), text(row, "query_seed_url")
    if text(row, "language") != "en":
        yield Drop("not English")
    elif "self-knowledge" in seed.lower() or "self-knowledge" in exercise:
        yield Drop("about the model that wrote it")
    elif exercise == "cooking":
        yield Drop("cooking")
    elif not seed:
        # Arithmetic word problems of low quality, made without an article; the released mixture has none of them.
        yield Drop("no article behind it")
    else:
        question = text(row, "query")
        # The texts that a retrieval exercise is to be answered from stand apart from its question.
        sources = text(row, "constraints") if exercise == "rag" and question else ""
        condition = "synth,direct" if exercise.endswith("mcq") else "synth,cot"
        yield pair(condition, "\n\n".join(filter(None, (question, sources))), text(row, "synthetic_answer"))
