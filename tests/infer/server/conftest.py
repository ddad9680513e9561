from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from tests.infer.server.fake import Running, make_service, running


@pytest.fixture(scope="module")
def server(tokenizer_dir: Path) -> Iterator[Running]:
    """A server whose engine says the prompt back."""
    with running(make_service(tokenizer_dir)) as started:
        yield started


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
        yield made
