from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest

FORKING = """
import json, os, signal, sys, tempfile, traceback
import torch, triton.backends.compiler, triton.compiler
from hrm_text.model.kernels import attention_kernels, decode, triton_attention

for line in sys.stdin:
    program, arguments = json.loads(line)
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        child = os.fork()
        if not child:
            signal.alarm(240)
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            sys.argv[1:] = arguments
            code = 1
            try:
                exec(program, {"__name__": "__main__"})
                code = 0
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        texts = [(file.seek(0), file.read())[1] for file in (out, err)]
    print(json.dumps([code, *texts]), flush=True)
"""


@pytest.fixture(scope="session")
def compiled() -> Iterator[Callable[..., str]]:
    """What a program prints that asks Triton's compiler, in a process of its own that need not import Triton.

    The interpreter, which other tests have switched on in this process, stands in the way of the compiler.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    with subprocess.Popen(
        [sys.executable, "-c", FORKING], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdin is not None and process.stdout is not None

        def run(program: str, *arguments: int) -> str:
            assert process.stdin is not None and process.stdout is not None
            process.stdin.write(json.dumps([program, [*map(str, arguments)]]) + "\n")
            process.stdin.flush()
            code, out, err = json.loads(process.stdout.readline())
            assert code == 0, err
            return str(out)

        yield run
        process.stdin.close()
