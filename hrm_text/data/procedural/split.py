"""Which problems are kept out of training."""

from __future__ import annotations

import hashlib

HELD_OUT_SHARE = 0.1
_THRESHOLD = int(HELD_OUT_SHARE * 2**32)


def is_held_out(task: str, key: str) -> bool:
    """Whether the problem belongs to the held-out tenth: a property of its text alone.

    The SHA-256 of ``task:key`` decides, so the split depends on no seed, order, wording or size of the mixture.
    """
    digest = hashlib.sha256(f"{task}:{key}".encode()).digest()
    return int.from_bytes(digest[:4], "big") < _THRESHOLD
