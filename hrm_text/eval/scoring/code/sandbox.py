"""Runs what a model wrote against a data set's tests, in cells that protect the machine and the verdict."""

from __future__ import annotations

import functools
import json
import os
import select
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hrm_text.contracts import UserError

HERE = Path(__file__).parent
START_SECONDS = 20.0
"""Longest time to build two cells: they take 0.1 s, and a loaded machine is slower."""
SHOWN = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache")
"""What Python's own libraries need besides its folder."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a cell may use."""

    seconds: float = 10.0
    """Of wall clock for all of a problem's tests; of processor time, a second more."""
    memory_mib: int = 512
    """Address space."""

    def of_process(self) -> dict[str, int]:
        """The kernel's limits by name; files of no length cannot be written, and standard output goes nowhere."""
        memory = self.memory_mib * 2**20
        seconds = int(self.seconds) + 1
        return {
            "CPU": seconds, "AS": memory, "FSIZE": 0, "NOFILE": 64, "NPROC": 1, "CORE": 0, "MEMLOCK": 0, "MSGQUEUE": 0,
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of a program."""

    kind: str
    """``passed``; ``wrong``: a test failed; ``error``: the code raised; ``ended``: its process did, by itself or over
    its memory; ``timeout``; ``unreadable``: no such function in it."""
    detail: str = ""

    @property
    def passed(self) -> bool:
        """Whether all tests held."""
        return self.kind == "passed"


def run_tests(
    programs: Sequence[str], *, prompt: str, test: str, entry_point: str, limits: Limits | None = None
) -> Verdict:
    """Tests the function that a program defines.

    Args:
        programs: readings of a response, tried in turn: the first that is Python is run, in the solver's cell.
        prompt: the data set's own code, which the tests may use; complete Python, run in the checker's cell.
        test: the data set's definition of ``check(candidate)``.
        entry_point: the function's name.
        limits: of either cell.

    Raises:
        UserError: this machine cannot isolate what it would run; nothing of the response was run.
    """
    limits = limits or Limits()
    with ExitStack() as stack:
        ours, theirs = socket.socketpair()
        verdict, verdict_in = os.pipe()
        cells = []
        try:
            judging = {"prompt": prompt, "test": test, "entry_point": entry_point}
            solving = {"programs": list(programs), "entry_point": entry_point}
            cells.append(stack.enter_context(Cell("checker", judging, [ours.fileno(), verdict_in], limits)))
            cells.append(stack.enter_context(Cell("solver", solving, [theirs.fileno()], limits)))
        finally:
            for end in (ours, theirs):
                end.close()
            os.close(verdict_in)
        with os.fdopen(verdict, "rb", buffering=0) as pipe:
            for cell in cells:
                cell.wait_until_started()
            written = _read_all(pipe.fileno(), time.monotonic() + limits.seconds)
    if written is None:
        return Verdict("timeout", f"no verdict within {limits.seconds:g} s")
    if not written:
        return Verdict("ended", "the process of the tests ended without a verdict")
    return Verdict(*json.loads(written))


class Cell:
    """A process of ``inmates.py`` in a cell of its own; leaving the context kills all that is in it, and waits."""

    def __init__(self, role: str, job: Mapping[str, Any], kept: Sequence[int], limits: Limits) -> None:
        """Starts to build the cell; ``kept`` are the file descriptors that its script is to have."""
        self._folder = tempfile.TemporaryDirectory(prefix="hrm-text-cell-")
        status, status_pipe = os.pipe()
        self._status = os.fdopen(status, "rb", buffering=0)
        root = Path(self._folder.name, "root")
        root.mkdir()
        job_file = Path(self._folder.name, "job")
        job_file.write_text(json.dumps(job))
        python = os.path.realpath(getattr(sys, "_base_executable", sys.executable))
        settings = {
            "folder": str(root),
            "shown": _shown(python),
            "argv": [python, "-I", "-S", "/inmates.py", role, *map(str, kept)],
            "kept": list(kept),
            "limits": limits.of_process(),
            "status_pipe": status_pipe,
        }
        try:
            with job_file.open("rb") as standard_input:
                self._process = subprocess.Popen(
                    [python, "-I", "-S", str(HERE / "cell.py"), json.dumps(settings)],
                    stdin=standard_input,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    pass_fds=[*kept, status_pipe],
                    env={},
                    cwd="/",
                    start_new_session=True,
                )
        except OSError as error:
            self._status.close()
            self._folder.cleanup()
            raise _refusal(str(error)) from None
        finally:
            os.close(status_pipe)

    def __enter__(self) -> Cell:
        return self

    def wait_until_started(self) -> None:
        """Until the script has the cell to itself.

        Raises:
            UserError: the cell could not be built.
        """
        trouble = _read_all(self._status.fileno(), time.monotonic() + START_SECONDS)
        if trouble is None:
            raise _refusal(f"it was not ready within {START_SECONDS:g} s")
        if trouble:
            raise _refusal(trouble.decode(errors="replace"))

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._status.close()
        self._folder.cleanup()


@functools.cache
def require_isolation() -> None:
    """Makes sure that code can be run here without harm, by running some.

    Raises:
        UserError: what is missing.
    """
    if sys.platform != "linux":
        raise _refusal(f"found {sys.platform}, expected Linux")
    verdict = run_tests(["def one(): return 1"], prompt="", test="def check(f): assert f() == 1", entry_point="one")
    if not verdict.passed:
        raise _refusal(f"a trivial program did not pass: {verdict.kind}, {verdict.detail}")


def _refusal(found: str) -> UserError:
    return UserError(
        f"this machine cannot isolate code that a model wrote, so it is not run: {found}. Expected: Linux 5.14 or "
        "later on x86_64 or aarch64, with user namespaces for this user: sysctl user.max_user_namespaces above 0, on "
        "Ubuntu kernel.apparmor_restrict_unprivileged_userns=0, in a container a seccomp profile that allows unshare "
        "and mount. Evaluate on such a machine, or leave out the tasks that run code"
    )


@functools.cache
def _shown(python: str) -> list[tuple[str, str]]:
    """What a cell shows: where it is and where it appears there."""
    prefix = Path(python).parent.parent
    wanted = [*SHOWN, python, str(prefix / "lib"), str(prefix / "lib64")]
    found = dict.fromkeys(each for each in wanted if os.path.exists(each))
    # A folder below another that is shown is there already.
    tops = [each for each in found if not any(each.startswith(other + "/") for other in found)]
    return [*((each, each) for each in tops), (str(HERE / "inmates.py"), "/inmates.py")]


def _read_all(pipe: int, deadline: float) -> bytes | None:
    """What is written until the other end closes, 64 KiB at most; None if the deadline comes first."""
    read = b""
    while len(read) < 2**16:
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([pipe], [], [], left)[0]:
            return None
        piece = os.read(pipe, 2**16)
        if not piece:
            break
        read += piece
    return read
