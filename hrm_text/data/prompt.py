"""How a record becomes tokens: the one place that renders a prompt, for tokenising, training, serving and evaluation.

    prefix    <|im_start|>  condition tokens  instruction  <|im_end|>
    response  response  <|box_end|>

Control tokens are put in by id. Text of the user is encoded with special tokens read as plain text, so no instruction
can forge a tag, the end of the prefix or the end of the response.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from hrm_text.contracts import CONDITIONS, Example, UserError, did_you_mean

_THINKING = re.compile(r"<think>.*?(?:</think>|\Z)", re.DOTALL)


@lru_cache(maxsize=1024)
def parse_condition(condition: str) -> tuple[str, ...]:
    """The tags of a condition such as ``"synth,cot"``, in the order given.

    White space around a tag is ignored. A tag that is given twice is emitted twice.

    Raises:
        UserError: there is no tag, or one that is not of ``CONDITIONS``.
    """
    tags = tuple(tag.strip() for tag in condition.split(","))
    for tag in tags:
        if tag not in CONDITIONS:
            hint = did_you_mean(tag.lower(), CONDITIONS)
            found = f"unknown condition tag {tag!r}" if tag else "empty condition tag"
            raise UserError(
                f"{found} in {condition!r}; {hint}Expected one or more of {', '.join(CONDITIONS)}, "
                'separated by commas, such as "synth,cot"'
            )
    return tags


def strip_thinking(response: str) -> str:
    """A response without its ``<think>...</think>`` spans, and without white space where one was first or last.

    A ``<think>`` that is never closed is a trace cut off before its answer, so everything after it goes too. A lone
    ``</think>`` is text like any other. A response without a span comes back as it is, to the byte.
    """
    if "<think>" not in response:
        return response
    spans = list(_THINKING.finditer(response))
    kept = _THINKING.sub("", response)
    # Only the white space that framed a span goes: that at the other end of the response belongs to the answer.
    if not response[: spans[0].start()].strip():
        kept = kept.lstrip()
    if not response[spans[-1].end() :].strip():
        kept = kept.rstrip()
    return kept


class EncodedExamples(NamedTuple):
    """Records as token ids."""

    tokens: npt.NDArray[np.uint32]
    """[T]; prefix, response, prefix, response, ..."""
    prefix_lengths: npt.NDArray[np.int64]
    """[N]"""
    response_lengths: npt.NDArray[np.int64]
    """[N]; the end token counts."""


class PromptFormat:
    """Renders prefixes and responses as token ids, for one tokenizer and its table of control tokens."""

    def __init__(self, tokenizer: Tokenizer, info: Mapping[str, Any]) -> None:
        """Look the control tokens up.

        Args:
            tokenizer: its ``encode_special_tokens`` is switched on, so that special tokens in text are plain text.
            info: as ``tokenizer_info.json``: the token strings ``boq``, ``eoq``, ``eoa`` and ``condition_mapping``
                (tag to token). The other keys are not used.

        Raises:
            UserError: a key is missing, or a token is not a special token of the tokenizer.
        """
        tokenizer.encode_special_tokens = True
        self._tokenizer = tokenizer
        try:
            tokens = {name: info[name] for name in ("boq", "eoq", "eoa")}
            tags = dict(info["condition_mapping"])
        except KeyError as error:
            raise UserError(
                f"tokenizer information lacks the key {error}; expected boq, eoq, eoa, condition_mapping"
            ) from None
        self.boq_id, self.eoq_id, self.eoa_id = (self._control_id(token) for token in tokens.values())
        self._tag_ids = {tag: self._control_id(token) for tag, token in tags.items()}
        self.vocab_size = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    def _control_id(self, token: str) -> int:
        """The id of a control token, once it is certain that no text can produce it."""
        index = self._tokenizer.token_to_id(token)
        if index is None:
            raise UserError(f"the tokenizer has no token {token!r}, which prompts are made with; use another tokenizer")
        if index in self._tokenizer.encode(token, add_special_tokens=False).ids:
            raise UserError(
                f"the tokenizer reads the text {token!r} as the control token, so that an instruction could forge it; "
                f'mark it "special": true under added_tokens in tokenizer.json'
            )
        return int(index)

    def condition_ids(self, condition: str) -> list[int]:
        """The tokens of a condition, in the order of its tags.

        Raises:
            UserError: an unknown tag, or one for which this tokenizer has no token.
        """
        tags = parse_condition(condition)
        for tag in tags:
            if tag not in self._tag_ids:
                raise UserError(f"this tokenizer has no token for the tag {tag!r}; it has: {', '.join(self._tag_ids)}")
        return [self._tag_ids[tag] for tag in tags]

    def prefix_ids(self, condition: str, instruction: str) -> list[int]:
        """The whole prompt, which the model sees in both directions."""
        return self.prefix_ids_batch([condition], [instruction])[0]

    def response_ids(self, response: str) -> list[int]:
        """What the model is to say, its end token included."""
        return self.response_ids_batch([response])[0]

    def prefix_ids_batch(self, conditions: Sequence[str], instructions: Sequence[str]) -> list[list[int]]:
        """``prefix_ids`` of many; the text is encoded on all cores."""
        texts = self._text_ids(instructions)
        return [
            [self.boq_id, *self.condition_ids(condition), *text, self.eoq_id]
            for condition, text in zip(conditions, texts, strict=True)
        ]

    def response_ids_batch(self, responses: Sequence[str]) -> list[list[int]]:
        """``response_ids`` of many; the text is encoded on all cores."""
        return [[*text, self.eoa_id] for text in self._text_ids(responses)]

    def encode(self, examples: Sequence[Example]) -> EncodedExamples:
        """Prefixes and responses of many, as arrays: what ``prefix_ids`` and ``response_ids`` give, without lists."""
        texts = [text for example in examples for text in (example.instruction, example.response)]
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        lengths = np.fromiter(map(len, encodings), np.int64, len(encodings))
        gathered = array("I")  # takes a list in 14 ns a token, where NumPy's readers take 22 to 25
        for encoding in encodings:
            gathered.extend(encoding.ids)
        text_ids = np.frombuffer(gathered, np.uint32) if gathered else np.empty(0, np.uint32)
        conditions = [self.condition_ids(example.condition) for example in examples]
        # Around the two texts of a record stand: begin, tags; end of the prefix; end of the response.
        before = np.ones(len(encodings), np.int64)
        before[0::2] = np.fromiter(map(len, conditions), np.int64, len(conditions)) + 1
        after_response = np.zeros(len(encodings), np.int64)
        after_response[1::2] = 1
        ends = np.cumsum(lengths + before + after_response) - after_response
        starts = ends - lengths
        tokens = np.empty(len(text_ids) + int((before + after_response).sum()), np.uint32)
        text_starts = np.cumsum(lengths) - lengths
        tokens[np.arange(len(text_ids)) + np.repeat(starts - text_starts, lengths)] = text_ids
        tokens[starts[0::2] - before[0::2]] = self.boq_id
        tokens[starts[1::2] - 1] = self.eoq_id
        tokens[ends[1::2]] = self.eoa_id
        tags = np.fromiter(chain.from_iterable(conditions), np.uint32)
        number = np.arange(len(tags)) - np.repeat(np.cumsum(before[0::2] - 1) - before[0::2] + 1, before[0::2] - 1)
        tokens[np.repeat(starts[0::2] - before[0::2] + 1, before[0::2] - 1) + number] = tags
        return EncodedExamples(tokens, before[0::2] + lengths[0::2] + 1, lengths[1::2] + 1)

    def _text_ids(self, texts: Sequence[str]) -> list[list[int]]:
        # encode_batch_fast leaves the character offsets out; nothing here needs them.
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some tokens, special tokens left out. Bytes that are not valid UTF-8 become U+FFFD."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))
