"""Text nobody wrote whose tokens behave as English, mathematics and code do: fast, and the same for the same seed.

Words are made of syllables, frequent ones short, and drawn by Zipf's law, so that byte pairs merge as they do in real
text: frequent words become one token, rare ones several. Numbers, LaTeX and code stand among them. Text is put together
from a bank of phrases: word by word it is a third as fast, 29 MB/s.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

import numpy as np
import numpy.typing as npt

Style = Literal["prose", "mathematics", "code"]
Strings = npt.NDArray[np.object_]

WORDS = 40_000
PHRASES = 1 << 18
"""Of the bank of a style."""
PIECES_A_PHRASE = 4
TOKENS_A_PHRASE: dict[Style, float] = {"prose": 5.2, "mathematics": 8.8, "code": 12.4}
"""Of a byte-level BPE with 65,536 entries trained on this text, so that lengths can be given in tokens."""

_ONSETS = "b bl br c ch cl d dr f fl fr g gl gr h j k l m n p ph pl pr qu r s sh sl sp st str t th tr v w y".split()
_NUCLEI = "a a e e i i o o u ai ea ee ie oa ou".split()
_CODAS = ["", "", "", "l", "m", "n", "r", "s", "t", "ck", "ld", "nd", "ng", "nt", "rd", "rn", "st", "th"]
_ENDINGS = ["", "", "", "", "ed", "er", "ing", "ion", "ly", "s", "ment", "ness"]
_VARIANTS = ((" {}", 0.80), (" {},", 0.06), (" {}.", 0.05), (" {:c}", 0.07), (" {}.\n", 0.01), (' "{}"', 0.01))
"""How a word stands in a sentence, and how often; ``:c`` is capitalised."""
_LATEX = (
    r" $\frac{{{0}}}{{{1}}}$", r" ${2}^{{{0}}} + {1}{2}$", r" $\sqrt{{{0}{2}}}$", r" ${2} \le {0}$", " = {0}", " + {1}",
    r" $f({2}) = {0}{2} - {1}$", r" \[ \sum_{{{2}}} {2} = {1} \]", r" $\boxed{{{0}}}$", " $({0}, {1})$", " ≥ {0}",
)  # fmt: skip
_CODE = (
    "\n    {0} = {1}({2})", "\nfor {0} in range({2}):", "\n    return {0}", " {0}_{1}", "\nif {0} > {2}:", " += {2}",
    "\nprint({0})", " {0}[{2}]", "\n    # {0} {1}", "\n\ndef {0}({1}):", "\n}}", " {0}->{1};",
)  # fmt: skip
_SHARES: dict[Style, tuple[float, float, float, float]] = {
    "prose": (0.955, 0.03, 0.01, 0.005),
    "mathematics": (0.66, 0.15, 0.185, 0.005),
    "code": (0.42, 0.10, 0.01, 0.47),
}
"""Shares of words, numbers, LaTeX and code among the pieces."""


def texts(seed: int, rng: np.random.Generator, tokens: npt.NDArray[np.float64], style: Style) -> list[str]:
    """A text for each number of tokens, which it has about; never empty."""
    counts = np.maximum(1, np.rint(tokens / TOKENS_A_PHRASE[style])).astype(np.int64)
    drawn = bank(seed, style)[rng.integers(0, PHRASES, int(counts.sum()), dtype=np.uint32)].tolist()
    ends = np.cumsum(counts).tolist()
    return ["".join(drawn[start:end]).strip() for start, end in zip([0, *ends], ends, strict=False)]


def near_copy(seed: int, rng: np.random.Generator, text: str, changes: int = 3) -> str:
    """The text with a few of its words replaced: at most one in eight."""
    words = text.split(" ")
    for place in rng.integers(0, len(words), min(changes, max(1, len(words) // 8))).tolist():
        words[place] = bank(seed, "prose")[rng.integers(PHRASES)].split()[0]
    return " ".join(words)


def lengths(
    rng: np.random.Generator, count: int, median: float, sigma: float, longest: float = 6000
) -> npt.NDArray[np.float64]:
    """Numbers of tokens, lognormal as those of real corpora are."""
    return np.minimum(rng.lognormal(np.log(median), sigma, count), longest)


@lru_cache
def bank(seed: int, style: Style) -> Strings:
    """The phrases of a style; a process makes them once, in about a second and 50 MB."""
    pieces, groups = _pieces(seed)
    shares = zip(groups, _SHARES[style], strict=True)
    cumulative = np.cumsum(np.concatenate([likely * share for likely, share in shares]))
    rng = np.random.default_rng([seed, sorted(_SHARES).index(style)])
    drawn = np.searchsorted(cumulative, rng.random((PHRASES, PIECES_A_PHRASE)) * cumulative[-1])
    phrases: Strings = np.array(["".join(phrase) for phrase in pieces[drawn].tolist()], dtype=object)
    return phrases


@lru_cache
def _pieces(seed: int) -> tuple[Strings, list[npt.NDArray[np.float64]]]:
    """Words, numbers, LaTeX and code, and how likely each is within its group."""
    rng = random.Random(seed)
    words = _words(rng)
    zipf = 1 / (np.arange(len(words)) + 2.7) ** 1.05
    groups = [
        [variant.replace("{:c}", word.capitalize()).replace("{}", word) for variant, _ in _VARIANTS for word in words],
        [f" {rng.randrange(10 ** rng.randint(1, 6))}{rng.choice(('', '', '', '.5'))}" for _ in range(6000)],
        [rng.choice(_LATEX).format(rng.randint(1, 99), rng.randint(1, 49), rng.choice("xyzabnk")) for _ in range(6000)],
        [rng.choice(_CODE).format(*rng.choices(words[:2000], k=2), rng.randint(0, 99)) for _ in range(6000)],
    ]
    likely = [np.full(len(group), 1 / len(group)) for group in groups]
    likely[0] = np.concatenate([zipf / zipf.sum() * share for _, share in _VARIANTS])
    return np.array([piece for group in groups for piece in group], dtype=object), likely


def _words(rng: random.Random) -> list[str]:
    """Different words, the short ones mostly first; one in a hundred has an accent."""
    made: dict[str, None] = {}
    while len(made) < WORDS:
        syllables = rng.choices((1, 2, 3, 4), (0.25, 0.45, 0.22, 0.08))[0]
        word = "".join(_syllable(rng) for _ in range(syllables)) + rng.choice(_ENDINGS)
        made[word.replace("e", "é", 1) if rng.random() < 0.01 else word] = None
    return sorted(made, key=lambda word: len(word) + rng.gauss(0, 2.5))


def _syllable(rng: random.Random) -> str:
    parts: Sequence[Sequence[str]] = (_ONSETS, _NUCLEI, _CODAS)
    return "".join(map(rng.choice, parts))
