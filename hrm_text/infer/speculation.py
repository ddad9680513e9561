"""Greedy decoding of one text with guesses: a pass checks several tokens, and the device never waits for the host.

A pass is the model's step for R rows, the newest token and R - 1 guesses behind it. Whatever the model itself chooses
counts: the guesses that agree save a pass each. The state that chose the last of them, which the pass has made anyway,
is what the head's next guesses begin with.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hrm_text.infer.prefill import NewTokens, prefill
from hrm_text.model.draft import DraftHead
from hrm_text.model.kernels.decode import DecodeStep, Settings
from hrm_text.model.kernels.draft import DraftStep, Progress, accept, accept_plain
from hrm_text.model.paged import PagedDecoding, PagedKeyValues
from hrm_text.model.plan import plan
from hrm_text.model.recurrence import RecurrentLM

AHEAD = 3
"""Passes that are under way before the host looks at the oldest of them."""


@dataclass(frozen=True)
class Answer:
    """What one text got, and what it took."""

    ids: list[int]
    """Up to the end token, itself included, or the limit."""
    passes: int
    """Passes of the model behind the prompt's own."""
    seconds: float
    """Of these passes."""


class OneText:
    """Decodes one text at a time with ``guesses`` guesses a pass; 0: none, the ordinary way."""

    def __init__(
        self,
        model: RecurrentLM,
        head: DraftHead | None,
        guesses: int,
        end: int,
        *,
        most_tokens: int = 128,
        settings: Settings | None = None,
        kernels: bool = True,
        page_size: int = 16,
    ) -> None:
        """kernels: False, the definition, for CPUs. settings: of the step, in the place of the tables'."""
        assert guesses == 0 or head is not None
        self.model, self.head, self.guesses, self.end, self.most_tokens = model, head, guesses, end, most_tokens
        config, weight = model.config, model.lm_head.weight
        self.device, self.kernels, rows = weight.device, kernels, guesses + 1
        self.pages = -(-config.max_position_embeddings // page_size)
        self.cache = PagedKeyValues.allocate(config, self.pages + 1, page_size, self.device, weight.dtype)
        self.table_RM = (1 + torch.arange(self.pages, dtype=torch.int32, device=self.device)).repeat(rows, 1)
        self.progress = Progress(
            torch.zeros(rows, dtype=torch.long, device=self.device),
            torch.zeros(rows, dtype=torch.long, device=self.device),
            torch.zeros(most_tokens + (AHEAD + 3) * rows, dtype=torch.long, device=self.device),
            torch.zeros(2, dtype=torch.int32, device=self.device),
            torch.zeros(rows, dtype=torch.int32, device=self.device),
        )
        self.state_1D = torch.zeros(1, config.hidden_size, dtype=weight.dtype, device=self.device)
        self.plan = plan(config)
        self.step = DecodeStep(model, rows, settings=settings) if kernels else None
        self.draft = DraftStep(model, head) if kernels and head is not None else None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._news = [
            torch.zeros(2, dtype=torch.int32, pin_memory=self.device.type == "cuda") for _ in range(AHEAD + 1)
        ]

    @torch.inference_mode()
    def answer(self, prefix_ids: Sequence[int]) -> Answer:
        """What the model says to a prompt, whose tokens see each other both ways."""
        # The passes under way when a text ends go on behind it.
        room = self.model.config.max_position_embeddings - len(prefix_ids) - (AHEAD + 2) * (self.guesses + 1)
        limit = min(self.most_tokens, room)
        assert limit > 0
        self._begin(prefix_ids)
        if self.device.type == "cuda":
            return self._answer_ahead(limit)
        start, passes = time.perf_counter(), 0
        while not self._over(self.progress.news.tolist(), limit):
            self._pass()
            passes += 1
        return Answer(self._ids(limit), passes, time.perf_counter() - start)

    def _answer_ahead(self, limit: int) -> Answer:
        if self._graph is None:
            self._graph = self._recorded()
        events = [torch.cuda.Event(enable_timing=True) for _ in range(self.most_tokens + AHEAD + 2)]
        events[0].record()
        passes = launched = 0
        while True:
            while launched < min(passes + 1 + AHEAD, self.most_tokens + AHEAD):
                self._graph.replay()
                self._news[launched % len(self._news)].copy_(self.progress.news, non_blocking=True)
                launched += 1
                events[launched].record()
            passes += 1
            events[passes].synchronize()
            if self._over(self._news[(passes - 1) % len(self._news)].tolist(), limit):
                torch.cuda.synchronize()
                return Answer(self._ids(limit), passes, events[0].elapsed_time(events[passes]) / 1e3)

    def _over(self, news: list[int], limit: int) -> bool:
        return news[1] > 0 or news[0] >= limit

    def _ids(self, limit: int) -> list[int]:
        ids: list[int] = self.progress.answer[:limit].tolist()
        ended = int(self.progress.news[1])
        return ids[:ended] if ended else ids

    def _begin(self, prefix_ids: Sequence[int]) -> None:
        """Prompt into the cache, the first token, the first guesses."""
        text = NewTokens(prefix_ids, 0, [(0, len(prefix_ids))], range(1, self.pages + 1))
        hidden_1D = prefill(self.model, self.plan, self.cache, [text])
        progress, rows = self.progress, self.guesses + 1
        first = self.model.lm_head(hidden_1D).argmax(-1)
        progress.positions_R.copy_(len(prefix_ids) + torch.arange(rows))
        progress.news.copy_(torch.stack([torch.ones_like(first), (first == self.end).long()], 1)[0])
        progress.answer[:1] = first
        progress.ids_R[:1] = first
        self.state_1D.copy_(hidden_1D)
        self._guess()

    def _pass(self) -> None:
        progress = self.progress
        if self.step is not None:
            hidden_RD = self.step(
                progress.ids_R, progress.positions_R, self.cache, self.table_RM, group=self.guesses + 1
            )
        else:
            hidden_RD = self._plain_step()
        chosen_R = self.model.lm_head(hidden_RD).argmax(-1)
        (accept if self.kernels else accept_plain)(chosen_R, hidden_RD, progress, self.state_1D, self.end)
        self._guess()

    def _plain_step(self) -> Tensor:
        """The definition: a token at a time."""
        states = []
        for row in range(self.guesses + 1):
            at = self.progress.positions_R[row : row + 1]
            attention = PagedDecoding(self.cache, self.table_RM[:1].long(), at + 1)
            states.append(self.model(self.progress.ids_R[row : row + 1], at, attention, steps=self.plan))
        return torch.cat(states)

    def _guess(self) -> None:
        state_1D, ids_R = self.state_1D, self.progress.ids_R
        for guess in range(1, self.guesses + 1):
            if self.draft is not None:
                state_1D, id_1 = self.draft(state_1D, ids_R[guess - 1 : guess])
            else:
                assert self.head is not None
                embedding_1D = self.model.model.embed_tokens(ids_R[guess - 1 : guess])
                state_1D = self.head(state_1D, embedding_1D)
                id_1 = self.model.lm_head(state_1D).argmax(-1)
            ids_R[guess : guess + 1] = id_1

    def _recorded(self) -> torch.cuda.CUDAGraph:
        """A pass as a graph; what trying it out changes is put back."""
        progress = self.progress
        kept = [x.clone() for x in (*vars(progress).values(), self.state_1D)]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._pass()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._pass()
        for x, before in zip((*vars(progress).values(), self.state_1D), kept, strict=True):
            x.copy_(before)
        return graph
