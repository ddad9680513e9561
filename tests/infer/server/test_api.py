"""The API as OpenAI's own client sees it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import openai
import pytest

from hrm_text.infer.server.gate import is_local_name
from tests.infer.server.fake import CONTEXT, Running, make_service, running

PROMPT = "What is 12 + 7?"
MESSAGES: list[Any] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "Say "}, {"type": "text", "text": "apple"}]},
]
SAID = "Be brief.\n\nSay apple"


def test_a_completion(server: Running, client: openai.OpenAI) -> None:
    answer = client.completions.create(model="echo", prompt=PROMPT, max_tokens=8)
    (choice,) = answer.choices
    assert (choice.text, choice.finish_reason, choice.logprobs) == (PROMPT[:8], "length", None)
    prompt_ids = server.service.model.prompt_format.prefix_ids("direct", PROMPT)
    assert server.engine.requests[-1].turns[-1].prefix_ids == tuple(prompt_ids)
    assert answer.usage is not None and answer.usage.prompt_tokens_details is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(prompt_ids), 8)
    assert answer.usage.prompt_tokens_details.cached_tokens == 1


def test_several_prompts_and_several_texts_of_each(server: Running, client: openai.OpenAI) -> None:
    answer = client.completions.create(model="echo", prompt=["alpha", "beta"], n=2, max_tokens=3, seed=5)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in answer.choices] == ["alp", "alp", "bet", "bet"]
    seeds = [request.sampling.seed for request in server.engine.requests[-4:]]
    assert len(set(seeds)) == 4
    prefixes = [request.num_prompt_tokens for request in server.engine.requests[-4:]]
    assert answer.usage is not None and answer.usage.prompt_tokens == prefixes[0] + prefixes[2]
    client.completions.create(model="echo", prompt=["alpha", "beta"], n=2, max_tokens=3, seed=5)
    assert [request.sampling.seed for request in server.engine.requests[-4:]] == seeds
    client.completions.create(model="echo", prompt=["alpha", "beta"], n=2, max_tokens=3, seed=6)
    assert not set(seeds) & {request.sampling.seed for request in server.engine.requests[-4:]}


def test_a_drawn_seed_is_told_and_draws_the_same_again(server: Running, client: openai.OpenAI) -> None:
    first = client.completions.create(model="echo", prompt=PROMPT, max_tokens=1)
    drawn = server.engine.requests[-1].sampling.seed
    client.completions.create(model="echo", prompt=PROMPT, max_tokens=1, seed=(first.model_extra or {})["seed"])
    assert server.engine.requests[-1].sampling.seed == drawn
    client.completions.create(model="echo", prompt=PROMPT, max_tokens=1)
    assert server.engine.requests[-1].sampling.seed != drawn


def test_a_streamed_completion_is_the_whole_one_in_pieces(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(client.completions.create(model="echo", prompt=PROMPT, max_tokens=20, **options))
    assert len(chunks) == 21
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == PROMPT + PROMPT[:5]
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * 19 + ["length"]
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 20
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_chat(server: Running, client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="echo", messages=MESSAGES, max_completion_tokens=len(SAID))
    assert answer.choices[0].message.content == SAID and answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "length"
    client.chat.completions.create(model="echo", messages=MESSAGES, stop=["S"])
    request = server.engine.requests[-1]
    assert request.max_new_tokens == CONTEXT - request.num_prompt_tokens, "a chat may go on to the end of the context"
    earlier: list[Any] = [*MESSAGES, {"role": "assistant", "content": "apple"}, {"role": "user", "content": "Again"}]
    client.chat.completions.create(model="echo", messages=earlier, max_tokens=1)
    turns = server.engine.requests[-1].turns
    assert turns[0].prefix_ids == request.turns[0].prefix_ids and len(turns) == 2
    assert turns[0].response_ids == tuple(server.service.model.prompt_format.response_ids("apple"))


def test_a_streamed_chat(client: openai.OpenAI) -> None:
    with client.chat.completions.create(model="echo", messages=MESSAGES, max_tokens=4, n=2, stream=True) as stream:
        chunks = list(stream)
    for index in (0, 1):
        own = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == index]
        assert own[0].delta.role == "assistant" and own[0].delta.content == ""
        assert [choice.delta.content for choice in own[1:]] == ["B", "e", " ", "b", None]
        assert [choice.finish_reason for choice in own] == [None] * 5 + ["length"]
        assert all(choice.delta.role is None for choice in own[1:])
    assert all("usage" not in chunk.model_fields_set for chunk in chunks)


@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities(client: openai.OpenAI, stream: bool) -> None:
    made: Any = client.completions.create(model="echo", prompt="apple", max_tokens=3, logprobs=2, stream=stream)
    parts = [chunk.choices[0].logprobs for chunk in (made if stream else [made])]
    assert [token for part in parts for token in part.tokens] == ["a", "p", "p"]
    assert [offset for part in parts for offset in part.text_offset] == [0, 1, 2]
    assert [value for part in parts for value in part.token_logprobs] == [-0.5] * 3
    assert [top for part in parts for top in part.top_logprobs] == [{"a": -1.0, "b": -2.0}] * 3
    chat: Any = client.chat.completions.create(
        model="echo", messages=MESSAGES, max_tokens=2, logprobs=True, top_logprobs=1, stream=stream
    )
    chosen = [chunk.choices[0].logprobs for chunk in (chat if stream else [chat])]
    tokens = [token for part in chosen if part is not None for token in part.content]
    assert [(token.token, token.bytes, token.logprob) for token in tokens] == [("B", [66], -0.5), ("e", [101], -0.5)]
    assert [[other.token for other in token.top_logprobs] for token in tokens] == [["a"], ["a"]]


def test_stop_texts_and_all_other_choices_reach_the_engine(server: Running, client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="echo",
        prompt="apple",
        stop=["l", "xyz"],
        temperature=0.5,
        top_p=0.25,
        logit_bias={"7": -3},
        extra_body={
            "condition": "synth,cot",
            "top_k": 4,
            "min_p": 0.125,
            "repetition_penalty": 1.5,
            "h_cycles": 1,
            "l_cycles": 3,
        },
    )
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("app", "stop")
    request = server.engine.requests[-1]
    assert request.stop == ("l", "xyz") and request.max_new_tokens == 256
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.5, 0.25, 4, 0.125)
    assert (sampling.repetition_penalty, sampling.logit_bias) == (1.5, {7: -3.0})
    assert (request.cycles.h_cycles, request.cycles.l_cycles) == (1, 3)
    prefix = server.service.model.prompt_format.prefix_ids("synth,cot", "apple")
    assert request.turns[0].prefix_ids == tuple(prefix)
    client.completions.create(model="echo", prompt="apple", max_tokens=1)
    assert server.engine.requests[-1].sampling.temperature == 0 and server.engine.requests[-1].cycles is None


def test_models(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert model.id == "echo" == client.models.retrieve("echo").id
    assert model.model_extra is not None
    assert model.model_extra["context"] == CONTEXT and model.model_extra["default_condition"] == "direct"
    with pytest.raises(openai.NotFoundError, match="'gpt' is not served here; 'echo' is"):
        client.models.retrieve("gpt")
    with pytest.raises(openai.NotFoundError, match="'gpt' is not served here"):
        client.completions.create(model="gpt", prompt="apple")


def test_what_cannot_run_is_an_error_of_its_own(client: openai.OpenAI) -> None:
    with pytest.raises(
        openai.BadRequestError, match=r"prompt\[1\] has \d+ tokens .* may have 4096: shorten it"
    ) as error:
        client.completions.create(model="echo", prompt=["apple", "apple " * CONTEXT])
    assert error.value.code == "context_length_exceeded" and error.value.param == "prompt"
    for stream in (False, True):  # the engine says no, and that comes before the stream begins
        with pytest.raises(openai.BadRequestError, match="too many for the cache"):
            client.completions.create(model="echo", prompt="apple", stream=stream, extra_body={"h_cycles": 9})
    with pytest.raises(openai.BadRequestError, match="unknown condition tag 'dirct'.*did you mean 'direct'"):
        client.completions.create(model="echo", prompt="apple", extra_body={"condition": "dirct"})
    with pytest.raises(openai.BadRequestError, match="the assistant's and answers nothing"):
        client.chat.completions.create(model="echo", messages=[{"role": "assistant", "content": "a"}])
    with pytest.raises(openai.BadRequestError, match="top_logprobs needs logprobs"):
        client.chat.completions.create(model="echo", messages=MESSAGES, top_logprobs=1)


def test_keys(tokenizer_dir: Path) -> None:
    with running(make_service(tokenizer_dir, keys=["one", "two"])) as server:
        for key in ("one", "two"):
            with openai.OpenAI(base_url=f"{server.url}/v1", api_key=key) as client:
                assert client.completions.create(model="echo", prompt="apple", max_tokens=1).choices[0].text == "a"
        for key in ("three", "on", "one2", "one two"):
            with openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0) as client:
                with pytest.raises(openai.AuthenticationError, match="a key is needed") as error:
                    client.completions.create(model="echo", prompt="apple")
                assert error.value.response.headers["www-authenticate"] == "Bearer"
                with pytest.raises(openai.AuthenticationError):
                    client.models.list()
        with openai.DefaultHttpxClient(base_url=server.url) as plain:
            assert plain.get("/metrics").status_code == 401
            assert plain.get("/metrics", headers={"Authorization": "bearer two"}).status_code == 200
            assert plain.get("/health").status_code == plain.get("/").status_code == 200
            assert plain.get("/health", headers={"Host": "evil.example"}).status_code == 200  # a key protects already


def test_pages_of_other_sites_are_kept_out(server: Running) -> None:
    with openai.DefaultHttpxClient(base_url=server.url) as plain:
        body = {"prompt": "apple", "max_tokens": 1}
        assert plain.post("/v1/completions", json=body).status_code == 200
        refused = plain.post("/v1/completions", json=body, headers={"Host": "evil.example:8000"})
        assert refused.status_code == 403 and "could be behind it" in refused.json()["error"]["message"]
        # A browser sends this to another site without asking it first, so it must not be read.
        text = plain.post("/v1/completions", content=b'{"prompt": "a"}', headers={"Content-Type": "text/plain"})
        assert text.status_code == 415
        asked = plain.options(
            "/v1/completions", headers={"Origin": "http://a.b", "Access-Control-Request-Method": "POST"}
        )
        assert not [name for name in asked.headers if name.startswith("access-control")]
    for host in ("localhost", "localhost:80", "LOCALHOST:8", "127.0.0.1:8000", "[::1]:8000", "10.0.0.7", "box:1"):
        assert is_local_name(host, "box")
    for host in ("", "evil.example", "localhost.evil.example:80", "127.0.0.1.evil.example", "[evil]:1", "bo:1"):
        assert not is_local_name(host, "box")


def test_the_page_runs_its_own_script_alone(server: Running) -> None:
    with openai.DefaultHttpxClient(base_url=server.url) as plain:
        page = plain.get("/")
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    assert page.text.count("<script>") == policy.count("'sha256-") - page.text.count("<style>")
    assert page.headers["content-type"] == "text/html; charset=utf-8"


def test_metrics_of_two_servers_are_their_own(tokenizer_dir: Path, server: Running) -> None:
    with running(make_service(tokenizer_dir)) as other, openai.DefaultHttpxClient() as plain:
        plain.post(f"{other.url}/v1/completions", json={"prompt": "apple", "max_tokens": 3})
        plain.get(f"{other.url}/no/such/page")
        text = plain.get(f"{other.url}/metrics").text
    assert 'hrm_text_requests_total{endpoint="/v1/completions",status="200"} 1.0' in text
    assert 'hrm_text_requests_total{endpoint="other",status="404"} 1.0' in text
    assert "hrm_text_first_token_seconds_count 1.0" in text and "hrm_text_token_seconds_count 2.0" in text
    assert "hrm_text_steps_total 3.0" in text and f"hrm_text_cache_tokens {float(CONTEXT)}" in text
