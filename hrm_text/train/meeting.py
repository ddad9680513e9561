"""Meeting: the ranks that torchrun started agree on a store of their own, whatever earlier attempts left behind.

After a failure torchrun starts all ranks again with the same store (2.11 and 2.13 do), and what the ranks before them
wrote is still in it: addresses of processes that are gone, to which the new ones would connect. The number of the
attempt, which torchrun gives, is no name for it: launchers on several machines count for themselves. So rank 0 makes a
name up, and tells it to those who ask.
"""

from __future__ import annotations

import time
import uuid
from datetime import timedelta

from torch.distributed.distributed_c10d import PrefixStore, Store

from hrm_text.contracts import UserError

_POLL_SECONDS = 0.01


def own_store(store: Store, rank: int, size: int, timeout_seconds: float) -> Store:
    """A part of the store that these ranks alone use; returns on each once all of them have met.

    Every rank asks under a number of its own, and rank 0 answers every number that it sees: one that an earlier process
    left is answered for nobody. It is done when all have confirmed its name, which no earlier attempt had.

    Raises:
        UserError: some ranks did not come within ``timeout_seconds``.
    """
    store.set_timeout(timedelta(seconds=timeout_seconds))
    if rank == 0:
        name = uuid.uuid4().hex
        _answer(store, name, set(range(1, size)), timeout_seconds)
    else:
        number = uuid.uuid4().hex
        store.set(f"asking/{rank}", number)
        try:
            name = store.get(f"answer/{number}").decode()
        except RuntimeError as error:
            raise UserError(
                f"rank {rank} of {size}: rank 0 did not answer within {timeout_seconds:.0f} s ({error}); see its output"
            ) from None
        store.set(f"{name}/met/{rank}", "")
    return PrefixStore(name, store)


def _answer(store: Store, name: str, missing: set[int], timeout_seconds: float) -> None:
    """Tell the name to all other ranks, until all have confirmed it."""
    answered: dict[int, bytes] = {}
    until = time.monotonic() + timeout_seconds
    while missing:
        for rank in sorted(missing):
            if store.check([f"{name}/met/{rank}"]):
                missing.remove(rank)
            elif store.check([f"asking/{rank}"]) and (number := store.get(f"asking/{rank}")) != answered.get(rank):
                store.set(f"answer/{number.decode()}", name)
                answered[rank] = number
        if missing and time.monotonic() > until:
            ranks = ", ".join(map(str, sorted(missing)))
            raise UserError(
                f"ranks {ranks} did not come within {timeout_seconds:.0f} s; see the output of their machines"
            )
        time.sleep(_POLL_SECONDS)
