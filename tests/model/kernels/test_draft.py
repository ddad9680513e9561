"""The kernels of guessing equal their definitions: on a GPU, or in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from hrm_text.model import draft
from hrm_text.model.config import preset
from hrm_text.model.draft import DraftHead
from hrm_text.model.recurrence import build

pytest.importorskip("triton", reason="the kernels are written in Triton, which is not installed")

from hrm_text.model.kernels.draft import DraftStep, accept

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize(
    ("ids", "chosen", "right"),
    [
        ([4], [5], 0),
        ([4, 5, 6, 7], [1, 6, 7, 8], 0),
        ([4, 5, 6, 7], [5, 6, 1, 8], 2),
        ([4, 5, 6, 7], [5, 6, 7, 8], 3),
        ([4, 5, 6, 7], [5, 2, 7, 8], 1),  # right behind a wrong one does not count
        ([4, 4, 4], [4, 4, 4], 2),
    ],
)
def test_accepted_is_the_longest_run_of_right_guesses(ids: list[int], chosen: list[int], right: int) -> None:
    hidden_RD = torch.randn(len(ids), 24, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    for way in (draft.accept, accept):
        rows = torch.tensor([ids[0], 77], device=DEVICE)  # of a batch, the first row's alone may change
        lengths = torch.tensor([5, 88], device=DEVICE)
        state_1D = torch.zeros(1, 24, device=DEVICE)
        chosen_R, ids_R = torch.tensor(chosen, device=DEVICE), torch.tensor(ids, device=DEVICE)
        told = way(chosen_R, ids_R, hidden_RD, rows[:1], lengths[:1], state_1D)
        assert told.tolist() == [*chosen, right + 1]
        assert (rows.tolist(), lengths.tolist()) == ([chosen[right], 77], [6 + right, 88])
        assert torch.equal(state_1D[0], hidden_RD[right])


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
