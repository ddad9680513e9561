from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from hrm_text import cli
from hrm_text.recipes import presets

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BY_CI = {"make quickstart", "make test", "make quickstart TORCH_INDEX=https://download.pytorch.org/whl/cpu"}
BY_SHELL = {". .venv/bin/activate"}
SHORTER = {
    "hrm-text train": ("--max_steps", "2"),
    "hrm-text bench train": ("--steps", "1", "--warmup", "1"),
    "torchrun": ("--max_steps", "2"),
}
"""What is added to commands of that beginning: they take their steps, only fewer of them."""


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    lines = [line.partition("  #")[0].strip() for block in blocks("sh") for line in block.splitlines()]
    return [line for line in lines if line]


@pytest.fixture(scope="module", autouse=True)
def finished_quickstart(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The folder that a newcomer has after `make quickstart`, made by a smaller one."""
    here = tmp_path_factory.mktemp("newcomer")
    shutil.copytree(ROOT / "configs", here / "configs")
    tiny = dataclasses.replace(
        presets.PRESETS["cpu"],
        examples=600,
        held_out_examples=40,
        items_per_task=2,
        items_before=1,
        model={"hidden_size": 32, "num_layers": 2, "num_heads": 2, "head_dim": 16, "H_cycles": 1, "L_cycles": 1},
        tokens_per_batch=1024,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        patch.setitem(presets.PRESETS, "cpu", tiny)
        assert cli.main(["quickstart"]) == 0
        shutil.copytree("runs/quickstart-cpu/records/train", "RECORDS")
        yield


def test_every_command_of_the_readme_runs() -> None:
    ran = 0
    for command in commands():
        if command in BY_CI | BY_SHELL:
            continue
        fewer = (option for begin, options in SHORTER.items() if command.startswith(begin) for option in options)
        program, *arguments = [*shlex.split(command), *fewer]
        if program == "torchrun":
            ranks = [sys.executable, "-m", "torch.distributed.run", "--standalone", *arguments]
            path = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
            assert subprocess.run(ranks, env=path, timeout=200, capture_output=True).returncode == 0, command
            continue
        assert program == "hrm-text", command
        if arguments[0] == "serve":
            serve_and_stop(arguments)
            continue
        if arguments[-1] == "--help":
            with pytest.raises(SystemExit, match="^0$"):
                cli.main(arguments)
        else:
            assert cli.main(arguments) == 0, command
        ran += 1
    assert ran >= 8
    assert Path("WEIGHTS_DIR/model.safetensors").exists()  # the last of them came to its end


def serve_and_stop(arguments: list[str]) -> None:
    """Start the server on a free port, ask it something, and end it as a machine does that shuts down."""
    path = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "hrm_text", *arguments, "--port", "0"]
    with subprocess.Popen(command, env=path, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        try:
            address = next(found[0] for line in server.stderr if (found := re.search(r"http://127\.0\.0\.1:\d+", line)))
            asked = json.dumps({"prompt": "57 + 38", "condition": "cot", "max_tokens": 4}).encode()
            request = urllib.request.Request(
                f"{address}/v1/completions", asked, {"Content-Type": "application/json"}, method="POST"
            )
            with urllib.request.urlopen(request, timeout=60) as answer:
                assert json.load(answer)["usage"]["completion_tokens"] > 0
        finally:
            server.terminate()
            server.stderr.read()
    assert server.returncode == 0


def test_the_python_of_the_readme_runs() -> None:
    (code,) = blocks("python")
    names: dict[str, object] = {}
    exec(code, names)
    assert isinstance(names["texts"], list)
    assert len(names["texts"]) == 1


def test_what_the_readme_points_to_is_there() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target
