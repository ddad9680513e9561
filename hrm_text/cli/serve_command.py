"""`hrm-text serve`: a model behind OpenAI's API."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, UseAppendAction, arg

from hrm_text.cli.terminal import tell, warn
from hrm_text.cli.weights_commands import available_device
from hrm_text.contracts import UserError

KEYS_VARIABLE = "HRM_TEXT_API_KEYS"


def serve(
    weights_dir: Positional[Path],
    host: str = "127.0.0.1",
    port: int = 8000,
    name: str | None = None,
    condition: str | None = None,
    device: str = "cpu",
    dtype: Literal["float32", "bfloat16"] = "float32",
    h_cycles: int | None = None,
    l_cycles: int | None = None,
    quantize: Literal["none", "int8"] = "none",
    max_batch: int = 64,
    cache_tokens: int | None = None,
    kv_cache: Literal["auto", "int8"] = "auto",
    max_queue: int = 256,
    max_body: int = 2**20,
    request_seconds: float = 300.0,
    client_seconds: float = 30.0,
    drain_seconds: float = 30.0,
    api_key: Annotated[tuple[str, ...], UseAppendAction, arg(metavar="KEY")] = (),
    api_keys_file: Path | None = None,
) -> None:
    """Serve a model with OpenAI's API (completions, chat, models), metrics, and a page to try it on.

    SIGTERM or Ctrl-C lets running requests finish; a second one ends at once.

    Args:
        weights_dir: weights folder
        host: address to listen at; other than loopback, give keys
        port: 0 takes any free one
        name: of the model; the folder's if not given
        condition: of requests that name none, such as direct, or synth,cot; the folder's if not given
        device: cpu, cuda or mps
        dtype: to compute in
        h_cycles: rounds of the recurrence, and the most that a request may ask for; as in training if not given
        l_cycles: fast calls in each of them; as many as in training if not given
        quantize: int8 keeps the weights of the blocks in 8 bits
        max_batch: texts made together
        cache_tokens: tokens of prompts and texts to have memory for; as many as fit if not given
        kv_cache: int8 keeps keys and values in 8 bits
        max_queue: texts that may be made or wait; beyond it clients get 429 and are told when to try again
        max_body: most bytes of a request
        request_seconds: most seconds for a request
        client_seconds: most seconds for a client to send a request, or to take what it was sent
        drain_seconds: most seconds for running requests at the end
        api_key: key that clients must have; again for more. Others can see it in the list of processes, but not in
            the environment variable HRM_TEXT_API_KEYS (separated by commas) or the file
        api_keys_file: file with a key on every line
    """
    from hrm_text.infer.server.launch import introduce, listen
    from hrm_text.infer.server.launch import serve as run
    from hrm_text.infer.server.metrics import Metrics
    from hrm_text.infer.server.service import Keys, Limits, Service
    from hrm_text.infer.server.worker import EngineWorker

    limits = Limits(max_queue, request_seconds, client_seconds, drain_seconds, max_body)
    keys = Keys([*api_key, *keys_of_environment(), *keys_of_file(api_keys_file)])
    with listen(host, port) as sock:  # first: a port in use is known before anything is loaded
        from hrm_text.infer.text_model import load

        model = load(
            weights_dir,
            device=available_device(device),
            dtype=dtype,
            quantize=quantize,
            h_cycles=h_cycles,
            l_cycles=l_cycles,
        )
        engine = model.engine(max_batch=max_batch, cache_tokens=cache_tokens, kv_cache=kv_cache)
        metrics = Metrics()
        service = Service(
            name=name or weights_dir.resolve().name,
            model=model,
            worker=EngineWorker(engine, metrics, limits.max_queue),
            metrics=metrics,
            condition=condition or model.default_condition,
            limits=limits,
            keys=keys,
            host=host,
        )
        introduce(service, sock, tell, warn)
        run(service, sock, tell)


def keys_of_environment() -> list[str]:
    """The keys of HRM_TEXT_API_KEYS."""
    return [key.strip() for key in os.environ.get(KEYS_VARIABLE, "").split(",") if key.strip()]


def keys_of_file(file: Path | None) -> list[str]:
    """The keys of a file; an empty one is an error, or a server thought closed would be open."""
    if file is None:
        return []
    try:
        keys = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--api-keys-file {file}: cannot be read ({error}); expected a key on every line") from None
    if not keys:
        raise UserError(f"--api-keys-file {file}: holds no key; expected one on every line")
    return keys
