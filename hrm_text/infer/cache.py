"""Who owns which pages of the key-value cache: texts that are being made, and turns that may come again.

A page that several own holds only tokens they share: whoever adds tokens owns the page they go to alone. Page 0 belongs
to nobody: rows of a batch that hold no text write there.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from hrm_text.infer.requests import Cycles, Turn

Context = tuple[Cycles, tuple[Turn, ...], tuple[int, ...]]
"""What keys and values of a response depend on beside itself: cycles, the turns before, and its own prefix."""


@dataclass(eq=False)
class Remembered:
    """The keys and values of a text that has ended, or of the prompt of one that is being made."""

    context: Context
    response_ids: tuple[int, ...]
    """The tokens of the response whose keys and values are in the pages, after all of the context's."""
    pages: list[int]

    @property
    def context_length(self) -> int:
        """Tokens of the context."""
        _, turns, prefix_ids = self.context
        return sum(turn.num_tokens for turn in turns) + len(prefix_ids)


@dataclass
class Pages:
    """All pages, and what is remembered in those that no running text needs."""

    num_pages: int
    page_size: int
    releases: int = field(init=False, default=0)
    """Grows whenever a page may have become free: whoever waits for some need not look before."""
    _free: list[int] = field(init=False)
    _owners: list[int] = field(init=False)
    _remembered: OrderedDict[int, Remembered] = field(init=False, default_factory=OrderedDict)
    """By identity, the least recently used first."""
    _by_context: dict[Context, list[Remembered]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        assert self.num_pages >= 2 and self.page_size >= 1, (self.num_pages, self.page_size)
        self._free = list(range(self.num_pages - 1, 0, -1))  # the lowest is taken first
        self._owners = [0] * self.num_pages

    @property
    def num_tokens(self) -> int:
        """Tokens that fit in all."""
        return (self.num_pages - 1) * self.page_size

    @property
    def num_free(self) -> int:
        """Pages that nobody owns."""
        return len(self._free)

    @property
    def num_obtainable(self) -> int:
        """Pages that nobody owns, or that are merely remembered."""
        remembered: dict[int, int] = {}
        for entry in self._remembered.values():
            for page in entry.pages:
                remembered[page] = remembered.get(page, 0) + 1
        return len(self._free) + sum(self._owners[page] == count for page, count in remembered.items())

    def needed(self, num_tokens: int) -> int:
        """Pages that so many tokens fill."""
        return -(-num_tokens // self.page_size)

    def take(self, count: int) -> list[int] | None:
        """``count`` pages of one's own; what is remembered makes way, the oldest first. None: there are not so many."""
        while len(self._free) < count and self._remembered:
            self._forget(next(iter(self._remembered.values())))
        if len(self._free) < count:
            return None
        taken = [self._free.pop() for _ in range(count)]
        for page in taken:
            self._owners[page] = 1
        return taken

    def share(self, pages: Sequence[int]) -> None:
        """Own pages together with those who own them."""
        for page in pages:
            assert self._owners[page] > 0, page
            self._owners[page] += 1

    def release(self, pages: Sequence[int]) -> None:
        """Own pages no longer."""
        for page in pages:
            assert self._owners[page] > 0, page
            self._owners[page] -= 1
            if not self._owners[page]:
                self._free.append(page)
        self.releases += 1

    # ------------------------------------------------------------------------------------------------- remembering ---

    def remember(self, entry: Remembered) -> None:
        """Share the pages of a text, so that one that begins like it may use them."""
        length = entry.context_length + len(entry.response_ids)
        assert self.needed(length) == len(entry.pages), (length, entry.pages)
        for other in list(self._by_context.get(entry.context, ())):
            if entry.response_ids[: len(other.response_ids)] == other.response_ids:
                self._forget(other)  # whatever it could serve, the longer one does
        self.share(entry.pages)
        self._remembered[id(entry)] = entry
        self._by_context.setdefault(entry.context, []).append(entry)

    def recall(self, cycles: Cycles, turns: Sequence[Turn]) -> tuple[int, Remembered | None]:
        """How many leading tokens of a request have keys and values here, and whose they are.

        A prefix is taken whole or not at all, as each of its tokens sees all others; a response as far as it is equal.
        """
        for last in range(len(turns) - 1, -1, -1):
            before, turn = tuple(turns[:last]), turns[last]
            entries = self._by_context.get((cycles, before, turn.prefix_ids), ())
            if entries:
                equal, found = max(
                    ((_equal_length(entry.response_ids, turn.response_ids), entry) for entry in entries),
                    key=lambda pair: pair[0],
                )
                self._remembered.move_to_end(id(found))
                return found.context_length + equal, found
        return 0, None

    def forget_all(self) -> None:
        """Give up everything that is merely remembered."""
        for entry in list(self._remembered.values()):
            self._forget(entry)

    def _forget(self, entry: Remembered) -> None:
        del self._remembered[id(entry)]
        same = self._by_context[entry.context]
        same.remove(entry)
        if not same:
            del self._by_context[entry.context]
        self.release(entry.pages)

    def __iter__(self) -> Iterator[Remembered]:
        """What is remembered, the least recently used first."""
        return iter(self._remembered.values())


def _equal_length(first: Sequence[int], second: Sequence[int]) -> int:
    """How many leading items are equal."""
    for index, (a, b) in enumerate(zip(first, second, strict=False)):
        if a != b:
            return index
    return min(len(first), len(second))
