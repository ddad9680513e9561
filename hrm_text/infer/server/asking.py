"""From what a client asks to what the engine is asked."""

from __future__ import annotations

import secrets
from collections.abc import Sequence

from hrm_text.infer.conversation import Message, turns_of
from hrm_text.infer.requests import Cycles, Request, Sampling, Turn
from hrm_text.infer.server.errors import bad_request, no_such_model
from hrm_text.infer.server.schemas import Asked, ChatRequest, CompletionRequest
from hrm_text.infer.server.service import Service
from hrm_text.infer.text_model import stream_seed

DEFAULT_MAX_TOKENS = 256
"""Of a completion, as in ``hrm-text generate``; a chat may go on to the end of the context, as with OpenAI."""


def drawn_seed(asked: Asked) -> int:
    """The seed that was given, or one for this request alone, small enough for any client's numbers."""
    return secrets.randbits(31) if asked.seed is None else asked.seed


def completion_requests(asked: CompletionRequest, service: Service, seed: int) -> list[Request]:
    """A request for each text: the first prompt's ``n``, the second's, ..."""
    check_model(asked, service)
    condition = asked.condition if asked.condition is not None else service.condition
    prompt_format = service.model.prompt_format
    turns = [
        (Turn(tuple(ids)),) for ids in prompt_format.prefix_ids_batch([condition] * len(asked.prompt), asked.prompt)
    ]
    longest = DEFAULT_MAX_TOKENS if asked.max_tokens is None else asked.max_tokens
    return _requests(asked, service, seed, turns, longest, asked.logprobs)


def chat_requests(asked: ChatRequest, service: Service, seed: int) -> list[Request]:
    """A request for each of the ``n`` answers."""
    check_model(asked, service)
    if asked.top_logprobs is not None and not asked.logprobs:
        raise bad_request("top_logprobs needs logprobs: true", "top_logprobs")
    if asked.max_tokens is not None and asked.max_completion_tokens is not None:
        raise bad_request("give max_completion_tokens or its older name max_tokens, not both", "max_tokens")
    condition = asked.condition if asked.condition is not None else service.condition
    messages = [
        Message("system" if message.role == "developer" else message.role, message.content)
        for message in asked.messages
    ]
    turns = turns_of(messages, condition, service.model.prompt_format)
    longest = asked.max_completion_tokens or asked.max_tokens or service.most_tokens
    logprobs = (asked.top_logprobs or 0) if asked.logprobs else None
    return _requests(asked, service, seed, [turns], longest, logprobs)


def check_model(asked: Asked, service: Service) -> None:
    """One model is served; any other name is an error rather than an answer from the wrong model."""
    if asked.model is not None and asked.model != service.name:
        raise no_such_model(asked.model, service.name)


def _requests(
    asked: Asked,
    service: Service,
    seed: int,
    conversations: Sequence[tuple[Turn, ...]],
    longest: int,
    logprobs: int | None,
) -> list[Request]:
    if asked.stream_options is not None and not asked.stream:
        raise bad_request("stream_options needs stream: true", "stream_options")
    bias = {int(token): value for token, value in (asked.logit_bias or {}).items()}
    vocab_size = service.model.vocab_size
    if any(token >= vocab_size for token in bias):
        raise bad_request(f"the model's token ids are below {vocab_size}, found {max(bias)}", "logit_bias")
    made: list[Request] = []
    for number, turns in enumerate(conversations):
        room = service.most_tokens - Request(turns).num_prompt_tokens
        if room < 1:
            where = f"prompt[{number}]" if len(conversations) > 1 else "the prompt"
            raise bad_request(
                f"{where} has {service.most_tokens - room} tokens with its condition and control tokens, and prompt "
                f"and text together may have {service.most_tokens}: shorten it",
                "messages" if isinstance(asked, ChatRequest) else "prompt",
                "context_length_exceeded",
            )
        for _ in range(asked.n or 1):
            sampling = Sampling(
                temperature=_or(asked.temperature, 0.0),
                top_p=_or(asked.top_p, 1.0),
                seed=stream_seed(seed, len(made)),  # as `hrm-text generate` does with its prompts
                top_k=asked.top_k or 0,
                min_p=asked.min_p or 0.0,
                repetition_penalty=_or(asked.repetition_penalty, 1.0),
                logit_bias=bias,
                logprobs=logprobs,
            )
            made.append(Request(turns, min(longest, room), sampling, tuple(asked.stop or ()), _cycles(asked, service)))
    return made


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


def _cycles(asked: Asked, service: Service) -> Cycles | None:
    if asked.h_cycles is None and asked.l_cycles is None:
        return None
    config = service.model.config
    return Cycles(asked.h_cycles or config.H_cycles, asked.l_cycles or config.L_cycles)
