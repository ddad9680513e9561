"""Ranks that are forks of one process, so that PyTorch is imported once and not by each: as under torchrun, without it.

Reads jobs from its standard input, a line of JSON each: how many ranks, the function that each calls, its arguments,
and where what they print goes. Answers each with a line: the exit codes of the ranks.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
MOST_SECONDS = 240
"""That a rank may take."""


@dataclass
class Ended:
    """What the ranks of a job printed."""

    out: str
    err: str


@dataclass
class Ranks:
    """The process that forks, from outside."""

    process: subprocess.Popen[str]

    def run(self, ranks: int, function: str, folder: Path, code: int = 0, **arguments: Any) -> Ended:
        """Call ``module:function`` on each rank, which must end with that code; what they print is kept there."""
        assert self.process.stdin is not None and self.process.stdout is not None
        job = {"ranks": ranks, "function": function, "folder": str(folder), "arguments": arguments}
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        codes = json.loads(self.process.stdout.readline())
        ended = Ended((folder / "out").read_text(), (folder / "err").read_text())
        assert codes == [code] * ranks, f"exit codes {codes}\n{ended.err}"
        return ended


@contextmanager
def started() -> Iterator[Ranks]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    command = [sys.executable, "-m", "tests.train.forked_ranks"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT
    ) as process:
        yield Ranks(process)
        process.stdin.close()  # type: ignore[union-attr]


# ---------------------------------------------------------------------------------------------------- in the process --


def train(config: str) -> int:
    """``hrm-text train`` of one rank."""
    from hrm_text.cli import main

    return main(["train", config])


def rank_of(job: Mapping[str, Any], rank: int, port: int) -> int:
    """One rank from beginning to end; its exit code."""
    signal.alarm(MOST_SECONDS)
    for name, stream in (("out", sys.stdout), ("err", sys.stderr)):
        with (Path(job["folder"]) / name).open("ab") as file:
            os.dup2(file.fileno(), stream.fileno())
    size = str(job["ranks"])
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    module, _, function = job["function"].partition(":")
    try:
        return int(getattr(importlib.import_module(module), function)(**job["arguments"]) or 0)
    except SystemExit as exit_:
        return int(exit_.code or 0)
    except BaseException:
        traceback.print_exc()
        return 1


def exit_codes(job: Mapping[str, Any]) -> list[int]:
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    for name in ("out", "err"):
        (Path(job["folder"]) / name).write_text("")
    children, ports = [], []
    for rank in range(job["ranks"]):
        read, write = os.pipe()
        if not (child := os.fork()):
            os.close(write)
            code = rank_of(job, rank, int(os.read(read, 16)))
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        os.close(read)
        children.append(child)
        ports.append(write)
    # Where the ranks meet, as a launcher has it; after the forks, for it has a thread.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for write in ports:
        os.write(write, str(store.port).encode())
        os.close(write)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


if __name__ == "__main__":
    # What every rank imports; the compiler's front is what sharded tensors import when they are first used.
    for name in ("torch._dynamo", "torch.distributed.fsdp", "hrm_text.recipes.train"):
        importlib.import_module(name)
    for line in sys.stdin:
        print(json.dumps(exit_codes(json.loads(line))), flush=True)
