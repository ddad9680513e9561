"""Conversations as the model reads them: exchange after exchange (paper, section 5.3).

    <|im_start|> tags  first message  <|im_end|>  first answer  <|box_end|>  <|im_start|> tags  second message ...

Tokens of one message see each other both ways and everything before; an answer is causal. So nothing that came before
ever sees what comes later, and its keys and values stay as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from hrm_text.contracts import UserError
from hrm_text.data.prompt import PromptFormat
from hrm_text.infer.requests import Turn

Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True, slots=True)
class Message:
    """What somebody said."""

    role: Role
    content: str


def turns_of(messages: Sequence[Message], condition: str, prompt_format: PromptFormat) -> tuple[Turn, ...]:
    """The exchanges of a conversation; a last message of the assistant's is what the answer is to begin with.

    The format knows two voices. What the system says, and several messages of the user's in a row, become one message,
    with empty lines between them.

    Raises:
        UserError: no message of the user's before one of the assistant's, or none at all.
    """
    asked: list[str] = []
    exchanges: list[tuple[str, str | None]] = []
    for number, message in enumerate(messages):
        if message.role == "assistant":
            if not asked:
                raise UserError(
                    f"message {number + 1} is the assistant's and answers nothing: expected one of the user's before it"
                )
            exchanges.append(("\n\n".join(asked), message.content))
            asked = []
        else:
            asked.append(message.content)
    if asked:
        exchanges.append(("\n\n".join(asked), None))
    if not exchanges:
        raise UserError("messages must hold at least one message of the user's")
    prefixes = prompt_format.prefix_ids_batch([condition] * len(exchanges), [text for text, _ in exchanges])
    turns = [
        Turn(tuple(prefix), tuple(prompt_format.response_ids(answer)) if answer is not None else ())
        for prefix, (_, answer) in zip(prefixes, exchanges, strict=True)
    ]
    if not asked:  # the answer goes on: its end token is not there yet
        turns[-1] = Turn(turns[-1].prefix_ids, turns[-1].response_ids[:-1])
    return tuple(turns)
