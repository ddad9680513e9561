"""Which language a text is in."""

from __future__ import annotations

import functools
from collections.abc import Callable

from hrm_text.contracts import UserError

LANGUAGES = (
    "ar bg bn de en es fa fi fr gu he hi it ja kn ko ml mr ne pa pl pt ru sw ta te th uk ur vi"  # ISO 639-1
).split()
"""Those that IFEval asks for. A text is taken for the likeliest of these: naming a rare relative would be a mistake of
the identifier, not of the response."""


def language_of(text: str) -> str:
    """The likeliest of LANGUAGES; empty for a text without a letter. Capitals do not matter.

    Raises:
        UserError: the identifier is not installed.
    """
    if not any(character.isalpha() for character in text):
        return ""
    return _identify()(text.lower())


@functools.cache
def _identify() -> Callable[[str], str]:
    """py3langid (Lui and Baldwin 2012): naive Bayes over byte n-grams, on NumPy alone, the same answer every time.

    The published scores were made with langdetect, which draws random numbers and was last released in 2021.
    """
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError:
        raise UserError(
            "judging the language of a response needs something that is not installed: pip install 'hrm-text[eval]'"
        ) from None
    identifier = LanguageIdentifier.from_model_file(MODEL_FILE)
    identifier.set_languages(LANGUAGES)
    return lambda text: str(identifier.classify(text)[0])
