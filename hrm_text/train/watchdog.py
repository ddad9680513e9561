"""The watchdog: a run in which one rank hangs ends with an error that names it.

Ranks wait for each other in every step, so one that hangs stops them all, and those that wait look as dead as the one
they wait for. Every rank therefore posts what it is doing to the store that all ranks share, from a thread of its own.
Where nothing moves for too long, each waiting rank reads what the others posted and tells who is to blame: a rank whose
posts have stopped (its process was stopped, its machine is gone), or else the rank that is furthest behind.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import timedelta

from torch.distributed.distributed_c10d import PrefixStore, Store

_POST_SECONDS = 1.0
_PARTS = 20
"""Ranks post and read at least so many times within the timeout, whatever it is: the reading is that precise. All
ranks read all others, so more would cost the store of many ranks more: at 600 s and 64 ranks it answers two reads a
second."""

_LAUNCHER_SECONDS = 0.5
_DONE = "done"


@dataclass(frozen=True)
class Post:
    """What a rank says of itself."""

    tick: int
    """Counts up for as long as the process runs at all."""
    step: int
    place: int
    """What is done within the step, counted; the same for all ranks."""
    doing: str
    """In words: "computing step 12"."""
    idle_seconds: float
    """Since the training thread began doing it."""
    paused: bool
    """What it does may take any time."""
    host: str
    pid: int
    launcher: int
    """Process that started it."""


@dataclass(frozen=True, slots=True)
class Doing:
    """What the training thread does, replaced as a whole: other threads read it."""

    step: int
    place: int
    words: str
    since: float
    paused: bool = False


@dataclass(frozen=True, slots=True)
class Seen:
    """The last post of a rank, and when it came by the clock of the one who reads."""

    post: Post
    at: float


class Watchdog:
    """Watches the training thread of this rank and, where that waits for too long, all other ranks.

    The training thread calls ``at`` whenever it begins something. Every rank must call it for the same things in the
    same order: by that they are compared, and not by clocks. It costs no more than storing a few values. Two threads
    do the rest: one talks to the store, the other only looks at the clock, so that a store that does not answer is
    noticed as well.

    Args:
        store: that all ranks share; it must hold nothing of an earlier attempt (``meeting.own_store``).
        rank: of this process, from 0.
        size: number of ranks.
        timeout_seconds: how long the training thread may be at one thing.
        on_hang: called once, from a thread, with what is wrong; by default it prints that and ends the process with
            exit code 1, at once: the training thread is stuck and could not be asked. Stopped ranks of the same
            launcher are killed first: they would not hear the launcher, which then waits for them in vain.
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        size: int,
        timeout_seconds: float,
        on_hang: Callable[[str], None] | None = None,
    ) -> None:
        self.rank, self.size, self.timeout_seconds = rank, size, timeout_seconds
        self._on_hang = on_hang or self._end_process
        # A connection of its own: the store's is locked for as long as another thread waits for a value.
        self._store = PrefixStore("watchdog", store.clone())  # type: ignore[attr-defined]  # its types forget it
        self._store.set_timeout(timedelta(seconds=max(timeout_seconds / 2, 1)))
        self._doing = Doing(0, 0, "starting", time.monotonic())
        self._seen: dict[int, Seen] = {}
        self._silent: list[int] = []
        """Ranks found to show no sign of life."""
        self._exchanged_at = time.monotonic()
        self._store_error = ""
        self._closed = threading.Event()
        self._threads = [
            threading.Thread(target=target, name=f"watchdog: {target.__name__}", daemon=True)
            for target in (self._exchange, self._watch)
        ]
        for thread in self._threads:
            thread.start()

    def at(self, step: int, doing: str) -> None:
        """The training thread begins something; ``doing`` names it for a person: "computing step 12"."""
        before = self._doing
        place = before.place + 1 if step == before.step else 0
        self._doing = Doing(step, place, doing, time.monotonic())

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What happens within may take any time (compiling, planning): only a process that is gone counts as hung.

        No other rank runs out of time meanwhile either: it may be waiting for this one. What ``at`` begins within is
        paused no more.
        """
        self._doing = replace(self._doing, since=time.monotonic(), paused=True)
        try:
            yield
        finally:
            self._doing = replace(self._doing, since=time.monotonic(), paused=False)

    def close(self) -> None:
        """End the watch: this rank is done, and says so to those that go on."""
        if self._closed.is_set():
            return
        self.at(self._doing.step, _DONE)
        self._closed.set()
        for thread in self._threads:
            # Not for long: a store that does not answer must not hold up the end of a run.
            thread.join(2 * _POST_SECONDS)

    # --------------------------------------------------------------------------------------------------- the store --

    def _exchange(self) -> None:
        """Post what this rank does, and read what the others do, until closed."""
        post_seconds = min(_POST_SECONDS, self.timeout_seconds / _PARTS)
        host, tick, read_at = socket.gethostname(), 0, time.monotonic()
        closed = False
        while not closed:
            closed = self._closed.is_set()  # once more after that, for the last word
            doing, tick = self._doing, tick + 1
            idle = time.monotonic() - doing.since
            post = Post(tick, doing.step, doing.place, doing.words, idle, doing.paused, host, os.getpid(), os.getppid())
            try:
                self._store.set(str(self.rank), json.dumps(asdict(post)))
                if time.monotonic() - read_at >= self.timeout_seconds / _PARTS:
                    self._read()
                    read_at = time.monotonic()
                self._exchanged_at, self._store_error = time.monotonic(), ""
            except Exception as error:  # whatever it is, the watch goes on, and tells if it comes to that
                self._store_error = str(error).partition("\n")[0]
            if not closed:
                self._closed.wait(post_seconds)

    def _read(self) -> None:
        """See what the other ranks posted."""
        for rank in range(self.size):
            if rank == self.rank or not (rank in self._seen or self._store.check([str(rank)])):
                continue
            post = Post(**json.loads(self._store.get(str(rank))))
            before = self._seen.get(rank)
            if before is None or before.post != post:
                self._seen[rank] = Seen(post, time.monotonic())

    # --------------------------------------------------------------------------------------------------- judgement --

    def _watch(self) -> None:
        """Look at the clock until closed, or until there is something to say."""
        began = time.monotonic()
        finding = None
        while finding is None:
            if self._closed.wait(min(_POST_SECONDS, self.timeout_seconds / _PARTS)):
                return
            if time.monotonic() - self._doing.since > self.timeout_seconds:
                finding = self._finding(began)
        self._on_hang(f"{finding} All ranks end; torchrun --max-restarts goes on from the last checkpoint.")

    def _finding(self, began: float) -> str | None:
        """Who is to blame that this rank waits for so long; None where that is no error (yet)."""
        now = time.monotonic()
        own = self._doing
        own_idle = now - own.since
        if (no_answer := now - self._exchanged_at) > self.timeout_seconds / 2:
            reason = f" ({self._store_error})" if self._store_error else ""
            return (
                f"rank {self.rank} is {own.words} for {own_idle:.0f} s, and the store of the ranks has not answered "
                f"for {no_answer:.0f} s{reason}: the process or machine that serves it is gone or cannot be reached."
            )
        seen = dict(self._seen)
        silent_for = {
            rank: now - (seen[rank].at if rank in seen else began)
            for rank in range(self.size)
            if rank != self.rank and not (rank in seen and seen[rank].post.doing == _DONE)
        }
        if silent := [rank for rank, seconds in silent_for.items() if seconds > self.timeout_seconds / 2]:
            if max(silent_for[rank] for rank in silent) <= self.timeout_seconds:
                return None  # these are to blame, but their time is not up
            self._silent = silent
            return (
                "; ".join(
                    f"{self._name(rank)} hangs: no sign of life for {silent_for[rank]:.0f} s, "
                    + (f"last seen {seen[rank].post.doing}" if rank in seen else "it never came")
                    for rank in silent
                )
                + "; the process was stopped, or its machine is gone."
            )
        if own.paused or any(each.post.paused for each in seen.values()):
            return None
        doing = {self.rank: own} | {
            rank: Doing(each.post.step, each.post.place, each.post.doing, each.at - each.post.idle_seconds)
            for rank, each in seen.items()
            if each.post.doing != _DONE
        }
        if behind := furthest_behind(doing):
            waiting = ", and the others wait" if len(doing) > len(behind) else ""
            hanging = (f"{self._name(r)} hangs: {doing[r].words} for {now - doing[r].since:.0f} s" for r in behind)
            return f"{'; '.join(hanging)}{waiting}."
        return (
            f"no rank gets on: all {len(doing)} are {own.words} for {own_idle:.0f} s, so none alone is to blame; "
            "the network between them or a device may be."
        )

    def _name(self, rank: int) -> str:
        """A rank and where to find it."""
        if rank == self.rank:
            return f"rank {rank} ({socket.gethostname()}, pid {os.getpid()})"
        if rank not in self._seen:
            return f"rank {rank}"
        post = self._seen[rank].post
        return f"rank {rank} ({post.host}, pid {post.pid})"

    def _end_process(self, message: str) -> None:
        # In one piece, since all ranks say it at once, and past Python's buffer, which a stuck thread may hold.
        os.write(2, f"[rank {self.rank}] error: {message}\n".encode())
        for rank in self._silent:
            if rank in self._seen:
                post = self._seen[rank].post
                if (post.host, post.launcher) == (socket.gethostname(), os.getppid()):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(post.pid, signal.SIGKILL)
        os._exit(1)


def end_with_launcher() -> None:
    """See to it that this process ends, with exit code 1, when the one that started it is gone.

    A launcher that is killed leaves its ranks behind: they would wait for minutes for those who never come, or go on
    and save, in the way of the ranks that are started next. To be called before anything else that may take time.
    """
    launcher = os.getppid()

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(_LAUNCHER_SECONDS)
        os.write(2, f"error: the launcher (pid {launcher}) of this process ({os.getpid()}) is gone; it ends\n".encode())
        os._exit(1)

    threading.Thread(target=watch, name="watchdog: launcher", daemon=True).start()


def furthest_behind(doing: Mapping[int, Doing]) -> list[int]:
    """The ranks that the others wait for; none if several are all at the same."""
    places = {rank: (each.step, each.place) for rank, each in doing.items()}
    if len(places) > 1 and len(set(places.values())) == 1:
        return []
    return sorted(rank for rank, place in places.items() if place == min(places.values()))
