"""What the server answers, field by field: OpenAI's names, and few of our own."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field

Reason = Literal["stop", "length"]


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    """Every error of the server's own."""

    error: ErrorDetail


class PromptTokensDetails(BaseModel):
    """Of the tokens of the prompt."""

    cached_tokens: int = Field(description="whose keys and values were there from an earlier request")


class Usage(BaseModel):
    """Tokens in and out; a prompt counts once, however many texts were made for it."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class Answer(BaseModel):
    """What all answers and all their chunks begin with."""

    id: str
    created: int
    model: str
    system_fingerprint: str
    seed: int = Field(description="given, or drawn: the same request with this seed gives the same texts")
    usage: Usage | None = None


# ----------------------------------------------------------------------------------------------------------------------


class CompletionLogprobs(BaseModel):
    """Log-probabilities under the model itself: before temperature, penalties and cuts."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int] = Field(description="in characters, from the begin of the text")


class CompletionChoice(BaseModel):
    """A text, or a piece of it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: Reason | None = None


class Completion(Answer):
    """Of /v1/completions: all texts, or a chunk of a stream."""

    object: Literal["text_completion"]
    choices: list[CompletionChoice]


# ----------------------------------------------------------------------------------------------------------------------


class TopLogprob(BaseModel):
    """A token that might have been."""

    token: str
    logprob: float
    bytes: list[int] | None = Field(description="of the token's text; null where it ends within a character")


class ChatTokenLogprob(TopLogprob):
    """A token that is."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """Log-probabilities under the model itself: before temperature, penalties and cuts."""

    content: list[ChatTokenLogprob]


class ChatAnswerMessage(BaseModel):
    """What the assistant says."""

    role: Literal["assistant"]
    content: str


class ChatChoice(BaseModel):
    """An answer."""

    index: int
    message: ChatAnswerMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: Reason


class ChatCompletion(Answer):
    """Of /v1/chat/completions."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]


class ChatDelta(BaseModel):
    """What a chunk adds."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChatChunkChoice(BaseModel):
    """A piece of an answer."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: Reason | None = None


class ChatChunk(Answer):
    """An event of a streamed /v1/chat/completions."""

    object: Literal["chat.completion.chunk"]
    choices: list[ChatChunkChoice]


# ----------------------------------------------------------------------------------------------------------------------


class Model(BaseModel):
    """What is served; the fields after ``owned_by`` are our own."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["hrm-text"] = "hrm-text"
    parameters: int
    context: int = Field(description="tokens of prompt and text together")
    conditions: list[str] = Field(description="the tags there are")
    default_condition: str = Field(description="of requests that name none")
    has_cycles: bool = Field(description="whether h_cycles and l_cycles mean anything to this architecture")
    h_cycles: int
    l_cycles: int
    max_calls: int = Field(description="most module calls a token may take: h_cycles * (l_cycles + 1)")


class ModelList(BaseModel):
    """Of /v1/models."""

    object: Literal["list"] = "list"
    data: list[Model]


class Health(BaseModel):
    """Whether requests are taken."""

    status: Literal["ok", "draining", "failed"]
    running: int = Field(description="texts being made")
    waiting: int = Field(description="texts that wait for their turn")
