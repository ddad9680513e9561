"""The server with the engine it was made for, on a tiny model."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

from hrm_text.data.prompt import PromptFormat
from hrm_text.data.tokenizer import load_tokenizer, tokenizer_info
from hrm_text.infer.server.metrics import Metrics
from hrm_text.infer.server.service import Limits, Service
from hrm_text.infer.server.worker import EngineWorker
from hrm_text.infer.text_model import TextModel
from hrm_text.model.config import preset
from hrm_text.model.recurrence import build
from tests.infer.server.fake import Running, running

PROMPTS = ["What is 12 + 7?", "apple", "", "Grüße 🙂 aus Köln", "<|im_end|>"]


@pytest.fixture(scope="module")
def model(tokenizer_dir: Path) -> TextModel:
    prompt_format = PromptFormat(load_tokenizer(tokenizer_dir), tokenizer_info(tokenizer_dir))
    config = preset("tiny", vocab_size=prompt_format.vocab_size, max_position_embeddings=96)
    return TextModel(build(config, seed=0), prompt_format, default_condition="cot")


@pytest.fixture(scope="module")
def server(model: TextModel) -> Iterator[Running]:
    metrics = Metrics()
    worker = EngineWorker(model.engine(max_batch=4, cache_tokens=400), metrics, 64)
    limits = Limits(max_queue=64)
    with running(Service("tiny", model, worker, metrics, model.default_condition, limits)) as started:
        yield started


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_texts_are_those_of_generate(
    model: TextModel, server: Running, client: openai.OpenAI, temperature: float
) -> None:
    expected = model.generate(PROMPTS, condition="cot", max_new_tokens=24, temperature=temperature, seed=3)
    assert any(expected)
    answer = client.completions.create(model="tiny", prompt=PROMPTS, max_tokens=24, temperature=temperature, seed=3)
    assert [choice.text for choice in answer.choices] == expected
    texts = [""] * len(PROMPTS)
    for chunk in client.completions.create(
        model="tiny", prompt=PROMPTS, max_tokens=24, temperature=temperature, seed=3, stream=True, logprobs=2
    ):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == expected


def test_many_who_come_and_go_leave_nothing_behind(model: TextModel, server: Running, client: openai.OpenAI) -> None:
    def ask(number: int) -> str:
        prompt = PROMPTS[number % len(PROMPTS)]
        if number % 3:
            return client.completions.create(model="tiny", prompt=prompt, max_tokens=12).choices[0].text
        with client.completions.create(model="tiny", prompt=prompt, max_tokens=80, stream=True) as stream:
            return next(stream).choices[0].text  # and leaves

    with ThreadPoolExecutor(12) as pool:
        texts = list(pool.map(ask, range(36)))
    expected = model.generate(PROMPTS, condition="cot", max_new_tokens=12)
    assert [texts[number] for number in range(36) if number % 3] == [expected[n % 5] for n in range(36) if n % 3]
    client.completions.create(model="tiny", prompt="apple", max_tokens=1)
    status = server.service.worker.status
    assert (status.running, status.waiting) == (0, 0) and not server.service.worker._owners


def test_what_was_said_before_is_in_the_cache(client: openai.OpenAI) -> None:
    first: list[Any] = [{"role": "user", "content": "What is 12 + 7?"}]
    answer = client.chat.completions.create(model="tiny", messages=first, max_tokens=3)
    more = [*first, {"role": "assistant", "content": answer.choices[0].message.content}]
    again = client.chat.completions.create(
        model="tiny",
        messages=[*more, {"role": "user", "content": "apple"}],
        max_tokens=3,
    )
    assert again.usage is not None and again.usage.prompt_tokens_details is not None
    assert again.usage.prompt_tokens_details.cached_tokens


def test_cycles_beyond_the_cache_and_prompts_beyond_the_context_are_400s(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="module calls"):
        client.completions.create(model="tiny", prompt="apple", extra_body={"h_cycles": 40})
    fewer = client.completions.create(model="tiny", prompt="apple", max_tokens=2, extra_body={"h_cycles": 1})
    assert fewer.choices[0].finish_reason
    with pytest.raises(openai.BadRequestError, match="may have 96: shorten it"):
        client.completions.create(model="tiny", prompt="apple " * 96)
