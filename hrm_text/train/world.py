"""The ranks of a run: one process for each device, started by torchrun, or one process alone."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from hrm_text.contracts import UserError
from hrm_text.train.meeting import own_store
from hrm_text.train.watchdog import end_with_launcher

Value = TypeVar("Value")

_HOSTS_MAY_TAKE = timedelta(days=1)
"""For words between hosts: one may be reading records or planning for hours; the watchdog sees to one that is gone."""
_OTHERS_MAY_SPEAK_FIRST_SECONDS = 3.0
"""How long a rank with an error waits for rank 0 to tell of the same one."""


@dataclass(frozen=True)
class World:
    """What one process knows of the others. Without any argument: it is alone."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """Among the ranks of this machine."""
    local_size: int = 1
    """Ranks on this machine."""
    store: Store | None = None
    """Keys and values that all ranks see; None: one process."""
    host_group: dist.ProcessGroup | None = None
    """For words between the hosts, which never wait for a device; None: one process."""
    saving_group: dist.ProcessGroup | None = None
    """The same for the thread that saves: what it sends must not meet what the others send."""

    @property
    def is_main(self) -> bool:
        """Whether this process speaks for all: it writes what is written once."""
        return self.rank == 0

    @property
    def machines(self) -> int:
        """Machines with ``local_size`` ranks each."""
        return self.size // self.local_size

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.host_group is not None:
            dist.barrier(group=self.host_group)

    def gathered(self, value: Value) -> list[Value]:
        """The value of each rank, on every rank; plain data only."""
        if self.host_group is None:
            return [value]
        values = [value] * self.size
        dist.all_gather_object(values, value, group=self.host_group)
        return values

    @contextlib.contextmanager
    def main_first(self) -> Iterator[None]:
        """Rank 0 goes through the block before the others begin it: it makes what they then find."""
        if not self.is_main:
            self.barrier()
        yield
        if self.is_main:
            self.barrier()


@contextlib.contextmanager
def joined(device: Literal["cpu", "cuda", "mps"], timeout_seconds: float) -> Iterator[World]:
    """The ranks that torchrun started, in touch with each other; a process that it did not start is alone.

    Of an error that all ranks have, rank 0 alone tells; one of another rank names that rank.

    Args:
        device: on which the ranks compute; on "cuda" each takes the GPU of its local rank.
        timeout_seconds: of the watchdog, which is to speak before an exchange between devices gives up.

    Raises:
        UserError: there are fewer GPUs than ranks on this machine, or the device knows no ranks.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_launcher()
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield World()
        return
    rank, local_rank = int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", "0"))
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if device == "mps":
        raise UserError("several ranks need device cpu or cuda; an Apple GPU trains in one process")
    if device == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"torchrun started {local_size} ranks on this machine, which has {torch.cuda.device_count()} GPUs; "
                "give --nproc-per-node the number of GPUs"
            )
        torch.cuda.set_device(local_rank)
    timeout = timedelta(seconds=2 * timeout_seconds)
    store, _, _ = next(rendezvous("env://", rank, size, timeout=timeout))
    store = own_store(store, rank, size, 2 * timeout_seconds)  # torchrun's is not fresh after a restart
    store.set_timeout(timeout)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo",
        store=PrefixStore("groups", store),
        rank=rank,
        world_size=size,
        timeout=timeout,
        device_id=torch.device("cuda", local_rank) if device == "cuda" else None,
    )
    host_group, saving_group = (dist.new_group(backend="gloo", timeout=_HOSTS_MAY_TAKE) for _ in range(2))
    ranks_store = PrefixStore("ranks", store)
    world = World(rank, size, local_rank, local_size, ranks_store, host_group, saving_group)
    try:
        yield world
    except UserError as error:
        if rank and _is_told_by_main(ranks_store, str(error)):
            raise SystemExit(1) from None
        if rank == 0:
            ranks_store.set("error", str(error))
            raise
        raise UserError(f"rank {rank} of {size}: {error}") from error
    # Not after an error: the others may be waiting for this rank in an exchange, which ends when its process does.
    dist.destroy_process_group()


def _is_told_by_main(store: Store, text: str) -> bool:
    """Whether rank 0 has the same error."""
    until = time.monotonic() + _OTHERS_MAY_SPEAK_FIRST_SECONDS
    while time.monotonic() < until:
        if store.check(["error"]):
            return bool(store.get("error").decode() == text)
        time.sleep(0.05)
    return False
