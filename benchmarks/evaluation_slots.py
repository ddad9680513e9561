"""How full an evaluation keeps the engine, and what it computes of prompts: counts, which no machine changes.

    python benchmarks/evaluation_slots.py [--questions 5000] [--batch 128]

A small model of random weights answers questions of mixed lengths, and ends each response where it is told to.

    zero-shot   prompts of 2 to 60 words, responses of 1 to 64 tokens
    few-shot    eight tasks with examples of 60 to 400 words each, responses of 1, 8 or 32 tokens
    sampled     four responses to each of the zero-shot prompts
    both        zero-shot and few-shot in turns
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from hrm_text.data.prompt import PromptFormat
from hrm_text.data.tokenizer import load_tokenizer, tokenizer_info, train_tokenizer
from hrm_text.eval.answers import Asked
from hrm_text.infer import engine
from hrm_text.infer.prefill import prefill
from hrm_text.infer.text_model import TextModel
from hrm_text.model.config import preset
from hrm_text.model.kernels.grouped import similar_lengths
from hrm_text.model.recurrence import build
from hrm_text.recipes.evaluation import EngineAnswerer

WORDS = "river stone lamp cloud door apple train grass mirror piano".split()
LOADS = ("zero-shot", "few-shot", "sampled", "both")


@dataclass(frozen=True)
class Counts:
    """What became of a load. Shares are of 1."""

    busy: float
    """Slots with a text, over all steps until nobody waits."""
    steps: int
    tail: int
    prefilled: int
    """Prompt tokens computed."""
    forced: int
    """Those of different prompts: under PrefixLM no two can share examples."""
    padding: float
    """Of the places that attention over prompts computes, those that hold no token; elsewhere there are none."""
    seconds: float


def small_model() -> TextModel:
    """Random weights and a tokenizer of a few words."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = train_tokenizer(iter([" ".join(WORDS)] * 3), 512, Path(folder) / "tokenizer")
        form = PromptFormat(load_tokenizer(tokenizer), tokenizer_info(tokenizer))
    sizes: dict[str, Any] = {"vocab_size": form.vocab_size, "max_position_embeddings": 1024}
    return TextModel(build(preset("tiny", H_cycles=1, L_cycles=1, **sizes)), form)


def load(name: str, count: int) -> list[Asked]:
    """Questions of a load, no two prompts alike but those that are sampled."""
    rng = random.Random(0)

    def words(fewest: int, most: int) -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(fewest, most)))

    heads = [words(60, 400) for _ in range(8)]
    asked: list[Asked] = []
    for number in range(count):
        few = name == "few-shot" or (name == "both" and number % 2 == 1)
        if name == "sampled" and number % 4:
            asked.append(Asked("direct", asked[-1].prompt, asked[-1].max_new_tokens, 1.0, 1.0, number))
        elif few:
            asked.append(Asked("direct", f"{heads[number % 8]} {words(2, 30)} {number}", rng.choice([1, 8, 32])))
        else:
            asked.append(Asked("direct", f"{words(2, 60)} {number}", rng.randint(1, 64)))
    return asked


def measured(model: TextModel, asked: Sequence[Asked], batch: int) -> Counts:
    """Ask, and count."""
    places, tokens = 0, 0

    def counted(module: Any, steps: Any, cache: Any, new: Any, recorded: Any) -> Any:
        nonlocal places, tokens
        lengths = torch.tensor([len(text.ids) for text in new])
        tokens += int(lengths.sum())
        places += sum(len(members) * int(lengths[members].max()) for members in similar_lengths(lengths))
        return prefill(module, steps, cache, new, recorded)

    answerer = EngineAnswerer(model, batch)
    with patch.object(engine, "prefill", counted):
        answerer.ask(asked, lambda index, answer: None)
    speed = answerer.speed()
    different = {(each.condition, each.prompt) for each in asked}
    forced = sum(answerer.num_tokens(*each) for each in different)
    steps, tail = int(speed["steps"]), int(speed["steps_of_tail"])
    padding = 1 - tokens / places
    return Counts(speed["busy_slots"], steps, tail, answerer.prompt_tokens, forced, padding, speed["seconds"])


def main(arguments: Sequence[str] | None = None) -> int:
    """A line for each load."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=5000)
    parser.add_argument("--batch", type=int, default=128)
    options = parser.parse_args(arguments)
    model = small_model()
    print(f"{options.questions:,} questions, {options.batch} slots")
    print("| load | slots busy until the tail | steps | of the tail | prompt tokens | per forced one | padding | s |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    for name in LOADS:
        found = measured(model, load(name, options.questions), options.batch)
        print(
            f"| {name} | {found.busy:.1%} | {found.steps:,} | {found.tail} | {found.prefilled:,} | "
            f"{found.prefilled / found.forced:.3f} | {found.padding:.1%} | {found.seconds:.0f} |",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
