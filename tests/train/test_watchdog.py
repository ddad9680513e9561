from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta

import pytest
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, TCPStore
from torch.distributed.distributed_c10d import PrefixStore, Store

from hrm_text.train.watchdog import Doing, Watchdog, furthest_behind

TIMEOUT = 0.8


class Ranks:
    """Some ranks of one process, each with a watchdog that notes what it would have said."""

    def __init__(self, size: int, store: Store, timeout_seconds: float = TIMEOUT) -> None:
        self.found: dict[int, str] = {}
        self.dogs = [Watchdog(store, rank, size, timeout_seconds, on_hang=self._note(rank)) for rank in range(size)]

    def _note(self, rank: int) -> Callable[[str], None]:
        return lambda text: self.found.__setitem__(rank, text)

    def at(self, step: int, doing: str, *ranks: int) -> None:
        for rank in ranks:
            self.dogs[rank].at(step, doing)

    def wait_for(self, *ranks: int, seconds: float = 5 * TIMEOUT) -> None:
        until = time.monotonic() + seconds
        while not set(ranks) <= set(self.found):
            assert time.monotonic() < until, f"only ranks {sorted(self.found)} said something"
            time.sleep(0.01)

    def close(self) -> None:
        for dog in self.dogs:
            dog.close()


@pytest.fixture
def ranks() -> Iterator[Callable[..., Ranks]]:
    made: list[Ranks] = []

    def make(size: int, store: Store | None = None, timeout_seconds: float = TIMEOUT) -> Ranks:
        made.append(Ranks(size, HashStore() if store is None else store, timeout_seconds))
        return made[-1]

    yield make
    for each in made:
        each.close()


def stop(dog: Watchdog) -> None:
    """What a stopped process does: neither of the threads does anything any more, and nothing is said about it."""
    nobody = PrefixStore("nobody", HashStore())
    nobody.set_timeout(timedelta(seconds=0.05))  # a thread that reads must not wait for what is not there
    dog._store = nobody  # the last word goes where nobody reads
    dog._closed.set()
    for thread in dog._threads:
        thread.join()


MakeRanks = Callable[..., Ranks]


class TestHanging:
    def test_the_rank_that_is_behind_is_named_by_all_even_by_itself(self, ranks: MakeRanks) -> None:
        four = ranks(4)
        four.at(12, "loading step 12", 0, 1, 2, 3)
        time.sleep(0.1)
        four.at(12, "computing step 12", 0, 1, 3)
        four.wait_for(0, 1, 2, 3)
        for text in four.found.values():
            assert re.match(rf"rank 2 \(.+, pid {os.getpid()}\) hangs: loading step 12 for \d s, and the others", text)
            assert "rank 1" not in text and "--max-restarts" in text

    def test_an_earlier_step_counts_more_than_a_longer_wait(self, ranks: MakeRanks) -> None:
        three = ranks(3)
        three.at(8, "saving", 0)
        three.at(8, "computing step 8", 2)
        time.sleep(0.1)
        three.at(7, "computing step 7", 1)
        three.wait_for(0, 2)
        assert {three.found[rank].split(" (")[0] for rank in (0, 2)} == {"rank 1"}

    def test_where_all_are_at_the_same_none_is_blamed(self, ranks: MakeRanks) -> None:
        two = ranks(2)
        two.at(3, "computing step 3", 0, 1)
        two.wait_for(0, 1)
        assert two.found[0].startswith("no rank gets on: all 2 are computing step 3 for ")

    def test_a_rank_without_a_sign_of_life_is_named_before_those_behind(self, ranks: MakeRanks) -> None:
        three = ranks(3)
        three.at(5, "computing step 5", 0, 2)  # rank 1 is behind all others, and alive
        time.sleep(0.2)
        silence_of_2 = time.monotonic()
        three.dogs[2].at(6, "loading step 6")
        time.sleep(0.1)
        stop(three.dogs[2])
        three.wait_for(0, 1)
        assert time.monotonic() - silence_of_2 >= TIMEOUT
        for rank in (0, 1):
            assert re.match(
                r"rank 2 \(.+\) hangs: no sign of life for \d s, last seen loading step 6;", three.found[rank]
            )

    def test_a_rank_that_never_came(self, ranks: MakeRanks) -> None:
        found: list[str] = []
        alone = Watchdog(HashStore(), 0, 2, TIMEOUT, on_hang=found.append)
        time.sleep(2 * TIMEOUT)
        alone.close()
        assert len(found) == 1 and re.match(r"rank 1 hangs: no sign of life for \d s, it never came", found[0])

    def test_nothing_is_said_while_ranks_get_on_however_slow_one_is(self, ranks: MakeRanks) -> None:
        two = ranks(2)
        for step in range(12):
            two.at(step, f"loading step {step}", 0, 1)
            time.sleep(TIMEOUT / 8)
            two.at(step, f"computing step {step}", 0)
            time.sleep(TIMEOUT / 8)
        assert two.found == {}
        two.wait_for(0, 1)  # and now they hang

    def test_is_noticed_within_the_timeout_and_little_more(self, ranks: MakeRanks) -> None:
        two = ranks(2)
        began = time.monotonic()
        two.at(1, "computing step 1", 0, 1)
        two.wait_for(0, 1)
        assert TIMEOUT <= time.monotonic() - began < TIMEOUT + 2

    @pytest.mark.parametrize(
        ("places", "behind"),
        [
            ({0: (4, 1)}, [0]),
            ({0: (4, 1), 1: (4, 1)}, []),
            ({0: (4, 2), 1: (4, 1), 2: (4, 1)}, [1, 2]),
            ({0: (4, 0), 1: (3, 3), 2: (3, 2)}, [2]),
        ],
    )
    def test_who_is_behind(self, places: dict[int, tuple[int, int]], behind: list[int]) -> None:
        assert furthest_behind({rank: Doing(*place, "", 0.0) for rank, place in places.items()}) == behind


class TestPausing:
    def test_no_rank_runs_out_of_time_while_one_is_paused_and_all_do_afterwards(self, ranks: MakeRanks) -> None:
        two = ranks(2)
        two.at(1, "computing step 1", 0, 1)
        with two.dogs[0].paused():
            time.sleep(2.5 * TIMEOUT)
            assert two.found == {}
        two.at(2, "loading step 2", 0)
        two.wait_for(1)
        assert two.found[1].startswith("rank 1 (")

    def test_what_is_begun_within_a_pause_is_paused_no_more(self, ranks: MakeRanks) -> None:
        one = ranks(1)
        with one.dogs[0].paused():
            one.at(1, "computing step 1", 0)
            one.wait_for(0)
        assert re.search(r"\) hangs: computing step 1 for \d s\. All ranks end; torchrun", one.found[0])

    def test_a_process_that_is_gone_is_noticed_all_the_same(self, ranks: MakeRanks) -> None:
        two = ranks(2)
        with two.dogs[0].paused(), two.dogs[1].paused():
            time.sleep(0.2)
            stop(two.dogs[1])
            two.wait_for(0)
        assert two.found[0].startswith("rank 1 (") and "no sign of life" in two.found[0]


class TestEnding:
    def test_a_rank_that_is_done_is_not_blamed(self, ranks: MakeRanks) -> None:
        three = ranks(3)
        three.at(9, "computing step 9", 0, 1, 2)
        three.dogs[2].close()
        three.at(9, "saving", 0)
        three.wait_for(0)
        assert three.found[0].startswith("rank 1 (") and "rank 2" not in three.found[0]

    def test_closing_ends_the_threads_and_may_be_repeated(self, ranks: MakeRanks) -> None:
        before = threading.active_count()
        two = ranks(2)
        assert threading.active_count() == before + 4
        two.close()
        two.close()
        assert threading.active_count() == before
        time.sleep(1.5 * TIMEOUT)
        assert two.found == {}


class TestStore:
    def test_over_the_network_with_its_own_connection(self, ranks: MakeRanks) -> None:
        server = TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
        client = PrefixStore("run", TCPStore("127.0.0.1", server.port, None, False, wait_for_workers=False))
        two = ranks(2, client)
        # The training thread waits for a key that nobody sets: its connection is locked all the time.

        def wait() -> None:
            with contextlib.suppress(dist.DistError):
                client.wait(["never"], timedelta(seconds=2))

        waiting = threading.Thread(target=wait)
        waiting.start()
        two.at(2, "loading step 2", 1)
        two.wait_for(0, 1, seconds=1.5)
        assert waiting.is_alive()
        waiting.join()
        assert two.found[1].startswith("rank 0 (")

    def test_one_that_is_gone_is_blamed_once_the_rank_waits(self, ranks: MakeRanks) -> None:
        program = (
            "import time; from torch.distributed import TCPStore; "
            "s = TCPStore('127.0.0.1', 0, None, True, wait_for_workers=False); "
            "print(s.port, flush=True); time.sleep(60)"
        )
        with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as server:
            assert server.stdout is not None
            port = int(server.stdout.readline())
            two = ranks(2, TCPStore("127.0.0.1", port, None, False, wait_for_workers=False))
            time.sleep(TIMEOUT / 2)
            # Stopped and not ended: nothing is refused, there is just no answer any more.
            server.send_signal(signal.SIGSTOP)
            for step in range(6):
                two.at(step, f"computing step {step}", 0, 1)
                time.sleep(TIMEOUT / 3)
            assert two.found == {}
            two.wait_for(0, 1)
            server.kill()
        assert re.match(
            r"rank 0 is computing step 5 for \d s, and the store of the ranks has not answered for \d s", two.found[0]
        )


RANK = """
import sys, time
from torch.distributed import TCPStore
from hrm_text.train.watchdog import Watchdog
rank, port = map(int, sys.argv[1:])
store = TCPStore("127.0.0.1", port, None, False, wait_for_workers=False)
dog = Watchdog(store, rank, 2, 1.5)
for step in range(10**9):
    dog.at(step, f"computing step {step:,}")
    store.set(f"{rank} at {step}", "")
    print(step, flush=True)
    store.wait([f"{1 - rank} at {step}"])
    time.sleep(0.05)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="signals of Unix")
def test_a_stopped_process_ends_the_others_with_its_name() -> None:
    server = TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), str(server.port)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in (0, 1)
    ]  # fmt: skip
    try:
        assert processes[1].stdout is not None
        while processes[1].stdout.readline().strip() != "5":
            assert processes[1].poll() is None
        processes[1].send_signal(signal.SIGSTOP)
        began = time.monotonic()
        _, errors = processes[0].communicate(timeout=20)
        assert 1.0 < time.monotonic() - began < 5
        assert processes[0].returncode == 1
        expected = (
            rf"\[rank 0\] error: rank 1 \(.+, pid {processes[1].pid}\) hangs: no sign of life for \d s, last seen "
        )
        assert processes[1].wait(5) == -signal.SIGKILL  # it could not hear a launcher's SIGTERM
        assert re.match(expected + r"computing step \d+; the process was stopped, .* All ranks end", errors)
    finally:
        for process in processes:
            process.kill()
            process.communicate()


ORPHAN = """
import os, time
from torch.distributed import TCPStore
from hrm_text.train.watchdog import end_with_launcher
end_with_launcher()
os.write(1, b"following\\n")
TCPStore("127.0.0.1", 9, 2, False)  # nobody answers there: two minutes in a place that no signal handler reaches
"""


def test_a_rank_whose_launcher_is_gone_ends() -> None:
    started = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {ORPHAN!r}])"
    with subprocess.Popen(
        [sys.executable, "-c", started], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as launcher:
        assert launcher.stdout is not None
        assert launcher.stdout.readline() == "following\n"
        time.sleep(1.2)
        assert launcher.poll() is None
        launcher.kill()
        began = time.monotonic()
        _, errors = launcher.communicate(timeout=20)  # the rank holds the pipes open until it ends
        assert time.monotonic() - began < 5
    assert f"error: the launcher (pid {launcher.pid}) of this process (" in errors
