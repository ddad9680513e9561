"""How much a text depends on who is in its batch: the products of another batch size round in another order.

    python benchmarks/neighbours.py WEIGHTS_DIR [--tasks quickstart] [--dtype bfloat16] [--quantize int8]
    python benchmarks/neighbours.py --random --size XL --dtype bfloat16 --device cuda

Every prompt is answered alone, greedily, and again in batches. "same token": the batch is made to say what the text
said alone, and at each place the likeliest token is compared, so that the context is always the same. "same text": the
batch says what it likes, and whole responses are compared. "largest gap": at the places where the token differs, how
far apart the two best logits were alone, at most; what is beyond rounding would be an error.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hrm_text.contracts import UserError
from hrm_text.eval.exact import given_questions
from hrm_text.eval.tasks import find_tasks
from hrm_text.infer.answering import Answering
from hrm_text.infer.engine import DecodingEngine
from hrm_text.infer.requests import Request, Sampling, Turn
from hrm_text.infer.sampling import Chosen, RowState, Sampler
from hrm_text.infer.text_model import load
from hrm_text.model.config import preset
from hrm_text.model.quantized import quantize_weights
from hrm_text.model.recurrence import build
from hrm_text.model.weights import parse_dtype
from hrm_text.recipes.decode_loads import RandomModel, RandomRequests, RandomText

BATCHES = (4, 16, 64)


@dataclass(frozen=True)
class Said:
    """A response: its tokens, the end token too, and how far the best logit was before the second at each."""

    ids: list[int]
    gaps: list[float]


@dataclass(frozen=True)
class Difference:
    """A batch size against the same texts alone."""

    batch: int
    tokens: int
    same_tokens: int
    texts: int
    same_texts: int
    largest_gap: float | None
    """Logits; None where no token differs."""


class Listener:
    """In the place of a sampler: takes the likeliest token, notes it, and says it, or else what it has been told to."""

    def __init__(self, vocab_size: int, device: torch.device, told: Mapping[int, Sequence[int]] | None = None) -> None:
        """told: the tokens that each text is to say, by its number."""
        self.sampler, self.vocab_size, self.told = Sampler(vocab_size, device), vocab_size, told
        self.heard: dict[int, list[tuple[int, float]]] = defaultdict(list)

    def choose(self, logits_BV: Tensor, rows: Sequence[RowState]) -> Chosen:
        """See ``Sampler``. The number of a text travels as the seed of a draw that is never made."""
        chosen = self.sampler.choose(logits_BV, rows)
        best_B2 = logits_BV[:, : self.vocab_size].float().topk(2).values
        numbers = [row.sampling.seed for row in rows]
        gaps = (best_B2[:, 0] - best_B2[:, 1]).tolist()
        for number, token, gap in zip(numbers, chosen.token_ids.tolist(), gaps, strict=True):
            self.heard[number].append((token, gap))
        if self.told is None:
            return chosen
        said = [self.told[number][len(self.heard[number]) - 1] for number in numbers]
        return Chosen(torch.tensor(said, device=logits_BV.device), ())


def listen(
    model: Answering, requests: Sequence[Request], batch: int, told: Sequence[Said] | None = None, **options: Any
) -> list[Said]:
    """The likeliest tokens of each text, of so many at a time; after its own tokens, or after those it is told to say.

    options: of the engine.
    """
    room = max(request.num_prompt_tokens + request.max_new_tokens for request in requests) + 64
    engine = DecodingEngine(model, max_batch=batch, cache_tokens=batch * room, **options)
    ids = None if told is None else {number: said.ids for number, said in enumerate(told)}
    listener = Listener(model.vocab_size, engine.device, ids)
    engine.sampler = listener  # type: ignore[assignment]
    for number, request in enumerate(requests):
        new = request.max_new_tokens if told is None else len(told[number].ids)
        engine.submit(replace(request, max_new_tokens=new, sampling=Sampling(seed=number)))
    while engine.has_work:
        engine.step()
    found = []
    for number in range(len(requests)):
        heard = listener.heard[number]
        if told is None:  # a GPU may be a token ahead of the host, which sees the end
            end = next((i for i, (token, _) in enumerate(heard) if token == model.prompt_format.eoa_id), len(heard) - 1)
            heard = heard[: end + 1]
        found.append(Said([token for token, _ in heard], [gap for _, gap in heard]))
    return found


def neighbours(
    model: Answering, requests: Sequence[Request], batches: Sequence[int] = BATCHES, **options: Any
) -> list[Difference]:
    """Each batch size against every text alone. options: of the engine."""
    alone = listen(model, requests, 1, **options)
    differences = []
    for batch in batches:
        forced = listen(model, requests, batch, alone, **options)
        free = listen(model, requests, batch, **options)
        places = [
            (one == other, gap)
            for a, b in zip(alone, forced, strict=True)
            for one, gap, other in zip(a.ids, a.gaps, b.ids, strict=True)
        ]
        differences.append(
            Difference(
                batch=batch,
                tokens=len(places),
                same_tokens=sum(same for same, _ in places),
                texts=len(alone),
                same_texts=sum(a.ids == b.ids for a, b in zip(alone, free, strict=True)),
                largest_gap=max((gap for same, gap in places if not same), default=None),
            )
        )
    return differences


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path, nargs="?")
    parser.add_argument("--tasks", "--items", default="quickstart", help="names, or a file of records")
    parser.add_argument("--limit", type=int, default=8, help="questions of a task")
    parser.add_argument("--random", action="store_true", help="random weights and prompts, in the place of a folder")
    parser.add_argument("--size", default="XL", help="of random weights")
    parser.add_argument("--count", type=int, default=64, help="random prompts")
    parser.add_argument("--prompt", type=int, default=256, help="tokens of a random prompt")
    parser.add_argument("--new", type=int, default=64, help="tokens of the response to a random prompt")
    parser.add_argument("--batches", type=int, nargs="+", default=list(BATCHES))
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--quantize", default="none", choices=["none", "int8"])
    parser.add_argument("--kv-cache", default="auto", choices=["auto", "int8"])
    parser.add_argument("--decode", default="auto", choices=["auto", "plain", "compiled", "fused"])
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args(arguments)
    if given.random == (given.weights is not None):
        parser.error("expected either a folder of weights or --random")
    try:
        model, requests = (random_load if given.random else trained_load)(given)
        differences = neighbours(model, requests, given.batches, kv_cache=given.kv_cache, decode=given.decode)
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    what = f"{given.size}, random weights" if given.random else given.weights
    print(f"{what}: {len(requests)} prompts, {given.dtype}, weights {given.quantize}, cache {given.kv_cache},", end=" ")
    print(f"decode {given.decode}, {given.device}")
    print(f"{'batch':>5}{'tokens':>10}{'same token':>14}{'same text':>14}{'largest gap':>14}")
    for each in differences:
        gap = "-" if each.largest_gap is None else f"{each.largest_gap:.4f}"
        tokens, texts = each.same_tokens / each.tokens, each.same_texts / each.texts
        print(f"{each.batch:5}{each.tokens:10,}{tokens:14.3%}{texts:14.1%}{gap:>14}")
    return 0


def random_load(given: argparse.Namespace) -> tuple[Answering, list[Request]]:
    """A model that has learned nothing, and prompts that say nothing."""
    module = build(preset(given.size), device=given.device, dtype=parse_dtype(given.dtype)).eval().requires_grad_(False)
    if given.quantize == "int8":
        quantize_weights(module)
    model = RandomModel(module, RandomText())
    prompts = RandomRequests(model.vocab_size, seed=0)
    return model, [prompts.make(given.prompt, given.new) for _ in range(given.count)]


def trained_load(given: argparse.Namespace) -> tuple[Answering, list[Request]]:
    """The model of a folder, and the questions of tasks."""
    model = load(given.weights, device=given.device, dtype=given.dtype, quantize=given.quantize)
    requests = [
        Request(
            (Turn(tuple(model.prompt_format.prefix_ids(task.asked_under(each), each.prompt))),), task.max_new_tokens
        )
        for task in find_tasks(given.tasks.split(","), limit=given.limit)
        for each in given_questions(task)
    ]
    return model, requests


if __name__ == "__main__":
    sys.exit(main())
