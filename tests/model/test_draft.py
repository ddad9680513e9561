"""The draft head: what it depends on, and its file."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from hrm_text.contracts import UserError
from hrm_text.model.config import preset
from hrm_text.model.draft import DraftHead, load_head, save_head

CONFIG = preset("tiny", vocab_size=64, max_position_embeddings=32)


def head_of() -> DraftHead:
    head = DraftHead(CONFIG)
    head.initialise(0)
    return head.requires_grad_(False)


def test_a_guess_depends_on_the_state_and_the_token_but_not_on_their_scale() -> None:
    head, generator = head_of(), torch.Generator().manual_seed(0)
    state, token = torch.randn(2, 3, CONFIG.hidden_size, generator=generator)
    guess = head(state, token)
    assert torch.allclose(head(5 * state, token / 3), guess, atol=1e-4)
    assert torch.allclose(guess.square().mean(1), torch.ones(3), atol=1e-4)
    for changed in (head(state.roll(1, 0), token), head(state, token.roll(1, 0))):
        assert (changed - guess).abs().amax(1).min() > 0.1


def test_it_is_read_as_it_was_written(tmp_path: Path) -> None:
    head = head_of()
    save_head(head, tmp_path)
    again = load_head(tmp_path, CONFIG, torch.device("cpu"), torch.float32)
    assert all(torch.equal(x, again.state_dict()[name]) for name, x in head.state_dict().items())
    half = load_head(tmp_path, CONFIG, torch.device("cpu"), torch.bfloat16)
    assert {x.dtype for x in half.parameters()} == {torch.bfloat16} and not half.enter.weight.requires_grad


def test_no_head_and_one_of_another_model(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no draft\.safetensors"):
        load_head(tmp_path, CONFIG, torch.device("cpu"), torch.float32)
    save_head(head_of(), tmp_path)
    other = dataclasses.replace(CONFIG, hidden_size=128)
    with pytest.raises(UserError, match="another size"):
        load_head(tmp_path, other, torch.device("cpu"), torch.float32)
