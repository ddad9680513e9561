"""What runs in cells: the solver has the model's code, the checker the data set's tests. A script itself.

Run as ``python -I -S inmates.py ROLE CHANNEL [VERDICT]`` with a job as JSON on standard input; the standard library
alone. The model's code is never in the process that judges it: the checker's ``candidate`` sends its arguments through
the channel and gets plain values back, of built-in types, so that nothing the model wrote (an ``__eq__`` that always
agrees, a patched ``assert``, an early exit) takes part in the comparison. The verdict pipe is the checker's alone.
"""

from __future__ import annotations

import io
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping

TYPE_CHECKING = False  # as typing has it, whose import takes longer than all the others here
if TYPE_CHECKING:
    from typing import Any, NoReturn

LONGEST_LINE = 2**22
"""Bytes of one message at most."""
LONGEST_ITERATOR = 2**16


def encode(value: Any) -> Any:
    """A value of built-in types, or of their subclasses, as JSON; TypeError for any other."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return {"int": hex(int.__index__(value))}
    if isinstance(value, float):
        return {"float": float.hex(value)}
    if isinstance(value, complex):
        return {"complex": [value.real.hex(), value.imag.hex()]}
    if isinstance(value, (bytes, bytearray)):
        return {"bytes": bytes(value).hex()}
    if isinstance(value, list):
        return [encode(each) for each in list.__iter__(value)]
    if isinstance(value, dict):
        return {"dict": [[encode(key), encode(each)] for key, each in dict.items(value)]}
    kinds: tuple[type[Any], ...] = (tuple, set, frozenset)
    for kind in kinds:
        if isinstance(value, kind):
            return {kind.__name__: [encode(each) for each in kind.__iter__(value)]}
    if isinstance(value, Iterator):
        return {"iterator": [encode(each) for each in itertools.islice(value, LONGEST_ITERATOR)]}
    raise TypeError(f"{type(value).__name__} is not a value that can be compared")


DECODERS: Mapping[str, Callable[[Any], Any]] = {
    "int": lambda text: int(text, 16),
    "float": float.fromhex,
    "complex": lambda parts: complex(*map(float.fromhex, parts)),
    "bytes": bytes.fromhex,
    "dict": lambda pairs: {decode(key): decode(each) for key, each in pairs},
    "tuple": lambda items: tuple(map(decode, items)),
    "set": lambda items: set(map(decode, items)),
    "frozenset": lambda items: frozenset(map(decode, items)),
    "iterator": lambda items: iter([decode(each) for each in items]),
}


def decode(coded: Any) -> Any:
    """The value that ``encode`` was given, of a built-in type itself."""
    if isinstance(coded, list):
        return [decode(each) for each in coded]
    if isinstance(coded, dict):
        [(kind, content)] = coded.items()
        return DECODERS[kind](content)
    return coded


def send(channel: io.BufferedRWPair[Any, Any], message: Any) -> None:
    """One message as a line."""
    channel.write(json.dumps(message).encode() + b"\n")
    channel.flush()


class Closed(BaseException):
    """The other side is gone; not an Exception, as the code's own are."""


def receive(channel: io.BufferedRWPair[Any, Any]) -> Any:
    """The next message; Closed if there is none, or one too long."""
    line = channel.readline(LONGEST_LINE)
    if not line.endswith(b"\n"):
        raise Closed
    return json.loads(line)


def solve(job: Mapping[str, Any], channel: io.BufferedRWPair[Any, Any]) -> None:
    """Runs the first of the job's programs that is Python, then answers calls of its function until nobody asks."""
    compiled = None
    for program in job["programs"]:
        try:
            compiled = compile(program, "response", "exec")
            break
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            continue
    if compiled is None:
        return send(channel, {"unreadable": "the response is not Python"})
    names: dict[str, Any] = {"__name__": "response"}
    try:
        exec(compiled, names)
        function = names.get(job["entry_point"])
        if not callable(function):
            return send(channel, {"unreadable": f"no function {job['entry_point']!r}"})
        send(channel, {"value": None})
        while True:
            arguments, keywords = receive(channel)
            send(channel, {"value": encode(function(*decode(arguments), **dict(decode(keywords))))})
    except (Closed, BrokenPipeError):
        return None
    except BaseException as error:
        return send(channel, {"error": f"{type(error).__name__}: {error}"[:500]})


class Over(BaseException):
    """The verdict is known; not an Exception, so that no test takes it for one of the function's own."""


def judge(job: Mapping[str, Any], channel: io.BufferedRWPair[Any, Any]) -> tuple[str, str]:
    """Runs the data set's tests on the function behind the channel: the kind of a verdict and a detail."""
    failures: list[tuple[str, str]] = []

    def answer() -> Any:
        try:
            reply = receive(channel)
            if "value" in reply:
                return decode(reply["value"])
            [(kind, detail)] = reply.items()
            failures.append((kind if kind in ("error", "unreadable") else "error", str(detail)))
        except Closed:
            failures.append(("ended", "the process of the code ended before it answered"))
        except Exception as error:
            failures.append(("error", f"not an answer: {type(error).__name__}"))
        raise Over

    def candidate(*arguments: Any, **keywords: Any) -> Any:
        try:
            send(channel, [encode(list(arguments)), encode(keywords)])
        except OSError:
            failures.append(("ended", "the process of the code ended before it was asked"))
            raise Over from None
        return answer()

    names: dict[str, Any] = {"__name__": "check"}
    try:
        answer()
        exec(job["prompt"], names)
        names[job["entry_point"]] = candidate
        exec(job["test"], names)
        names["check"](candidate)
    except AssertionError as error:
        failures.append(("wrong", str(error)[:500]))
    except Over:
        pass
    except BaseException as error:
        failures.append(("wrong", f"{type(error).__name__}: {error}"[:500]))
    # The first failure counts, even if a test swallowed it.
    return failures[0] if failures else ("passed", "")


def main() -> NoReturn:
    """Takes the job and the role."""
    job = json.load(sys.stdin)
    sys.stdin = io.StringIO()
    role, channel = sys.argv[1], os.fdopen(int(sys.argv[2]), "r+b", buffering=0)
    reader = io.BufferedRWPair(channel, channel)
    if role == "solver":
        solve(job, reader)
    else:
        kind, detail = judge(job, reader)
        os.write(int(sys.argv[3]), json.dumps([kind, detail]).encode())
    os._exit(0)


if __name__ == "__main__":
    main()
