"""Guesses change how long a text takes, and nothing else."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hrm_text.model.config import ModelConfig
from hrm_text.model.draft import DraftHead
from hrm_text.model.recurrence import RecurrentLM, build

pytest.importorskip("triton", reason="the kernels are written in Triton, which is not installed")

from hrm_text.infer.speculation import Answer, OneText
from hrm_text.model.kernels.decode import Attend, Settings, Vector

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
VECTOR = Vector(32, 32, 1, 1)
SMALL = Settings(VECTOR, VECTOR, VECTOR, VECTOR, Attend(8, 1, 2, 4))
PROMPT = [3, 1, 4, 1, 5]


def model_of() -> RecurrentLM:
    config = ModelConfig(
        architecture="transformer",
        vocab_size=16,
        max_position_embeddings=64,
        hidden_size=24,
        num_layers=1,
        num_heads=2,
        head_dim=16,
        inner_multiple=8,
    )
    return build(config, seed=3, device=DEVICE.type).requires_grad_(False)


class Oracle(DraftHead):
    """Guesses what it was told, whatever it is asked: the state is the number of the guess."""

    def __init__(self, model: RecurrentLM, tokens: list[int]) -> None:
        super().__init__(model.config)
        self.tokens, self.weight = tokens, model.lm_head.weight
        self.asked = 0

    def forward(self, state_TD: Tensor, embedding_TD: Tensor) -> Tensor:
        token = self.tokens[self.asked % len(self.tokens)]
        self.asked += 1
        logits = torch.full((1, len(self.weight)), -1.0, device=self.weight.device)
        logits[0, token] = 1.0
        return torch.linalg.lstsq(self.weight, logits.T).solution.T


def answer(
    model: RecurrentLM, head: DraftHead | None, guesses: int, most: int = 12, end: int = -1, **how: bool
) -> Answer:
    loop = OneText(model, head, guesses, end, most_tokens=most, settings=SMALL, page_size=8, **how)
    return loop.answer(PROMPT)


@pytest.mark.parametrize("guesses", [1, 2, 3])
def test_whatever_is_guessed_the_text_is_the_same(guesses: int) -> None:
    model = model_of()
    expected = answer(model, None, 0, kernels=False)
    assert expected.passes == len(expected.ids) - 1
    head = DraftHead(model.config).to(DEVICE).requires_grad_(False)
    head.initialise(0)
    found = answer(model, head, guesses, kernels=False)
    assert found.ids == expected.ids and found.passes <= expected.passes


def test_the_kernels_say_the_same() -> None:
    model = model_of()
    head = DraftHead(model.config).to(DEVICE).requires_grad_(False)
    head.initialise(0)
    expected = answer(model, None, 0, 6, kernels=False)
    for guesses in (0, 2):
        assert answer(model, head, guesses, 6).ids == expected.ids


@pytest.mark.skipif(DEVICE.type == "cuda", reason="the oracle is no head of two products")
def test_right_guesses_save_passes() -> None:
    model = model_of()
    expected = answer(model, None, 0, kernels=False)
    # Behind token n come the guesses of n + 1, n + 2, n + 3; a pass takes all of them and one more.
    told = [expected.ids[(4 * number + 1 + guess) % 12] for number in range(3) for guess in range(3)]
    found = answer(model, Oracle(model, told), 3, kernels=False)
    assert found.ids == expected.ids
    assert found.passes == 3


def test_it_ends_at_the_end_token_wherever_in_a_pass_it_is() -> None:
    model = model_of()
    whole = answer(model, None, 0, kernels=False).ids
    head = DraftHead(model.config).to(DEVICE).requires_grad_(False)
    head.initialise(0)
    for end in set(whole):
        for guesses in (0, 3):
            assert answer(model, head, guesses, end=end, kernels=False).ids == whole[: whole.index(end) + 1]
