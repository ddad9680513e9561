r"""Mathematical answers that are equal though written differently, by math-verify, with a time limit for each.

An answer such as ``9^{9^{9^9}}`` keeps SymPy in a single multiplication for hours, which no signal interrupts, or takes
all memory. So answers are compared in a process of their own, which is ended when its time is over.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib
import importlib.util
import json
import os
import select
import subprocess
import sys
import threading
from typing import IO

from hrm_text.contracts import UserError
from hrm_text.eval.scoring.boxed import last_boxed
from hrm_text.eval.task import Question, Scored

SECONDS = 15.0
"""For one comparison; math-verify's own limit, 5 seconds for each of its steps, ends most of the slow ones earlier."""

START_SECONDS = 120.0
"""For the imports of the process, which take one second where nothing else runs."""

MEMORY_BYTES = 4 << 30
"""Address space of the process."""


def score_maths(response: str, question: Question) -> Scored:
    r"""Compare the last box of a response with a formula.

    Strictly there must be a box, and the contents of both are read as LaTeX. The published code hands math-verify the
    bare contents, which it takes for prose: of ``3\frac12`` it sees the 3, and in ``x+1`` nothing, so that not even
    ``x+1`` equals it. Without a box it gets the whole response. So the published score may lie on either side.

    Args:
        response: of the model.
        question: its answer is the content of the right box.

    Raises:
        UserError: math-verify is not installed, or does not start.
    """
    box, gold = last_boxed(response), question.answer
    published = comparer().equal(gold, response if box is None else box)
    strict = bool(box) and comparer().equal(rf"\boxed{{{gold}}}", rf"\boxed{{{box}}}")
    return Scored(float(strict), float(published), box or "", readable=bool(box))


@functools.cache
def comparer() -> Comparer:
    """The one of this process, which lives as long as it does."""
    found = Comparer()
    atexit.register(found.close)
    return found


class Comparer:
    """A process that compares answers: started with the first comparison, and again after one that it did not survive.

    Threads may share it; one comparison runs at a time.
    """

    def __init__(self, seconds: float = SECONDS) -> None:
        self.seconds = seconds
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def equal(self, right: str, given: str) -> bool:
        """Whether math-verify holds two texts to be equal; no where it takes more than the time or the memory allowed.

        Raises:
            UserError: math-verify is not installed, or does not start.
        """
        with self._lock:
            if self._process is not None and self._process.poll() is not None:
                self._stop()  # it was ended from outside
            process = self._process or self._start()
            assert process.stdin is not None and process.stdout is not None
            try:
                process.stdin.write(json.dumps([right, given]).encode() + b"\n")
                process.stdin.flush()
                verdict = _read_line(process.stdout, self.seconds)
            except BrokenPipeError:
                verdict = ""
            if not verdict:
                self._stop()
            return verdict == "equal"

    def close(self) -> None:
        """End the process; the next comparison starts another."""
        with self._lock:
            self._stop()

    def _start(self) -> subprocess.Popen[bytes]:
        if importlib.util.find_spec("math_verify") is None:
            raise UserError("MATH is scored by math-verify, which is not installed; pip install 'hrm-text[eval]'")
        # It must find this package where this process found it; -P keeps the working directory out of the way.
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        self._process = process = subprocess.Popen(
            [sys.executable, "-P", "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
        )
        assert process.stdout is not None
        said = _read_line(process.stdout, START_SECONDS)
        if said != "ready":
            self._stop()
            why = said or f"no answer within {START_SECONDS:.0f} seconds, or its end"
            raise UserError(f"math-verify does not start: {why}; pip install 'hrm-text[eval]' installs what it needs")
        return process

    def _stop(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            with contextlib.suppress(BrokenPipeError), process:  # closes the pipes, waits for its end
                pass
            process.wait()


def _read_line(pipe: IO[bytes], seconds: float) -> str:
    """The one line that the process writes at a time; empty if it takes too long or ends."""
    readable, _, _ = select.select([pipe], [], [], seconds)
    return pipe.readline().decode().strip() if readable else ""


def _answer_comparisons() -> None:
    """Of the process: a line of JSON in, a line with the verdict out, until the pipe is closed."""
    import resource  # not on Windows

    with contextlib.suppress(ValueError, OSError):  # a lower limit holds already, or the system has none of this kind
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    try:
        library = importlib.import_module("math_verify")
        library.verify(library.parse("$1$"), library.parse("$1$"))
    except ImportError as error:
        print(error, flush=True)
        return
    print("ready", flush=True)
    for line in sys.stdin:
        right, given = (library.parse(text) for text in json.loads(line))
        print("equal" if library.verify(right, given) else "different", flush=True)


if __name__ == "__main__":
    _answer_comparisons()
