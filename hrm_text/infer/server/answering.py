"""From the pieces that the engine makes to answers: whole, or chunk by chunk."""

from __future__ import annotations

import dataclasses
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from hrm_text import __version__
from hrm_text.infer.requests import Piece, Request, TokenScore
from hrm_text.infer.server import responses as r
from hrm_text.infer.server.service import Service
from hrm_text.infer.server.worker import Generation

_PART_OF_A_CHARACTER = "\ufffd"


class Answering(ABC):
    """One call's answer while it is made."""

    def __init__(self, requests: Sequence[Request], num_choices: int, seed: int, service: Service) -> None:
        """``num_choices``: texts for each prompt."""
        self.requests = requests
        self.num_choices = num_choices
        self.head: dict[str, Any] = {
            "id": self.id_prefix + secrets.token_hex(12),
            "created": int(time.time()),
            "model": service.name,
            "system_fingerprint": f"hrm-text-{__version__}",
            "seed": seed,
        }
        self._made = [0] * len(requests)
        self._cached = [0] * len(requests)

    id_prefix: str

    @abstractmethod
    def whole(self, pieces: Sequence[Sequence[Piece]]) -> r.Answer:
        """The answer from all pieces of every text."""

    @abstractmethod
    def opening(self) -> list[r.Answer]:
        """Chunks before the first piece."""

    @abstractmethod
    def chunks(self, number: int, piece: Piece) -> list[r.Answer]:
        """A piece of text ``number``, as chunks."""

    @abstractmethod
    def closing(self, usage: r.Usage) -> r.Answer:
        """The chunk that holds the usage and no text."""

    def see(self, number: int, piece: Piece) -> None:
        """Count."""
        self._made[number] = piece.num_tokens
        self._cached[number] = max(self._cached[number], piece.num_cached_tokens)

    def usage(self) -> r.Usage:
        """As far as it was seen. A prompt counts once; of it, what the first of its texts found in the cache."""
        first = range(0, len(self.requests), self.num_choices)
        prompt = sum(self.requests[number].num_prompt_tokens for number in first)
        made = sum(self._made)
        return r.Usage(
            prompt_tokens=prompt,
            completion_tokens=made,
            total_tokens=prompt + made,
            prompt_tokens_details=r.PromptTokensDetails(cached_tokens=sum(self._cached[number] for number in first)),
        )


class CompletionAnswering(Answering):
    """/v1/completions."""

    id_prefix = "cmpl-"

    def __init__(self, requests: Sequence[Request], num_choices: int, seed: int, service: Service) -> None:
        super().__init__(requests, num_choices, seed, service)
        self._offsets = [0] * len(requests)

    def whole(self, pieces: Sequence[Sequence[Piece]]) -> r.Answer:
        choices = [self._choice(number, _joined(of_one)) for number, of_one in enumerate(pieces)]
        return r.Completion(**self.head | {"usage": self.usage()}, object="text_completion", choices=choices)

    def opening(self) -> list[r.Answer]:
        return []

    def chunks(self, number: int, piece: Piece) -> list[r.Answer]:
        return [r.Completion(**self.head, object="text_completion", choices=[self._choice(number, piece)])]

    def closing(self, usage: r.Usage) -> r.Answer:
        return r.Completion(**self.head | {"usage": usage}, object="text_completion", choices=[])

    def _choice(self, number: int, piece: Piece) -> r.CompletionChoice:
        logprobs = None
        if self.requests[number].sampling.logprobs is not None and (piece.scores or piece.finish_reason):
            logprobs = self._logprobs(number, piece.scores)
        return r.CompletionChoice(index=number, text=piece.text, logprobs=logprobs, finish_reason=_reason(piece))

    def _logprobs(self, number: int, scores: Sequence[TokenScore]) -> r.CompletionLogprobs:
        offsets = []
        for score in scores:
            offsets.append(self._offsets[number])
            self._offsets[number] += len(score.text)
        return r.CompletionLogprobs(
            tokens=[score.text for score in scores],
            token_logprobs=[score.logprob for score in scores],
            # Tokens that are parts of characters share a text: the likeliest stands for them.
            top_logprobs=[{text: logprob for _, text, logprob in reversed(score.top)} for score in scores],
            text_offset=offsets,
        )


class ChatAnswering(Answering):
    """/v1/chat/completions."""

    id_prefix = "chatcmpl-"

    def whole(self, pieces: Sequence[Sequence[Piece]]) -> r.Answer:
        choices = []
        for number, of_one in enumerate(pieces):
            piece = _joined(of_one)
            reason = _reason(piece)
            assert reason is not None
            choices.append(
                r.ChatChoice(
                    index=number,
                    message=r.ChatAnswerMessage(role="assistant", content=piece.text),
                    logprobs=self._logprobs(number, piece),
                    finish_reason=reason,
                )
            )
        return r.ChatCompletion(**self.head | {"usage": self.usage()}, object="chat.completion", choices=choices)

    def opening(self) -> list[r.Answer]:
        return [self._chunk(n, r.ChatDelta(role="assistant", content="")) for n in range(len(self.requests))]

    def chunks(self, number: int, piece: Piece) -> list[r.Answer]:
        made = []
        if piece.text or piece.scores:
            made.append(self._chunk(number, r.ChatDelta(content=piece.text), self._logprobs(number, piece)))
        if piece.finish_reason is not None:
            made.append(self._chunk(number, r.ChatDelta(), None, _reason(piece)))
        return made

    def closing(self, usage: r.Usage) -> r.Answer:
        return r.ChatChunk(**self.head | {"usage": usage}, object="chat.completion.chunk", choices=[])

    def _chunk(
        self, number: int, delta: r.ChatDelta, logprobs: r.ChatLogprobs | None = None, reason: r.Reason | None = None
    ) -> r.Answer:
        choice = r.ChatChunkChoice(index=number, delta=delta, logprobs=logprobs, finish_reason=reason)
        return r.ChatChunk(**self.head, object="chat.completion.chunk", choices=[choice])

    def _logprobs(self, number: int, piece: Piece) -> r.ChatLogprobs | None:
        if self.requests[number].sampling.logprobs is None:
            return None
        return r.ChatLogprobs(
            content=[
                r.ChatTokenLogprob(
                    token=score.text,
                    logprob=score.logprob,
                    bytes=_bytes(score.text),
                    top_logprobs=[
                        r.TopLogprob(token=text, logprob=logprob, bytes=_bytes(text)) for _, text, logprob in score.top
                    ],
                )
                for score in piece.scores
            ]
        )


def _joined(pieces: Sequence[Piece]) -> Piece:
    """All pieces of a text as one."""
    return dataclasses.replace(
        pieces[-1],
        text="".join(piece.text for piece in pieces),
        scores=tuple(score for piece in pieces for score in piece.scores),
    )


def _reason(piece: Piece) -> r.Reason | None:
    # "cancelled" is for clients that have left.
    return None if piece.finish_reason is None else "stop" if piece.finish_reason == "stop" else "length"


def _bytes(text: str) -> list[int] | None:
    return None if _PART_OF_A_CHARACTER in text else list(text.encode())


# ----------------------------------------------------------------------------------------------------------------------


async def whole_answer(generation: Generation, answering: Answering) -> r.Answer:
    """Wait for all texts."""
    pieces: list[list[Piece]] = [[] for _ in generation.requests]
    async for number, piece in generation.pieces():
        answering.see(number, piece)
        pieces[number].append(piece)
    return answering.whole(pieces)
