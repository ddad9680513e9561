"""The engine: many requests, each joining and leaving the batch between two steps."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

from hrm_text.contracts import UserError
from hrm_text.infer import memory
from hrm_text.infer.answering import Answering
from hrm_text.infer.cache import Pages
from hrm_text.infer.lane import Lane, with_cycles
from hrm_text.infer.prefill import prefill
from hrm_text.infer.requests import Cycles, Decode, FinishReason, KeyValues, Piece, Request, TokenScore
from hrm_text.infer.sampling import Chosen, RowState, Sampler
from hrm_text.infer.steps import make_recorded, make_step, prepare
from hrm_text.infer.text import Text
from hrm_text.infer.text_stream import TextStream, token_text
from hrm_text.model.config import ModelConfig
from hrm_text.model.paged import PagedKeyValues
from hrm_text.model.plan import plan

PREFILL_TOKENS = 8192
"""Prompt tokens in one pass: about what fills a GPU; more would only hold up those who wait for their next token."""


@dataclass(frozen=True, slots=True)
class EngineStatus:
    """Where the engine stands; the totals are since it was made."""

    running: int
    waiting: int
    cache_tokens: int
    """Tokens the cache has room for."""
    cache_tokens_used: int
    """Of those, in pages that hold something, be it only for texts to come."""
    prompt_tokens_total: int
    cached_prompt_tokens_total: int
    """Prompt tokens that did not have to be computed."""
    generated_tokens_total: int
    preemptions_total: int
    """How often a text gave its memory to an older one, to be continued later."""
    steps_total: int
    """Passes that gave every text of a batch one more token."""
    rows_total: int
    """Of those passes together, the rows that held a text."""


@dataclass(frozen=True)
class Launch:
    """What the device has been asked to choose, on its way to the host."""

    texts: list[Text]
    chosen: Chosen
    ids_B: Tensor
    """The token ids in the host's memory, once ``ready`` says so."""
    ready: torch.cuda.Event | None


class DecodingEngine:
    """Continuous batching over a paged cache. One thread drives it: ``submit``, then ``step`` while there is work.

    Requests are taken in the order they came. One that does not fit waits, and the youngest text gives its memory up
    when an older one needs it, to be continued where it was: none is dropped. What a request says does not depend on
    what runs beside it, but for the rounding of batches of different size.
    """

    def __init__(
        self,
        model: Answering,
        *,
        max_batch: int = 64,
        cache_tokens: int | None = None,
        kv_cache: KeyValues = "auto",
        decode: Decode = "auto",
        page_size: int | None = None,
    ) -> None:
        """Take the memory.

        Args:
            model: what answers.
            max_batch: texts that take a step together.
            cache_tokens: tokens, of prompts and responses, to have room for; None: as many as the memory left takes.
            kv_cache: auto keeps keys and values in the model's dtype; int8 in half or a quarter of the memory.
            decode: how steps are computed; auto is the fastest way that is known to be right.
            page_size: tokens of a page; None: what suits the device.

        Raises:
            UserError: max_batch or cache_tokens below 1; a way to decode that is not to be had.
        """
        if max_batch < 1:
            raise UserError(f"max_batch must be at least 1, found {max_batch}")
        if cache_tokens is not None and cache_tokens < 1:
            raise UserError(f"cache_tokens must be at least 1, found {cache_tokens}")
        self.model, self.max_batch = model, max_batch
        config, weight = model.config, model.module.lm_head.weight
        self.device = weight.device
        self.decode = prepare(model.module, decode)
        page_size = page_size or memory.page_size(self.device)
        dtype = torch.int8 if kv_cache == "int8" else weight.dtype
        tokens = cache_tokens or memory.cache_tokens(config, dtype, self.device, max_batch)
        self.pages = Pages(1 + -(-tokens // page_size), page_size)
        self.cache = PagedKeyValues.allocate(config, self.pages.num_pages, page_size, self.device, dtype)
        self.sampler = Sampler(model.vocab_size, self.device)
        self._recorded = make_recorded(model.module, self.cache, self.decode)
        self.cycles = Cycles(config.H_cycles, config.L_cycles)
        # On a GPU the host looks at a step's tokens while the next one runs; a CPU would only do work for nothing.
        self._most_pending = 1 if self.device.type == "cuda" else 0
        self._lanes: dict[Cycles, Lane] = {}
        self._running: dict[int, Text] = {}
        self._waiting: deque[Text] = deque()
        self._pending: deque[Launch] = deque()
        self._pieces: list[Piece] = []
        self._submitted = 0
        self._blocked_at: int | None = None
        self._prompt_tokens = self._cached_tokens = self._generated = self._preemptions = self._steps = self._rows = 0

    # ------------------------------------------------------------------------------------------------------ asking ---

    def submit(self, request: Request) -> int:
        """Put a request behind those that wait; its number, which its pieces bear.

        Raises:
            UserError: it could never run: too long, an unknown token, more cycles than the cache has slots for.
        """
        config = self.model.config
        prompt = request.num_prompt_tokens
        if prompt >= config.max_position_embeddings:
            raise UserError(
                f"the prompt has {prompt:,} tokens with its condition and the context is "
                f"{config.max_position_embeddings:,}: no room for a response. Shorten the prompt."
            )
        most = min(request.max_new_tokens, config.max_position_embeddings - prompt)
        if prompt + most > self.pages.num_tokens:
            raise UserError(
                f"the prompt has {prompt:,} tokens and may get {most:,} more, and the cache has room for "
                f"{self.pages.num_tokens:,}: ask for less, or give the cache more memory"
            )
        ids = [token for turn in request.turns for token in (*turn.prefix_ids, *turn.response_ids)]
        for token in (*ids, *request.sampling.logit_bias):
            if not 0 <= token < self.model.vocab_size:
                raise UserError(f"token id {token} is not one of the tokenizer's {self.model.vocab_size:,}")
        cycles = self._checked(request.cycles)
        decode = self.model.prompt_format.decode
        text = Text(
            number=self._submitted,
            request=request,
            cycles=cycles,
            most_tokens=most,
            state=RowState(request.sampling, ids),
            stream=TextStream(decode, request.stop),
        )
        self._submitted += 1
        self._waiting.append(text)
        return text.number

    def cancel(self, request: int) -> None:
        """End a request; its last piece says so. One that has ended is left as it is."""
        text = self._running.get(request) or next((text for text in self._waiting if text.number == request), None)
        if text is not None:
            self._finish(text, "cancelled")

    @property
    def has_work(self) -> bool:
        """Whether ``step`` has anything to do or to say."""
        return bool(self._waiting or self._running or self._pending or self._pieces)

    @property
    def status(self) -> EngineStatus:
        """Counts, for people and for meters."""
        return EngineStatus(
            running=len(self._running),
            waiting=len(self._waiting),
            cache_tokens=self.pages.num_tokens,
            cache_tokens_used=self.pages.num_tokens - self.pages.num_free * self.pages.page_size,
            prompt_tokens_total=self._prompt_tokens,
            cached_prompt_tokens_total=self._cached_tokens,
            generated_tokens_total=self._generated,
            preemptions_total=self._preemptions,
            steps_total=self._steps,
            rows_total=self._rows,
        )

    # ----------------------------------------------------------------------------------------------------- working ---

    def step(self, fill: bool = False) -> list[Piece]:
        """Take in who waits, make one more token of every text, and tell what has become final since.

        Who waits is taken in by one pass over prompts, so that nobody's next token is held up for long; ``fill`` takes
        as many passes as give rows to more texts. Where nobody looks at single tokens, full steps are fewer steps.
        """
        before = -1
        while before < (rows := sum(map(len, self._lanes.values()))):
            self._admit()
            self._collect(self._most_pending)
            before = rows if fill else self.max_batch
        for lane in list(self._lanes.values()):
            if len(lane):
                self._decode(lane)
        idle = not any(len(lane) for lane in self._lanes.values())
        self._collect(0 if idle else self._most_pending)
        pieces, self._pieces = self._pieces, []
        return pieces

    def _admit(self) -> None:
        """Give rows and pages to those who wait, in their order, as far as they last; compute their prompts."""
        if self._waiting and self._blocked_at == self.pages.releases and self._running:
            return
        self._blocked_at = None
        new: dict[Cycles, list[Text]] = {}
        tokens = 0
        contexts = set()
        while self._waiting and tokens < PREFILL_TOKENS:
            text = self._waiting[0]
            lane = self._lane(text.cycles)
            if len(lane) + len(new.get(text.cycles, ())) >= self.max_batch:
                break
            context = (text.cycles, text.turns[:-1], text.request.turns[-1].prefix_ids)
            if context in contexts:
                break  # the same prompt is computed in this step: its keys and values serve both in the next
            if not self._give_pages(text):
                self._blocked_at = self.pages.releases
                break
            self._waiting.popleft()
            self._running[text.number] = text
            if text.length == text.total - 1:  # all is there but the newest token, which the next step takes in
                self._join(text, lane, text.ids()[-1])
            else:
                contexts.add(context)
                new.setdefault(text.cycles, []).append(text)
                tokens += text.total - text.length
        for cycles, texts in new.items():
            self._prefill(cycles, texts)

    def _give_pages(self, text: Text) -> bool:
        """Pages for what a text has and its next token, shared as far as others have the same; False: too few."""
        size = self.pages.page_size
        found, entry = self.pages.recall(text.cycles, text.turns)
        found = min(found, text.total - 1)
        whole = found // size
        shared = entry.pages[: self.pages.needed(found)] if entry is not None else []
        self.pages.share(shared)  # what is remembered makes way for new pages, but not these
        count = self.pages.needed(text.total + 1) - whole
        own = self.pages.take(count) if count <= self.pages.num_obtainable else None
        if own is None:
            self.pages.release(shared)
            if self._running:
                return False
            # It is alone: all that is left to give up is what it would have shared.
            self.pages.forget_all()
            found, whole, shared = 0, 0, []
            own = self.pages.take(self.pages.needed(text.total + 1))
            assert own is not None, "submit has seen to that"
        if len(shared) > whole:  # its own tokens go into the rest of the page, so it needs a copy
            self.cache.copy_page(shared[whole], own[0])
            self.pages.release(shared[whole:])
        text.pages, text.length = [*shared[:whole], *own], found
        if not text.num_tokens:
            text.cached = found
            self._prompt_tokens += text.total
            self._cached_tokens += found
        return True

    def _prefill(self, cycles: Cycles, texts: list[Text]) -> None:
        steps = plan(self._config(cycles))
        new = [text.new_tokens(text.length, self.model.config.prefix_lm) for text in texts]
        hidden_BD = prefill(self.model.module, steps, self.cache, new, self._recorded)
        with torch.inference_mode():
            chosen = self.sampler.choose(self.model.module.lm_head(hidden_BD), [text.state for text in texts])
        for text, token in zip(texts, chosen.token_ids.unbind(0), strict=True):
            text.length = text.total
            self._remember(text)
            self._join(text, self._lane(cycles), token)
        self._launched(texts, chosen)

    def _join(self, text: Text, lane: Lane, token: Tensor | int) -> None:
        text.lane, text.row = lane, lane.join(token, text.length, text.pages)

    def _decode(self, lane: Lane) -> None:
        """One more token of every row."""
        for text in self._texts_of(lane):
            if text.lane is lane and text.length == len(text.pages) * self.pages.page_size:
                self._grow(text)
        if not len(lane):
            return
        texts = self._texts_of(lane)
        chosen = self.sampler.choose(lane.logits(), [text.state for text in texts])
        lane.choose(chosen.token_ids)
        for text in texts:
            text.length += 1
        self._steps += 1
        self._rows += len(texts)
        self._launched(texts, chosen)

    def _texts_of(self, lane: Lane) -> list[Text]:
        """In the order of the rows."""
        return sorted((text for text in self._running.values() if text.lane is lane), key=lambda text: text.row)

    def _grow(self, text: Text) -> None:
        """One more page for a text that is in the batch; if there is none, the youngest gives all of its up."""
        while (page := self.pages.take(1)) is None:
            if not self._pending:
                self._preempt(max(self._running.values(), key=lambda other: other.number))
            self._collect(0)  # the host must know all tokens of who is to come back; and some may end by it
            if text.lane is None:  # it has ended, or was the youngest
                return
        text.pages += page
        assert text.lane is not None
        text.lane.give(text.row, text.pages)

    def _preempt(self, text: Text) -> None:
        """Take a text out of the batch, to come back before all others that wait."""
        self._leave(text)
        self.pages.release(text.pages)
        text.pages, text.length, text.launched = [], 0, len(text.made)
        del self._running[text.number]
        self._waiting.appendleft(text)
        self._preemptions += 1

    def _launched(self, texts: list[Text], chosen: Chosen) -> None:
        """Send what was chosen to the host; texts that are complete with it leave the batch."""
        ready = None
        ids_B = chosen.token_ids
        if ids_B.is_cuda:
            ids_B = ids_B.to("cpu", non_blocking=True)
            ready = torch.cuda.Event()
            ready.record()
        self._pending.append(Launch(texts, chosen, ids_B, ready))
        for text in texts:
            text.launched += 1
            if text.launched == text.most_tokens:
                self._leave(text)

    def _leave(self, text: Text) -> None:
        """Free a text's row."""
        if text.lane is None:
            return
        moved = text.lane.leave(text.row)
        for other in self._running.values():
            if other.lane is text.lane and other.row == moved:
                other.row = text.row
        text.lane, text.row = None, -1

    # ----------------------------------------------------------------------------------------------------- telling ---

    def _collect(self, most: int) -> None:
        """Look at what has been chosen, the oldest first, until no more than ``most`` launches are left."""
        while len(self._pending) > most:
            self._look_at(self._pending.popleft())

    def _look_at(self, launch: Launch) -> None:
        if launch.ready is not None:
            launch.ready.synchronize()
        scores = self._scores(launch)
        for index, (text, token) in enumerate(zip(launch.texts, launch.ids_B.tolist(), strict=True)):
            if text.finish_reason is not None:
                continue  # chosen before the host knew that the text had ended
            text.num_tokens += 1
            self._generated += 1
            if token == self.model.prompt_format.eoa_id:
                self._finish(text, "stop")
                continue
            text.made.append(token)
            final = text.stream.add([token])
            if text.stream.stopped:
                self._finish(text, "stop", final, scores.get(index, ()))
            elif len(text.made) == text.most_tokens:
                self._finish(text, "length", final, scores.get(index, ()))
            elif final or index in scores:
                self._tell(text, final, scores.get(index, ()))

    def _scores(self, launch: Launch) -> dict[int, tuple[TokenScore, ...]]:
        """The log-probabilities of the rows that want them."""
        decode = self.model.prompt_format.decode
        return {
            row: (
                TokenScore(
                    token_id,
                    token_text(decode, token_id),
                    logprob,
                    tuple((other, token_text(decode, other), value) for other, value in top),
                ),
            )
            for row, token_id, logprob, top in launch.chosen.scores()
        }

    def _finish(self, text: Text, reason: FinishReason, final: str = "", scores: tuple[TokenScore, ...] = ()) -> None:
        """Free all that a text has, and tell its end."""
        text.finish_reason = reason
        if text.number in self._running:
            self._leave(text)
            self._remember(text)
            self.pages.release(text.pages)
            text.pages = []
            del self._running[text.number]
        else:
            self._waiting.remove(text)
        self._tell(text, final if text.stream.stopped else final + text.stream.finish(), scores)

    def _tell(self, text: Text, final: str, scores: tuple[TokenScore, ...]) -> None:
        self._pieces.append(
            Piece(text.number, final, scores, text.num_tokens, text.finish_reason, num_cached_tokens=text.cached)
        )

    def _remember(self, text: Text) -> None:
        if (entry := text.remembered(self.pages.page_size)) is not None:
            self.pages.remember(entry)

    # ---------------------------------------------------------------------------------------------------- the dial ---

    def _checked(self, cycles: Cycles | None) -> Cycles:
        """The cycles of a request, for which the cache must have slots."""
        if cycles is None or cycles == self.cycles:
            return self.cycles
        config = self.model.config
        if not config.H_cycles:
            raise UserError(f"h_cycles and l_cycles mean nothing to architecture {config.architecture!r}")
        if cycles.h_cycles < 1 or cycles.l_cycles < 1:
            raise UserError(f"h_cycles and l_cycles must be at least 1, found {cycles.h_cycles} and {cycles.l_cycles}")
        calls, most = cycles.h_cycles * (cycles.l_cycles + 1), config.num_calls
        if calls > most:
            raise UserError(
                f"h_cycles {cycles.h_cycles} and l_cycles {cycles.l_cycles} make {calls} module calls, and the cache "
                f"has slots for {most}: load the model with as many cycles as the largest request has"
            )
        return cycles

    def _config(self, cycles: Cycles) -> ModelConfig:
        if cycles == self.cycles:
            return self.model.config
        return with_cycles(self.model.config, cycles.h_cycles, cycles.l_cycles)

    def _lane(self, cycles: Cycles) -> Lane:
        if cycles not in self._lanes:
            step = make_step(self.model.module, self._config(cycles), self.cache, self.max_batch, self.decode)
            per_text = self.pages.needed(self.model.config.max_position_embeddings)
            self._lanes[cycles] = Lane(step, self.max_batch, per_text, self.device)
        return self._lanes[cycles]
