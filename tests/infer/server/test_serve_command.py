from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import openai
import pytest
import torch

from hrm_text.cli.serve_command import keys_of_environment, keys_of_file
from hrm_text.contracts import UserError
from hrm_text.data.prompt import PromptFormat
from hrm_text.data.tokenizer import load_tokenizer, tokenizer_info
from hrm_text.infer.server.launch import introduce, is_loopback, listen
from hrm_text.infer.server.service import Keys, Limits
from hrm_text.model.config import preset
from hrm_text.model.recurrence import build
from hrm_text.model.weights import write_weights
from tests.infer.server.fake import make_service


def test_keys_come_from_the_environment_and_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert keys_of_environment() == [] == keys_of_file(None)
    monkeypatch.setenv("HRM_TEXT_API_KEYS", " one, two ,,")
    assert keys_of_environment() == ["one", "two"]
    file = tmp_path / "keys"
    file.write_text("\n three\nfour \n")
    assert keys_of_file(file) == ["three", "four"]
    file.write_text("\n")
    with pytest.raises(UserError, match="holds no key"):
        keys_of_file(file)
    with pytest.raises(UserError, match="cannot be read"):
        keys_of_file(tmp_path / "absent")
    with pytest.raises(UserError, match="an API key is empty"):
        Keys(["one", ""])


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"max_queue": 0}, "--max-queue must be positive, found 0"),
        ({"request_seconds": -1.0}, "--request-seconds must be positive"),
        ({"client_seconds": float("nan")}, "--client-seconds must be positive"),
        ({"max_body": 0}, "--max-body must be positive"),
        ({"drain_seconds": -1.0}, "--drain-seconds must be 0 or more"),
    ],
)
def test_limits_that_mean_nothing(limits: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Limits(**limits)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("host", "keys", "warned", "url"),
    [
        ("127.0.0.1", [], False, "http://127.0.0.1:"),
        ("localhost", [], False, "http://localhost:"),
        ("0.0.0.0", [], True, "http://127.0.0.1:"),
        ("0.0.0.0", ["key"], False, "http://127.0.0.1:"),
    ],
)
def test_who_opens_the_server_to_all_is_warned(
    tokenizer_dir: Path, host: str, keys: list[str], warned: bool, url: str
) -> None:
    service = make_service(tokenizer_dir, keys=keys)
    service.host = host
    said: list[str] = []
    warnings: list[str] = []
    with listen("127.0.0.1", 0) as sock:
        introduce(service, sock, said.append, warnings.append)
    service.worker.stop()
    assert bool(warnings) == warned
    curl = said[-1]
    assert f"  try it    {url}" in said[1] and url in curl
    assert ("Authorization: Bearer KEY" in curl) == bool(keys)
    assert is_loopback("::1") and is_loopback("127.9.9.9") and not is_loopback("192.168.0.1") and not is_loopback("box")


def test_the_command_serves_a_folder_until_it_is_told_to_end(tokenizer_dir: Path, tmp_path: Path) -> None:
    prompt_format = PromptFormat(load_tokenizer(tokenizer_dir), tokenizer_info(tokenizer_dir))
    config = preset("tiny", vocab_size=prompt_format.vocab_size, max_position_embeddings=64)
    write_weights(tmp_path, config, build(config, seed=0).state_dict(), torch.float32, {}, condition="cot")
    (tmp_path / "tokenizer.json").write_bytes((tokenizer_dir / "tokenizer.json").read_bytes())
    program = (
        "from pathlib import Path\nfrom hrm_text.cli.serve_command import serve\n"
        f"serve(Path({str(tmp_path)!r}), port=0, name='small', cache_tokens=640)"
    )
    process = subprocess.Popen([sys.executable, "-c", program], cwd=Path(__file__).parents[3], stderr=subprocess.PIPE)
    assert process.stderr is not None
    try:
        said = [process.stderr.readline().decode() for _ in range(4)]
        assert said[0].startswith("serving small: ") and "context 64, condition cot; cache for 640 tokens" in said[0]
        url = said[2].split()[1].removesuffix("/v1")
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client:
            answer = client.completions.create(model="small", prompt="apple", max_tokens=4)
        assert answer.usage is not None and answer.usage.completion_tokens <= 4
        # The line that is shown can be typed.
        if shutil.which("curl"):
            typed = subprocess.run(said[3], shell=True, capture_output=True, text=True)
            assert '"object":"text_completion"' in typed.stdout and typed.returncode == 0
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def test_without_the_extra_the_error_names_it() -> None:
    program = (
        "import sys; sys.modules['uvicorn'] = None\n"
        "from hrm_text.contracts import UserError\n"
        "try:\n    import hrm_text.infer.server\n"
        "except UserError as error:\n    print(error)\n"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=Path(__file__).parents[3])
    assert run.stderr == "" and '(uvicorn): pip install "hrm-text[serve]"' in run.stdout
