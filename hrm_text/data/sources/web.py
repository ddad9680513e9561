"""Questions from textbooks and the web: TextbookReasoning, NaturalReasoning, WebInstruct-verified."""

from __future__ import annotations

from collections.abc import Iterator

from hrm_text.contracts import Example
from hrm_text.data.sources.pairs import asks_for_proof, pair, text
from hrm_text.data.sources.upstream import Drop, Hub, Row, dataset


def _reference(row: Row) -> Iterator[Example | Drop]:
    """The answer that stood in the document: extracted by a model, so noisy; of no use where a proof is wanted."""
    question, answer = text(row, "question"), text(row, "reference_answer")
    if not answer:
        yield Drop("no reference answer")
    elif asks_for_proof(question):
        yield Drop("reference answer to a proof")
    else:
        yield pair("noisy,direct", question, answer)


@dataset(
    "textbook_reasoning",
    group="textbook, web",
    licence="CC-BY-NC-SA-4.0",
    home="https://huggingface.co/datasets/MegaScience/TextbookReasoning",
    condition="synth,cot with the solution a model refined; noisy,direct with the book's answer, unless it is a proof",
    columns={"question": "string", "answer": "string", "reference_answer": "string or null"},
    files=("**/train-*.parquet",),
    hub=Hub("MegaScience/TextbookReasoning"),
    rows=651_840,
    megabytes=532,
)
def clean_textbook_reasoning(row: Row) -> Iterator[Example | Drop]:
    """TextbookReasoning: questions from 12,000 university textbooks of seven sciences."""
    yield pair("synth,cot", text(row, "question"), text(row, "answer"))
    yield from _reference(row)


@dataset(
    "natural_reasoning",
    group="textbook, web",
    licence="CC-BY-NC-4.0",
    home="https://huggingface.co/datasets/facebook/natural_reasoning",
    condition="synth,cot with each model's response; noisy,direct with the document's answer, unless it is a proof",
    columns={"question": "string", "responses": "list or null", "reference_answer": "string or null"},
    files=("**/*.jsonl", "**/*.json", "**/*.jsonl.gz"),
    hub=Hub("facebook/natural_reasoning"),
    rows=1_145_824,
    megabytes=4_400,
)
def clean_natural_reasoning(row: Row) -> Iterator[Example | Drop]:
    """NaturalReasoning: questions made from web pages, answered by Llama-3.3-70B."""
    responses = row.get("responses")
    found = responses if isinstance(responses, list) else []
    answers = [text(each, "response") for each in found if isinstance(each, dict)]
    if not answers:
        yield Drop("no response of a model")
    for answer in answers:
        yield pair("synth,cot", text(row, "question"), answer)
    yield from _reference(row)


@dataset(
    "webinstruct_verified",
    group="textbook, web",
    licence="Apache-2.0",
    home="https://huggingface.co/datasets/TIGER-Lab/WebInstruct-verified",
    condition="direct",
    columns={"question": "string", "answer": "string"},
    files=("**/train-*.parquet",),
    hub=Hub("TIGER-Lab/WebInstruct-verified"),
    rows=228_736,
    megabytes=50,
)
def clean_webinstruct_verified(row: Row) -> Iterator[Example | Drop]:
    """WebInstruct-verified: exam questions from the web whose short answer a model has checked."""
    yield pair("direct", text(row, "question"), text(row, "answer"))
