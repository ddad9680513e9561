"""What clients may ask, field by field: OpenAI's names, and our own beside them. Anything else is an error.

A field that is null is as if it were not there, as with OpenAI.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, WithJsonSchema

from hrm_text.contracts import did_you_mean
from hrm_text.infer.requests import MOST_LOGPROBS
from hrm_text.infer.server.errors import ApiError, bad_request

MOST_CHOICES = 16
MOST_PROMPTS = 64
MOST_MESSAGES = 256
MOST_STOPS = 16
LONGEST_STOP = 256
"""Characters."""
COLDEST = 0.01
"""Below, logits divided by the temperature leave the range of float32, and the draw is greedy in all but name."""


def _texts(value: Any) -> Any:
    """A text is a list of one. Ids are refused: a client could write control tokens with them."""
    if isinstance(value, list) and any(isinstance(item, int | list) for item in value):
        raise ValueError(
            "expected a text or a list of texts, found token ids: they are not accepted, so that no prompt can hold "
            "control tokens"
        )
    if not isinstance(value, str | list):
        raise ValueError("expected a text or a list of texts")
    return [value] if isinstance(value, str) else value


def _stops(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _parts(value: Any) -> Any:
    """The text of a message, whole or in parts."""
    if not isinstance(value, list):
        return value
    for part in value:
        if not (isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)):
            raise ValueError(
                'expected a text, or a list of {"type": "text", "text": "..."}: this model reads only text'
            )
        if len(part) > 2:
            raise ValueError(f"unknown field in a part of the content: {sorted(set(part) - {'type', 'text'})}")
    return "".join(part["text"] for part in value)


def _not_lukewarm(value: float) -> float:
    if 0 < value < COLDEST:
        raise ValueError(f"expected 0 (greedy), or {COLDEST} to 2")
    return value


def _zero(value: float) -> float:
    if value != 0:
        raise ValueError("not supported, so it must be 0: use repetition_penalty (1 is none; above 1 repeats less)")
    return value


def _token_ids(value: dict[str, float]) -> dict[str, float]:
    for name in value:
        if not (name.isascii() and name.isdecimal() and len(name) < 10):
            raise ValueError(f"expected token ids as keys, found {name[:40]!r}")
    return value


def _text_or_texts(most: int, longest: int | None = None, *, least: int) -> WithJsonSchema:
    """What a validator before the type lets in, which the type does not say."""
    text: dict[str, Any] = {"type": "string", "minLength": 1, "maxLength": longest} if longest else {"type": "string"}
    texts = {"type": "array", "items": text, "minItems": least, "maxItems": most}
    return WithJsonSchema({"anyOf": [text, texts]})


_PART = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
    "required": ["type", "text"],
    "additionalProperties": False,
}

Prompts = Annotated[
    list[str],
    BeforeValidator(_texts),
    Field(min_length=1, max_length=MOST_PROMPTS),
    _text_or_texts(MOST_PROMPTS, least=1),
]
Stops = Annotated[
    list[Annotated[str, Field(min_length=1, max_length=LONGEST_STOP)]],
    BeforeValidator(_stops),
    Field(max_length=MOST_STOPS),
    _text_or_texts(MOST_STOPS, LONGEST_STOP, least=0),
]
Content = Annotated[
    str,
    BeforeValidator(_parts),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": _PART}]}),
]
LogitBias = Annotated[
    dict[str, Annotated[float, Field(ge=-100, le=100)]], AfterValidator(_token_ids), Field(max_length=1024)
]
MaxTokens = Annotated[int, Field(ge=1, lt=2**31)]


class Strict(BaseModel):
    """Unknown fields, numbers given as text, NaN and infinity are errors."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)


class StreamOptions(Strict):
    """How to stream."""

    include_usage: bool = Field(False, description="end with a chunk that has the usage, and no choices")


class Asked(Strict):
    """What both kinds of completion may be asked."""

    model: str | None = Field(None, max_length=256, description="the one that is served, if given")
    n: int | None = Field(None, ge=1, le=MOST_CHOICES, description="texts for each prompt; 1 if not given")
    stream: bool | None = Field(None, description="answer in server-sent events, as the text is made")
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, AfterValidator(_not_lukewarm)] | None = Field(
        None, ge=0, le=2, description=f"0 (greedy) if not given, unlike OpenAI's 1; or {COLDEST} to 2"
    )
    top_p: float | None = Field(
        None, gt=0, le=1, description="keep the likeliest tokens that together reach this probability; 1 if not given"
    )
    stop: Stops | None = Field(None, description="the text ends before the first of these")
    seed: int | None = Field(
        None, ge=-(2**63), lt=2**63, description="the same seed draws the same texts; drawn and reported if not given"
    )
    logit_bias: LogitBias | None = Field(None, description="token id to what is added to its logit")
    frequency_penalty: Annotated[float, AfterValidator(_zero)] | None = Field(None, description="must be 0")
    presence_penalty: Annotated[float, AfterValidator(_zero)] | None = Field(None, description="must be 0")
    # Our own:
    condition: str | None = Field(
        None, max_length=64, description="tags such as direct, or synth,cot; the model's own if not given"
    )
    top_k: int | None = Field(None, ge=0, le=10_000_000, description="keep so many of the likeliest; 0 keeps all")
    min_p: float | None = Field(
        None, ge=0, le=1, description="keep tokens with this share of the likeliest one's probability"
    )
    repetition_penalty: float | None = Field(
        None, ge=0.01, le=100, description="above 1, tokens that were there become less likely; 1 if not given"
    )
    h_cycles: int | None = Field(None, ge=1, le=1024, description="cycles of the slow state; the model's if not given")
    l_cycles: int | None = Field(None, ge=1, le=1024, description="cycles of the fast state; the model's if not given")

    @property
    def num_texts(self) -> int:
        """Texts to be made."""
        return self.n or 1


class CompletionRequest(Asked):
    """Body of /v1/completions: every prompt is one question."""

    prompt: Prompts
    max_tokens: MaxTokens | None = Field(None, description="longest text; 256 if not given; the context ends it too")
    logprobs: int | None = Field(
        None, ge=0, le=MOST_LOGPROBS, description="report the log-probability of each token and of so many others"
    )
    echo: Literal[False] | None = Field(None, description="must be false")

    @property
    def num_texts(self) -> int:
        return len(self.prompt) * (self.n or 1)


class ChatMessage(Strict):
    """What somebody said."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Content


class ChatRequest(Asked):
    """Body of /v1/chat/completions."""

    messages: list[ChatMessage] = Field(
        min_length=1,
        max_length=MOST_MESSAGES,
        description="if the last is the assistant's, the answer goes on from there",
    )
    max_completion_tokens: MaxTokens | None = Field(
        None, description="longest answer; what the context has room for if not given"
    )
    max_tokens: MaxTokens | None = Field(None, description="the older name of max_completion_tokens")
    logprobs: bool | None = Field(None, description="report the log-probability of each token")
    top_logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS, description="and of so many others; needs logprobs")


# ----------------------------------------------------------------------------------------------------------------------

Body = TypeVar("Body", bound=Asked)


def parse(model: type[Body], body: bytes) -> Body:
    """The body of a request; raises ApiError 400 that names the first field that is wrong, and what would be right."""
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        raise _first_of(error, model) from None


def _first_of(error: ValidationError, model: type[Asked]) -> ApiError:
    problem = error.errors(include_url=False, include_context=False)[0]
    kind, message = problem["type"], problem["msg"].removeprefix("Value error, ")
    if kind == "json_invalid":
        return bad_request(f"the body is not JSON in UTF-8: {message.removeprefix('Invalid JSON: ')}", code="not_json")
    param = _dotted(problem["loc"])[:200]
    if kind == "extra_forbidden":
        *above, name = problem["loc"]
        inner: dict[Any, type[Strict]] = {"messages": ChatMessage, "stream_options": StreamOptions}
        known = (inner[above[0]] if above else model).model_fields
        hint = did_you_mean(str(name), known)
        text = f"{param}: unknown field; {hint}Expected {', '.join(known)}"
        return bad_request(text, param, code="unknown_field")
    if kind == "missing":
        message = "is missing"
    else:
        message += _found(problem["input"])
    return bad_request(f"{param}: {message}" if param else message, param or None)


def _found(value: Any) -> str:
    """A short value, as it is written. (Python refuses to write integers of thousands of digits.)"""
    if isinstance(value, int) and value.bit_length() > 200:
        return ", found an integer of more than 60 digits"
    if not isinstance(value, bool | int | float | str | None):
        return ""
    shown = repr(value[:60] if isinstance(value, str) else value)
    return f", found {shown}"


def _dotted(path: tuple[int | str, ...]) -> str:
    """As people write it: messages[3].content."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text
