"""The likelihood of given responses against its definition: one full forward pass for each."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from hrm_text.contracts import UserError
from hrm_text.data.prompt import PromptFormat
from hrm_text.data.tokenizer import load_tokenizer, tokenizer_info
from hrm_text.infer.likelihood import Likelihood, likelihoods, plan_passes
from hrm_text.infer.requests import Request, Sampling, Turn
from hrm_text.infer.text_model import TextModel
from hrm_text.model.config import preset
from hrm_text.model.recurrence import build

CONTEXT = 96
PROMPTS = ["What is 12 + 7?", "", "Grüße 🙂 aus Köln, " * 2]
RESPONSES = ["19", "The sum is 19.", "数", "9", "19"]


def make(tokenizer_dir: Path, seed: int = 0, **changes: Any) -> TextModel:
    prompt_format = PromptFormat(load_tokenizer(tokenizer_dir), tokenizer_info(tokenizer_dir))
    values = {"vocab_size": 512, "max_position_embeddings": CONTEXT} | changes
    return TextModel(build(preset("tiny", **values), seed=seed), prompt_format)


@pytest.fixture(scope="module")
def model(tokenizer_dir: Path) -> TextModel:
    return make(tokenizer_dir)


def turns_of(model: TextModel, end: bool = True) -> list[Turn]:
    form = model.prompt_format
    return [
        Turn(tuple(form.prefix_ids("direct", prompt)), tuple(form.response_ids(response)[: None if end else -1]))
        for prompt, response in itertools.product(PROMPTS, RESPONSES)
    ]


def by_definition(model: TextModel, turn: Turn) -> Likelihood:
    """One full forward pass, log-softmax in fp32 over the tokenizer's entries, one token after the other."""
    prefix = len(turn.prefix_ids)
    ids = torch.tensor([[*turn.prefix_ids, *turn.response_ids]])
    logits = model.logits(ids, torch.tensor([prefix if model.config.prefix_lm else 0]))[0, :, : model.vocab_size]
    scores = logits.log_softmax(-1)[prefix - 1 : -1]
    logprob = sum(float(row[token]) for row, token in zip(scores, turn.response_ids, strict=True))
    greedy = all(int(row.argmax()) == token for row, token in zip(scores, turn.response_ids, strict=True))
    return Likelihood(logprob, greedy)


def found(model: TextModel, turns: list[Turn], **options: Any) -> list[Likelihood]:
    by_number = dict(likelihoods(model, turns, **options))
    assert len(by_number) == len(turns)
    return [by_number[number] for number in range(len(turns))]


@pytest.mark.parametrize(
    "changes", [{}, {"architecture": "rins"}, {"architecture": "looped", "norm": "post"}, {"prefix_lm": False}]
)
@pytest.mark.parametrize("pass_tokens", [1, 60, 8192])
def test_many_together_equal_one_full_forward_pass_each(
    changes: dict[str, Any], pass_tokens: int, tokenizer_dir: Path
) -> None:
    model = make(tokenizer_dir, seed=3, **changes)
    turns = turns_of(model)
    for turn, each in zip(turns, found(model, turns, pass_tokens=pass_tokens), strict=True):
        expected = by_definition(model, turn)
        assert each.logprob == pytest.approx(expected.logprob, rel=2e-6, abs=2e-6)
        assert each.greedy == expected.greedy


def test_the_engine_says_what_is_greedy_and_scores_it_alike(model: TextModel) -> None:
    prefix = tuple(model.prompt_format.prefix_ids("direct", PROMPTS[0]))
    engine = model.engine(max_batch=1)
    engine.submit(Request((Turn(prefix),), 6, Sampling(logprobs=0)))
    scores = []
    while engine.has_work:
        scores += [score for piece in engine.step() for score in piece.scores]
    said = tuple(score.token_id for score in scores)
    assert len(said) > 2
    other = (*said[:-1], (said[-1] + 1) % model.vocab_size)
    whole, changed, begun = found(model, [Turn(prefix, said), Turn(prefix, other), Turn(prefix, said[:2])])
    assert (whole.greedy, changed.greedy, begun.greedy) == (True, False, True)
    assert whole.logprob == pytest.approx(sum(score.logprob for score in scores), rel=1e-5)


def test_of_equal_logits_the_lowest_id_is_the_greedy_one(tokenizer_dir: Path) -> None:
    model = make(tokenizer_dir, seed=1)
    with torch.no_grad():
        model.module.lm_head.weight[40:] = model.module.lm_head.weight[40]
        model.module.lm_head.weight[:40] = -model.module.lm_head.weight[40]
    prefix = tuple(model.prompt_format.prefix_ids("direct", "apple"))
    logits = model.logits(torch.tensor([prefix]), torch.tensor([len(prefix)]))[0, -1]
    low, high = (40, 41) if logits[40] > logits[0] else (0, 1)
    assert [each.greedy for each in found(model, [Turn(prefix, (low,)), Turn(prefix, (high,))])] == [True, False]


def test_a_token_that_only_the_model_has_takes_no_probability(tokenizer_dir: Path) -> None:
    model = make(tokenizer_dir)
    turn = Turn(tuple(model.prompt_format.prefix_ids("direct", "apple")), (50,))
    before = found(model, [turn])
    with torch.no_grad():
        model.module.lm_head.weight[model.vocab_size :] = 1e3
    assert found(model, [turn]) == before


def test_a_response_changes_its_own_likelihood_and_no_other(model: TextModel) -> None:
    turns = turns_of(model)
    before = found(model, turns)
    changed = list(turns)
    changed[1] = Turn(turns[1].prefix_ids, turns[1].response_ids[::-1])  # of the same length: the shapes stay
    after = found(model, changed)
    assert [number for number in range(len(turns)) if before[number] != after[number]] == [1]


def test_a_prompt_is_computed_once_and_passes_are_few(model: TextModel, monkeypatch: pytest.MonkeyPatch) -> None:
    turns = turns_of(model)
    tokens: list[int] = []
    forward = model.module.forward

    def count(ids_T: torch.Tensor, *rest: Any) -> torch.Tensor:
        tokens.append(len(ids_T))
        return forward(ids_T, *rest)

    monkeypatch.setattr(model.module, "forward", count)
    found(model, turns)
    prompts = {turn.prefix_ids for turn in turns}
    assert tokens == [sum(map(len, prompts)) + sum(len(turn.response_ids) - 1 for turn in turns)]
    tokens.clear()
    found(model, turns, pass_tokens=60)
    assert len(tokens) > 1 and max(tokens) <= 60


def test_letters_cost_the_prompt_alone_even_where_it_is_longer_than_a_pass() -> None:
    turns = [Turn(tuple(range(40)), (letter,)) for letter in range(4)]
    ((group,),) = plan_passes(turns, pass_tokens=30)
    assert group.num_tokens == 40 and group.numbers == [0, 1, 2, 3]


def test_no_token_is_certain_and_what_cannot_be_is_told(model: TextModel) -> None:
    prefix = tuple(model.prompt_format.prefix_ids("direct", "apple"))
    assert found(model, [Turn(prefix)]) == [Likelihood(0.0, True)]
    with pytest.raises(UserError, match=r"do not fit in the context of 96.*shorten"):
        found(model, [Turn(prefix, (50,) * CONTEXT)])
    with pytest.raises(UserError, match="token id 400"):
        found(model, [Turn(prefix, (400,))])
