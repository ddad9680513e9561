"""What lm-evaluation-harness asks of a model, in our terms: pure functions, without the harness and without a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hrm_text.contracts import UserError

LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""Names the tasks have for the longest response, the first of them that is given counts."""

SAMPLING = ("top_p", "top_k", "min_p", "repetition_penalty")
"""Keywords that our sampling has by the same name."""


@dataclass(frozen=True, slots=True)
class Generation:
    """How a task wants its responses made."""

    max_new_tokens: int
    until: tuple[str, ...]
    """Texts that a response ends before."""
    sampling: Mapping[str, float]
    """Fields of ``Sampling``, but for the seed."""


def read_generation(keywords: Mapping[str, Any], max_gen_toks: int) -> Generation:
    """The ``generation_kwargs`` of a task; ``max_gen_toks`` is for tasks that set no length.

    ``do_sample`` decides, where it is given: false is greedy at any temperature, true is temperature 1 unless another
    is given. Otherwise the temperature does.

    Raises:
        UserError: a keyword that we have nothing for: left out in silence, the score would be of another protocol.
    """
    known = {*LENGTHS, *SAMPLING, "until", "do_sample", "temperature", "num_beams"}
    if unknown := sorted(set(keywords) - known):
        raise UserError(
            f"generation_kwargs: {unknown[0]!r} means nothing to this model; it knows {', '.join(sorted(known))}"
        )
    if keywords.get("num_beams", 1) != 1:
        raise UserError(f"generation_kwargs: num_beams is {keywords['num_beams']}, and there is no beam search: set 1")
    given = [keywords[name] for name in LENGTHS if keywords.get(name) is not None]
    until = keywords.get("until") or ()
    until = (until,) if isinstance(until, str) else tuple(until)
    match keywords.get("do_sample"):
        case False:
            temperature = 0.0
        case True:
            temperature = float(keywords.get("temperature", 1.0))
        case None:
            temperature = float(keywords.get("temperature", 0.0))
        case other:
            raise UserError(f"generation_kwargs: do_sample must be true or false, found {other!r}")
    sampling = {name: keywords[name] for name in SAMPLING if keywords.get(name) is not None}
    return Generation(
        int(given[0] if given else max_gen_toks),
        tuple(text for text in until if text),  # an empty text ends nothing
        {"temperature": temperature, **sampling},
    )


def read_condition(text: str) -> str:
    """``synth+cot`` as a condition: a comma would end the argument on the harness's command line."""
    return text.replace("+", ",")


def response_of(continuation: str) -> str:
    """A continuation as a response of its own: without the white space that joins it to the prompt.

    Tasks write " Paris" behind "The capital of France is" since in one text a word begins with its space. Here a
    control token ends the prompt, and responses have been learnt without a space before them. White space alone stays.
    """
    return continuation.lstrip() or continuation


def keep_end(prefix_ids: Sequence[int], head: int, most: int) -> tuple[int, ...]:
    """A prompt of ``most`` tokens at most: its first ``head`` (begin, tags) stay, what goes is the text's beginning.

    Few-shot examples stand first and the question last, so the examples go.

    Raises:
        UserError: not even the head and the end of the prompt fit.
    """
    if most < head + 1:
        raise UserError(f"no room for a prompt: {most} tokens are left and an empty one has {head + 1}; ask for less")
    excess = max(0, len(prefix_ids) - most)
    return (*prefix_ids[:head], *prefix_ids[head + excess :])


def windows(length: int, room: int) -> list[tuple[int, int, int]]:
    """Windows over a text longer than the context: (start of what is seen, start and end of what is scored).

    Every token is scored once. The first window has no prompt; behind it, the half of the room before a window is its
    prompt and the other half is scored: what is in the prompt is computed once a window, and sees itself both ways.

    Args:
        length: tokens of the text.
        room: tokens of a prompt's text and a response together.
    """
    assert room >= 2, room
    if length <= 0:
        return []
    half = room // 2
    found = [(0, 0, min(length, room))]
    while (end := found[-1][2]) < length:
        found.append((end - half, end, min(length, end + room - half)))
    return found
