"""Code that a model wrote harms neither the machine nor the verdict."""

from __future__ import annotations

import ast
import contextlib
import os
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from hrm_text.contracts import UserError
from hrm_text.eval.scoring.code import Limits, Verdict, programs_of, require_isolation, run_tests, sandbox

TEST = """
def check(candidate):
    assert candidate(2) == 4
    assert candidate(3) == 9, "three"
"""
RIGHT = "def square(x):\n    return x * x\n"
WRONG = "def square(x):\n    return x + 2\n"


@pytest.fixture(scope="module", autouse=True)
def isolated() -> None:
    try:
        require_isolation()
    except UserError as error:
        pytest.skip(str(error))


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    yield
    assert not descendants(os.getpid())


def descendants(ancestor: int) -> set[int]:
    """Process ids of all that runs in cells which a process has built."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
    found: set[int] = set()
    while more := {child for child, parent in parents.items() if parent in found | {ancestor}} - found:
        found |= more
    return {each for each in found if is_cell(each)}


def is_cell(process: int) -> bool:
    try:
        command = Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return any(part.endswith((b"/cell.py", b"/inmates.py")) for part in command)


def run(*programs: str, test: str = TEST, prompt: str = "", seconds: float = 10, memory_mib: int = 256) -> Verdict:
    limits = Limits(seconds=seconds, memory_mib=memory_mib)
    return run_tests(programs, prompt=prompt, test=test, entry_point="square", limits=limits)


def attacked(attack: str, seconds: float = 10) -> Verdict:
    """The verdict on a wrong function that attacks first, when it is defined."""
    return run(f"{attack}\n{WRONG}", seconds=seconds)


def told(*attacks: str) -> list[object]:
    """What lines that set ``found`` find out in a cell, one after the other; the name of what they raise."""
    programs = "\n".join(f"results.append(attempt({attack!r}))" for attack in attacks)
    program = f"""
import ctypes, os, socket, subprocess, sys, tempfile, threading
def attempt(code):
    names = dict(globals(), found=None)
    try:
        exec(code, names)
    except BaseException as error:
        return type(error).__name__
    return names["found"]
def square(x):
    results = []
    {textwrap.indent(programs, "    ").strip()}
    return repr(results)
"""
    verdict = run(program, test=TELLING)
    assert verdict.kind == "wrong", verdict
    found = ast.literal_eval(verdict.detail)
    assert isinstance(found, list)
    return found


TELLING = "def check(candidate):\n    assert False, candidate(1)"


def test_right_passes_and_wrong_says_what_failed() -> None:
    assert run(RIGHT) == Verdict("passed")
    assert run(WRONG) == Verdict("wrong", "three")


def test_the_first_reading_that_is_python_is_run() -> None:
    assert run("def square(x) return", RIGHT, WRONG).passed
    assert run("no Python at all").kind == "unreadable"
    assert run().kind == "unreadable"
    assert run("def cube(x): return x ** 3").kind == "unreadable"
    assert run("(" * 5000).kind == "unreadable"


def test_code_that_raises_is_an_error_wherever_it_does() -> None:
    assert run("raise KeyError(1)") == Verdict("error", "KeyError: 1")
    assert run("def square(x): return x[0]").kind == "error"
    swallowing = "def check(candidate):\n    try:\n        candidate(2)\n    except BaseException:\n        pass"
    assert run("def square(x): return x[0]", test=swallowing).kind == "error"


def test_values_come_through_unchanged() -> None:
    values = ["True", "None", "-7", "10**5000", "0.1", "float('inf')", "'\\ud800 é'", "[1, (2, 3)]",
              "{1: {2}, 'a': []}", "frozenset({1})", "b'x'", "2j", "{(1, 2): None}"]  # fmt: skip
    test = "def check(candidate):\n" + "\n".join(
        f"    got = candidate({value})\n    assert got == {value} and type(got) is type({value}), {value!r}"
        for value in values
    )
    assert run("def square(x): return x", test=test) == Verdict("passed")


def test_tests_may_use_the_prompt_and_the_functions_own_name() -> None:
    prompt = 'from typing import List\ndef helper(x: List):\n    return x[0]\n\ndef square(x):\n    """Squares."""\n'
    test = "def check(candidate):\n    assert helper([square(3)]) == candidate(3) == 9"
    assert run("def helper(x): return 9\n" + RIGHT, prompt=prompt, test=test).passed
    assert not run("def helper(x): return 8\n" + WRONG, prompt=prompt, test=test).passed


WRITE_EVERYWHERE = "import os\nfor fd in range(64):\n    try: os.write(fd, {!r})\n    except OSError: pass"


@pytest.mark.parametrize(
    "forgery",
    [
        "import sys; sys.exit(0)",
        "import os; os._exit(0)",
        "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
        "raise AssertionError",
        WRITE_EVERYWHERE.format(b'["passed", ""]\n'),
        WRITE_EVERYWHERE.format(b'{"value": null}\n' * 100),
        WRITE_EVERYWHERE.format(b'{"passed": ""}\n'),
        WRITE_EVERYWHERE.format(b"[" * 100000 + b"\n"),
        "import builtins, json\nbuiltins.AssertionError = KeyError\njson.dumps = lambda *_: '{\"value\": null}'",
        "import sys\nfor each in sys._current_frames().values(): each.f_globals['judge'] = lambda *_: ('passed', '')",
    ],
)
def test_a_verdict_cannot_be_forged(forgery: str) -> None:
    assert not attacked(forgery).passed


def test_an_object_that_equals_everything_does_not() -> None:
    liar = "class Yes(int):\n    def __eq__(self, other): return True\ndef square(x): return Yes(5)"
    assert run(liar).kind == "wrong"
    assert run("class Yes:\n    def __eq__(self, other): return True\ndef square(x): return Yes()").kind == "error"


BOMBS: list[tuple[str, set[str]]] = [
    ("import os\nwhile True: os.fork()", {"error"}),
    ("import os\nwhile True:\n    try: os.fork()\n    except OSError: pass", {"timeout"}),
    ("import threading\nwhile True: threading.Thread(target=input).start()", {"error"}),
    ("x = bytearray(2**40)", {"error"}),
    ("x = []\nwhile True: x.append(bytearray(2**24))", {"error", "ended"}),
    ("while True: pass", {"timeout"}),
    ("import signal\nfor s in range(1, 65):\n    try: signal.signal(s, signal.SIG_IGN)\n"
     "    except (OSError, ValueError): pass\nwhile True: pass", {"timeout"}),
    ("import time; time.sleep(1000)", {"timeout"}),
    ("while True: print('x' * 10**6)", {"timeout"}),
    ("import sys\ndef f(): f()\nsys.setrecursionlimit(10**9)\nf()", {"error", "ended", "timeout"}),
    ("input()", {"error"}),
]  # fmt: skip


def test_bombs_go_off_in_their_cell() -> None:
    started = time.monotonic()
    with ThreadPoolExecutor(4) as pool:
        verdicts = list(pool.map(lambda bomb: attacked(bomb[0], seconds=0.5 if "timeout" in bomb[1] else 20), BOMBS))
    for (bomb, kinds), verdict in zip(BOMBS, verdicts, strict=True):
        assert verdict.kind in kinds, (bomb, verdict)
    assert time.monotonic() - started < 30


def test_an_endless_answer_is_cut() -> None:
    assert run("def square(x): return 'x' * 10**8").kind in {"ended", "error"}
    assert run("import itertools\ndef square(x): return itertools.count()").kind in {"wrong", "error", "ended"}


def test_nothing_of_the_machine_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "1")
    (tmp_path / "secret").write_text("1")
    paths = ["/proc", "/etc/passwd", "/sys", "/dev", "/tmp", str(tmp_path), str(Path(__file__).parent), str(Path.cwd())]
    top, etc, home, environment, *exist = told(
        "found = os.listdir('/')",
        "found = os.listdir('/etc')",
        f"found = os.listdir({str(Path.home())!r})",
        "found = dict(os.environ)",
        *(f"found = os.path.exists({path!r})" for path in paths),
    )
    assert dict(zip(paths, exist, strict=True)) == dict.fromkeys(paths, False)
    # Python itself may set its locale's variable.
    assert environment in ({}, {"LC_CTYPE": "C.UTF-8"})
    assert isinstance(top, list) and set(top) <= {"etc", "home", "inmates.py", "lib", "lib64", "opt", "root", "usr"}
    assert etc in ("FileNotFoundError", ["ld.so.cache"])
    # Where Python is installed below the home directory, the way to it is there.
    hidden = {each.name for each in Path.home().iterdir()} if home != "FileNotFoundError" else {"nothing"}
    assert isinstance(home, str) or len(home) <= 1 < len(hidden)  # type: ignore[arg-type]


def test_nothing_can_be_written() -> None:
    attempts = ["open('/x', 'w')", "open('/inmates.py', 'a')", "os.mkdir('/usr/lib/x')", "os.chmod('/', 0o777)",
                "os.unlink('/inmates.py')", "os.memfd_create('x')", "tempfile.TemporaryFile()"]  # fmt: skip
    assert set(told(*attempts)) <= {"OSError", "PermissionError", "FileNotFoundError"}


def test_there_is_no_network() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        families = [f"socket.socket(socket.{family})" for family in ("AF_UNIX", "AF_INET", "AF_INET6", "AF_NETLINK")]
        found = told(f"socket.create_connection(('127.0.0.1', {port}), 1)", *families, "socket.socketpair()")
    assert set(found) == {"PermissionError"}


def test_nobody_else_can_be_reached() -> None:
    assert told(f"os.kill({os.getpid()}, 9)", f"os.kill({os.getppid()}, 9)") == ["ProcessLookupError"] * 2
    above, killed, after = told("found = os.getppid()", "os.kill(os.getppid(), 9)", "found = 'still here'")
    assert above == 1 and killed in (None, "PermissionError") and after == "still here"
    starts = ["os.fork()", "threading.Thread(target=print).start()", "subprocess.run(['/inmates.py'])"]
    assert set(told(*starts)) <= {"PermissionError", "RuntimeError", "BlockingIOError"}
    # A new user namespace, tracing process 1, mounting, shared memory, moving to another root.
    calls = [
        "unshare(0x10000000)",
        "ptrace(16, 1, 0, 0)",
        "mount(0, b'/', 0, 0, 0)",
        "shmget(0, 4096, 0o1600)",
        "chroot(b'/')",
    ]
    assert told(*(f"found = ctypes.CDLL(None).{call}" for call in calls)) == [-1] * len(calls)


def test_no_right_is_left() -> None:
    identity, root, bounding, new_privileges, capabilities, seccomp = told(
        "found = os.getresuid() + os.getresgid()",
        "os.setuid(0)",
        "found = [ctypes.CDLL(None).prctl(23, capability, 0, 0, 0) for capability in range(38)]",
        "found = ctypes.CDLL(None).prctl(39, 0, 0, 0, 0)",
        "sets = (ctypes.c_uint32 * 6)()\n"
        "ctypes.CDLL(None).capget(ctypes.byref((ctypes.c_uint32 * 2)(0x20080522, 0)), sets)\nfound = list(sets)",
        "found = ctypes.CDLL(None).prctl(21, 0, 0, 0, 0)",
    )
    assert identity == (65534,) * 6 and root in ("PermissionError", "OSError")
    assert bounding == [0] * 38 and capabilities == [0] * 6
    assert new_privileges == 1 and seccomp == 2


def test_what_kills_the_evaluation_kills_the_cells(tmp_path: Path) -> None:
    script = tmp_path / "evaluation.py"
    script.write_text(
        "from hrm_text.eval.scoring.code import Limits, run_tests\n"
        "run_tests(['import time; time.sleep(100)'], prompt='', test='', entry_point='f', limits=Limits(seconds=100))\n"
    )
    # What is killed leaves its empty folders: here they go with the test's.
    path = os.pathsep.join([str(Path(sandbox.__file__).parents[4]), *sys.path])
    environment = {**os.environ, "PYTHONPATH": path, "TMPDIR": str(tmp_path)}
    process = subprocess.Popen([sys.executable, script], env=environment)
    waited(lambda: len(descendants(process.pid)) == 6)
    cells = descendants(process.pid)
    process.kill()
    process.wait()
    waited(lambda: not any(map(is_cell, cells)))


def waited(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


def test_many_at_once() -> None:
    verdicts: list[Verdict] = []
    threads = [threading.Thread(target=lambda each=each: verdicts.append(run(each))) for each in (RIGHT, WRONG) * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(verdict.kind for verdict in verdicts) == ["passed", "passed", "wrong", "wrong"]


def test_a_machine_that_cannot_isolate_refuses(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cell = (Path(sandbox.__file__).parent / "cell.py").read_text()
    for there, gone, said in (
        ("libc.unshare(NEWUSER)", "-1", "unshare user"),
        ("MACHINE not in", '"riscv64" not in', "system calls are known for x86_64 and aarch64"),
        ("libc.prctl(PR_SET_SECCOMP", "libc.prctl(9999", "seccomp filter: Invalid argument"),
        ("libc.syscall(\n        wide(MOUNT_SETATTR)", "libc.syscall(\n        wide(9999)", "mount_setattr read-only"),
    ):
        assert cell.count(there) == 1, there
        (tmp_path / "cell.py").write_text(cell.replace(there, gone))
        (tmp_path / "inmates.py").write_text((Path(sandbox.__file__).parent / "inmates.py").read_text())
        monkeypatch.setattr(sandbox, "HERE", tmp_path)
        sandbox._shown.cache_clear()
        with pytest.raises(UserError, match=f"cannot isolate code that a model wrote, so it is not run: .*{said}"):
            run(RIGHT)
    sandbox._shown.cache_clear()


PROMPT = 'import math\n\ndef square(x):\n    """Squares."""\n'


def read(response: str) -> object:
    """The square of 3 by the first reading that is Python; these responses are this file's own."""
    for program in programs_of(response, PROMPT, "square"):
        with contextlib.suppress(SyntaxError):
            names: dict[str, Any] = {}
            exec(program, names)
            return names["square"](3)
    return None


@pytest.mark.parametrize(
    "response",
    [
        "    return x * x",
        "return x * x",
        "    return x * x\n\nprint(square(3)) and more prose",
        "y = x\n    return y * x",
        "if x:\n    return x * x\nreturn 0",
        "def square(x):\n    return x * x",
        "    def square(x):\n        return x * x",
        "It is easy.\n```python\ndef square(x):\n    return math.prod([x, x])\n```\nDone.",
        "First\n```python\ndef square(x):\n    return 1\n```\nno:\n```\ndef square(x):\n    return x * x\n```",
        "```py\n    return x * x\n```",
        "```python\ndef square(x):\n    return x * x",
        "```python\ndef square(x):\n    return x * x\n```\n```python\nprint(square(2))\n```",
        "def helper(x):\n    return x\n\ndef square(x):\n    return x * helper(x)",
    ],
)
def test_programs_in_responses(response: str) -> None:
    assert read(response) == 9


@pytest.mark.parametrize("response", ["", "\n\n", "I cannot do this.", "def cube(x):\n    return x", "```\n```"])
def test_no_program_in_a_response(response: str) -> None:
    assert read(response) is None
