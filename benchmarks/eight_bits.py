"""What 8-bit weights and an 8-bit key-value cache cost a trained model: perplexity and exact match, in one run.

    python benchmarks/eight_bits.py WEIGHTS_DIR [--tasks quickstart] [--limit 100] [--device cpu]

Perplexity is that of the tasks' answers, token by token as in decoding: each token is put into the cache and the next
one is predicted from there.
"""

from __future__ import annotations

import argparse
import itertools
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from hrm_text.eval.exact import given_questions
from hrm_text.eval.task import Question, Task
from hrm_text.eval.tasks import find_tasks
from hrm_text.infer.requests import KeyValues, Request, Sampling, Turn
from hrm_text.infer.sampling import Chosen, RowState
from hrm_text.infer.text_model import Quantize, TextModel, load
from hrm_text.recipes.evaluation import evaluate_model
from hrm_text.recipes.quickstart_outcome import read_answered


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path)
    parser.add_argument("--tasks", default="quickstart")
    parser.add_argument("--limit", type=int, default=100)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    given = parser.parse_args()
    tasks = find_tasks(given.tasks.split(","), limit=given.limit)
    asked = [(task, question) for task in tasks for question in given_questions(task)]
    print(f"{given.weights}: {len(asked)} questions of {len(tasks)} tasks, {given.dtype} on {given.device}")
    print(f"{'weights':10}{'cache':10}{'perplexity':>12}{'exact match':>14}{'answers changed':>18}")
    first: list[str] | None = None
    weights: tuple[Quantize, ...] = ("none", "int8")
    caches: tuple[KeyValues, ...] = ("auto", "int8")
    for quantize, kv_cache in itertools.product(weights, caches):
        model = load(given.weights, device=given.device, dtype=given.dtype, quantize=quantize, kv_cache=kv_cache)
        with tempfile.TemporaryDirectory() as run:
            evaluate_model(model, tasks, Path(run), identity={})
            outcome = read_answered(Path(run))
        answers = [result["text"] for result in outcome]
        first = first or answers
        changed = sum(a != b for a, b in zip(answers, first, strict=True)) / len(answers)
        right = sum(result["ok"] for result in outcome) / len(answers)
        ppl = perplexity(model, asked, kv_cache)
        print(f"{quantize:10}{kv_cache:10}{ppl:12.4f}{right:14.2%}{changed:18.2%}", flush=True)


class Teacher:
    """In the place of a sampler: says the answers, and notes how likely the model held each token."""

    def __init__(self, answers: Sequence[Sequence[int]]) -> None:
        self.left = [iter(answer) for answer in answers]
        self.losses: list[float] = []

    def choose(self, logits_BV: Tensor, rows: Sequence[RowState]) -> Chosen:
        ids_B = torch.tensor([next(self.left[row.sampling.seed]) for row in rows], device=logits_BV.device)
        self.losses += F.cross_entropy(logits_BV.float(), ids_B, reduction="none").tolist()
        return Chosen(ids_B, ())


def perplexity(model: TextModel, asked: Sequence[tuple[Task, Question]], kv_cache: KeyValues) -> float:
    """exp of the mean loss per token of the answers, end tokens counted."""
    engine = model.engine(max_batch=64, kv_cache=kv_cache)
    answers = [model.prompt_format.response_ids(question.answer) for _, question in asked]
    teacher = Teacher(answers)
    engine.sampler = teacher  # type: ignore[assignment]
    for number, ((task, question), answer) in enumerate(zip(asked, answers, strict=True)):
        prefix = model.prompt_format.prefix_ids(task.asked_under(question), question.prompt)
        # The number of the question travels as the seed of a draw that is never made.
        engine.submit(Request((Turn(tuple(prefix)),), len(answer), Sampling(seed=number)))
    while engine.has_work:
        engine.step()
    assert len(teacher.losses) == sum(map(len, answers))
    return math.exp(sum(teacher.losses) / len(teacher.losses))


if __name__ == "__main__":
    main()
