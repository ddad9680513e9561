"""The kernels of guessing equal their definitions: on a GPU, or in Triton's interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hrm_text.model.config import preset
from hrm_text.model.draft import DraftHead
from hrm_text.model.recurrence import build

pytest.importorskip("triton", reason="the kernels are written in Triton, which is not installed")

from hrm_text.model.kernels.draft import DraftStep, Progress, accept, accept_plain

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
END = 9


def progress_of(ids: list[int], count: int, ended: int = 0) -> Progress:
    rows = len(ids)
    long: Any = {"dtype": torch.long, "device": DEVICE}
    answer = torch.arange(100, 120, **long)
    positions = 5 + torch.arange(rows, **long)
    news = torch.tensor([count, ended], dtype=torch.int32, device=DEVICE)
    return Progress(torch.tensor(ids, **long), positions, answer, news, torch.zeros_like(positions, dtype=torch.int32))


@pytest.mark.parametrize(
    ("ids", "chosen", "right"),
    [
        ([4], [5], 0),
        ([4], [END], 0),
        ([4, 5, 6, 7], [1, 6, 7, 8], 0),
        ([4, 5, 6, 7], [5, 6, 1, 8], 2),
        ([4, 5, 6, 7], [5, 6, 7, 8], 3),
        ([4, 5, END, 7], [5, END, 7, 8], 3),
        ([4, 5, END, 7], [5, 2, 7, END], 1),  # an end token behind a wrong guess is none
        ([4, END, END], [END, END, 3], 2),  # the first one counts
    ],
)
def test_accepted_is_the_longest_run_of_right_guesses(ids: list[int], chosen: list[int], right: int) -> None:
    hidden = torch.randn(len(ids), 24, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    found = []
    for way in (accept_plain, accept):
        progress, state = progress_of(ids, 3), torch.zeros(1, 24, device=DEVICE)
        way(torch.tensor(chosen, device=DEVICE), hidden, progress, state, END)
        assert torch.equal(state[0], hidden[right])
        assert progress.answer[3 : 4 + right].tolist() == chosen[: right + 1]
        assert progress.ids_R[0] == chosen[right]
        assert progress.positions_R.tolist() == [6 + right + row for row in range(len(ids))]
        assert progress.accepted_R.tolist() == [int(row == right) for row in range(len(ids))]
        found.append(progress.news.tolist())
    taken = chosen[: right + 1]
    assert found == [[4 + right, 4 + taken.index(END) if END in taken else 0]] * 2


def test_a_text_ends_once() -> None:
    for way in (accept_plain, accept):
        progress = progress_of([4, 5], 6, ended=2)
        way(
            torch.tensor([5, END], device=DEVICE),
            torch.ones(2, 24, device=DEVICE),
            progress,
            torch.zeros(1, 24, device=DEVICE),
            END,
        )
        assert progress.news.tolist() == [8, 2]


def test_guesses_in_a_row_equal_the_head() -> None:
    config = preset("tiny", vocab_size=64, max_position_embeddings=32)
    model = build(config, seed=1, device=DEVICE.type).requires_grad_(False)
    head = DraftHead(config).to(DEVICE).requires_grad_(False)
    head.initialise(2)
    step = DraftStep(model, head)
    exact = ours = torch.randn(1, config.hidden_size, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    token = torch.tensor([7], device=DEVICE)
    for _ in range(3):
        exact = head(exact, model.model.embed_tokens(token))
        ours, guess = step(ours, token)
        assert torch.allclose(step.logits_1V, model.lm_head(exact), atol=1e-4)
        token = model.lm_head(exact).argmax(-1)
        assert torch.equal(guess, token)
