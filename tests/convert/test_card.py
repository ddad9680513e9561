from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import yaml

from hrm_text.convert.card import Card, render
from hrm_text.model.config import preset


@dataclass(frozen=True)
class Scored:
    task: str
    n: int
    strict: float
    low: float
    high: float
    chance: float


def card(**facts: Any) -> str:
    values: dict[str, Any] = {
        "name": "tiny-test",
        "config": preset("tiny", vocab_size=512),
        "dtype": "float32",
        "weights": "moving average of the weights, decay 0.999",
        "origin": "Trained by a test.",
    }
    return render(Card(**(values | facts)))


def metadata(text: str) -> dict[str, Any]:
    front, body = text.removeprefix("---\n").split("\n---\n", 1)
    assert body.startswith("\n# tiny-test\n")
    return yaml.safe_load(front)


def section(text: str, title: str) -> str:
    return text.split(f"\n## {title}\n", 1)[1].split("\n## ", 1)[0].strip()


def test_the_hub_reads_the_metadata() -> None:
    assert metadata(card(license="apache-2.0")) == {
        "license": "apache-2.0",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["hrm", "hrm-text", "prefix-lm"],
    }
    looped = metadata(card(config=preset("tiny", architecture="looped", vocab_size=512, prefix_lm=False)))
    assert looped["library_name"] == "hrm-text"
    assert looped["tags"] == ["looped", "hrm-text"]


def test_what_is_not_known_is_not_invented() -> None:
    text = card()
    assert "license" not in metadata(text)
    assert section(text, "Training data") == "Not recorded with these weights."
    assert section(text, "Training") == "The settings of the training run are not known."
    assert section(text, "Scores") == "No scores were recorded when this card was written."
    assert "It was not evaluated." in section(text, "Limitations")
    assert "None" not in text


def test_facts_are_shown() -> None:
    scores = [Scored("sums", 1000, 0.875, 0.853, 0.894, 0.005), Scored("parity", 50, 1.0, 0.929, 1.0, 0.5)]
    text = card(
        about_data="Sums, made by rule.",
        data={"Tokens seen": 1234567},
        training={"Steps": "10 of 10", "Rule": "a | b"},
        scores=scores,
        scored_on="held-out sums",
    )
    assert "Sums, made by rule." in section(text, "Training data")
    assert "| Tokens seen | 1,234,567 |" in section(text, "Training data")
    assert "| Rule | a \\| b |" in section(text, "Training")
    assert "| sums | 1,000 | 87.5 | 85.3 to 89.4 | 0.5 |" in section(text, "Scores")
    assert "held-out sums; mean of the tasks 93.8" in section(text, "Scores")
    assert "not evaluated" not in text


def test_the_architecture_is_that_of_the_configuration() -> None:
    text = section(card(), "Architecture")
    assert "| Module calls | L1 L2 L3 H1 L4 L5 L6 H2 |" in text
    assert "| Stacks | L: 1 layers, H: 1 layers |" in text
    assert "MagicNorm" in text
    assert "PrefixLM" in text
    assert "causal" in section(card(config=preset("tiny", prefix_lm=False)), "Architecture")


def test_prompting_warns_of_token_type_ids_where_they_matter() -> None:
    assert 'inputs["token_type_ids"] = torch.ones_like' in section(card(), "How to prompt")
    assert "token_type_ids" not in card(config=preset("tiny", prefix_lm=False))
    assert "no tokenizer" in card(has_tokenizer=False)
