"""The model card: README.md of a weights folder, with the Hub's metadata, filled from what really happened.

A section without facts is left out or says so; nothing is guessed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import yaml

from hrm_text.data.tokenizer import BOQ, CONDITION_TOKENS, EOQ
from hrm_text.model.config import ModelConfig
from hrm_text.model.plan import call_names, plan
from hrm_text.model.weights import is_transformers_model

Rows = Mapping[str, Any]
"""A two-column table: what, and its value."""


class Score(Protocol):
    """One line of the table of scores; evaluation's ``TaskScore`` fits."""

    @property
    def task(self) -> str: ...
    @property
    def n(self) -> int: ...
    @property
    def strict(self) -> float: ...
    @property
    def low(self) -> float: ...
    @property
    def high(self) -> float: ...
    @property
    def chance(self) -> float: ...


@dataclass(frozen=True, kw_only=True)
class Card:
    """What is known of a model. An empty field is a fact that is not known."""

    name: str
    config: ModelConfig
    dtype: str
    weights: str
    """Which weights these are, as the value of a table: such as "EMA (decay 0.9999)"."""
    origin: str
    """One sentence: what the weights were made by."""
    has_tokenizer: bool = True
    license: str | None = None
    about_data: str = ""
    """What the model was trained on, in words."""
    data: Rows = field(default_factory=dict)
    training: Rows = field(default_factory=dict)
    scores: Sequence[Score] = ()
    scored_on: str = "held-out questions"
    """What the scores are of."""


def render(card: Card) -> str:
    """The card as Markdown, with the YAML metadata that the Hub reads in front."""
    sections = [
        _metadata(card),
        f"# {card.name}",
        _introduction(card),
        "## Architecture",
        _table(_architecture(card)),
        "## Training data",
        *_training_data(card),
        "## Training",
        _table(card.training) if card.training else "The settings of the training run are not known.",
        "## How to prompt",
        *_prompting(card),
        "## Scores",
        *_scores(card),
        "## Limitations",
        _limitations(card),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _metadata(card: Card) -> str:
    loads = is_transformers_model(card.config)
    tags = ["hrm" if card.config.architecture == "hrm" else card.config.architecture, "hrm-text"]
    if card.config.prefix_lm:
        tags.append("prefix-lm")
    values = {
        **({"license": card.license} if card.license else {}),
        "library_name": "transformers" if loads else "hrm-text",
        "pipeline_tag": "text-generation",
        "tags": tags,
    }
    return f"---\n{yaml.safe_dump(values, sort_keys=False)}---"


def _introduction(card: Card) -> str:
    config = card.config
    size = f"{config.num_parameters:,} parameters, {config.num_calls} module calls a token ({card.weights})"
    if is_transformers_model(config):
        loads = "Transformers 5.9 or later loads this folder without remote code."
    else:
        loads = "Transformers has no class for this architecture; `hrm_text.load` reads the folder."
    return f"A language model of the HRM-Text family: {size}. {card.origin} {loads}"


def _architecture(card: Card) -> dict[str, Any]:
    config = card.config
    norms = {
        "magic": "parameterless RMSNorm before each sub-layer and at each stack's exit (MagicNorm)",
        "pre": "parameterless RMSNorm before each sub-layer and before the head",
        "post": "parameterless RMSNorm after each sub-layer",
    }
    cycles = {name: getattr(config, name) for name in ("H_cycles", "L_cycles", "cycles") if getattr(config, name)}
    return {
        "Architecture": config.architecture,
        "Module calls": " ".join(call_names(plan(config))),
        **cycles,
        "Stacks": ", ".join(f"{name}: {layers} layers" for name, layers in config.stacks.items()),
        "Hidden size": config.hidden_size,
        "Inner width (SwiGLU)": config.intermediate_size,
        "Attention heads": f"{config.num_heads} of width {config.head_dim}, sigmoid output gate",
        "Vocabulary": f"{config.vocab_size:,}",
        "Context": f"{config.max_position_embeddings:,} tokens",
        "Positions": f"RoPE, theta {config.rope_theta:,.0f}",
        "Norm": norms[config.norm],
        "Mask": "PrefixLM: the prompt sees itself both ways" if config.prefix_lm else "causal",
        "Parameters": f"{config.num_parameters:,}",
        "KV cache": f"{config.cache_bytes_per_token():,} bytes a token in bf16",
        "Weights": f"{card.weights}, stored as {card.dtype}",
    }


def _training_data(card: Card) -> list[str]:
    parts = [card.about_data, _table(card.data) if card.data else ""]
    return parts if any(parts) else ["Not recorded with these weights."]


def _prompting(card: Card) -> list[str]:
    tags = ", ".join(f"`{tag}` (`{token}`)" for tag, token in CONDITION_TOKENS.items())
    parts = [
        f"A prompt is `{BOQ}`, the tokens of its condition tags, the text, `{EOQ}`. The tags are {tags}; they compose, "
        'as in "synth,cot". Use a condition that the training data has.',
    ]
    if not card.has_tokenizer:
        return [*parts, "This folder has no tokenizer: put the tokenizer.json that the model was trained with into it."]
    parts.append(
        "With this project:\n\n"
        "```python\n"
        "import hrm_text\n\n"
        'model = hrm_text.load(".")  # this folder\n'
        'print(model.generate(["What is 2 + 2?"], condition="direct", max_new_tokens=64)[0])\n'
        "```"
    )
    if is_transformers_model(card.config):
        mark = ""
        if card.config.prefix_lm:
            parts.append(
                "With Transformers. `token_type_ids` must be 1 over the prompt: without them Transformers silently "
                "runs the model causally, which is not how it was trained."
            )
            mark = 'inputs["token_type_ids"] = torch.ones_like(inputs["input_ids"])\n'
        else:
            parts.append("With Transformers:")
        prompt = f"{BOQ}{CONDITION_TOKENS['direct']}What is 2 + 2?{EOQ}"
        parts.append(
            "```python\n"
            "import torch\n"
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            'folder = "."  # this folder\n'
            "tokenizer = AutoTokenizer.from_pretrained(folder)\n"
            "model = AutoModelForCausalLM.from_pretrained(folder)\n"
            f'prompt = "{prompt}"  # condition: direct\n'
            'inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)\n'
            f"{mark}"
            "output = model.generate(**inputs, max_new_tokens=64, do_sample=False)\n"
            'print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))\n'
            "```"
        )
    return parts


def _scores(card: Card) -> list[str]:
    if not card.scores:
        return ["No scores were recorded when this card was written."]
    lines = ["| task | n | accuracy | 95 % interval | chance |", "|---|---:|---:|---:|---:|"]
    for s in card.scores:
        interval = f"{100 * s.low:.1f} to {100 * s.high:.1f}"
        lines.append(f"| {s.task} | {s.n:,} | {100 * s.strict:.1f} | {interval} | {100 * s.chance:.1f} |")
    mean = sum(s.strict for s in card.scores) / len(card.scores)
    return [f"Exact match in per cent on {card.scored_on}; mean of the tasks {100 * mean:.1f}.", "\n".join(lines)]


def _limitations(card: Card) -> str:
    points = [
        "It continues prompts of the form above; it is not a chat model and was not aligned by this project.",
        f"Prompt and response together have at most {card.config.max_position_embeddings:,} tokens.",
        "It knows what its training data shows, and answers other questions with whatever looks alike.",
        "Its outputs may be wrong; nothing here measures bias or safety.",
    ]
    if not card.scores:
        points.append("It was not evaluated.")
    return "\n".join(f"- {point}" for point in points)


def _table(rows: Rows) -> str:
    """A two-column Markdown table without a heading."""
    return "\n".join(["| | |", "|---|---|", *(f"| {key} | {_cell(value)} |" for key, value in rows.items())])


def _cell(value: Any) -> str:
    text = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")
