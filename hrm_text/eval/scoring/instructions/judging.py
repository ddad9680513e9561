"""Strict and loose judgement of a response to several instructions at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hrm_text.contracts import UserError
from hrm_text.eval.scoring.instructions.kinds import KINDS


@dataclass(frozen=True, slots=True)
class Judged:
    """For each instruction, in order, whether it is followed."""

    strict: tuple[bool, ...]
    loose: tuple[bool, ...]
    """By the response, or by what is left of it without a frame or emphasis."""


def judge(response: str, kinds: Sequence[str], arguments: Sequence[Mapping[str, Any]]) -> Judged:
    """Judge a response by instructions of these kinds.

    Args:
        response: of the model.
        kinds: names such as ``punctuation:no_comma``: upstream's ``instruction_id_list``.
        arguments: of each; those that are None do not belong to the kind, as in upstream's ``kwargs``.

    Raises:
        UserError: a kind, or arguments of one, that are not known.
    """
    if len(kinds) != len(arguments):
        raise UserError(f"found {len(kinds)} instructions and arguments for {len(arguments)}; fetch the data again")
    given = [{name: value for name, value in each.items() if value is not None} for each in arguments]
    forms = loose_forms(response)
    strict, loose = [], []
    for kind, settings in zip(kinds, given, strict=True):
        if kind not in KINDS:
            raise UserError(f"unknown instruction {kind!r}; the kinds are {', '.join(KINDS)}")
        try:
            follows = [bool(form.strip()) and KINDS[kind](form, **settings) for form in forms]
        except TypeError as error:
            raise UserError(f"instruction {kind!r} cannot have the arguments {settings}: {error}") from None
        strict.append(follows[0])
        loose.append(any(follows))
    return Judged(tuple(strict), tuple(loose))


def loose_forms(response: str) -> list[str]:
    """The response, and it without its first line, its last line, both, and each of the four without asterisks.

    So "Sure, here it is:", a closing remark, and Markdown's emphasis cost nothing: section 2.2 of the paper. The first
    is the response as it is.
    """
    lines = response.split("\n")
    cut = [lines, lines[1:], lines[:-1], lines[1:-1]]
    forms = [response, *("\n".join(each).strip() for each in cut[1:])]
    return [*forms, *(form.replace("*", "") for form in forms)]
