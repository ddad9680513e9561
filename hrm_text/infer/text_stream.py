"""The text of a response, in pieces, while its tokens are being made."""

from __future__ import annotations

from collections.abc import Callable, Sequence

UNFINISHED = "\ufffd"
"""What bytes that are not UTF-8 decode to, and so the beginning of a character whose end is to come."""


class TextStream:
    """The text of one response: pieces that never change again, cut before the first stop string.

    All pieces together, that of ``finish`` included, are the text of all tokens at once, up to where a stop string
    begins. Of several stop strings the one that is complete first counts; of those that are complete at the same
    character, the longest. How the tokens are divided among calls of ``add`` makes no difference to the text.

    A piece ends neither within a character nor within what may become a stop string. The time is linear in the
    response: a token is decoded with at most the three before it.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: Sequence[str] = ()) -> None:
        """``decode`` joins the bytes of its tokens and reads them as UTF-8, as that of ``PromptFormat`` does."""
        assert all(stop), "an empty stop string ends every response before it begins"
        self.stopped = False
        """Whether a stop string was met: the text before it has been given, everything after it is dropped."""
        self._decode = decode
        self._tail: list[int] = []  # tokens that the next ones are decoded with
        self._given = 0  # characters of the tail's text that are final
        self._stops = [(text, _borders(text)) for text in stop]
        self._matched = [0] * len(self._stops)  # how many first characters of each stop string the text ends with
        self._held = ""  # the end of the text that may become a stop string

    def add(self, token_ids: Sequence[int]) -> str:
        """The text that these tokens make final; empty if there is none."""
        if self.stopped or not token_ids:
            return ""
        self._tail.extend(token_ids)
        text = self._decode(self._tail)
        start = self._given
        if text.endswith(UNFINISHED):
            # A character may end later; only its mark, the last, can still change. Whether it will cannot be seen:
            # the mark may as well stand for a wrong byte, or be itself in the response.
            text = text[:-1]
            self._keep_tail()
        else:
            self._tail, self._given = [], 0
        return self._before_stop(text[start:])

    def finish(self) -> str:
        """What was held back: the end of the text. ``add`` must not follow."""
        text = self._decode(self._tail)[self._given :]
        self._tail, self._given = [], 0
        piece = self._before_stop(text) + self._held
        self._held = ""
        return piece

    def _keep_tail(self) -> None:
        """Forget the tokens that no longer matter.

        The three last bytes are enough to go on from: a character has at most four, so its unfinished beginning lies
        within them, and where they all continue a character that began before them, it ends with them. Decoded alone
        they may begin with marks for bytes of such a character, but their text ends as that of all tokens does.
        """
        kept: list[int] = []
        while self._tail and len(kept) < 3:
            token = self._tail.pop()
            if self._decode([token]):  # special tokens have no bytes; every other has one at least
                kept.append(token)
        self._tail = kept[::-1]
        self._given = len(self._decode(self._tail)) - 1

    def _before_stop(self, text: str) -> str:
        """What can be given of the text held so far and this, which goes on from it (Knuth, Morris and Pratt)."""
        if not self._stops or self.stopped:
            return text if not self.stopped else ""
        held = self._held + text
        for place, character in enumerate(text, len(self._held) + 1):
            complete = 0
            for number, (stop, borders) in enumerate(self._stops):
                matched = self._matched[number]
                while matched and stop[matched] != character:
                    matched = borders[matched - 1]
                matched += stop[matched] == character
                self._matched[number] = matched
                if matched == len(stop):
                    complete = max(complete, matched)
            if complete:
                self.stopped, self._held, self._tail = True, "", []
                return held[: place - complete]
        final = len(held) - max(self._matched)
        self._held = held[final:]
        return held[:final]


def token_text(decode: Callable[[Sequence[int]], str], token_id: int) -> str:
    """What one token says by itself: bytes that are no whole character are U+FFFD, a special token says nothing."""
    return decode([token_id])


def _borders(text: str) -> list[int]:
    """For each beginning of a text, the length of the longest shorter beginning that it ends with."""
    borders = [0] * len(text)
    matched = 0
    for place in range(1, len(text)):
        while matched and text[matched] != text[place]:
            matched = borders[matched - 1]
        matched += text[matched] == text[place]
        borders[place] = matched
    return borders
