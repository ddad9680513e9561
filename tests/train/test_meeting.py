from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from torch._C._distributed_c10d import HashStore, TCPStore
from torch.distributed.distributed_c10d import Store

from hrm_text.contracts import UserError
from hrm_text.train.meeting import own_store


def meet(store: Store, size: int, seconds: float = 20.0) -> list[Store]:
    """All ranks of one attempt, rank 0 a little late."""

    def join(rank: int) -> Store:
        time.sleep(0.1 if rank == 0 else 0)
        return own_store(store, rank, size, seconds)

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(join, range(size)))


def test_ranks_share_what_no_other_attempt_sees() -> None:
    store = HashStore()
    seen: list[list[Store]] = []
    for attempt in range(3):
        ranks = meet(store, 3)
        assert not any(each.check(["address"]) for each in ranks), "an address of an earlier attempt is still there"
        ranks[attempt].set("address", str(attempt))
        assert {each.get("address") for each in ranks} == {str(attempt).encode()}
        seen.append(ranks)
    assert [ranks[0].get("address") for ranks in seen] == [b"0", b"1", b"2"]


def test_a_rank_that_asked_and_died_before_it_was_answered_is_in_nobodys_way() -> None:
    store = HashStore()
    with pytest.raises(UserError, match=r"rank 2 of 3: rank 0 did not answer within 0 s"):
        own_store(store, 2, 3, 0.2)
    ranks = meet(store, 3)
    ranks[2].set("key", "value")
    assert ranks[0].get("key") == ranks[1].get("key") == b"value"


def test_one_alone_waits_for_nobody() -> None:
    assert not own_store(HashStore(), 0, 1, 0.1).check(["key"])


def test_ranks_that_do_not_come_are_named() -> None:
    store = HashStore()
    store.set("asking/1", "of an earlier attempt")
    with pytest.raises(UserError, match=r"ranks 1, 2 did not come within 0 s"):
        own_store(store, 0, 3, 0.3)


def test_over_the_network() -> None:
    server = TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)

    def join(rank: int) -> bytes:
        client = TCPStore("127.0.0.1", server.port, None, False, wait_for_workers=False)
        store = own_store(client, rank, 2, 20)
        store.set(str(rank), f"from {rank}")
        return store.get(str(1 - rank))

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(join, range(2))) == [b"from 1", b"from 0"]
        assert list(pool.map(join, range(2))) == [b"from 1", b"from 0"]
