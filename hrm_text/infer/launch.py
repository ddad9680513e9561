"""What the device has been asked to choose, on its way to the host."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hrm_text.infer.requests import TokenScore
from hrm_text.infer.sampling import Chosen
from hrm_text.infer.text import Text
from hrm_text.infer.text_stream import token_text


@dataclass(frozen=True)
class Launch:
    """A step, a pass over prompts, or a pass with guesses."""

    texts: list[Text]
    ids: Tensor
    """In the host's memory, once ``ready`` says so: a token of each text; with guesses what ``draft.accept`` gives."""
    ready: torch.cuda.Event | None
    chosen: Chosen | None
    """None: a pass with guesses, of the only text."""

    @staticmethod
    def of_step(texts: list[Text], chosen: Chosen) -> Launch:
        """Send what was chosen for each text to the host."""
        return Launch(texts, *_sent(chosen.token_ids), chosen)

    @staticmethod
    def of_drafts(text: Text, told: Tensor) -> Launch:
        """Send what a pass with guesses says to the host."""
        return Launch([text], *_sent(told), None)

    @property
    def drafted(self) -> bool:
        """Whether it made guesses, so that only the device knows for now how many tokens there are."""
        return self.chosen is None

    def tokens(self) -> list[list[int]]:
        """The new tokens of each text, once the device is done."""
        if self.ready is not None:
            self.ready.synchronize()
        if not self.drafted:
            return [[token] for token in self.ids.tolist()]
        *ids, count = self.ids.tolist()
        return [ids[:count]]

    def scores(self, decode: Callable[[Sequence[int]], str]) -> dict[int, tuple[TokenScore, ...]]:
        """The log-probabilities of the rows that want them; ``tokens`` must have been asked before."""
        if self.chosen is None:
            return {}
        return {
            row: (
                TokenScore(
                    token_id,
                    token_text(decode, token_id),
                    logprob,
                    tuple((other, token_text(decode, other), value) for other, value in top),
                ),
            )
            for row, token_id, logprob, top in self.chosen.scores()
        }


def _sent(ids: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    if not ids.is_cuda:
        return ids, None
    ids = ids.to("cpu", non_blocking=True)
    ready = torch.cuda.Event()
    ready.record()
    return ids, ready
