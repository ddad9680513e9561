"""The API against its own description: requests made from it, valid and not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import APIOperation, Case, GenerationMode
from schemathesis.checks import CheckFunction, load_all_checks, not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.infer.server.fake import Running, make_service, running

CHECKS: list[CheckFunction] = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]


@pytest.fixture(scope="module")
def small(tokenizer_dir: Path) -> Iterator[Running]:
    with running(make_service(tokenizer_dir, context=64)) as started:
        yield started


def statuses_of(operation: APIOperation, mode: GenerationMode) -> Counter[int]:
    """Ask one operation whatever its description allows, or does not; check every answer."""
    statuses: Counter[int] = Counter()

    @settings(
        max_examples=40 if operation.method == "post" else 3,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def ask(case: Case) -> None:
        statuses[case.call_and_validate(checks=CHECKS).status_code] += 1

    ask()
    return statuses


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=["valid", "invalid"])
def test_whatever_is_asked_the_answer_is_as_described(small: Running, mode: GenerationMode) -> None:
    load_all_checks()
    schema = schemathesis.openapi.from_url(f"{small.url}/openapi.json")
    operations: list[APIOperation] = [result.ok() for result in schema.get_all_operations()]  # type: ignore[union-attr]
    if mode is GenerationMode.NEGATIVE:
        operations = [operation for operation in operations if operation.method == "post"]  # the rest takes anything
    seen = {operation.label: statuses_of(operation, mode) for operation in operations}
    chat, text = seen["POST /v1/chat/completions"], seen["POST /v1/completions"]
    if mode is GenerationMode.POSITIVE:
        assert chat[200] and text[200], "none of them was answered"
        assert set(seen) == {
            *("GET /health", "GET /metrics", "GET /v1/models", "GET /v1/models/{name}"),
            *("POST /v1/chat/completions", "POST /v1/completions"),
        }
    else:
        assert set(chat) | set(text) <= {400, 415} and chat[400] and text[400]
    assert small.service.worker.fault is None


def test_keys_are_described_where_they_are_needed(tokenizer_dir: Path, small: Running) -> None:
    with openai.DefaultHttpxClient() as client:
        assert "security" not in client.get(f"{small.url}/openapi.json").text
        with running(make_service(tokenizer_dir, keys=["key"])) as server:
            document = client.get(f"{server.url}/openapi.json").json()
    for path, operations in document["paths"].items():
        for operation in operations.values():
            assert ("security" in operation) == (path != "/health")
